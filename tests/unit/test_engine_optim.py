"""rlhf.engine.optim: parameter groups and learning-rate curves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rlhf.config.schema import OptimConfig
from rlhf.engine.optim import build_optimizer, build_scheduler, param_groups
from tests.unit import model_help as help_


def curve(steps: int, **settings: Any) -> list[float]:
    """Learning rate of each optimiser step and of the one after the last, peak 1."""
    optim = OptimConfig(learning_rate=1.0, **settings)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_scheduler(optimizer, optim, steps)
    rates = []
    for _ in range(steps + 1):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def cosine(x: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * x))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"scheduler": "linear"}, [1 - t / 10 for t in range(11)]),
        ({"scheduler": "cosine"}, [cosine(t / 10) for t in range(11)]),
        ({"scheduler": "constant"}, [1.0] * 11),
        ({"scheduler": "polynomial"}, [1 - t / 10 * (1 - 1e-7) for t in range(11)]),
        ({"scheduler": "cosine_with_restarts"}, [cosine(t / 10) for t in range(10)] + [0.0]),
        (
            {"scheduler": "linear", "warmup": 0.2},
            [0, 0.5] + [1 - t / 8 for t in range(9)],
        ),
        (
            {"scheduler": "cosine", "warmup": 4},
            [0, 0.25, 0.5, 0.75] + [cosine(t / 6) for t in range(7)],
        ),
        ({"scheduler": "constant_with_warmup", "warmup": 0.5}, [t / 5 for t in range(5)] + [1] * 6),
    ],
)
def test_curves(settings: dict[str, Any], expected: list[float]) -> None:
    """9, 32: each schedule by its formula; warm-up below 1 is a share, from 1 on steps."""
    assert curve(10, **settings) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("steps", [10, 30, 100, 1000])
def test_a_share_of_the_steps_is_not_rounded_down_by_a_hair(steps: int) -> None:
    """0.29 x 100 is 28.999999999999996 in floating point, and means 29."""
    rates = curve(steps, scheduler="linear", warmup=0.29)
    assert rates.index(max(rates)) == round(0.29 * steps)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_groups_partition_the_trainable_parameters(family: str) -> None:
    """Every trainable parameter is in one group; biases and norms are not decayed."""
    model = help_.load_value(family)
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    groups: Any = param_groups(model, OptimConfig(learning_rate=1e-3, weight_decay=0.1), 5e-2)
    grouped = [id(p) for group in groups for p in group["params"]]
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(trainable)
    for group in groups:
        for parameter in group["params"]:
            name = trainable[id(parameter)]
            assert group["lr"] == (5e-2 if "score" in name else 1e-3), name
            # All one-dimensional parameters of these families are biases or norms' scales.
            assert group["weight_decay"] == (0.0 if parameter.dim() == 1 else 0.1), name


def test_groups_of_adapters_and_head() -> None:
    """L2: with LoRA only adapters and the score head train, the head at its own rate."""
    model = help_.load_value(lora={"rank": 2})
    groups: Any = param_groups(model, OptimConfig(learning_rate=1e-3), 5e-2)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in groups for p in group["params"]}
    assert {name for name, rate in rates.items() if rate == 5e-2} == {
        "model.base_model.model.score.modules_to_save.default.weight"
    }
    assert all("lora_" in name for name, rate in rates.items() if rate == 1e-3)


def test_adamw_has_the_settings() -> None:
    """32: eps 1e-5, decoupled weight decay; one step against the formula by hand."""
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    optim = OptimConfig(learning_rate=0.1, weight_decay=0.5, betas=(0.9, 0.95))
    assert optim.eps == 1e-5
    groups = [{"params": [weight], "lr": 0.1, "weight_decay": 0.5}]
    optimizer = build_optimizer(groups, optim)
    weight.grad = torch.tensor([3e-5])
    optimizer.step()
    # m^ = g, v^ = g^2: the step is lr g / (|g| + eps), after the decay by lr * 0.5.
    expected = 2.0 * (1 - 0.1 * 0.5) - 0.1 * 3e-5 / (3e-5 + 1e-5)
    assert weight.item() == pytest.approx(expected, abs=1e-6)
