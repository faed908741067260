"""rlhf.models.scalar: the reward model's head and its artifact (6, 10, 33)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf import models
from rlhf.config.schema import EngineConfig
from rlhf.engine.train import FrozenEngine
from rlhf.errors import RequirementError
from rlhf.families import TINY_FAMILIES
from tests.unit import model_help as help_


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    help_.world_of_one(monkeypatch)


def batch(left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows, pads on one side."""
    ids, mask = torch.full((3, 14), help_.PAD), torch.zeros(3, 14, dtype=torch.bool)
    g = torch.Generator().manual_seed(1)
    for row, length in enumerate((9, 12, 5)):
        place = slice(14 - length, 14) if left else slice(0, length)
        ids[row, place] = torch.randint(3, 200, (length,), generator=g)
        mask[row, place] = True
    return ids, mask


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
def test_the_score_is_the_artifacts_own_logit(family: str, tmp_path: Path) -> None:
    """6, 13: the value at the last real token, padded left or right, equals the logit of plain
    AutoModelForSequenceClassification on the saved artifact, unpadded."""
    module = help_.load_value(family, name=help_.lively(family)).eval()
    module.set_statistics(0.5, 2.0)
    models.Snapshot(module).write(tmp_path, help_.tokenizer(family), card="")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert plain.config.num_labels == 1
    for left in (True, False):
        ids, mask = batch(left)
        with torch.no_grad():
            values = module(ids, mask)
            assert values.shape == (3, 14)
            assert values.dtype == torch.float32
            found = models.last_values(values, mask)
            expected = [plain(row[m][None]).logits.item() for row, m in zip(ids, mask, strict=True)]
        assert found.tolist() == pytest.approx(expected, abs=1e-4), left
        assert len({round(x, 3) for x in expected}) == 3
    assert (plain.config.rlhf_score_mean, plain.config.rlhf_score_std) == (0.5, 2.0)
    again = help_.load_value(family, name=str(tmp_path), new_head=False)
    assert again.statistics == (0.5, 2.0)
    assert torch.equal(again.model.score.weight, module.model.score.weight)


def test_last_values_by_hand() -> None:
    """6: the last True, with pads left, right, on both sides, or none."""
    values = torch.arange(20.0).view(4, 5)
    mask = torch.tensor(
        [[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [1, 1, 1, 1, 1]], dtype=torch.bool
    )
    assert models.last_values(values, mask).tolist() == [4.0, 6.0, 13.0, 19.0]


def test_the_new_head() -> None:
    """6: Linear(d, 1) without bias, weights drawn with std 1 / sqrt(d + 1), by the seed."""
    heads = [help_.load_value(seed=seed).model.score for seed in range(40)]
    assert all(head.bias is None and head.weight.shape == (1, 32) for head in heads)
    weights = torch.cat([head.weight.detach() for head in heads])
    assert float(weights.std()) == pytest.approx(1 / math.sqrt(33), rel=0.05)
    assert abs(float(weights.mean())) < 3 / math.sqrt(33) / math.sqrt(weights.numel())
    assert torch.equal(heads[3].weight, help_.load_value(seed=3).model.score.weight)
    # At width 3 the "+ 1" shows: 0.5, not 0.577.
    small: Any = torch.nn.Module()
    small.score = torch.nn.Linear(3, 1, bias=False)
    drawn = []
    for seed in range(2000):
        models.scalar._use_fp32_head(small, True, seed)
        drawn.append(small.score.weight.detach().clone())
    assert float(torch.cat(drawn).std()) == pytest.approx(0.5, rel=0.03)
    assert not torch.equal(heads[0].weight, heads[1].weight)


def test_a_new_head_replaces_a_trained_one() -> None:
    fresh = help_.load_value(name=help_.reward_dir(), seed=8).model.score.weight
    assert torch.equal(fresh, help_.load_value(seed=8).model.score.weight)
    kept = help_.load_value(name=help_.reward_dir(), new_head=False, seed=8).model.score.weight
    assert torch.equal(kept, help_.load_value(seed=5).model.score.weight)


def test_the_head_is_fp32_under_bf16() -> None:
    """33: values are the fp32 product of bf16 states and weights, not rounded to bf16, in a
    DeepSpeed engine too."""
    module = help_.load_value(name=help_.lively(), dtype="bfloat16")
    ids, mask = batch(left=False)
    engine = FrozenEngine(module, EngineConfig(), dtype="bfloat16")
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    values = engine(ids, mask)
    assert values.dtype == torch.float32
    with torch.no_grad():
        hidden = module.hidden(ids, mask)
        expected = (hidden.double() @ module.model.score.weight.double().T).squeeze(-1)
    torch.testing.assert_close(values.double(), expected, atol=1e-6, rtol=1e-6)
    assert (values != values.bfloat16().float()).any()


def test_statistics_normalise() -> None:
    """10: (raw - mean) / std; a std of 0 does not divide by 0."""
    module = help_.load_value()
    assert module.statistics == (0.0, 1.0)
    module.set_statistics(2.0, 4.0)
    assert module.normalize(torch.tensor([10.0, 2.0])).tolist() == [2.0, 0.0]
    module.set_statistics(1.0, 0.0)
    assert torch.isfinite(module.normalize(torch.tensor([5.0]))).all()


def test_a_causal_model_is_no_reward_model() -> None:
    """34: critic and reward model need a trained head; the message names the remedy."""
    for family in ("llama", "gpt2"):
        with pytest.raises(RequirementError, match=r"not a reward model.*train\.py --step 2"):
            help_.load_value(family, new_head=False)


def test_a_head_of_two_labels(tmp_path: Path) -> None:
    """A two-class model is no reward model, but one can be trained from its body."""
    AutoModelForSequenceClassification.from_pretrained(
        help_.lively(), num_labels=2
    ).save_pretrained(tmp_path)
    with pytest.raises(RequirementError, match="not a reward model"):
        help_.load_value(name=str(tmp_path), new_head=False)
    module = help_.load_value(name=str(tmp_path), seed=4)
    assert torch.equal(module.model.score.weight, help_.load_value(seed=4).model.score.weight)


def test_families_without_a_score_head() -> None:
    model: Any = torch.nn.Module()
    with pytest.raises(RequirementError, match=r"no `score` head.*decoder family"):
        models.families.scalar_head(model)


@pytest.mark.parametrize("family", sorted(TINY_FAMILIES))
def test_values_that_are_read(family: str) -> None:
    """The same numbers where `read` says, 0 elsewhere."""
    module = help_.load_value(family, name=help_.lively(family)).eval()
    ids, mask = batch(left=True)
    read = models.last_tokens(mask)
    with torch.no_grad():
        whole, some = module(ids, mask), module(ids, mask, read)
    torch.testing.assert_close(some[read], whole[read], atol=1e-5, rtol=1e-4)
    assert not some[~read].any()
