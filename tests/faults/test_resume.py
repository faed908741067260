"""A step that was cut off goes on from its checkpoint, and ends as if nothing had happened."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf import resume
from rlhf.config.schema import RunConfig
from rlhf.engine.checkpoint import SafeCheckpointEngine, random_state, set_random_state
from rlhf.errors import ArtifactError, ConfigError, Diverged, RequirementError
from rlhf.harness import Stopped
from rlhf.store import checkpoints, verify
from rlhf.track import read_metrics
from tests.soak import digests, figures
from tests.unit import model_help as help_
from tests.unit.test_launch_supervise import wait_for
from tests.unit.test_steps_main import config, root, step

__all__ = ["root"]  # a fixture
FOLDERS = {1: "step1_sft", 2: "step2_reward", 3: "step3_ppo"}
LORA = {"rank": 2, "dropout": 0.3}
EVERYTHING = {
    "actor": {"model": {"lora": LORA}},
    "critic": {"model": {"lora": LORA}},
    "rollout": {"engine": "hybrid", "temperature": 0.7, "samples_per_prompt": 2},
    "iterations": 5,
    "ppo": {
        "ema_decay": 0.5, "ptx_coef": 0.1, "critic_warmup": 1, "kl_target": 1.0,
        "kl_horizon": 100.0, "minibatches": 2, "max_kl": 1000.0,
    },
}  # fmt: skip
CASES: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"step1": {"model": {"lora": LORA}, "train": {"max_steps": 5, "eval_every": 2}}}),
    (1, {"step1": {"engine": {"zero_stage": 2}, "model": {"dtype": "bfloat16"}}}),
    (1, {"step1": {"train": {"epochs": 3, "batch_size": 12, "max_steps": None}}}),
    (2, {}),
    (2, {"step2": {"engine": {"zero_stage": 3}}}),
    (3, {"step3": {"iterations": 3}}),
    (3, {"step3": EVERYTHING}),
    (3, {"step3": {"actor": {"engine": {"zero_stage": 3}}, "iterations": 3}}),
]


class Cut(BaseException):
    """Stands for a SIGKILL: nothing of the step's own handling runs."""


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    help_.world_of_one(monkeypatch)


def saving(root: Path, changes: dict[str, Any] | None = None, **how: Any) -> RunConfig:
    return config(root, **{"checkpoint": {"save_every": 1, **how}, **(changes or {})})


def cut_off(
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    number: int,
    settings: RunConfig,
    run: Path,
    root: Path,
) -> None:
    """Runs the step and ends it right after position `at` was saved."""
    after = resume.Keeper.after

    def then_cut(self: Any, position: int, *args: Any, **named: Any) -> None:
        after(self, position, *args, **named)
        if position == at:
            self._wait()
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(resume.Keeper, "after", then_cut)
        with pytest.raises(Cut):
            step(number, settings, root / "run", run)


@pytest.mark.parametrize(("number", "changes"), CASES)
def test_it_ends_as_if_nothing_had_happened(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    changes: dict[str, Any],
) -> None:
    """Weights, figures and verdict, to the last bit; cut off at the first and at a later save."""
    folder = FOLDERS[number]
    step(number, config(root, **changes), root / "run", tmp_path / "whole")
    settings = saving(root, changes)
    last = len(checkpointed(tmp_path / "whole" / folder))
    for at in sorted({1, last - 1}):
        torch.manual_seed(99 + at)  # what the restored state must replace
        cut_off(monkeypatch, at, number, settings, tmp_path / "cut", root)
    run = step(number, settings, root / "run", tmp_path / "cut")
    assert digests(tmp_path / "cut" / folder) == digests(tmp_path / "whole" / folder)
    assert figures(tmp_path / "cut" / folder) == figures(tmp_path / "whole" / folder)
    assert published(tmp_path / "cut" / folder) == published(tmp_path / "whole" / folder)
    assert number == 3 or "loss_before" in published(tmp_path / "cut" / folder)
    assert not run.directory.resume(number).exists(), "a finished step keeps no checkpoints"
    seconds = [row["seconds"] for row in read_metrics(tmp_path / "cut" / folder / "metrics.jsonl")]
    assert seconds == sorted(seconds), "the clock goes on"


def published(step_dir: Path) -> dict[str, Any]:
    """The manifest's figures, those from before training too; but for those of a clock."""
    metrics = verify(step_dir / "artifact").metrics
    return {name: value for name, value in metrics.items() if name != "seconds_by_phase"}


def rates(step_dir: Path) -> list[float]:
    rows = read_metrics(step_dir / "metrics.jsonl")
    return [row["train/learning_rate"] for row in rows if "train/learning_rate" in row]


def checkpointed(step_dir: Path) -> list[int]:
    rows = read_metrics(step_dir / "metrics.jsonl")
    return sorted({row["step"] for row in rows} - {0})  # 0: measured before training


@pytest.fixture
def cut(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Step 1, cut off after two of three optimiser steps."""
    cut_off(monkeypatch, 2, 1, saving(root), tmp_path, root)
    return tmp_path


def resumed(run: Path) -> Path:
    return run / "step1_sft" / "resume"


def test_what_a_checkpoint_says(cut: Path) -> None:
    """keep_last 2; figures that were logged after the last one are cut off."""
    assert [path.name for path in checkpoints.checkpoints(resumed(cut))] == [
        "step-00000001",
        "step-00000002",
    ]
    record = checkpoints.verify_checkpoint(resumed(cut) / "step-00000002")
    assert (record.position, record.world_size, record.step) == (2, 1, 1)
    assert record.engines["model"].zero_stage == 0
    assert record.settings["step1.optim.learning_rate"] == 1e-3
    assert "step1.train.micro_batch_size" not in record.settings
    assert record.metrics_bytes == (cut / "step1_sft" / "metrics.jsonl").stat().st_size


def test_a_damaged_checkpoint_is_passed_over(
    root: Path, cut: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one before it serves, and the damaged one is named; without any: from the beginning."""
    for path in sorted(resumed(cut).glob("*/rank0.pt"))[-1:]:
        path.write_bytes(path.read_bytes()[:-1])
    step(1, saving(root), root / "run", cut)
    out = capsys.readouterr().out
    assert "passed over a checkpoint" in out
    assert "step-00000002: 'rank0.pt' has another size" in out
    assert "going on from step-00000001" in out


def test_without_a_whole_checkpoint_it_starts_again(
    root: Path, cut: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in resumed(cut).glob("*/CHECKPOINT.json"):
        path.unlink()
    step(1, saving(root), root / "run", cut)
    out = capsys.readouterr().out
    assert out.count("it was never finished") == 2
    assert "going on from" not in out
    assert list((cut / "step1_sft").glob("metrics.*.jsonl")), "the earlier figures are kept apart"


def test_other_settings_are_refused_unless_asked_for(
    root: Path, cut: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {"step1": {"optim": {"learning_rate": 5e-4}}}
    with pytest.raises(ConfigError, match=r"learning_rate 0.001 -> 0.0005.*--resume always"):
        step(1, saving(root, changed), root / "run", cut)
    step(1, saving(root, {"step1": {"train": {"micro_batch_size": 4}}}), root / "run", cut)
    assert "going on from step-00000002" in capsys.readouterr().out


def test_always_goes_on_with_other_settings(
    root: Path, cut: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {"step1": {"optim": {"learning_rate": 5e-4}}}
    step(1, saving(root, changed, resume="always"), root / "run", cut)
    assert "going on from step-00000002" in capsys.readouterr().out
    before, after = (rates(cut / "step1_sft")[at] for at in (1, 2))
    schedule = [0.5 * (1 + math.cos(math.pi * done / 3)) for done in (1, 2)]
    assert [before, after] == pytest.approx([1e-3 * schedule[0], 5e-4 * schedule[1]])


def test_always_needs_a_checkpoint(root: Path, tmp_path: Path) -> None:
    with pytest.raises(RequirementError, match=r"--resume always: .* has no whole checkpoint"):
        step(1, saving(root, resume="always"), root / "run", tmp_path)


def test_never_starts_again(root: Path, cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step(1, saving(root, resume="never", save_every=0), root / "run", cut)
    assert "going on from" not in capsys.readouterr().out
    whole = read_metrics(cut / "step1_sft" / "metrics.jsonl")
    assert [row["step"] for row in whole if "train/loss" in row] == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"step1": {"model": {"dtype": "bfloat16"}}}, "float32.*bfloat16"),
        ({"step1": {"model": {"lora": {"rank": 2}}}}, "trained_parameters"),
    ],
)
def test_what_cannot_be_read_back_is_refused(
    root: Path, cut: Path, change: dict[str, Any], text: str
) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)does not fit this run.*{text}.*--resume never"):
        step(1, saving(root, change, resume="always"), root / "run", cut)


def test_a_model_that_was_not_there_is_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GRPO has no critic whose state PPO could go on from."""
    grpo = {"step3": {"algorithm": "grpo", "rollout": {"samples_per_prompt": 2}}}
    ppo = {"step3": {"algorithm": "ppo", "rollout": {"samples_per_prompt": 2}}}
    cut_off(monkeypatch, 1, 3, saving(root, grpo), tmp_path, root)
    with pytest.raises(ConfigError, match=r"the critic was None, it is .* now; or, .*--resume"):
        step(3, saving(root, ppo, resume="always"), root / "run", tmp_path)


def test_other_data_are_refused(root: Path, cut: Path) -> None:
    """The rows under the same path have changed meanwhile."""
    other = cut / "data"
    shutil.copytree(root / "data", other)
    rows = (other / "train.jsonl").read_text().replace("glad", "sad")
    (other / "train.jsonl").write_text(rows)
    settings = saving(root)
    settings.data.path = [str(other)]
    settings.checkpoint.resume = "always"
    with pytest.raises(ConfigError, match="the training data was other data"):
        step(1, settings, root / "run", cut)


def test_a_signal_saves_and_stops(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """143 for SIGTERM, at the next boundary, also where saving by steps and time is off."""
    settings = saving(root, save_every=0, save_minutes=0)
    after = resume.Keeper.after

    def told(self: Any, position: int, *args: Any, **named: Any) -> None:
        self.run.stop = 15 if position == 2 else 0
        after(self, position, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(resume.Keeper, "after", told)
        with pytest.raises(Stopped) as caught:
            step(1, settings, root / "run", tmp_path)
    assert caught.value.exit_code == 143
    (saved,) = checkpoints.checkpoints(resumed(tmp_path))
    assert checkpoints.verify_checkpoint(saved).position == 2


def test_saving_by_time(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = saving(root, save_every=0, save_minutes=1e-6)
    cut_off(monkeypatch, 2, 1, settings, tmp_path, root)
    assert len(checkpoints.checkpoints(resumed(tmp_path))) == 2
    settings = saving(root, save_every=0, save_minutes=60)
    cut_off(monkeypatch, 2, 1, settings, tmp_path / "b", root)
    assert checkpoints.checkpoints(resumed(tmp_path / "b")) == []


def test_learning_rates_are_scaled_after_a_rollback(
    root: Path, cut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half the rate from the checkpoint on; a later resume does not halve it again."""
    from rlhf.config.schema import ResolvedStep

    class Halved(ResolvedStep):
        learning_rate_scale: float = 0.5

    plain = rates(cut / "step1_sft")
    monkeypatch.setattr("tests.unit.test_steps_main.ResolvedStep", Halved)
    step(1, config(root), root / "run", cut / "unsaved")
    assert rates(cut / "unsaved" / "step1_sft")[0] == pytest.approx(plain[0] / 2)
    cut_off(monkeypatch, 3, 1, saving(root), cut, root)
    step(1, saving(root), root / "run", cut)
    scaled = rates(cut / "step1_sft")
    assert scaled[:2] == plain
    assert scaled[2] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 2 / 3)) * 0.5)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    """DeepSpeed's own reader would run it; ours builds tensors and plain values only."""

    class Canary:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "canary",))

    torch.save({"x": Canary()}, tmp_path / "bad.pt")
    with pytest.raises(Exception, match=r"Weights only load failed"):
        SafeCheckpointEngine().load(str(tmp_path / "bad.pt"))
    assert not (tmp_path / "canary").exists()


def test_every_generator_is_restored() -> None:
    import random

    import numpy

    state = random_state()
    drawn = [random.random(), float(numpy.random.rand()), float(torch.rand(()))]
    set_random_state(state)
    again = [random.random(), float(numpy.random.rand()), float(torch.rand(()))]
    assert drawn == again


def test_every_damage_to_a_checkpoint_is_seen(root: Path, cut: Path) -> None:
    """Each file flipped, cut, emptied, removed, replaced by another run's; one more; a link."""
    place = resumed(cut) / "step-00000002"
    checkpoints.verify_checkpoint(place)
    other = resumed(cut) / "step-00000001"
    kept = cut / "kept"
    shutil.copytree(place, kept)
    tried = 0
    for file in sorted(p for p in kept.rglob("*") if p.is_file()):
        relative = file.relative_to(kept)
        whole = file.read_bytes()
        at = len(whole) // 2
        damages: dict[str, bytes | None] = {
            "flipped": whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] if whole else b"x",
            "cut": whole[:-1] if whole else b"xy",
            "longer": whole + b"\0",
            "removed": None,
        }
        theirs = (other / relative).read_bytes() if (other / relative).exists() else whole
        if theirs != whole:
            damages["another's"] = theirs
        for damage in damages.values():
            target = place / relative
            if damage is None:
                target.unlink()
            else:
                target.write_bytes(damage)
            with pytest.raises(ArtifactError):
                checkpoints.verify_checkpoint(place)
            target.write_bytes(whole)
            tried += 1
    (place / "extra").write_text("x")
    with pytest.raises(ArtifactError, match="unexpected file 'extra'"):
        checkpoints.verify_checkpoint(place)
    (place / "extra").unlink()
    (place / "link").symlink_to(place / "rank0.pt")
    with pytest.raises(ArtifactError, match="symbolic link"):
        checkpoints.verify_checkpoint(place)
    (place / "link").unlink()
    checkpoints.verify_checkpoint(place)
    moved = place.rename(place.with_name("step-00000007"))
    with pytest.raises(ArtifactError, match="checkpoint of position 2"):
        checkpoints.verify_checkpoint(moved)
    assert tried >= 15


def test_a_path_that_leaves_the_checkpoint_is_refused(cut: Path) -> None:
    from rlhf.store import pretty_json
    from rlhf.store.jsonio import fingerprint

    place = resumed(cut) / "step-00000002" / checkpoints.CHECKPOINT
    content = json.loads(place.read_text())
    content["files"]["../../escape"] = next(iter(content["files"].values()))
    del content["id"]
    content["id"] = fingerprint(content)
    place.write_text(pretty_json(content))
    with pytest.raises(ArtifactError, match="leads outside"):
        checkpoints.verify_checkpoint(place.parent)


def test_numbers_that_are_lost_stop_the_step(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in the loss: in that very step, with the micro-batch that made it."""
    from step1_sft import main as sft

    real, calls = sft._counted, []

    def noted(batch: Any) -> Any:
        calls.append(batch)
        return real(batch)

    def poisoned(log_probs: torch.Tensor, *_: Any) -> torch.Tensor:
        return -log_probs.sum() * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(sft, "_counted", noted)
    monkeypatch.setattr(sft, "sum_of_nll", poisoned)
    with pytest.raises(Diverged, match="training loss is nan") as caught:
        step(1, saving(root), root / "run", tmp_path)
    assert caught.value.tensors["input_ids"].equal(calls[3].input_ids)
    wait_for(lambda: checkpoints.checkpoints(resumed(tmp_path)))  # written in the background
    (saved,) = checkpoints.checkpoints(resumed(tmp_path))
    assert saved.name == "step-00000001", "what was saved before is whole"


@pytest.mark.parametrize("field", ["scores", "log_probs", "ref_log_probs", "values"])
def test_a_number_that_is_lost_in_a_rollout_is_named(field: str) -> None:
    from dataclasses import replace

    from step3_ppo.health import check_finite
    from tests.unit.steps_help import scored_rollout

    rollout = scored_rollout()
    check_finite(rollout)
    bad = getattr(rollout, field).clone()
    bad[2] = float("inf")
    with pytest.raises(Diverged, match="not finite in 1 of 6 answers") as caught:
        check_finite(replace(rollout, **{field: bad}))
    kept = caught.value.tensors["input_ids"]
    assert kept.equal(rollout.rows(torch.tensor([2])).input_ids)


def test_a_policy_that_has_left_the_reference_stops_the_step(root: Path, tmp_path: Path) -> None:
    settings = config(root, step3={"ppo": {"max_kl": 1e-9}, "iterations": 3})
    with pytest.raises(Diverged, match=r"nats per token, over step3.ppo.max_kl = 1e-09"):
        step(3, settings, root / "run", tmp_path)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_is_caught(stage: int, clip: float) -> None:
    """The loss is finite, its slope is not: DeepSpeed's norms say -1 then."""
    from rlhf.config.schema import EngineConfig

    engine = help_.train_engine(
        torch.nn.Linear(4, 4), engine=EngineConfig(zero_stage=stage), max_grad_norm=clip
    )

    def loss(row: torch.Tensor) -> torch.Tensor:
        return (engine(row) * 0).sum().abs().sqrt()

    with pytest.raises(Diverged, match="the gradient is not finite"):
        engine.step([torch.ones(1, 4)], loss)
