"""gpu_day.json as a page: what ran, what failed and why, and the figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Parts = Mapping[str, Mapping[str, Any]]
SIZES = ("135m", "1.3b")


def page(day: Mapping[str, Any]) -> str:
    """Markdown; a figure that was not measured is absent."""
    parts: Parts = day["parts"]
    made = [
        "# A day on a GPU",
        "",
        f"{day['date']}, `{day['command']}`, {day['seconds']:.0f} s."
        + (" Small sizes: the figures mean nothing." if day["small"] else ""),
        "",
        *_machine(parts.get("machine", {})),
        *_states(parts),
        *_failures(parts),
        *_default(parts.get("default", {})),
        *_speed(parts),
        *_phases(parts),
        *_decode(parts),
        *_memory(parts),
    ]
    return "\n".join(made) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table, and an empty one; nothing where there are no rows."""
    if not rows:
        return []
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def _machine(found: Mapping[str, Any]) -> list[str]:
    if "versions" not in found:
        return []
    versions = ", ".join(f"{name} {v}" for name, v in found["versions"].items() if v)
    hardware = f"{found.get('smi', 'no GPU')}; {found['cores']} cores"
    lines = [f"{hardware}; Python {found['python']}; {versions}."]
    if "bf16_flops_per_second" in found:
        lines += [
            f"Ceilings: a copy moves {found['copy_bytes_per_second'] / 1e12:.2f} TB/s, "
            f"a bf16 matrix product runs at {found['bf16_flops_per_second'] / 1e12:.0f} TFLOP/s."
        ]
    return [*lines, ""]


def _states(parts: Parts) -> list[str]:
    rows = []
    for name, found in parts.items():
        tests = ""
        if "passed" in found:
            tests = (
                f"{found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped"
            )
        what = tests or found.get("why", "")
        rows.append([name, found["state"], found.get("part_seconds", ""), what])
    return ["## Parts", "", *table(["part", "", "seconds", ""], rows)]


def _failures(parts: Parts) -> list[str]:
    """Every test, part and figure that failed, with what it said."""
    said: list[tuple[str, str]] = []
    for name, found in parts.items():
        if isinstance(found.get("failed"), str):
            said.append((name, found["failed"]))
        for test, text in found.get("failures", ()):
            said.append((test, text))
        for case in found.get("cases", ()):
            if "failed" in case:
                said.append((f"{name}, {case['case']}", case["failed"]))
        for key, value in found.items():
            if isinstance(value, Mapping) and isinstance(value.get("failed"), str):
                said.append((f"{name}, {key}", value["failed"]))
    if not said:
        return ["Nothing failed.", ""]
    lines = ["## What failed", ""]
    for name, text in said:
        last = "\n".join(text.strip().splitlines()[-12:])
        lines += [f"**{name}**", "", "```", last, "```", ""]
    return lines


def _default(found: Mapping[str, Any]) -> list[str]:
    if "exit_code" not in found:
        return []
    ended = f"`{found['command']}`: exit code {found['exit_code']}, {found['seconds']} s."
    lines = ["## The embedded default", "", ended, ""]
    if "report" in found:
        lines += ["```", found["report"].split("\n\n")[0].strip(), "```", ""]
    phases = {
        kind: found[kind]["seconds_by_phase"]
        for kind in ("sft", "reward", "ppo")
        if isinstance(found.get(kind), Mapping) and "seconds_by_phase" in found[kind]
    }
    rows = [[k, ", ".join(f"{p} {s:.1f}" for p, s in v.items())] for k, v in phases.items()]
    return lines + table(["step", "seconds by phase"], rows)


def _speed(parts: Parts) -> list[str]:
    rows = []
    for kind in ("sft", "ppo"):
        for size in SIZES:
            ours, theirs = parts.get(f"{kind}-{size}", {}), parts.get(f"{kind}-{size}-trl", {})
            if "per_second" not in ours and "per_second" not in theirs:
                continue
            both = "per_second" in ours and "per_second" in theirs
            ratio = f"{ours['per_second'] / theirs['per_second']:.2f}" if both else ""
            unit = ours.get("unit") or theirs["unit"]
            sides = (ours, theirs)
            speeds, peaks = map(_per_second, sides), (_gb(x.get("peak_allocated")) for x in sides)
            rows.append([f"{kind} {size}, {unit}/s", *speeds, ratio, *peaks])
    head = ["work", "ours", "trl", "ours / trl", "our peak, GB", "trl's peak, GB"]
    return ["## Speed", "", *table(head, rows)] if rows else []


def _per_second(found: Mapping[str, Any]) -> str:
    if "per_second" not in found:
        return found.get("state", "")
    runs = found["seconds"]
    spread = (max(runs) - min(runs)) / sorted(runs)[len(runs) // 2]
    return f"{found['per_second']:.4g} ({len(runs)} runs, {spread:.0%} apart)"


def _phases(parts: Parts) -> Iterator[str]:
    for size in SIZES:
        found = parts.get(f"ppo-{size}", {})
        profile = found.get("profile", {})
        if "phases" not in found:
            continue
        yield from (f"## A PPO iteration by phase, {size}", "")
        rows = []
        for phase, seconds in found["phases"].items():
            kernels = profile.get("phases", {}).get(phase, {}).get("kernels")
            rows.append([phase, f"{seconds:.3f}", f"{kernels:.3f}" if kernels is not None else ""])
        yield from table(["phase", "seconds", "of these, kernels run (profiled)"], rows)
        most = [[name, count, f"{s * 1e3:.1f}"] for name, count, s in profile.get("most", ())]
        yield from table(["kernel", "launches", "ms"], most)


def _decode(parts: Parts) -> Iterator[str]:
    bandwidth = parts.get("machine", {}).get("copy_bytes_per_second")
    for size in SIZES:
        found = parts.get(f"decode-{size}", {})
        rows = []
        for name, figures in found.get("engines", {}).items():
            step = figures["seconds_per_step"]
            share = found["weight_bytes"] / bandwidth / step if bandwidth else None
            rows.append([name, f"{figures['tokens_per_second']:.0f}", f"{step * 1e3:.2f}",
                         f"{share:.0%}" if share is not None else ""])  # fmt: skip
        if rows:
            yield from (f"## Decoding, {size}: {found['rows']} rows, {found['answer']} tokens", "")
            yield from table(
                ["engine", "tokens/s", "ms a step", "of the memory's rate (weights alone)"], rows
            )


def _memory(parts: Parts) -> list[str]:
    cases = parts.get("memory", {}).get("cases", ())
    rows = [
        [case["case"], case["planned_mb"], case["allocated_mb"], case["reserved_mb"],
         f"{case['error']:+.1%}", case["at"]]
        for case in cases
        if "failed" not in case
    ]  # fmt: skip
    for size in SIZES:
        found = parts.get(f"ppo-{size}", {})
        plan, peak = found.get("planned", {}), found.get("peak_allocated")
        if peak and "peak" in plan:
            rows.append([f"ppo {size}", round(plan["peak"] / 1e6), round(peak / 1e6),
                         round(found["peak_reserved"] / 1e6), f"{plan['peak'] / peak - 1:+.1%}",
                         plan["at"]])  # fmt: skip
    head = [
        "case",
        "planned, MB",
        "allocated, MB",
        "reserved, MB",
        "error",
        "worst moment, planned",
    ]
    return ["## Peak memory against the plan", "", *table(head, rows)] if rows else []


def _gb(value: float | None) -> str:
    return "" if value is None else f"{value / 1e9:.1f}"
