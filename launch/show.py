"""`rlhf show RUN`: what ran, where it stands, its curves, time, memory and verdict. No torch."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.curves import BLOCKS, PLAIN, Curve, curves, sparkline, thinned
from launch.options import Parser, normalize_flags
from launch.runs import (
    FINISHED,
    GOING_ON,
    OUTPUT,
    StepState,
    find_run,
    goes_on,
    is_run,
    records,
    states,
    working,
)
from rlhf.config.trees import flatten
from rlhf.errors import ArtifactError, RequirementError
from rlhf.redact import printable, redact, redact_tree
from rlhf.stages import Stage, get
from rlhf.store import RunDir, find_evaluation, jsonable, read_json
from rlhf.track.metrics import read_metrics

_PHASES, _PEAKS = "seconds_", "peak_memory_bytes_"
_WIDTH = 24
_SUMS = ("seconds_iteration",)  # the sum of the phases


def main(argv: Sequence[str]) -> int:
    """0. Raises ConfigError, RequirementError."""
    flags = parser().parse_args(normalize_flags(argv))
    if flags.run is None:
        runs = sorted(path for path in Path(OUTPUT).glob("*") if is_run(path))
        if flags.json:
            print(json.dumps([standing(RunDir(path.absolute())) for path in runs], indent=2))
        else:
            print("\n".join(map(overview, runs)) or f"no runs in {Path(OUTPUT).absolute()}")
        return 0
    place = pooled(flags.run)
    if place is not None:
        name = "verdict.json" if flags.json else "verdict.txt"
        print(printable((place / name).read_text(encoding="utf-8")).strip("\n"))
        return 0
    found = report(find_run(flags.run, "show"))
    if flags.json:
        print(json.dumps(redact_tree(jsonable(found)), indent=2))
    else:
        blocks = BLOCKS if _shows(BLOCKS) else PLAIN
        print(printable(redact("\n".join(describe(found, blocks, every=flags.all)))))
    return 0


def parser() -> Parser:
    """The flags with their help."""
    made = Parser(
        prog="rlhf show",
        allow_abbrev=False,
        description="What a run did and where it stands: finished, going on, stopped or died, and "
        "the command that goes on; curves from metrics.jsonl, time and memory by phase, verdict. "
        "Changes nothing, and may be asked while the run is going on.",
    )
    made.add_argument(
        "run", nargs="?", metavar="RUN",
        help="the run's directory, or its name below output/; without it: all runs there",
    )  # fmt: skip
    made.add_argument("--all", action="store_true", help="every curve of metrics.jsonl")
    made.add_argument("--json", action="store_true", help="everything for machines")
    return made


def pooled(given: str) -> Path | None:
    """The directory of a verdict over several seeds, if that is what is given."""
    for path in (Path(given).expanduser(), Path(OUTPUT) / given):
        if (path / "verdict.json").is_file() and (path / "verdict.txt").is_file():
            return path if not is_run(path) and path.name != "evaluation" else None
    return None


def standing(run: RunDir) -> dict[str, Any]:
    """Where a run stands, in JSON's types."""
    return {
        "name": run.path.name,
        "path": str(run.path),
        "goes_on_with": goes_on(run),
        "steps": [
            {"step": one.stage.number, "stage": one.stage.name, "state": one.state}
            for one in states(run)
        ],
    }


def overview(path: Path) -> str:
    """A run in a line."""
    told = [f"{one.stage.title} {one.state}" for one in states(RunDir(path.absolute()))]
    return printable(redact(f"{path.name:24} {', '.join(told) or 'nothing yet'}"))


def report(run: RunDir) -> dict[str, Any]:
    """All that is shown. Curves have at most 500 points each; `points` counts all."""
    told = records(run)
    found: dict[str, Any] = {
        **standing(run),
        "asked": told.get("asked"),
        "started": told.get("started"),
        "recipe": told.get("recipe"),
        "from": told.get("from"),
        "world_size": told.get("world_size"),
        "versions": told.get("versions"),
        "steps": [step_report(run, state) for state in states(run)],
    }
    return found | _evaluation(run)


def _evaluation(run: RunDir) -> dict[str, Any]:
    """`verdict`, or `no_verdict`: why there is none."""
    if not run.artifact("ppo").is_dir():
        return {"verdict": None, "no_verdict": "step 3 has published nothing"}
    try:
        found, why = find_evaluation(run)
    except ArtifactError as error:
        return {"verdict": None, "no_verdict": str(error)}
    path = run.artifact("evaluation") / "verdict.json"
    if found is None or not path.is_file():
        why = f"{why}; something works in the run now" if why and working(run) else why
        return {"verdict": None, "no_verdict": why or "nothing was held out"}
    verdict = dict(read_json(path))
    return {"verdict": {key: value for key, value in verdict.items() if key != "samples"}}


def step_report(run: RunDir, state: StepState) -> dict[str, Any]:
    """One step: state, figures, curves, seconds and peak bytes by phase."""
    manifest, stage = state.manifest, state.stage
    found: dict[str, Any] = {
        "step": stage.number,
        "stage": stage.name,
        "name": stage.title,
        "state": state.state,
        "why": state.why,
        "saved": state.saved or None,
        "artifact": None,
        "seconds_by_phase": {},
    }
    if manifest is not None:
        found["artifact"] = {"id": manifest.id, "created": manifest.created}
        if state.state == FINISHED:
            found["seconds_by_phase"] = dict(manifest.metrics.get("seconds_by_phase", {}))
    try:
        rows = read_metrics(run.metrics(stage))
        found["curves"] = _as_json(curves(rows))
    except (RequirementError, OSError, KeyError, TypeError, ValueError) as error:
        return found | {"curves": {}, "unreadable": str(error)}
    found |= _costs(curves(rows))
    if rows:
        found["position"] = int(rows[-1]["step"])
        found["last_logged"] = float(rows[-1]["time"])
    if stage.generates:
        found["iterations"] = _iterations(run, stage, manifest.config if manifest else None)
    return found


def _as_json(found: Mapping[str, Curve]) -> dict[str, Any]:
    return {
        name: {
            "points": len(curve),
            "first": curve[0][1],
            "last": curve[-1][1],
            "lowest": min(value for _, value in curve),
            "highest": max(value for _, value in curve),
            "steps": [step for step, _ in thinned(curve)],
            "values": [value for _, value in thinned(curve)],
        }
        for name, curve in found.items()
    }


def _costs(found: Mapping[str, Curve]) -> dict[str, Any]:
    """Seconds (summed) and peak bytes of the phases of an iteration, where they are logged."""
    seconds = {
        name.removeprefix(_PHASES): sum(value for _, value in curve)
        for name, curve in found.items()
        if name.startswith(_PHASES) and name not in _SUMS
    }
    peaks = {
        name.removeprefix(_PEAKS): max(value for _, value in curve)
        for name, curve in found.items()
        if name.startswith(_PEAKS)
    }
    whole = found.get("peak_memory_bytes")
    each = found.get("seconds_iteration")
    return {
        "iteration_seconds_by_phase": seconds,
        "peak_bytes_by_phase": peaks,
        "peak_bytes": max(value for _, value in whole) if whole else None,
        "seconds_an_iteration": sum(v for _, v in each) / len(each) if each else None,
    }


def _iterations(run: RunDir, stage: Stage, config: Mapping[str, Any] | None) -> int | None:
    """How many iterations a stage makes, as its processes were told."""
    with contextlib.suppress(RequirementError, OSError, ValueError, KeyError, TypeError):
        config = dict(read_json(run.resolved(stage)))["config"]
    value = flatten(config or {}).get(f"{stage.section}.iterations")
    return int(value) if isinstance(value, int) else None


def describe(found: Mapping[str, Any], blocks: str, *, every: bool = False) -> list[str]:
    """The report for a person, in at most 100 columns but for paths and commands."""
    lines = [f"run      {found['name']}: {found['path']}"]
    if found["goes_on_with"]:
        lines.append(f"asked    {found['goes_on_with']}")
    if found["started"]:
        lines.append(f"started  {found['started']}, {found['world_size']} process(es)")
    if found["from"]:
        lines.append(f"from     {found['from']}")
    lines += _verdict_lines(found)
    for step in found["steps"]:
        lines += ["", *_step_lines(step, blocks, every)]
    return [*lines, "", *_next(found)]


def _verdict_lines(found: Mapping[str, Any]) -> list[str]:
    verdict = found["verdict"]
    if verdict is None:
        return [f"verdict  none: {found['no_verdict']}"]
    try:
        reward = verdict["comparisons"]["ppo"]["reward"]
        text = f"reward {reward['before']:.3f} (SFT) -> {reward['after']:.3f} (PPO)"
        if "low" in reward:
            text += f", 95% interval of the change {reward['low']:+.3f} to {reward['high']:+.3f}"
        rule = verdict["decisions"]["ppo"]["rule"]
        return [f"verdict  {verdict['outcome'].upper()}: {rule}", f"         {text}"]
    except (KeyError, TypeError):
        return [f"verdict  {verdict.get('outcome', 'in a form that is not known')}"]


def _step_lines(step: Mapping[str, Any], blocks: str, every: bool) -> list[str]:
    name = f"step {step['step']}   {step['name']}: {step['state']}"
    if step["why"]:
        name += f": {step['why']}"
    lines = [name + _details(step)]
    if "unreadable" in step:
        lines.append(f"         {step['unreadable']}")
    shown = get(step["stage"]).curves
    if every:
        shown = tuple((name, name) for name in step["curves"])
    there = [(step["curves"][name], label) for name, label in shown if name in step["curves"]]
    width = max([len(label) for _, label in there], default=0)
    for curve, label in there:
        line = sparkline(curve["values"], _WIDTH, blocks)
        ends = f"{curve['last']:.4g}"
        ends = f"{curve['first']:.4g} -> {ends}" if curve["points"] > 1 else ends
        lines.append(f"         {label:{width}}  {line:{_WIDTH}}  {ends}")
    return lines + _cost_lines(step)


def _details(step: Mapping[str, Any]) -> str:
    if step["state"] == FINISHED and step["artifact"]:
        return f", artifact {step['artifact']['id'][:12]}, made {step['artifact']['created']}"
    parts = []
    if "position" in step:
        of = f" of {step['iterations']}" if step.get("iterations") else ""
        parts.append(f"logged up to {step['position']}{of}")
    if step["state"] == GOING_ON and "last_logged" in step:
        parts.append(f"{duration(max(time.time() - step['last_logged'], 0.0))} ago")
        if left := _left(step):
            parts.append(f"about {duration(left)} left")
    elif step["saved"]:
        parts.append(f"saved at {step['saved']}")
    return f", {', '.join(parts)}" if parts else ""


def _left(step: Mapping[str, Any]) -> float | None:
    """Seconds that the iterations which are left will take, at the pace so far."""
    if not step.get("iterations") or not step.get("seconds_an_iteration"):
        return None
    return (step["iterations"] - step["position"]) * step["seconds_an_iteration"]


def _cost_lines(step: Mapping[str, Any]) -> list[str]:
    lines = []
    if phases := step["seconds_by_phase"]:
        told = (f"{name} {duration(float(seconds))}" for name, seconds in phases.items())
        lines.append(f"         time    {', '.join(told)}")
    if phases := step.get("iteration_seconds_by_phase"):
        total = sum(phases.values()) or 1.0
        told = (f"{name} {seconds / total:.0%}" for name, seconds in phases.items())
        each = step["seconds_an_iteration"]
        pace = f", {each:.2f} s each" if each else ""
        lines.append(f"         iterations  {', '.join(told)}{pace}")
    if step.get("peak_bytes"):
        told = (f"{name} {size(b)}" for name, b in step["peak_bytes_by_phase"].items())
        phases_told = f" ({', '.join(told)})" if step["peak_bytes_by_phase"] else ""
        lines.append(f"         memory  {size(step['peak_bytes'])} at most, a process{phases_told}")
    return lines


def _next(found: Mapping[str, Any]) -> list[str]:
    place = shlex.quote(found["name"] if _is_by_name(found) else found["path"])
    if found["steps"] and all(step["state"] == FINISHED for step in found["steps"]):
        if found["verdict"] is None and any(
            get(step["stage"]).evaluates for step in found["steps"]
        ):
            return [f"next     rlhf evaluate {place}"]
        return [f"next     rlhf chat {place}"]
    if any(step["state"] == GOING_ON for step in found["steps"]):
        return [f"next     it is going on; look again: rlhf show {place}"]
    command = found["goes_on_with"] or "python train.py with the flags that it was started with"
    return [f"next     goes on with: {command}"]


def _is_by_name(found: Mapping[str, Any]) -> bool:
    return Path(OUTPUT).absolute() / found["name"] == Path(found["path"])


def duration(seconds: float) -> str:
    """`0.4 s`, `42 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """Bytes in GB or MB, of thousands."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _shows(text: str) -> bool:
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
