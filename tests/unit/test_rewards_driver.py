"""What the driver makes of rewards that need no reward model: steps, plan, memory, checks."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.gate import find_parents
from launch.looking import _functions
from launch.model_checks import check_models
from launch.options import parse_options
from launch.plan import Plan, describe, make_plan
from rlhf.config.load import load_config, parse_overrides
from rlhf.errors import ConfigError
from rlhf.plan.read import read_shape
from rlhf.plan.roles import Ranks, Shapes, ppo_roles, shares_base
from rlhf.stages import PPO

FUNCTION = "step3.rewards=json:dumps"


def plan(tmp_path: Path, *arguments: str) -> Plan:
    return make_plan(parse_options(["--output-dir", str(tmp_path), *arguments], environ={}))


def test_step_2_is_left_out_where_no_term_needs_it(tmp_path: Path) -> None:
    assert parse_options([], environ={}).steps == [1, 2, 3]
    assert parse_options(["step3.rewards=[model, length]"], environ={}).steps == [1, 2, 3]
    made = plan(tmp_path, FUNCTION)
    assert [item.step for item in made.steps] == [1, 3]
    assert made.steps[1].resolved.parents.keys() == {"sft"}
    text = describe(made)
    assert "no term of step3.rewards is the reward model, so step 2 has no use" in text
    assert "data.split=4,0,6 gives it to step 3" in text
    assert "rewarded by json:dumps -> step3_ppo" in text
    without = describe(plan(tmp_path, FUNCTION, "data.split=4,0,6"))
    assert "gives it to step 3" not in without


def test_step_2_runs_where_it_is_asked_for(tmp_path: Path) -> None:
    made = plan(tmp_path, "--step", "1", "2", "3", FUNCTION)
    assert [item.step for item in made.steps] == [1, 2, 3]
    assert "has no use" not in describe(made)


def test_a_reward_model_that_nothing_reads_is_refused() -> None:
    flag = ["--reward-model", "tiny:opt"]
    with pytest.raises(ConfigError, match=r"nothing would read it: step3\.rewards is json:dumps"):
        parse_options([*flag, FUNCTION], environ={})
    assert parse_options([*flag, "--step", "2", FUNCTION], environ={}).reward_model == "tiny:opt"
    assert parse_options([*flag, "step3.rewards=[model, length]"], environ={}).reward_model


def test_step_3_alone_finds_no_reward_model_missing(tmp_path: Path) -> None:
    asked = ["--output-dir", str(tmp_path), "--step", "3", "--actor-model", "tiny:llama"]
    options = parse_options([*asked, FUNCTION, "--dry-run"], environ={})
    assert [parent.name for parent in find_parents(options, PPO, {})] == ["sft"]


def test_the_critic_is_checked_as_what_it_starts_from(tmp_path: Path) -> None:
    """GRPO has none; PPO's is the SFT model with a new head."""
    ppo = [check.found for check in check_models(plan(tmp_path, FUNCTION))]
    assert ppo == ["can be the base of step 1, step 3's policy, step 3's critic"]
    alone = plan(tmp_path, FUNCTION, "step3.algorithm=reinforce++")
    assert [check.found for check in check_models(alone)] == [
        "can be the base of step 1, step 3's policy"
    ]


def test_the_planner_has_no_reward_model(tmp_path: Path) -> None:
    small, large = read_shape("facebook/opt-125m"), read_shape("facebook/opt-1.3b")
    shapes, ranks = Shapes(small, large), Ranks(1, True)
    with_model = ppo_roles(load_config(None, {}), shapes, ranks)
    without = ppo_roles(load_config(None, parse_overrides([FUNCTION])), shapes, ranks)
    assert list(with_model) == ["actor", "reference", "reward", "critic"]
    assert list(without) == ["actor", "reference", "critic"]
    assert (with_model["critic"].shape, without["critic"].shape) == (large, small)
    lora = ["step2.model.lora.rank=8", "step3.actor.model.lora.rank=8"]
    lora += ["step3.critic.model.lora.rank=8"]
    assert shares_base(load_config(None, parse_overrides(lora)), on_cpu=True)
    assert not shares_base(load_config(None, parse_overrides([*lora, FUNCTION])), on_cpu=True)


def test_every_function_is_asked_about(tmp_path: Path) -> None:
    """One line for each; a name that is wrong does not hide the others."""
    rewards = "step3.rewards=[model, json:dumps, {use: length, label: a}, no_such:f]"
    checks = _functions(plan(tmp_path, rewards))
    assert [(check.what, check.state) for check in checks] == [
        ("step3.rewards", "FAIL"), ("step3.rewards", "ok"), ("step3.rewards", "FAIL"),
    ]  # fmt: skip
    assert "must be a function of (prompts, answers, ...)" in checks[0].found
    assert "no module 'no_such'" in checks[2].found
