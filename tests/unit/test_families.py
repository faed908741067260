"""One file per model family, with everything that is special about it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import rlhf.families
from rlhf.errors import ConfigError
from rlhf.families import FAMILIES, TINY_FAMILIES, tiny_settings

SHARED = {"__init__", "family", "shape", "gated", "scaled"}
OWN_FILE = sorted(
    path.stem
    for path in Path(rlhf.families.__file__).parent.glob("*.py")
    if path.stem not in SHARED
)


def test_every_file_is_a_family_and_in_the_table() -> None:
    assert "phi" in OWN_FILE
    assert [name for name in OWN_FILE if FAMILIES[name].model_type != name] == []
    alone = {name for name, family in FAMILIES.items() if family.shape or family.tiny}
    assert alone == set(OWN_FILE)


@pytest.mark.parametrize("name", OWN_FILE)
def test_what_a_file_names_is_in_transformers(name: str) -> None:
    family = FAMILIES[name]
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name] == family.causal_class
    if family.shape:
        assert family.saved is not None, "the planner counts what its layers keep"
    settings = tiny_settings("llama") if family.tiny is None else tiny_settings(name)
    config = AutoConfig.for_model(**{**settings, "model_type": name})
    model = AutoModelForCausalLM.from_config(config)
    assert type(model).__name__ == family.causal_class
    layers = [part for part in model.modules() if type(part).__name__ == family.layer_class]
    assert len(layers) == 2
    if family.parts:
        parts = family.parts
        layers[0].get_submodule(parts.attention).get_submodule(parts.out)
        layers[0].get_submodule(parts.enter)
        layers[0].get_submodule(parts.leave)


def test_the_table_needs_no_torch() -> None:
    code = "import sys, rlhf.families; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_family_without_a_tiny_model_says_which_there_are() -> None:
    with pytest.raises(ConfigError, match=r"tiny:cohere: no such family; choose one of llama"):
        tiny_settings("cohere")
    assert "phi" in TINY_FAMILIES
