"""`rlhf compare RUN RUN...`: settings that differ, figures side by side, and what can be told
apart. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch.options import Parser, normalize_flags
from launch.show import duration, report, size
from launch.sides import Pairing, Side, differing, pair, sides
from rlhf.errors import ConfigError
from rlhf.evaluation.compare import Comparison
from rlhf.redact import printable, redact, redact_tree
from rlhf.stages import PPO, REWARD, SFT, Stage, get
from rlhf.store import jsonable

Figure = tuple[str, Callable[[Mapping[str, Any]], str | None]]
# figure -> (its name, digits after the point), in the order of the table
_COMPARED = {
    "reward": ("reward", 3),
    "reward_within_lengths": ("  at equal length", 3),
    "judge": ("judge", 3),
    "kl": ("KL, nats an answer", 3),
    "eos_fraction": ("answers that end", 3),
    "length": ("length, tokens", 1),
    "distinct_2": ("distinct-2", 3),
}
_OF_POLICY = (
    ("reward", "reward of PPO", 3),
    ("kl", "KL, nats an answer", 2),
    ("kl_per_token", "KL, nats a token", 3),
    ("judge", "judge", 3),
    ("judge_good", "fully good", 3),
    ("length", "length, tokens", 1),
    ("eos_fraction", "answers that end", 3),
    ("distinct_2", "distinct-2", 3),
)


def main(argv: Sequence[str]) -> int:
    """0. Raises ConfigError, RequirementError."""
    flags = parser().parse_args(normalize_flags(argv))
    if len(flags.runs) < 2:
        raise ConfigError(f"rlhf compare {flags.runs[0]}: give two runs or more")
    found = sides(flags.runs)
    pairs = [pair(found[0], other) for other in found[1:]]
    if flags.json:
        print(json.dumps(redact_tree(jsonable(as_json(found, pairs))), indent=2))
    else:
        print(printable(redact("\n".join(describe(found, pairs)))))
    return 0


def parser() -> Parser:
    """The flags with their help."""
    made = Parser(
        prog="rlhf compare",
        allow_abbrev=False,
        description="Settings that differ between runs, their figures side by side, and each run "
        "against the first one: changes with 95% intervals over the held-out prompts that both "
        "answered. What does not mean the same in both (rewards of different reward models, KL "
        "from different SFT models) is not compared, and that is said.",
    )
    made.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's directory, or its name below output/"
    )
    made.add_argument("--json", action="store_true", help="everything for machines")
    return made


def as_json(found: Sequence[Side], pairs: Sequence[Pairing]) -> dict[str, Any]:
    """Settings (name -> a value for each run), figures of each run, and the comparisons."""
    differ, incomplete = differing(found)
    return {
        "runs": [
            {
                "name": one.name,
                "path": str(one.run.path),
                "artifacts": {
                    str(stage.number): manifest.id for stage, manifest in one.manifests.items()
                },
                "models": one.verdict["models"] if one.verdict else None,
                "outcome": one.verdict["outcome"] if one.verdict else None,
                "missing": one.missing,
                "figures": {
                    label: values[number]
                    for label, *values in side_by_side(found)
                    if values[number] is not None
                },
            }
            for number, one in enumerate(found)
        ],
        "settings": differ,
        "steps_without_settings": [stage.number for stage in incomplete],
        "same_models": same_models(found),
        "comparisons": [
            {
                "before": one.before,
                "after": one.after,
                "prompts": one.prompts,
                "figures": {name: figure.as_json() for name, figure in one.figures.items()},
                "not_compared": one.left_out,
            }
            for one in pairs
        ],
    }


def same_models(found: Sequence[Side]) -> dict[str, bool | None]:
    """Were the policies trained from one SFT model, with one reward model? None: not known."""
    told: dict[str, bool | None] = {}
    for role in (need.kind for need in PPO.needs):
        made = [one.made_from(role) for one in found]
        told[role] = None if None in made else len(set(made)) == 1
    return told


def describe(found: Sequence[Side], pairs: Sequence[Pairing]) -> list[str]:
    """The comparison for a person."""
    names = [one.name for one in found]
    differ, incomplete = differing(found)
    lines = ["settings that differ" if differ else "settings: none differs"]
    if differ:
        rows = [[name, *map(_value, values)] for name, values in differ.items()]
        lines += table([["", *names], *rows])
    for stage in incomplete:
        lines.append(f"  {stage}: not every run has settings of it, so they are not compared")
    for role, same in same_models(found).items():
        if same is not None:
            name = "SFT" if role == "sft" else role
            lines.append(f"  {name} model: {'the same' if same else 'different ones'}")
    figures = [[str(value or "") for value in row] for row in side_by_side(found)]
    if figures:
        lines += ["", "figures", *table([["", *names], *figures])]
    for one in found:
        lines += [f"  {text}" for text in one.missing]
    for paired in pairs:
        lines += ["", *_pairing_lines(paired)]
    return lines


def _pairing_lines(one: Pairing) -> list[str]:
    lines = [f"{one.after} against {one.before}"]
    if one.figures:
        lines[0] += (
            f", on {one.prompts} prompts that both answered; intervals are 95%, over prompts"
        )
        head = ["", one.before, one.after, "change", "95% interval", ""]
        rows = [
            _compared(label, digits, one.figures[name], name)
            for name, (label, digits) in _COMPARED.items()
            if name in one.figures
        ]
        lines += table([head, *rows])
    for name, reason in one.left_out.items():
        label = _COMPARED[name][0].strip() if name in _COMPARED else name
        lines.append(f"  {label}: not compared: {reason}")
    if one.figures:
        lines.append("  They say nothing of other seeds: python train.py --seeds asks that.")
    return lines


def _compared(label: str, digits: int, figure: Comparison, name: str) -> list[str]:
    change = f"+.{digits}f" if name != "distinct_2" else "+.0%"
    ends = "none"
    if figure.low is not None and figure.high is not None:
        ends = f"{figure.low:{change}} to {figure.high:{change}}"
    both = [f"{figure.before:.{digits}f}", f"{figure.after:.{digits}f}"]
    if name == "reward_within_lengths":  # a rise, not a figure of either policy
        both = ["", ""]
    return [label, *both, f"{figure.change:{change}}", ends, figure.outcome]


def side_by_side(found: Sequence[Side]) -> list[list[str | None]]:
    """[name, a text for each run or None] of every figure that one of them has."""
    reports = [{"verdict": one.verdict, **_run_figures(one)} for one in found]
    rows: list[list[str | None]] = []
    for label, figure in FIGURES:
        values = [figure(one) for one in reports]
        if any(value is not None for value in values):
            rows.append([label, *values])
    return rows


def _run_figures(one: Side) -> dict[str, Any]:
    stages = {get(found["stage"]): found for found in report(one.run)["steps"]}
    return {"steps": stages, "metrics": {k: m.metrics for k, m in one.manifests.items()}}


def _metric(stage: Stage, name: str) -> Callable[[Mapping[str, Any]], str | None]:
    def figure(one: Mapping[str, Any]) -> str | None:
        value = one["metrics"].get(stage, {}).get(name)
        return f"{value:.4g}" if isinstance(value, (int, float)) else None

    return figure


def _policy(
    name: str, digits: int, model: str = "ppo"
) -> Callable[[Mapping[str, Any]], str | None]:
    def figure(one: Mapping[str, Any]) -> str | None:
        models = one["verdict"]["models"] if one["verdict"] else {}
        value = models.get(model, {}).get(name)
        if value is None:
            return None
        ends = [models[model].get(f"{name}_{end}") for end in ("low", "high")]
        half = f" +- {(ends[1] - ends[0]) / 2:.{digits}f}" if None not in ends else ""
        return f"{value:.{digits}f}{half}"

    return figure


def _step(stage: Stage, name: str, say: Callable[[float], str]) -> Callable[..., str | None]:
    def figure(one: Mapping[str, Any]) -> str | None:
        value = one["steps"].get(stage, {}).get(name)
        return None if value is None else say(value)

    return figure


def _training(one: Mapping[str, Any]) -> str | None:
    seconds = [step["seconds_by_phase"].get("train") for step in one["steps"].values()]
    known = [float(value) for value in seconds if value is not None]
    return duration(sum(known)) if known else None


FIGURES: tuple[Figure, ...] = (
    ("verdict", lambda one: one["verdict"]["outcome"] if one["verdict"] else None),
    ("perplexity of SFT, held out", _metric(SFT, "perplexity")),
    ("accuracy of reward model", _metric(REWARD, "accuracy")),
    ("reward of SFT", _policy("reward", 3, "sft")),
    *((label, _policy(name, digits)) for name, label, digits in _OF_POLICY),
    ("iterations", _step(PPO, "position", str)),
    ("an iteration", _step(PPO, "seconds_an_iteration", lambda value: f"{value:.2f} s")),
    ("training, its own steps", _training),
    ("memory of PPO, a process", _step(PPO, "peak_bytes", size)),
)


def _value(value: Any) -> str:
    if value is None:
        return "unset"
    return value if isinstance(value, str) else json.dumps(value)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns, indented."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
