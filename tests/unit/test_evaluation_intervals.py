"""rlhf.evaluation.intervals: against tables, and by how often they hold the truth."""

from __future__ import annotations

import random
import statistics

import pytest

from rlhf.evaluation.intervals import (
    by_prompt,
    jackknife,
    mean_interval,
    share_change,
    share_interval,
    t_quantile,
)


def test_t_quantiles() -> None:
    """Printed tables, two-sided 95%; 99% for one."""
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 19: 2.093, 30: 2.042, 120: 1.980}
    for df, value in table.items():
        assert t_quantile(df) == pytest.approx(value, abs=6e-4)
    assert t_quantile(10, 0.995) == pytest.approx(3.169, abs=6e-4)
    assert t_quantile(10**6) == pytest.approx(1.96, abs=0.01)


def test_by_prompt() -> None:
    assert by_prompt(["a", "b", "a"], [1.0, 5.0, 2.0]) == [1.5, 5.0]


def test_wilson() -> None:
    """One answer a prompt: Wilson's interval with t for z; 0 of 50 reaches up to z2 / (50 + z2)."""
    z2 = t_quantile(49) ** 2
    none = share_interval([0.0] * 50, 50)
    assert none.low == 0.0
    assert none.high == pytest.approx(z2 / (50 + z2))
    half = share_interval([0.0, 1.0] * 25, 50)
    assert half.mean == 0.5
    assert half.low is not None
    # The unbiased variance makes 49 of 50 answers.
    assert 0.5 - half.low == pytest.approx(0.5 * (z2 / (49 + z2)) ** 0.5)
    assert share_interval([0.3], 4).low is None


def test_a_change_where_nothing_changes_has_a_width() -> None:
    change = share_change([1.0] * 20, [1.0] * 20, 128)
    assert change.mean == 0.0
    assert change.low == pytest.approx(-(t_quantile(19) ** 2) / (20 + t_quantile(19) ** 2))


def test_the_jackknife_of_a_mean_is_its_t_interval() -> None:
    values = [1.0, 4.0, 2.0, 8.0]
    without = [statistics.fmean(values[:i] + values[i + 1 :]) for i in range(4)]
    assert jackknife(3.75, without) == pytest.approx(mean_interval(values))


@pytest.mark.parametrize("prompts", [20, 80])
def test_coverage(prompts: int) -> None:
    """128 answers, alike within a prompt: 95% of intervals of a mean, of a share and of the change
    of a share hold the truth; one that takes answers for independent holds it less often."""
    rng = random.Random(prompts)
    keys = [i % prompts for i in range(128)]
    draws = 1200
    hits = {"mean": 0, "share": 0, "change": 0, "naive": 0}
    for _ in range(draws):
        effects = [rng.gauss(0, 1) for _ in range(prompts)]
        chances = [rng.betavariate(6, 2) for _ in range(prompts)]
        values = [effects[k] + rng.gauss(0, 1) for k in keys]
        old = by_prompt(keys, [float(rng.random() < chances[k]) for k in keys])
        new = by_prompt(keys, [float(rng.random() < chances[k]) for k in keys])
        for name, interval, truth in (
            ("mean", mean_interval(by_prompt(keys, values)), 0.0),
            ("naive", mean_interval(values), 0.0),
            ("share", share_interval(old, 128), 0.75),
            ("change", share_change(old, new, 128), 0.0),
        ):
            assert interval.low is not None
            assert interval.high is not None
            hits[name] += interval.low <= truth <= interval.high
    for name in ("mean", "share", "change"):
        assert 0.93 < hits[name] / draws < 0.985, name
    if prompts == 20:
        assert hits["naive"] / draws < 0.85
