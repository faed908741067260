"""A run with real, tiny, untrained models, published as the steps do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.config import load_config
from rlhf.config.load import parse_overrides
from rlhf.models import Snapshot, sampling_settings
from rlhf.store import RunDir, publish, tokenizer_fingerprint
from tests.unit import model_help as help_

MEAN, STD = 0.25, 2.0
NEW_TOKENS = 12


def write_policy(directory: Path, *, seed: int, template: bool = True, **sampling: Any) -> None:
    """A causal model with the tests' tokenizer; `sampling`: of generation_config.json."""
    import torch

    tokenizer = help_.tokenizer()
    model = help_.load_policy()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    Snapshot(model).write(directory, tokenizer, card="", generation=sampling or None)
    if not template:
        (directory / "chat_template.jinja").unlink()


def write_reward(directory: Path) -> None:
    model = help_.load_value(seed=5)
    model.set_statistics(MEAN, STD)
    Snapshot(model).write(directory, help_.tokenizer(), card="")


def make_run(path: Path, *, steps: tuple[int, ...] = (1, 2, 3), template: bool = True) -> RunDir:
    """SFT, reward model and PPO, each verified, with the settings that PPO samples with."""
    run = RunDir(path)
    config = load_config(
        None,
        parse_overrides(
            [f"step3.rollout.max_new_tokens={NEW_TOKENS}", "step3.rollout.stop=['##']"]
        ),
    )
    sampling = sampling_settings(config.step3.rollout)
    fingerprint = tokenizer_fingerprint(help_.tiny())
    parents: dict[str, Any] = {}
    for step, kind in ((1, "sft"), (2, "reward"), (3, "ppo")):
        if step not in steps:
            continue

        def write(directory: Path, step: int = step) -> None:
            if step == 1:
                write_policy(directory, seed=1, template=template)
            elif step == 2:
                write_reward(directory)
            else:
                write_policy(directory / "actor", seed=2, template=template, **sampling)
                write_reward(directory / "critic")

        made = publish(
            run.step_dir(step),
            write,
            kind=kind,
            step=step,
            parents=parents,
            data_fingerprint="d" * 64,
            tokenizer_fingerprint=fingerprint,
            config=config,
            metrics={"base": help_.tiny()} if step == 1 else {},
        )
        parents[kind] = {"path": str(run.step_dir(step) / "artifact"), "id": made.id}
    return run
