"""A checkpoint is read by another number of processes, or at another ZeRO stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.engine.checkpoint import load_engine, save_engine
from rlhf.engine.reshard import MOMENTS, Shards
from rlhf.engine.train import TrainEngine
from rlhf.errors import ArtifactError
from tests.faults import elsewhere_worker as worker
from tests.unit import model_help as help_
from tests.unit.rank_help import in_two_ranks
from tests.unit.test_steps_main import root

__all__ = ["root"]  # a fixture
LORA = {"rank": 2}
STAGES = {"float32": (0, 1, 2, 3), "bfloat16": (1, 2, 3)}


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    help_.world_of_one(monkeypatch)


def same_state(one: Shards, other: Shards) -> None:
    """Master weights, moments and counts, to the last bit."""
    assert one.shapes == other.shapes
    assert one.steps is not None
    assert one.steps == other.steps
    for count in ("global_steps", "skipped_steps", "lr_scheduler"):
        assert one.common[count] == other.common[count]
    for name in one.shapes:
        assert torch.equal(one.weight(name), other.weight(name)), name
        for kind in MOMENTS:
            moment = one.moment(name, kind)
            assert torch.equal(moment, other.moment(name, kind)), name
            assert name.endswith("lora_A.default.weight") or bool(moment.any()), name


def saved(engine: TrainEngine, place: Path, stage: int) -> Shards:
    save_engine(engine, place)
    return Shards(place, stage, 1, engine.groups)


@pytest.mark.parametrize("dtype", STAGES)
@pytest.mark.parametrize("lora", [{}, LORA], ids=["whole", "lora"])
def test_every_stage_reads_every_other(tmp_path: Path, dtype: str, lora: dict[str, Any]) -> None:
    """The state is that which was saved, and training goes on as it would have."""
    for stage in STAGES[dtype]:
        first = worker.engine(stage, dtype, lora)
        worker.train(first, 2)
        was = saved(first, tmp_path / f"{stage}", stage)
        expected = worker.train(first, 2)
        for other in set(STAGES[dtype]) - {stage}:
            second = worker.engine(other, dtype, lora)
            load_engine(second, was.directory, stage=stage, world=1)
            same_state(was, saved(second, tmp_path / f"{stage}-{other}", other))
            found = worker.train(second, 2)
            # In 16 bits ZeRO-3's forward rounds otherwise, whoever saved.
            rel = 1e-5 if dtype == "float32" else 0.02
            for one, two in zip(expected, found, strict=True):
                assert two == pytest.approx(one, rel=rel), (stage, other)


def test_before_the_first_update(tmp_path: Path) -> None:
    """There are no moments yet: the actor's during critic_warmup."""
    for stage, other in ((0, 2), (2, 3), (3, 0)):
        first = worker.engine(stage)
        save_engine(first, tmp_path / str(stage))
        expected = worker.train(first, 2)
        second = worker.engine(other)
        load_engine(second, tmp_path / str(stage), stage=stage, world=1)
        found = worker.train(second, 2)
        for one, two in zip(expected, found, strict=True):
            assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("kind", MOMENTS)
def test_a_moment_that_is_lost_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The tests above can fail: without one of the moments losses differ by far more than they
    allow."""
    first = worker.engine(2)
    worker.train(first, 3)
    save_engine(first, tmp_path / "2")
    expected = worker.train(first, 3)
    moment = Shards.moment

    def lost(self: Shards, name: str, asked: str) -> torch.Tensor:
        found = moment(self, name, asked)
        return torch.zeros_like(found) if asked == kind else found

    monkeypatch.setattr(Shards, "moment", lost)
    second = worker.engine(3)
    load_engine(second, tmp_path / "2", stage=2, world=1)
    found = worker.train(second, 3)
    assert found[-1]["loss"] != pytest.approx(expected[-1]["loss"], rel=1e-3)


def test_another_model_is_refused(tmp_path: Path) -> None:
    first = worker.engine(2)
    worker.train(first, 1)
    save_engine(first, tmp_path / "a")
    with pytest.raises(ArtifactError, match="is not in both, or has another shape"):
        load_engine(worker.engine(0, lora=LORA), tmp_path / "a", stage=2, world=1)
    (part,) = (tmp_path / "a" / "state").glob("zero_pp_rank_0*optim*")
    part.unlink()
    with pytest.raises(
        ArtifactError, match=r"0 files are called \*zero_pp_rank_0_mp_rank_00_optim"
    ):
        load_engine(worker.engine(0), tmp_path / "a", stage=2, world=1)


def test_groups_that_changed_are_refused(tmp_path: Path) -> None:
    """ZeRO 0 numbers parameters group by group: with other groups the numbers mean others."""
    first = worker.engine(0, weight_decay=0.1)
    worker.train(first, 1)
    save_engine(first, tmp_path / "a")
    with pytest.raises(ArtifactError, match="its parameters were in other groups"):
        load_engine(worker.engine(2, weight_decay=0.0), tmp_path / "a", stage=0, world=1)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process saved, two ranks read and went on with; and the other way round."""
    out = tmp_path_factory.mktemp("elsewhere")
    with pytest.MonkeyPatch.context() as patch:
        help_.world_of_one(patch)
        for stage in worker.SAVED:
            one = worker.engine(stage)
            worker.train(one, 2)
            save_engine(one, out / f"one{stage}")
            worker.average(one, out / f"one{stage}.ema")
        help_.lively(), help_.reward_dir()
        in_two_ranks("tests.faults.elsewhere_worker", out)
    return out


@pytest.mark.parametrize("stage", worker.SAVED)
def test_two_ranks_read_what_one_wrote(ranks: Path, stage: int) -> None:
    one = worker.engine(stage)
    load_engine(one, ranks / f"one{stage}", stage=stage, world=1)
    expected = worker.train(one, 2)
    was = Shards(ranks / f"one{stage}", stage, 1, one.groups)
    for other in worker.SAVED:
        name = f"one{stage}-two{other}"
        same_state(was, Shards(ranks / name, other, 2, one.groups))
        found = json.loads((ranks / f"{name}.json").read_text())
        for ours, theirs in zip(expected, found, strict=True):
            assert theirs == pytest.approx(ours, rel=1e-5)


@pytest.mark.parametrize("stage", worker.SAVED)
def test_one_reads_what_two_ranks_wrote(ranks: Path, tmp_path: Path, stage: int) -> None:
    """And that is what one process has after the same four updates; its average, too."""
    whole = worker.engine(0)
    worker.train(whole, 4)
    expected = worker.train(whole, 2)
    for other in worker.SAVED:
        one = worker.engine(other)
        load_engine(one, ranks / f"two{stage}", stage=stage, world=2)
        same_state(
            Shards(ranks / f"two{stage}", stage, 2, one.groups),
            saved(one, tmp_path / str(other), other),
        )
        for ours, theirs in zip(worker.train(one, 2), expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("stage", worker.SAVED)
def test_the_average_moves_too(ranks: Path, stage: int) -> None:
    """What EMA publishes after a resume elsewhere is what was averaged before."""
    expected = torch.load(ranks / f"one{stage}.ema.whole")
    for other in worker.SAVED:
        found = torch.load(ranks / f"one{stage}-two{other}.ema.whole")
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
