"""A checkpoint is read by another number of processes, or at another ZeRO stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import step3_ppo.main
from rlhf.engine.checkpoint import load_engine, save_engine
from rlhf.engine.ema import WeightEMA
from rlhf.engine.reshard import Shards
from rlhf.errors import ConfigError
from tests.faults import elsewhere_worker as worker
from tests.faults.test_reshard import same_state, saved
from tests.faults.test_resume import FOLDERS, cut_off, saving
from tests.soak import figures
from tests.unit import model_help as help_
from tests.unit.ranks_help import two_ranks
from tests.unit.test_steps_main import config, merge, root, step

__all__ = ["root"]  # a fixture
pytestmark = pytest.mark.timeout(900)  # on a busy machine two ranks take minutes
LORA = {"rank": 2}


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    help_.world_of_one(monkeypatch)


EVERYTHING = {
    "actor": {"model": {"lora": LORA}},
    "critic": {"model": {"lora": LORA}},
    "rollout": {"samples_per_prompt": 3, "temperature": 0.7},
    "iterations": 3,
    "micro_batch_size": 3,
    "ppo": {
        "ema_decay": 0.5, "ptx_coef": 0.1, "critic_warmup": 1, "kl_target": 1.0,
        "kl_horizon": 100.0, "minibatches": 3, "max_kl": 1000.0,
    },
}  # fmt: skip
STEPS: dict[int, dict[str, Any]] = {
    1: {"step1": {"model": {"lora": LORA}, "train": {"max_steps": 4, "micro_batch_size": 1}}},
    2: {},
    3: {"step3": EVERYTHING},
}


def at_stage(number: int, stage: int) -> dict[str, Any]:
    """The step's settings at this ZeRO stage."""
    engine = {"engine": {"zero_stage": stage}}
    stages = {"actor": engine, "critic": engine} if number == 3 else engine
    return merge(STEPS[number], {f"step{number}": stages})


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """What one process saved, two ranks read and went on with; and the other way round."""
    out = tmp_path_factory.mktemp("elsewhere")
    jobs: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        help_.world_of_one(patch)
        for stage in worker.STAGES:
            one = worker.engine(stage)
            worker.train(one, 2)
            save_engine(one, out / f"one{stage}")
            worker.average(one, out / f"one{stage}.ema")
        for number in STEPS:
            run = {"root": str(root), "run": str(out / f"grown{number}")}
            worker.work(number, at_stage(number, 0), **run, stop_at=1)
            jobs.append({"number": number, "changes": at_stage(number, 3), **run})
            run["run"] = str(out / f"shrunk{number}")
            jobs.append({"number": number, "changes": at_stage(number, 2), **run, "stop_at": 2})
            worker.work(number, STEPS[number], str(root), str(out / f"whole{number}"))
        (out / "jobs.json").write_text(json.dumps(jobs))
        two_ranks("tests.faults.elsewhere_worker", out)
    return out


def same_step(one: Path, other: Path, number: int) -> None:
    """Figures and published weights, to rounding."""
    folder = FOLDERS[number]
    ours, theirs = figures(one / folder), figures(other / folder)
    assert len(ours) == len(theirs) > 2
    for row, expected in zip(ours, theirs, strict=True):
        assert row == pytest.approx(expected, rel=2e-4, abs=2e-5)
    names = sorted(path.relative_to(other) for path in other.rglob("artifact/**/*.safetensors"))
    assert names
    for name in names:
        for tensor, expected in zip(
            load_file(one / name).items(), load_file(other / name).items(), strict=True
        ):
            assert tensor[0] == expected[0]
            torch.testing.assert_close(tensor[1], expected[1], atol=2e-5, rtol=0, msg=tensor[0])


@pytest.mark.parametrize("number", STEPS)
def test_two_ranks_finish_what_one_began(ranks: Path, number: int) -> None:
    """Cut off after one save in one process at ZeRO 0, finished by two at ZeRO 3: figures and
    weights are those of one process that nobody disturbed. For step 3 that means: the same prompts,
    the same answers, the same minibatches, the average, the SFT rows, the KL coefficient."""
    same_step(ranks / f"grown{number}", ranks / f"whole{number}", number)
    log = (ranks / "rank0.log").read_text()
    assert "checkpoint of 1 process, ZeRO 0, read for 2 processes, ZeRO 3" in log


@pytest.mark.parametrize("number", STEPS)
def test_one_process_finishes_what_two_ranks_began(
    ranks: Path, root: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    worker.work(number, at_stage(number, 0), str(root), str(ranks / f"shrunk{number}"))
    told = capsys.readouterr().out
    assert "checkpoint of 2 processes, ZeRO 2, read for 1 process, ZeRO 0" in told
    same_step(ranks / f"shrunk{number}", ranks / f"whole{number}", number)


def test_models_that_no_longer_share_a_base(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Adapters on one base at ZeRO 2, on their own at ZeRO 3, where the critic's have other names;
    and back. Step 3 ends as it does without any of that."""
    shutil.copytree(root / "run" / "step1_sft", tmp_path / "run" / "step1_sft")
    lora = config(root, step2={"model": {"lora": LORA}})
    step(2, lora, tmp_path / "run", tmp_path / "run")
    step(3, config(root, **at_stage(3, 0)), tmp_path / "run", tmp_path / "whole")
    for at, stage in ((1, 2), (2, 3)):
        settings = saving(root, at_stage(3, stage))
        cut_off(monkeypatch, at, 3, settings, tmp_path / "cut", tmp_path)
    step(3, saving(root, at_stage(3, 0)), tmp_path / "run", tmp_path / "cut")
    told = capsys.readouterr().out
    for was, now in ((2, 3), (3, 0)):
        assert f"checkpoint of 1 process, ZeRO {was}, read for 1 process, ZeRO {now}" in told
    same_step(tmp_path / "cut", tmp_path / "whole", 3)


def test_prompts_that_cannot_be_shared_out_are_refused(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Iterations of another size would be another run."""
    settings = saving(root, {"step3": {"rollout": {"prompts": 3}}})
    cut_off(monkeypatch, 1, 3, settings, tmp_path, root)
    fewer = step3_ppo.main._prompts_per_iteration
    monkeypatch.setattr(
        step3_ppo.main, "_prompts_per_iteration", lambda rl, rows, world: fewer(rl, rows, 2)
    )
    with pytest.raises(ConfigError, match=r"iterations have 3 prompts, .* can share out 2: start"):
        step(3, settings, root / "run", tmp_path)


@pytest.mark.parametrize("stage", worker.STAGES)
def test_two_ranks_read_what_one_wrote(ranks: Path, stage: int) -> None:
    one = worker.engine(stage)
    load_engine(one, ranks / f"one{stage}", stage=stage, world=1)
    expected = worker.train(one, 2)
    was = Shards(ranks / f"one{stage}", stage, 1, one.groups)
    for _, other in (pair for pair in worker.PAIRS if pair[0] == stage):
        name = f"one{stage}-two{other}"
        same_state(was, Shards(ranks / name, other, 2, one.groups))
        found = json.loads((ranks / f"{name}.json").read_text())
        for ours, theirs in zip(expected, found, strict=True):
            assert theirs == pytest.approx(ours, rel=1e-5)


@pytest.mark.parametrize("stage", worker.STAGES)
def test_one_reads_what_two_ranks_wrote(ranks: Path, tmp_path: Path, stage: int) -> None:
    """And that is what one process has after the same four updates; its average, too."""
    whole = worker.engine(0)
    worker.train(whole, 4)
    expected = worker.train(whole, 2)
    average = torch.load(ranks / "one0.ema.whole")
    for other in (stage, (stage + 2) % 4):
        one = worker.engine(other)
        load_engine(one, ranks / f"two{stage}", stage=stage, world=2)
        same_state(
            Shards(ranks / f"two{stage}", stage, 2, one.groups),
            saved(one, tmp_path / str(other), other),
        )
        ema = WeightEMA(one.module, 0.5)
        ema.load_shards([torch.load(ranks / f"two{stage}.ema.{rank}") for rank in (0, 1)])
        worker.publish(ema, one, tmp_path / f"{other}.ema")
        same_average(average, tmp_path / f"{other}.ema.whole")
        for ours, theirs in zip(worker.train(one, 2), expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize(("stage", "other"), worker.PAIRS)
def test_the_average_moves_too(ranks: Path, stage: int, other: int) -> None:
    """What EMA publishes after a resume elsewhere is what was averaged before."""
    expected = torch.load(ranks / f"one{stage}.ema.whole")
    same_average(expected, ranks / f"one{stage}-two{other}.ema.whole")


def same_average(expected: dict[str, torch.Tensor], place: Path) -> None:
    found = torch.load(place)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
