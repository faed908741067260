"""Text typed in a shell: escapes are read where a setting holds text, and survive the records."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.options import parse_options
from rlhf.config import load_config, resolve_step
from rlhf.config.escapes import TEXT_SETTINGS, unescaped
from rlhf.config.keys import leaves
from rlhf.config.load import parse_overrides
from rlhf.config.schema import RunConfig
from rlhf.config.show import config_yaml
from rlhf.config.step_args import step_config
from rlhf.errors import ConfigError
from rlhf.stages import SFT

TYPED = r"\n\nHuman: {instruction}\n\nAssistant:"
MEANT = "\n\nHuman: {instruction}\n\nAssistant:"


@pytest.mark.parametrize(
    "argv",
    [
        [f"data.prompt_format={TYPED}"],
        [f"--data.prompt_format={TYPED}"],
        ["--data.prompt-format", TYPED],
    ],
)
def test_backslash_n_is_a_line_break(argv: list[str]) -> None:
    assert parse_options(argv, {}).config.data.prompt_format == MEANT


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"step3.rollout.stop=\n\nHuman:", ["\n\nHuman:"]),
        (r"step3.rollout.stop=[\n\nHuman, '\n', '# ']", ["\n\nHuman", r"\n", "# "]),
        (r'step3.rollout.stop=["\nHuman:", "a\\n"]', ["\nHuman:", r"a\n"]),
    ],
)
def test_stop_strings(typed: str, meant: list[str]) -> None:
    """Plain ones have escapes; inside YAML's quotes YAML's rules hold."""
    assert load_config(None, parse_overrides([typed])).step3.rollout.stop == meant


def test_a_step_script_reads_the_same(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: x\n")
    argv = ["--config", str(recipe), "--sft", "a/b", "--reward", "a/c"]
    config = step_config([*argv, "--prompt_format", TYPED, "--stop", r"\n", r"\t#"], 3).config
    assert (config.data.prompt_format, config.step3.rollout.stop) == (MEANT, ["\n", "\t#"])


@pytest.mark.parametrize("wrong", [r"a\q", r"\x4", r"\ud800", r"\U00110000", "end\\"])
def test_what_is_no_escape_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="double it"):
        parse_overrides([f"data.response_format={wrong}"])


@pytest.mark.parametrize(
    "name", ["data.path", "output_dir", "step1.model.lora.target_modules", "data.cache_dir"]
)
def test_paths_and_patterns_keep_their_backslashes(name: str) -> None:
    typed = r"C:\new\table.jsonl"
    value = parse_overrides([f"{name}={typed}"])[name]
    assert value in (typed, [typed])


def test_text_settings_exist() -> None:
    assert set(leaves()) >= TEXT_SETTINGS


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_as_yaml_double_quotes(text: str) -> None:
    """What YAML writes inside double quotes is read as YAML reads it."""
    quoted = yaml.safe_dump(text, default_style='"', width=10**6).removesuffix("\n")
    assert unescaped(quoted[1:-1], "x") == text


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.lists(TEXTS, max_size=3))
def test_print_config_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, text: str, stop: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("printed")
    asked = {"data.response_format": "{text}" + text, "step3.rollout.stop": stop}
    try:
        config = load_config(None, asked)
    except ConfigError:
        return  # an empty stop string, say
    path = folder / "printed.yaml"
    path.write_text(config_yaml(config), encoding="utf-8")
    again = load_config(path)
    assert again.model_dump() == config.model_dump()
    assert config_yaml(again) == config_yaml(config)


def test_the_records_hold_the_text(tmp_path: Path) -> None:
    config = load_config(None, parse_overrides([f"data.prompt_format={TYPED}"]))
    resolved = resolve_step(config, 1, run_dir=tmp_path)
    content = json.loads(json.dumps(resolved.model_dump(mode="json")))
    assert RunConfig(**content["config"]).data.prompt_format == MEANT


def test_the_command_to_type_next_means_the_same() -> None:
    argv = [f"data.prompt_format={TYPED}"]
    command = parse_options(argv, {}).command(SFT)
    assert re.search(r"'data.prompt_format=\\n\\nHuman", command)
