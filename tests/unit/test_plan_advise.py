"""What the planner advises fits when it is done, and is what was to be expected."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config.load import load_config, parse_overrides, with_values
from rlhf.config.schema import RunConfig
from rlhf.plan import report
from rlhf.plan.advise import METHOD, Machine, advise, apply, fastest, fits, possible, time_with
from rlhf.plan.hardware import gpu_speeds
from rlhf.plan.known import known_config
from rlhf.plan.memory import step_memory
from rlhf.plan.roles import Ranks, Shapes
from rlhf.plan.shapes import shape_of
from rlhf.plan.time import step_time
from rlhf.stages import PPO, SFT, get

SPEEDS = gpu_speeds("a100-80g")


def shapes(name: str) -> Shapes:
    shape = shape_of(known_config(name) or {})
    return Shapes(shape, shape)


def machine(world: int = 8, memory: float = 80e9, host: float | None = None) -> Machine:
    return Machine(Ranks(world, False, min(world, 8)), SPEEDS, memory, host)


def followed(config: RunConfig, texts: list[str]) -> RunConfig:
    """The settings as a user would give them: checked by the schema."""
    return with_values(config, parse_overrides(texts))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["facebook/opt-1.3b", "facebook/opt-6.7b", "meta-llama/Llama-3.1-8B"]),
    step=st.sampled_from([1, 2, 3]),
    world=st.sampled_from([1, 8, 64]),
    memory=st.sampled_from([16e9, 24e9, 48e9, 80e9]),
)
def test_advice_fits_when_it_is_followed(name: str, step: int, world: int, memory: float) -> None:
    config = load_config(None, {"step1.train.batch_size": 64, "step2.train.batch_size": 64})
    place = machine(world, memory)
    found = report.plan_step(config, get(step), shapes(name), place)
    if found.fits or found.changes is None:
        return
    changed = followed(config, report.settings(found.changes))
    again = report.plan_step(changed, get(step), shapes(name), place)
    assert again.fits
    assert found.after is not None
    assert again.memory.peak == found.after.peak
    # No single change would have done where several are advised, of the same cost.
    cost = max(change.cost for change in found.changes)
    for single in possible(config, get(step), place):
        if single.cost <= cost and len(found.changes) > 1:
            memory_with = step_memory(apply(config, [single]), get(step), shapes(name), place.ranks)
            assert not fits(memory_with, place)


def test_changes_that_cost_only_time_come_first() -> None:
    """6.7B on 8 x 48 GB: sharding does it. Alone on 40 GB with little RAM, only adapters do."""
    config = load_config(None)
    changes = advise(config, SFT, shapes("facebook/opt-6.7b"), machine(8, 48e9))
    assert changes is not None
    assert [change.kind for change in changes] == ["zero"]
    alone = advise(config, SFT, shapes("facebook/opt-6.7b"), machine(1, 40e9, host=30e9))
    assert alone is not None
    assert any(change.cost == METHOD for change in alone)


def test_among_equals_the_fastest_is_advised() -> None:
    config = load_config(None)
    place, names = machine(8, 80e9), shapes("facebook/opt-6.7b")
    changes = advise(config, SFT, names, place)
    assert changes is not None
    chosen = time_with(config, SFT, names, place, changes).seconds
    for other in possible(config, SFT, place):
        with_other = step_memory(apply(config, [other]), SFT, names, place.ranks)
        if other.cost == 0 and fits(with_other, place):
            assert chosen <= time_with(config, SFT, names, place, [other]).seconds


def test_the_fastest_way_may_need_no_change() -> None:
    config = load_config(None)
    small = shapes("facebook/opt-125m")
    assert fastest(config, SFT, small, machine(8, 80e9)) is not None
    tight = machine(64, 80e9)
    found = fastest(config, PPO, shapes("facebook/opt-13b"), tight)
    assert found is not None
    with_it = step_memory(apply(config, found), PPO, shapes("facebook/opt-13b"), tight.ranks)
    assert fits(with_it, tight)


def test_what_cannot_fit_is_said_with_its_reason() -> None:
    """66B in bfloat16 are 132 GB, and vLLM has them whole on each rank."""
    place = machine(64, 80e9)
    config = load_config(None, {"step3.rollout.engine": "vllm"})
    found = report.plan_step(config, PPO, shapes("facebook/opt-66b"), place)
    assert not found.fits
    assert found.changes is None
    text = " ".join(report.lines(found, place))
    assert "DOES NOT FIT" in text
    assert "nothing makes it fit" in text
    assert report.as_json(found)["change"] is None


def test_every_change_is_a_setting_and_saves_something() -> None:
    config = load_config(None, {"step1.train.batch_size": 64, "step2.train.batch_size": 64})
    for step, world in itertools.product((1, 2, 3), (1, 8)):
        place, names = machine(world), shapes("facebook/opt-1.3b")
        before = step_memory(config, get(step), names, place.ranks)
        for change in possible(config, get(step), place):
            changed = followed(config, report.settings([change]))
            assert changed != config
            after = step_memory(changed, get(step), names, place.ranks)
            lower = any(
                after.moments[at].total < parts.total for at, parts in before.moments.items()
            )
            assert lower, f"step {step} on {world}: {change.words} saves nothing"


def test_unknown_memory_is_no_obstacle() -> None:
    place = Machine(Ranks(1, True), SPEEDS)
    found = report.plan_step(load_config(None), SFT, shapes("facebook/opt-13b"), place)
    assert found.fits
    assert not report.hopeless(found, place)
    assert report.lines(found, place)[0].startswith("memory ")


@pytest.mark.parametrize(("value", "text"), [(12.34e9, "12.3 GB"), (5e6, "5 MB"), (2e12, "2 TB")])
def test_sizes_in_words(value: float, text: str) -> None:
    assert report.size(value) == text


ZERO3 = {f"step3.{place}.zero_stage": 3
         for place in ("actor.engine", "critic.engine", "reference_engine")}  # fmt: skip


def test_layer_by_layer_needs_no_whole_policy() -> None:
    """By hand, 66B in bfloat16 on 64: the whole and what is repacked, or DeepSpeed's 1e9 elements;
    every token of every turn then sends all weights."""
    names, ranks = shapes("facebook/opt-66b"), Ranks(64, False, 8)
    whole, layers = (
        load_config(None, {**ZERO3, "step3.rollout.gather": how}) for how in ("always", "never")
    )
    at = [step_memory(config, PPO, names, ranks).moments["generate"] for config in (whole, layers)]
    shape = names.actor
    repacked = 2 * shape.layers * sum(linear.size for linear in shape.linears[:3])
    assert at[0].total - at[1].total == 2 * shape.causal + repacked - 2 * 1e9
    sent = [step_time(c, PPO, names, ranks, SPEEDS).sent for c in (whole, layers)]
    answer, turns = whole.step3.rollout.max_new_tokens, 1
    once = 2 * shape.causal * 63 / 64
    assert sent[1] - sent[0] == pytest.approx((answer * turns - 1) * once)


def test_auto_is_planned_as_it_decides() -> None:
    """Whole where that fits the device, else layer by layer: then no change is needed."""
    config, names = load_config(None, ZERO3), shapes("facebook/opt-66b")
    place = machine(64, 80e9)
    assert not fits(step_memory(config, PPO, names, place.ranks), place)
    found = report.plan_step(config, PPO, names, place)
    assert found.fits
    always = load_config(None, {**ZERO3, "step3.rollout.gather": "always"})
    refused = report.plan_step(always, PPO, names, place)
    assert not refused.fits
    assert refused.changes is not None
    assert [c.words for c in refused.changes] == ["the policy gathered layer by layer"]
    small = shapes("facebook/opt-125m")
    whole = step_memory(config, PPO, small, place.ranks)
    assert report.plan_step(config, PPO, small, place).memory == whole
