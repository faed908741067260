"""Recipes, overrides and flags become one checked configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from launch.options import RECIPES
from rlhf.config import RunConfig, load_config
from rlhf.config.keys import leaves, lookup, nearest, parse_value
from rlhf.config.load import flatten, merge, nest, parse_overrides, read_recipe
from rlhf.config.schema import RolloutConfig
from rlhf.errors import ConfigError


def recipe(directory: Path, text: str, name: str = "recipe.yaml") -> Path:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


def load(*overrides: str) -> RunConfig:
    return load_config(None, parse_overrides(overrides))


def refusal(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*overrides)
    assert "pydantic" not in str(caught.value).lower()
    assert "Traceback" not in str(caught.value)
    return str(caught.value)


def test_later_layers_win(tmp_path: Path) -> None:
    """Recipe, then overrides, then flags; what none of them says is the default."""
    path = recipe(tmp_path, "seed: 1\nname: a\nstep3: {ppo: {kl_coef: 0.5, lam: 0.9}}\n")
    config = load_config(path, {"step3.ppo.kl_coef": 0.02, "seed": 2}, {"seed": 3})
    assert (config.seed, config.name) == (3, "a")
    assert (config.step3.ppo.kl_coef, config.step3.ppo.lam) == (0.02, 0.9)
    assert config.step3.ppo.clip == RunConfig().step3.ppo.clip


def test_extends_merges_mappings_and_replaces_lists(tmp_path: Path) -> None:
    """A recipe takes another one as its base, by a path beside it."""
    (tmp_path / "deep").mkdir()
    recipe(
        tmp_path, "data: {path: [a, b], split: [1, 1, 1]}\nstep1: {max_length: 300}", "base.yaml"
    )
    path = recipe(
        tmp_path / "deep",
        "extends: ../base.yaml\ndata: {path: [c]}\nstep1: {max_prompt_length: 99}",
    )
    config = load_config(path)
    assert config.data.path == ["c"]
    assert config.data.split == (1, 1, 1)
    assert (config.step1.max_length, config.step1.max_prompt_length) == (300, 99)


def test_extends_in_a_circle(tmp_path: Path) -> None:
    recipe(tmp_path, "extends: b.yaml", "a.yaml")
    recipe(tmp_path, "extends: a.yaml", "b.yaml")
    with pytest.raises(ConfigError, match=r"circle: a\.yaml -> b\.yaml -> a\.yaml"):
        load_config(tmp_path / "a.yaml")


def test_yaml_builds_no_objects(tmp_path: Path) -> None:
    """A recipe from a stranger runs no code."""
    marker = tmp_path / "ran"
    path = recipe(tmp_path, f"seed: !!python/object/apply:os.system ['touch {marker}']")
    with pytest.raises(ConfigError, match=r"recipe.yaml:1: .*python/object"):
        load_config(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2", "recipe.yaml:2: the key 'seed' is given twice, first in line 1"),
        ("seed: 1\n 2: [", "recipe.yaml:2"),
        ("1: 2", "the key 1 is not text"),
        ("- a\n- b", "a recipe is a mapping"),
        ("extends: nowhere.yaml", "nowhere.yaml: no such file"),
        ("extends: [a]", "must be one file name"),
        ("step1: 3", "step1: it must be a section"),
        ("step1: {optim: fast}", "step1.optim: it must be a section"),
    ],
)
def test_a_broken_recipe_says_where(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe(tmp_path, text))
    assert said in str(caught.value)


def test_an_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(recipe(tmp_path, "# nothing yet\n")) == RunConfig()


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("step1.train.bach_size", "step1.train.batch_size"),
        ("step3.kl_coef", "step3.ppo.kl_coef"),
        ("step3.ppo.kl_coeff", "step3.ppo.kl_coef"),
        ("step2.learning_rate", "step2.optim.learning_rate"),
        ("sead", "seed"),
        ("data.paths", "data.path"),
    ],
)
def test_an_unknown_key_names_the_nearest(tmp_path: Path, wrong: str, right: str) -> None:
    """STYLE 8: in an override and in a recipe alike."""
    assert f"unknown setting {wrong!r}. Did you mean {right!r}?" in refusal(f"{wrong}=1")
    tree = recipe(tmp_path, str(nest({wrong: 1})).replace("'", '"'))
    with pytest.raises(ConfigError) as caught:
        load_config(tree)
    assert f"{tree}: unknown setting {wrong!r}. Did you mean {right!r}?" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("step1.train.batch_size=0", "step1.train.batch_size = 0: it must be greater than 0"),
        ("step1.train.batch_size=1.5", "must be a whole number"),
        ("step1.train.batch_size=many", "'many': it must be a whole number"),
        ("step1.engine.zero_stage=5", "must be one of 0, 1, 2 or 3"),
        ("step3.algorithm=ppp", "must be one of 'ppo', 'grpo', 'rloo' or 'reinforce++'"),
        ("step2.margin=col", "must be a number, or must be one of 'column'"),
        ("step1.prompt_loss=maybe", "must be true or false"),
        ("seed=-1", "it must be 0 or more"),
        ("name=a b", "must match"),
        ("data.split=1,2", "too few values"),
        ("step1=3", "'step1' is a section"),
        ("step1.max_length=4", "leaves no room for an answer in max_length 4"),
        ("step1.engine.offload=cpu", "needs zero_stage 1, 2 or 3"),
        ("step3.algorithm=grpo", "samples_per_prompt must be 2 or more, it is 1"),
        ("launch.master_port=www", "must be a whole number, or must be one of 'auto'"),
    ],
)
def test_a_bad_value_says_value_and_rule(override: str, said: str) -> None:
    """STYLE 15: no validator's jargon."""
    assert said in refusal(override)


def test_a_bad_value_says_what_the_setting_means() -> None:
    said = refusal("step1.train.batch_size=0")
    assert "Rows per optimiser step, over all ranks. Default: 32." in said


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    path = recipe(tmp_path, "seed: -1\nstep1: {train: {batch_size: 0, x: 1}}")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert len(str(caught.value).splitlines()) == 3


def test_the_error_names_the_flag() -> None:
    with pytest.raises(ConfigError, match=r"^--seed: seed = -1"):
        load_config(None, {}, {"seed": -1}, {"seed": "--seed"})


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("step1.optim.learning_rate=1e-4", 1e-4),
        ("step1.optim.betas=0.9,0.99", (0.9, 0.99)),
        ("step1.train.max_steps=null", None),
        ("step1.engine.zero_stage=3", 3),
        ("step1.model.name=007", "007"),
        ("step1.model.lora.target_modules=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("step1.model.lora.target_modules=all-linear", "all-linear"),
        ("step1.engine.offload=none", "none"),
        ("step2.margin=0.5", 0.5),
        ("step2.margin=column", "column"),
        ("step2.group_by_prompt=false", False),
        ("step3.rollout.stop=END", ["END"]),
        ("launch.master_port=29600", 29600),
        ("track.trackers=wandb", ["wandb"]),
        ("track.trackers=auto", "auto"),
        ("data.path=a.json", ["a.json"]),
        ("data.path=[a.json, b.json]", ["a.json", "b.json"]),
        ("data.columns.prompt=question", "question"),
        ("data.columns={prompt: question}", {"prompt": "question"}),
        ("data.response_format= {text}", " {text}"),
    ],
)
def test_values_from_text(override: str, value: object) -> None:
    """The command line's text becomes the setting's type."""
    name = override.split("=")[0]
    assert flatten(load(override).model_dump()).get(name, load(override).data.columns) == value


@pytest.mark.parametrize(
    ("given", "name"),
    [("1.3b", "facebook/opt-1.3b"), ("350m", "facebook/opt-350m"), ("66B", "facebook/opt-66b")],
)
def test_a_bare_size_is_opt(given: str, name: str) -> None:
    """C2."""
    assert load(f"step1.model.name={given}").step1.model.name == name
    assert load(f"step3.actor.model.name={given}").step3.actor.model.name == name


def test_other_names_stay() -> None:
    for name in ("gpt2", "facebook/opt-1.3b", "./1.3b", "tiny:llama", "13bb"):
        assert load(f"step1.model.name={name}").step1.model.name == name


def test_two_devices_mean_this_machine() -> None:
    """`--num-gpus 2` alone is no contradiction; written out it is one."""
    assert load("launch.num_gpus=2").launch.deployment_type == "single_node"
    said = refusal("launch.num_gpus=2", "launch.deployment_type=single_gpu")
    assert "use --deployment-type single_node" in said


@pytest.mark.parametrize(
    "override",
    [
        "hub.endpoint=https://me:secret@mirror.example",
        "data.path=s3://key:secret@bucket/rows.json",
        "step1.model.name=https://me:secret@host/model",
    ],
)
def test_no_password_enters_a_configuration(override: str) -> None:
    """Y6: it would be written to the run's files; nor is it repeated in the message."""
    said = refusal(override)
    assert "secret" not in said
    assert "environment" in said


def test_every_recipe_loads() -> None:
    """Every recipe in launch/recipes is read by the default test run."""
    found = sorted(RECIPES.glob("*.yaml"))
    assert RECIPES / "tiny_cpu.yaml" in found
    for path in found:
        load_config(path)


def test_nearest_prefers_the_last_part() -> None:
    assert nearest("clip", leaves())[0] in ("step3.ppo.clip", "step3.ppo.score_clip")
    assert nearest("zzzzqqqq", leaves()) == []


def test_all_leaves_are_documented() -> None:
    """STYLE 8: each field explains itself."""
    assert all(key.doc for key in leaves().values())
    assert lookup("data.columns.prompt") is leaves()["data.columns"]
    assert lookup("data.columns.prompt.x") is None


json_trees = st.recursive(
    st.dictionaries(st.sampled_from("abc"), st.integers(), min_size=1, max_size=3),
    lambda below: st.dictionaries(st.sampled_from("abc"), below, min_size=1, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(json_trees, json_trees)
def test_merge_is_the_later_one_where_both_speak(first: dict, second: dict) -> None:
    merged = merge(first, second)
    for key, value in flatten(second).items():
        assert flatten(merged)[key] == value
    assert nest(flatten(first)) == first
    assert merge(first, {}) == first


def test_numbers_survive_the_command_line() -> None:
    """Every default, printed and read back, is itself."""
    config = RunConfig().model_dump()
    for name, value in flatten(config).items():
        if isinstance(value, (int, float, str, bool)):
            parsed = parse_value(str(value), leaves()[name])
            changed = load_config(None, {name: parsed})
            assert flatten(changed.model_dump())[name] == value, name


def test_origins_follow_the_file(tmp_path: Path) -> None:
    base = recipe(tmp_path, "seed: -1", "base.yaml")
    path = recipe(tmp_path, "extends: base.yaml\nname: x")
    _, origins = read_recipe(path)
    assert origins == {"seed": str(base), "name": str(path)}


def test_kernels_are_the_hybrid_engines() -> None:
    assert RolloutConfig(engine="hybrid", hybrid_kernels=True).hybrid_kernels
    with pytest.raises(ValueError, match=r"does nothing with 'continuous'.*set engine hybrid"):
        RolloutConfig(hybrid_kernels=True)


def test_an_importance_cap_needs_an_engine_that_rounds_differently() -> None:
    vllm = {"engine": "vllm", "importance_cap": 2.0}
    assert RolloutConfig(**vllm).importance_cap == 2.0
    for wrong, said in (
        ({"importance_cap": 2.0}, "samples with the policy itself"),
        (vllm | {"importance_cap": 0.5}, "greater than or equal to 1"),
    ):
        with pytest.raises(ValidationError, match=said):
            RolloutConfig(**wrong)


@pytest.mark.parametrize("scheme", ["abfs", "abfss", "ABFS", "wasbs", "az"])
def test_a_container_is_no_user(scheme: str) -> None:
    """Azure's URLs name a container and an account; a password still has no place in them."""
    url = f"{scheme}://box-1@account.dfs.core.windows.net/d/x.jsonl"
    assert load_config(None, {"data.path": url}).data.path == [url]
    for refused in (url.replace("box-1", "me:pass"), url.replace("box-1", "a@b"),
                    url.replace(scheme, "https"), f"s3://me@{scheme}/x"):  # fmt: skip
        with pytest.raises(ConfigError, match="a user name or password in a URL"):
            load_config(None, {"data.path": refused})
