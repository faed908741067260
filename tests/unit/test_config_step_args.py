"""The step scripts' command lines: `deepspeed step1_sft/main.py --config resolved.json ...`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.config import load_config, resolve_step, step_config
from rlhf.config.load import parse_overrides
from rlhf.errors import ConfigError


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def resolved_file(directory: Path, step: int, *overrides: str) -> str:
    config = load_config(None, parse_overrides(overrides))
    resolved = resolve_step(config, step, run_dir=directory, parents={"sft": "/a", "reward": "/b"})
    path = directory / f"resolved{step}.json"
    path.write_text(json.dumps(resolved.model_dump(mode="json")))
    return str(path)


def test_the_drivers_file_is_read_as_it_is(tmp_path: Path) -> None:
    """DESIGN decision 2: resolve once, hand over the file."""
    path = resolved_file(tmp_path, 2, "step2.max_length=300")
    given = step_config(["--local_rank=0", "--config", path], 2)
    assert given.config.step2.max_length == 300
    assert given.parents == {"sft": "/a", "reward": "/b"}
    assert given.run_dir == str(tmp_path)


@pytest.mark.parametrize(
    "argv",
    [
        ["--learning_rate", "1e-5"],
        ["--learning-rate=1e-5"],
        ["--optim.learning_rate", "1e-5"],
        ["--step1.optim.learning-rate", "1e-5"],
        ["step1.optim.learning_rate=1e-5"],
        ["--local-rank", "1", "--learning_rate=1e-5"],
        ["--learning_rate", "1e-5", "--local_rank", "1"],
    ],
)
def test_any_setting_in_any_spelling(tmp_path: Path, argv: list[str]) -> None:
    """Flags are accepted in both spellings, by dotted path or by a name that is unique."""
    given = step_config(["--config", resolved_file(tmp_path, 1), *argv], 1)
    assert given.config.step1.optim.learning_rate == 1e-5


def test_flags_lists_and_shared_settings(tmp_path: Path) -> None:
    argv = ["--gradient_checkpointing", "--data.path", "a", "b", "--seed=7", "--rank", "4"]
    given = step_config(["--config", resolved_file(tmp_path, 1), *argv], 1).config
    assert given.step1.model.gradient_checkpointing is True
    assert (given.data.path, given.seed, given.step1.model.lora.rank) == (["a", "b"], 7, 4)


def test_the_steps_own_section_goes_first(tmp_path: Path) -> None:
    """`--max_length` means another setting in each step."""
    one = step_config(["--config", resolved_file(tmp_path, 1), "--max_length=400"], 1)
    two = step_config(["--config", resolved_file(tmp_path, 2), "--max_length=400"], 2)
    assert (one.config.step1.max_length, two.config.step2.max_length) == (400, 400)
    assert two.config.step1.max_length != 400


def test_an_ambiguous_name_lists_the_choices(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        step_config(["--config", resolved_file(tmp_path, 3), "--learning_rate", "1"], 3)
    assert "--step3.actor.optim.learning_rate, --step3.critic.optim.learning_rate" in str(
        caught.value
    )


def test_a_unique_suffix_ends_the_ambiguity(tmp_path: Path) -> None:
    argv = ["--config", resolved_file(tmp_path, 3), "--actor.optim.learning-rate", "0.5"]
    given = step_config(argv, 3).config.step3
    assert given.actor.optim.learning_rate == 0.5
    assert given.critic.optim.learning_rate != 0.5


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--learnin-rate", "1"], "did you mean --step1.optim.learning_rate"),
        (["--batch_size"], "takes one value, 0 were given"),
        (["--batch_size", "1", "2"], "takes one value, 2 were given"),
        (["--batch_size", "0"], "step1.train.batch_size = 0: it must be greater than 0"),
    ],
)
def test_mistakes(tmp_path: Path, argv: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        step_config(["--config", resolved_file(tmp_path, 1), *argv], 1)
    assert said in str(caught.value)


def test_a_word_before_all_flags(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'loose': not a setting"):
        step_config(["loose", "--config", resolved_file(tmp_path, 1)], 1)


def test_another_steps_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is for step 1: give step 2's resolved.json"):
        step_config(["--config", resolved_file(tmp_path, 1)], 2)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "no such file"), ("{", "not readable as JSON"), ("[]", "must be a mapping")],
)
def test_a_broken_file(tmp_path: Path, content: str | None, said: str) -> None:
    path = tmp_path / "resolved.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=said):
        step_config(["--config", str(path)], 1)


def test_without_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--config is missing"):
        step_config(["--seed", "1"], 1)


def test_a_recipe_will_do_with_its_parents(tmp_path: Path) -> None:
    """A script runs alone from a recipe: steps 2 and 3 are told their parents."""
    path = tmp_path / "r.yaml"
    path.write_text("name: alone\nstep1: {max_length: 300}\n")
    argv = ["--config", str(path), f"--output_dir={tmp_path}"]
    assert step_config(argv, 1).run_dir == str(tmp_path / "alone")
    with pytest.raises(ConfigError, match="step 3 also needs --sft and --reward"):
        step_config(argv, 3)
    given = step_config([*argv, "--sft", "/x", "--reward", "/y"], 3)
    assert given.parents == {"sft": "/x", "reward": "/y"}
    given = step_config([*argv, "--sft", "/x"], 2)
    assert given.config.step2.max_length == 300


def test_the_launchers_world_size_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started with other ranks than planned, the batch arithmetic is checked again."""
    path = resolved_file(tmp_path, 1, "step1.train.batch_size=32")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert step_config(["--config", path], 1).world_size == 4
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match="multiple of 3"):
        step_config(["--config", path], 1)
