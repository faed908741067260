"""One rank against two gloo ranks: training, ZeRO stages, adapters, EMA, PPO, generation.

The two ranks do all of their work in one start (tests/unit/engine_worker.py).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rlhf.algo.advantages import whiten
from rlhf.track import read_metrics
from step1_sft.main import sft_step
from step3_ppo.update import update
from tests.unit import model_help as help_
from tests.unit.ranks_help import two_ranks
from tests.unit.steps_help import ppo_settings, scored_rollout


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two ranks wrote."""
    out = tmp_path_factory.mktemp("ranks")
    help_.tiny(), help_.lively(), help_.reward_dir()  # made here, since ranks would race
    two_ranks("tests.unit.engine_worker", out)
    return out


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    help_.world_of_one(monkeypatch)


def load(ranks: Path, name: str) -> Any:
    return torch.load(ranks / f"{name}.pt")


def assert_equal(found: dict[str, Any], expected: dict[str, Any], atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=atol, rtol=0, msg=name)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_ranks_and_every_stage_train_alike(ranks: Path, stage: int) -> None:
    """30, L4: losses, norms and weights of two ranks at ZeRO 0, 2, 3 equal one rank's, in fp32."""
    engine = help_.train_engine(help_.load_policy())
    found = load(ranks, f"stage{stage}")
    for theirs in found["stats"]:
        ours = sft_step(engine, help_.sft_batches(help_.sft_rows(), 8))
        assert theirs == pytest.approx(ours, abs=1e-6, rel=1e-6)
    # At ZeRO-3 the head is called, elsewhere its product is part of the loss: other rounding.
    assert_equal(found["weights"], help_.weights(engine.module), atol=1e-5 if stage == 3 else 1e-6)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_ema_over_shards(ranks: Path, stage: int) -> None:
    """36: what is published is the average of all weights, also of the small ones (norms), which
    ZeRO-3 keeps whole beside their shards."""
    found = load(ranks, f"stage{stage}")
    assert_equal(found["ema"], found["ema_expected"], atol=1e-6)


def test_an_artifact_from_shards(ranks: Path) -> None:
    """D8: written under ZeRO-3, read by plain transformers, it holds the trained weights."""
    for stage in (0, 2, 3):
        model = AutoModelForCausalLM.from_pretrained(ranks / f"zero{stage}")
        state = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
        assert_equal(state, load(ranks, f"stage{stage}")["weights"], atol=0)


def test_adapters_under_zero_3(ranks: Path) -> None:
    """L2: base bits untouched; merged artifact, peft's adapter and live model agree."""
    batch = help_.sft_batches(help_.sft_rows(), 8)[0]
    live = load(ranks, "lora")
    base = AutoModelForCausalLM.from_pretrained(help_.lively())
    merged = AutoModelForCausalLM.from_pretrained(ranks / "lora")
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(help_.lively()), ranks / "lora" / "adapter"
    )
    with torch.no_grad():
        for model, same in ((merged, True), (adapted, True), (base, False)):
            logits = model(batch.input_ids, attention_mask=batch.attention_mask.long()).logits
            log_probs = logits[:, :-1].log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])
            difference = (log_probs.squeeze(-1) - live[:, 1:]) * batch.attention_mask[:, 1:]
            assert (float(difference.abs().max()) < 1e-4) == same
    changed = [
        name
        for name, tensor in merged.state_dict().items()
        if not torch.equal(tensor, base.state_dict()[name])
    ]
    assert changed
    assert all("proj" in name for name in changed), "embeddings and norms keep their bits"


def test_a_head_drawn_under_zero_3(ranks: Path) -> None:
    """6: sharding changes nothing in the new head."""
    assert_equal(load(ranks, "scalar"), help_.weights(help_.load_value(seed=11)), atol=0)


@pytest.mark.parametrize("stage", [0, 3])
def test_ppo_updates_alike(ranks: Path, stage: int) -> None:
    """30: actor and critic after two PPO epochs, two ranks against one."""
    actor = help_.train_engine(help_.load_policy(name=help_.lively()), learning_rate=1e-3)
    critic = help_.train_engine(
        help_.load_value(name=help_.reward_dir(), new_head=False), learning_rate=1e-3
    )
    stats = update(
        actor, critic, scored_rollout(), ppo_settings(), temperature=0.7, micro_batch_size=6,
        seed=1,
    )  # fmt: skip
    found = load(ranks, f"ppo{stage}")
    assert found["stats"] == pytest.approx(stats, abs=1e-5, rel=1e-5)
    for theirs, engine in zip(found["weights"], (actor, critic), strict=True):
        assert_equal(theirs, help_.weights(engine.module), atol=5e-6)


def test_whitening_over_ranks(ranks: Path) -> None:
    """27: four rows on one rank and two on the other, whitened as six rows."""
    found = load(ranks, "sums")
    x, mask = found["x"], found["mask"]
    counted = x[mask].double()
    expected = (x.double() - counted.mean()) / (counted.var(unbiased=False) + 1e-8).sqrt()
    expected = expected.float() * mask
    torch.testing.assert_close(found["white"], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(whiten(x, mask), expected, atol=1e-6, rtol=0)


def test_collectives(ranks: Path) -> None:
    """Sums in float64 by name, maxima, lists in rank order."""
    found = load(ranks, "sums")
    assert found["total"] == {"a": 2.0**24 + 2, "b": 3.0}
    assert found["max"] == 1.0
    assert found["lists"] == ["rank0", "rank1", "rank1"]


def test_rank_zero_goes_first(ranks: Path) -> None:
    """Rank 0 had not found the file that it then made; rank 1 found it."""
    assert load(ranks, "sums")["saw"] == [False, True]


def test_generation_under_zero_3_does_not_wait_for_the_other_rank(ranks: Path) -> None:
    """Answers of 3 tokens on one rank and of up to 17 on the other; then training goes on."""
    short, long = load(ranks, "uneven")
    assert short <= 3 < long


def test_layer_by_layer_is_the_same_as_whole(ranks: Path) -> None:
    """Issue 3: with `gather: never` two ranks with unequal work answer with the same tokens and
    log-probs, training goes on alike, and the policy is never whole on a rank."""
    found = load(ranks, "layers")
    for whole, layers in zip(found["always"], found["never"], strict=True):
        for ours, theirs in zip(layers[0], whole[0], strict=True):
            assert torch.equal(ours[0], theirs[0])
            torch.testing.assert_close(ours[1], theirs[1], atol=5e-5, rtol=0)
        for one, other in zip(layers[1], whole[1], strict=True):
            assert one == pytest.approx(other, rel=1e-5)
        _, _, most, total, _ = layers
        assert whole[2] == [total, total]
        assert max(most) < total / 3, "one module at a time; the embedding is the largest"
        assert whole[4] == 0
    assert [rank[4] > 0 for rank in found["never"]] == [True, False]


def test_step_3_without_ever_gathering_the_policy(ranks: Path) -> None:
    """The same losses, figures and verdict, all four models in shards."""
    whole, layers = (
        read_metrics(ranks / f"step3-{how}" / "step3_ppo" / "metrics.jsonl")
        for how in ("always", "never")
    )
    assert len(whole) == len(layers) == 2
    for one, other in zip(whole, layers, strict=True):
        same = {k: v for k, v in other.items() if not re.search("second|memory|time", k)}
        assert {k: one[k] for k in same} == pytest.approx(same, rel=1e-4, abs=1e-5)
    verdicts = [
        json.loads(
            (ranks / f"step3-{how}" / "step3_ppo" / "evaluation" / "verdict.json").read_text()
        )
        for how in ("always", "never")
    ]
    assert verdicts[0]["samples"] == verdicts[1]["samples"]
