"""An engine's checkpoint, read into an engine of another ZeRO stage: the same state to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.engine.checkpoint import load_engine, save_engine
from rlhf.engine.reshard import MOMENTS, Shards
from rlhf.engine.safe_load import load_safely
from rlhf.engine.train import TrainEngine
from rlhf.errors import ArtifactError
from tests.faults import elsewhere_worker as worker
from tests.unit import model_help as help_

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
def test_each_stage_reads_another(tmp_path: Path, dtype: str, lora: dict[str, Any]) -> None:
    """The state is that which was saved, and training goes on as it would have. In a ring: how a
    state is read does not depend on who asks."""
    torch.manual_seed(0)
    for at, other in enumerate(STAGES[dtype]):
        stage = STAGES[dtype][at - 1]
        first = worker.engine(stage, dtype, lora)
        worker.train(first, 2)
        was = saved(first, tmp_path / f"{stage}", stage)
        expected = worker.train(first, 2)
        second = worker.engine(other, dtype, lora)
        load_engine(second, was.directory, stage=stage, world=1)
        same_state(was, saved(second, tmp_path / f"{stage}-{other}", other))
        found = worker.train(second, 2)
        for one, two in zip(expected, found, strict=True):
            if dtype == "float32":
                assert two == pytest.approx(one, rel=1e-5), (stage, other)
            else:  # the stages round gradients otherwise, whoever saved
                assert two["loss"] == pytest.approx(one["loss"], rel=5e-4), (stage, other)


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


def test_after_a_resume_as_it_was(tmp_path: Path) -> None:
    """What an engine saves that was itself read back can be read elsewhere; so can files of torch's
    older format, which earlier releases wrote then."""
    first = worker.engine(2)
    worker.train(first, 1)
    save_engine(first, tmp_path / "a")
    second = worker.engine(2)
    load_engine(second, tmp_path / "a", stage=2, world=1)
    was = saved(second, tmp_path / "b", 2)
    for path in was.directory.rglob("*.pt"):
        torch.save(load_safely(path), path, _use_new_zipfile_serialization=path.name[0] == "m")
    was = Shards(was.directory, 2, 1, second.groups)
    third = worker.engine(3)
    load_engine(third, was.directory, stage=2, world=1)
    same_state(was, saved(third, tmp_path / "c", 3))


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
