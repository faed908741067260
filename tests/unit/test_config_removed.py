"""Settings that are gone, and the settings of the KL term that took their place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.config import load_config, step_config
from rlhf.config.keys import leaves
from rlhf.config.load import parse_overrides
from rlhf.config.removed import REMOVED
from rlhf.errors import ConfigError
from tests.unit.test_config_step_args import resolved_file


def config(*overrides: str):  # type: ignore[no-untyped-def]
    return load_config(None, parse_overrides(overrides))


def test_a_removed_setting_says_what_to_type(tmp_path: Path) -> None:
    """On the driver's and a step's command line, in a recipe, in an old resolved.json."""
    said = "no longer a setting: .*step3.ppo.kl_loss=k2"
    with pytest.raises(ConfigError, match=said):
        config("step3.ppo.kl_estimator=k3")
    recipe = tmp_path / "old.yaml"
    recipe.write_text("step3:\n  ppo:\n    kl_estimator: k3\n")
    with pytest.raises(ConfigError, match=r"old\.yaml: .*" + said):
        load_config(recipe)
    recipe.write_text("step3:\n  ppo:\n    kl_estimator: k1\n")  # its old default: it says nothing
    load_config(recipe)
    file = resolved_file(tmp_path, 3)
    with pytest.raises(ConfigError, match=said):
        step_config(["--config", file, "--kl_estimator", "k2"], 3)
    content = json.loads(Path(file).read_text())
    content["config"]["step3"]["ppo"]["kl_estimator"] = "k3"
    Path(file).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=said):
        step_config(["--config", file], 3)


@pytest.mark.parametrize("name", ["top_k=5", "top-p=0.9"])
def test_filters_are_refused_in_training(name: str) -> None:
    """ALGORITHM 14: the policy that samples is the policy that is scored."""
    with pytest.raises(ConfigError, match=r"Sharpen with step3\.rollout\.temperature"):
        config(f"step3.rollout.{name}")


def test_the_table_is_of_settings_that_are_gone() -> None:
    assert not REMOVED.keys() & leaves().keys()


@pytest.mark.parametrize(
    ("algorithm", "kl_in", "place"),
    [("ppo", None, "reward"), ("rloo", None, "reward"), ("reinforce++", None, "reward"),
     ("grpo", None, "loss"), ("grpo", "reward", "reward"), ("ppo", "loss", "loss")],
)  # fmt: skip
def test_where_the_kl_counts(algorithm: str, kl_in: str | None, place: str) -> None:
    """ALGORITHM 22, 37, 44: the algorithm's own place, or the one that is asked for."""
    given = [f"step3.algorithm={algorithm}", "step3.rollout.samples_per_prompt=2"]
    given += [f"step3.ppo.kl_in={kl_in}"] if kl_in else []
    assert config(*given).step3.kl_place == place


def test_a_loss_weight_hides_no_target() -> None:
    """A set kl_loss_coef would be used in place of the coefficient that kl_target adapts."""
    grpo = ("step3.algorithm=grpo", "step3.rollout.samples_per_prompt=2")
    target = "step3.ppo.kl_target=6"
    assert config(*grpo, target).step3.ppo.kl_loss_coef is None
    for weight in ("0", "0.1"):
        with pytest.raises(ConfigError, match="could not adapt it"):
            config(*grpo, target, f"step3.ppo.kl_loss_coef={weight}")
    # With the KL in the reward, kl_target adapts that one; a loss beside it is another term.
    both = config(*grpo, target, "step3.ppo.kl_in=reward", "step3.ppo.kl_loss_coef=0.1")
    assert both.step3.kl_place == "reward"
