"""What a step's processes get: inherited values, batches that fit, absolute paths."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.options import parser
from rlhf.config import ResolvedStep, RunConfig, load_config, resolve_step
from rlhf.config.load import flatten, parse_overrides
from rlhf.config.resolve import (
    accumulation,
    check_batches,
    describe_inherited,
    section_of,
)
from rlhf.config.show import config_yaml, json_schema
from rlhf.errors import ConfigError
from rlhf.stages import REWARD, SFT, STAGES, get

OWN = {"sft": "/run/step1_sft/artifact", "reward": "/run/step2_reward/artifact"}


def load(*overrides: str) -> RunConfig:
    return load_config(None, parse_overrides(overrides))


def test_unset_lengths_come_from_the_same_run(tmp_path: Path) -> None:
    """STYLE 10: steps run together inherit from this run's own section."""
    resolved = resolve_step(
        load("step1.max_length=512", "step1.max_prompt_length=200"),
        2,
        run_dir=tmp_path,
        parents={"sft": OWN["sft"]},
        parent_configs={"sft": None},
    )
    assert resolved.config.step2.max_length == 512
    assert resolved.inherited == {
        "step2.max_prompt_length": "step 1",
        "step2.max_length": "step 1",
    }
    assert describe_inherited(resolved) == [
        "step2.max_prompt_length = 200 (inherited from step 1)",
        "step2.max_length = 512 (inherited from step 1)",
        f"step2.model.name = {OWN['sft']} (inherited from step 1)",
    ]


def test_the_parents_manifest_goes_before_this_recipe(tmp_path: Path) -> None:
    """STYLE 10: parents have memory; what was trained with 100 is not continued with 256."""
    manifest = {
        "step1": {"max_prompt_length": 100, "max_length": 300},
        "data": {"template": "chatml"},
    }
    resolved = resolve_step(
        load(), 3, run_dir=tmp_path, parents=OWN, parent_configs={"sft": manifest, "reward": {}}
    )
    assert resolved.config.step3.rollout.max_prompt_length == 100
    assert resolved.config.data.template == "chatml"
    assert "data.template = chatml (inherited from step 1)" in describe_inherited(resolved)


def test_a_value_that_is_set_is_not_inherited(tmp_path: Path) -> None:
    manifest = {
        "step1": {"max_prompt_length": 100, "max_length": 300},
        "data": {"template": "chatml"},
    }
    config = load("step2.max_length=77", "step2.max_prompt_length=7", "data.template=model")
    resolved = resolve_step(
        config, 2, run_dir=tmp_path, parents=OWN, parent_configs={"sft": manifest}
    )
    assert (resolved.config.step2.max_length, resolved.config.data.template) == (77, "model")
    assert resolved.inherited == {}


def test_a_foreign_parent_has_no_settings(tmp_path: Path) -> None:
    resolved = resolve_step(load(), 3, run_dir=tmp_path, parents={"sft": "gpt2", "reward": "x/y"})
    assert resolved.config.step3.rollout.max_prompt_length == RunConfig().step1.max_prompt_length
    assert resolved.inherited == {"step3.rollout.max_prompt_length": "the step 1 section"}


def test_an_inherited_value_that_does_not_fit_says_where_it_is_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_step(load("step2.max_length=64"), 2, run_dir=tmp_path)
    assert "max_prompt_length 256 leaves no room" in str(caught.value)
    assert "step2.max_prompt_length = 256 (inherited from" in str(caught.value)


def test_the_tables_name_settings_that_exist() -> None:
    names = flatten(RunConfig().model_dump())
    for stage in STAGES.values():
        for key, (_, source) in stage.inherits.items():
            assert key in names
            assert source in names
        own = [stage.batch, stage.micro_batch, *stage.model_from]
        own += [f"{stage.model}.name", *([stage.base] if stage.base else [])]
        own += [one for need in stage.needs for one in (need.named_by, need.spared_by) if one]
        assert set(own) <= set(names)
        flags = {"", stage.zero_flag, stage.model_flag} - {""}
        assert flags <= set(parser()._option_string_actions)


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C1: a run means the same from any directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").touch()
    (tmp_path / "model").mkdir()
    config = load("data.path=[rows.json, org/name]", "step1.model.name=model")
    resolved = resolve_step(config, 1, run_dir=Path("out"))
    assert resolved.config.data.path == [str(tmp_path / "rows.json"), "org/name"]
    assert resolved.config.step1.model.name == str(tmp_path / "model")
    assert resolved.run_dir == str(tmp_path / "out")


def test_resolved_json_is_read_back_whole(tmp_path: Path) -> None:
    resolved = resolve_step(load("step1.train.max_steps=3"), 1, run_dir=tmp_path)
    again = ResolvedStep.model_validate(json.loads(json.dumps(resolved.model_dump(mode="json"))))
    assert again == resolved


@pytest.mark.parametrize(
    ("overrides", "step", "world", "said"),
    [
        (("step1.train.batch_size=32",), 1, 5, "use step1.train.batch_size=30 or 35"),
        (("step2.train.batch_size=2",), 2, 4, "use step2.train.batch_size=4"),
        (("step3.rollout.prompts=9",), 3, 2, "use step3.rollout.prompts=8 or 10"),
        (
            ("step3.rollout.prompts=12", "step3.ppo.minibatches=4"),
            3,
            2,
            "3 answers per PPO minibatch",
        ),
    ],
)
def test_a_batch_that_does_not_divide(
    overrides: tuple[str, ...], step: int, world: int, said: str
) -> None:
    """ALGORITHM 30 needs whole shares: refused, with the numbers that would do."""
    with pytest.raises(ConfigError) as caught:
        check_batches(load(*overrides), get(step), world)
    assert said in str(caught.value)
    check_batches(load(*overrides), get(step), 1)


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 200), st.integers(1, 16), st.integers(1, 40))
def test_the_advice_is_good_advice(rows: int, world: int, micro: int) -> None:
    """Each number that the refusal names is accepted; accumulation covers the batch, just."""
    config = load(f"step1.train.batch_size={rows}", f"step1.train.micro_batch_size={micro}")
    try:
        check_batches(config, SFT, world)
    except ConfigError as error:
        assert rows % world
        advice = str(error).split("batch_size=")[1].split(",")[0].split(" or ")
        for number in advice:
            check_batches(load(f"step1.train.batch_size={number}"), SFT, world)
        return
    passes = accumulation(config, SFT, world)
    assert passes * micro * world >= rows > (passes - 1) * micro * world


def test_what_makes_a_step_another_one() -> None:
    """Its own section, data and seed count; where and how it runs does not."""
    base = section_of(load().model_dump(), REWARD)
    for same in ("launch.num_gpus=2", "name=x", "step1.max_length=300", "data.cache_dir=/c"):
        assert section_of(load(same).model_dump(), REWARD) == base
    for other in ("seed=1", "data.split=1,1,1", "step2.loss=token_wise"):
        assert section_of(load(other).model_dump(), REWARD) != base


def test_printed_yaml_is_the_same_configuration(tmp_path: Path) -> None:
    """--print-config gives a recipe; each setting stands under its documentation."""
    config = load("step1.model.name=1.3b", "data.columns.prompt=q", "step3.rollout.stop=\nA: #")
    path = tmp_path / "all.yaml"
    path.write_text(config_yaml(config), encoding="utf-8")
    assert load_config(path) == config
    lines = path.read_text(encoding="utf-8").splitlines()
    at = lines.index("    kl_coef: 0.05")
    assert (
        lines[at - 1]
        == "    # Weight of the KL to the reference (first value if adaptive); 0: none."
    )
    assert set(flatten(yaml.safe_load(path.read_text()))) == set(flatten(config.model_dump()))


def test_json_schema_knows_all_keys() -> None:
    schema = json.loads(json_schema())
    assert schema["properties"].keys() == {*RunConfig.model_fields, "extends"}
    assert schema["additionalProperties"] is False
    batch = schema["$defs"]["TrainConfig"]["properties"]["batch_size"]
    assert batch["description"] == "Rows per optimiser step, over all ranks."
