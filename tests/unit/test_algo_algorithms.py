"""The table of algorithms: each rule by hand, and what holds for all of them."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rlhf.algo
from rlhf.algo.advantages import discounted_returns, gae, whiten
from rlhf.algo.algorithms import ALGORITHMS, Credited
from rlhf.algo.ema import ema_update

MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
REWARDS = torch.tensor([[0.5, 1.0, 9.0], [0.0, 0.0, 3.0], [2.0, 9.0, 9.0], [0.0, 4.0, 9.0]])
VALUES = torch.tensor([[0.5, 0.5, 9.0], [1.0, 1.0, 1.0], [0.0, 9.0, 9.0], [2.0, 2.0, 9.0]])


def credit(name: str, **change: object) -> Credited:
    arguments: dict = {
        "token_rewards": REWARDS,
        "values": VALUES if ALGORITHMS[name].needs_critic else None,
        "mask": MASK,
        "group_size": 2,
        "gamma": 1.0,
        "lam": 0.95,
        "whiten": True,
        "group_std": True,
    }
    return ALGORITHMS[name].credit(**(arguments | change))


def test_table() -> None:
    """DESIGN decision 5: four entries; only PPO has a critic."""
    facts = {name: (a.name, a.needs_critic) for name, a in ALGORITHMS.items()}
    assert facts == {
        "ppo": ("ppo", True),
        "grpo": ("grpo", False),
        "rloo": ("rloo", False),
        "reinforce++": ("reinforce++", False),
    }


def test_ppo() -> None:
    """ALGORITHM 25-27: GAE, whitened; returns are un-whitened advantages + values."""
    raw, returns = gae(REWARDS, VALUES, MASK, 1.0, 0.95)
    advantages, got = credit("ppo")
    assert got is not None
    assert torch.equal(got, returns)
    assert torch.equal(advantages, whiten(raw, MASK))
    assert torch.equal(credit("ppo", whiten=False)[0], raw)
    with pytest.raises(ValueError, match="'ppo' needs a critic"):
        credit("ppo", values=None)


def test_grpo() -> None:
    """ALGORITHM 37: mean and std of the group's whole rewards, on every token; std is a setting."""
    advantages, returns = credit("grpo")
    s = 1 / math.sqrt(2)  # wholes 1.5, 3 and 2, 4: deviations -x, x, unbiased std x sqrt(2)
    by_hand = torch.tensor([[-s, -s, 0], [s, s, s], [-s, 0, 0], [s, s, 0]])
    torch.testing.assert_close(advantages, by_hand)
    assert returns is None
    plain, _ = credit("grpo", group_std=False, whiten=False)
    assert plain.tolist() == [[-0.75, -0.75, 0], [0.75] * 3, [-1, 0, 0], [1, 1, 0]]


def test_rloo() -> None:
    """ALGORITHM 37: the whole reward, KL included, minus the mean of the others'."""
    advantages, returns = credit("rloo")  # wholes 1.5, 3 and 2, 4
    assert advantages.tolist() == [[-1.5, -1.5, 0], [1.5] * 3, [-2, 0, 0], [2, 2, 0]]
    assert returns is None


def test_empty_rows_shift_no_baseline() -> None:
    """ALGORITHM 37: a row without a counted token is not a member of its group."""
    mask = MASK.clone()
    mask[1] = False
    rewards = REWARDS[[0, 1, 2]]
    arguments = {"token_rewards": rewards, "mask": mask[:3], "group_size": 3}
    assert credit("rloo", **arguments)[0].tolist() == [[-0.5, -0.5, 0], [0] * 3, [0.5, 0, 0]]
    plain, _ = credit("grpo", group_std=False, **arguments)  # wholes 1.5 and 2
    assert plain.tolist() == [[-0.25, -0.25, 0], [0] * 3, [0.25, 0, 0]]


def test_reinforce_plus_plus() -> None:
    """ALGORITHM 37: rewards to come, whitened over the global batch."""
    advantages, returns = credit("reinforce++", gamma=0.5)
    to_come = torch.tensor([[1.0, 1.0, 0], [0.75, 1.5, 3.0], [2.0, 0, 0], [2.0, 4.0, 0]])
    assert torch.equal(discounted_returns(REWARDS, MASK, 0.5), to_come)
    assert torch.equal(advantages, whiten(to_come, MASK))
    assert returns is None
    assert torch.equal(credit("reinforce++", gamma=0.5, whiten=False)[0], to_come)


@pytest.mark.parametrize("name", ["ppo", "reinforce++"])
def test_all_reduce_is_used(name: str) -> None:
    """ALGORITHM 27: moments come from all ranks: twin ranks change nothing, a quiet one does."""
    alone = credit(name)[0]
    torch.testing.assert_close(credit(name, all_reduce=lambda x: 2 * x)[0], alone)
    other = credit(name, all_reduce=lambda x: x + 5)[0]
    assert not torch.allclose(other, alone)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(ALGORITHMS)), st.integers(0, 1000), st.booleans(), st.booleans())
def test_every_rule(name: str, seed: int, whiten: bool, group_std: bool) -> None:
    """Finite float32 without gradient, 0 off the mask; NaN where nothing counts stays out."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(5) < torch.randint(0, 6, (6, 1), generator=generator)
    off = torch.where(mask, 0.0, torch.nan)
    tensors = (torch.randn(2, 6, 5, generator=generator) + off).bfloat16()
    advantages, returns = credit(
        name,
        token_rewards=tensors[0],
        values=tensors[1].requires_grad_(),
        mask=mask,
        group_size=3,
        whiten=whiten,
        group_std=group_std,
    )
    assert (returns is None) != ALGORITHMS[name].needs_critic
    results: list[Tensor] = [advantages] if returns is None else [advantages, returns]
    for tensor in results:
        assert tensor.shape == mask.shape
        assert tensor.dtype == torch.float32
        assert not tensor.requires_grad
        assert tensor.isfinite().all()
        assert tensor[~mask].eq(0).all()


def test_a_better_answer_gets_more_credit() -> None:
    """Every rule prefers the higher score, other things equal."""
    mask = torch.ones(2, 3, dtype=torch.bool)
    rewards = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])
    for name in ALGORITHMS:
        advantages, _ = credit(
            name,
            token_rewards=rewards,
            values=torch.zeros(2, 3),
            mask=mask,
            scores=torch.tensor([1.0, -1.0]),
        )
        assert (advantages[0] > advantages[1]).all(), name


def test_ema() -> None:
    """ALGORITHM 36: average <- decay * average + (1 - decay) * weight, in float32."""
    average = [torch.tensor([1.0, 2.0])]
    for _ in range(2):
        ema_update(average, [torch.tensor([3.0, 2.0]).bfloat16().requires_grad_()], 0.992)
    assert average[0].tolist() == pytest.approx([3 - 2 * 0.992**2, 2.0])
    with pytest.raises(TypeError, match="keep the averages in float32"):
        ema_update([torch.zeros(2).bfloat16()], [torch.zeros(2)], 0.9)
    with pytest.raises(ValueError, match=r"EMA decay 1\.5"):
        ema_update([], [], 1.5)
    with pytest.raises(ValueError, match="shape"):
        ema_update([torch.zeros(2)], [torch.zeros(1)], 0.9)
    with pytest.raises(ValueError):
        ema_update([torch.zeros(2)], [], 0.9)


def test_only_torch_is_imported() -> None:
    """DESIGN: algo imports torch only (and the standard library)."""
    allowed = {"torch", "rlhf.algo", "__future__", "collections", "dataclasses", "math", "typing"}
    for file in Path(str(rlhf.algo.__file__)).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "."]
            for name in names:
                root = "rlhf.algo" if name.startswith("rlhf.algo") else name.split(".")[0]
                assert root in allowed, f"{file.name} imports {name}"
