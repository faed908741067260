"""Tiny models: deterministic, loadable with plain transformers, byte-exact tokenizers (row D4)."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.data.courtesy import rows
from rlhf.errors import ConfigError
from rlhf.families import TINY_FAMILIES, TINY_SIZE
from rlhf.models.tiny import build_tiny, train_tokenizer

ROWS = rows("train", pairs=400)
TEXTS = [row["prompt"] + row[side] for row in ROWS for side in ("chosen", "rejected")]
SMALL = {"hidden": 32, "layers": 1, "heads": 2, "mlp": 48, "positions": 64}
ODD = "\n\nHuman: Hi!  it's  \u00e9\u4f60\U0001f600 <eos \t\n\nAssistant: 'tis 12,345 don't , ok ."


def digests(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


@pytest.fixture(scope="module", params=TINY_FAMILIES)
def made(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    build_tiny(request.param, TEXTS, directory, seed=0)
    return request.param, directory


def test_loads_with_plain_transformers(made):
    """D4: Auto classes load it; the tokenizer is the one that was saved, byte for byte."""
    family, directory = made
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert family.replace("_", "") in type(model).__name__.lower()
    assert len(tokenizer) == model.get_input_embeddings().weight.shape[0] == model.config.vocab_size
    trained = train_tokenizer(TEXTS, 1024, 512)
    for text in [ODD, *TEXTS[:50]]:
        ids = tokenizer(text).input_ids
        assert ids == trained(text).input_ids
        assert tokenizer.decode(ids) == text


def test_special_tokens_are_distinct(made):
    """ALGORITHM 1, 2: pad is not eos; eos is one id; nothing is added by itself."""
    _, directory = made
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids == (0, 1, 2)
    assert tokenizer("<eos>").input_ids == [2]
    assert tokenizer.padding_side == "left"
    assert not set(ids) & set(tokenizer(ODD).input_ids)
    model = AutoModelForCausalLM.from_pretrained(directory)
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == ids


def test_size_ties_and_dropout(made):
    """About half a million weights; embeddings tied; ALGORITHM 18: dropout is 0."""
    _, directory = made
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert 400_000 < sum(p.numel() for p in model.parameters()) < 600_000
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.weight.data_ptr() == embeddings.weight.data_ptr()
    drops = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert not any(drops)
    settings = {k: v for k, v in model.config.to_dict().items() if "drop" in k or "pdrop" in k}
    assert not any(settings.values()), settings
    ids = torch.arange(3, 35)[None]
    model.train()
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_generates_with_left_padding(made):
    """Padded and unpadded rows get the same next-token scores (ALGORITHM 13's tolerance)."""
    _, directory = made
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    prompts = ["\n\nHuman: Hi!\n\nAssistant:", ROWS[0]["prompt"]]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    assert (batch.input_ids[0] == 0).any()
    out = model.generate(
        **batch, max_new_tokens=3, output_logits=True, return_dict_in_generate=True
    )
    for i, prompt in enumerate(prompts):
        alone = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
        torch.testing.assert_close(out.logits[0][i], alone, atol=1e-5, rtol=1e-5)


def test_initial_loss_is_near_uniform(made):
    """A sane start: cross-entropy within 15% of log(vocabulary)."""
    _, directory = made
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = torch.tensor([tokenizer(TEXTS[0]).input_ids])
    loss = model(ids, labels=ids).loss.item()
    assert loss == pytest.approx(torch.log(torch.tensor(float(len(tokenizer)))).item(), rel=0.15)


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        build_tiny("llama", iter(TEXTS), tmp_path / name, seed=seed, size=SMALL)
    a, b, c = (digests(tmp_path / name) for name in "abc")
    assert a == b
    assert {name for name in a if a[name] != c[name]} == {"model.safetensors"}


def test_same_bytes_in_another_process(tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    code = (
        "import json, sys; from pathlib import Path; from rlhf.models.tiny import build_tiny;"
        "texts = json.loads(Path(sys.argv[1], 'texts.json').read_text());"
        f"build_tiny('llama', texts, Path(sys.argv[1], 'there'), seed=1, size={SMALL!r})"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    build_tiny("llama", TEXTS, tmp_path / "here", seed=1, size=SMALL)
    assert digests(tmp_path / "here") == digests(tmp_path / "there")


def test_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_tiny("opt", TEXTS, tmp_path, seed=9, size=SMALL)
    assert torch.equal(torch.rand(3), expected)


def test_sizes_and_vocabulary_are_settings(tmp_path):
    build_tiny("llama", TEXTS, tmp_path, seed=0, vocab_size=300, size=SMALL)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.vocab_size == 300
    assert model.config.hidden_size == 32
    assert set(SMALL) == set(TINY_SIZE)


def test_answers_are_short_in_tokens():
    """The embedded default's answers stay under 28 tokens of its own tokenizer."""
    every = [
        row["prompt"] + row[s] for row in rows("train", pairs=3000) for s in ("chosen", "rejected")
    ]
    tokenizer = train_tokenizer(every, 1024, 512)
    assert 700 <= len(tokenizer) <= 1024
    lengths = [len(tokenizer(row[s]).input_ids) for row in rows("test") for s in ("chosen",)]
    assert max(lengths) < 28


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("lama", {}, "choose one of llama"),
        ("llama", {"vocab_size": 100}, "needs 259 or more"),
        ("llama", {"size": {"width": 3}}, "unknown size 'width'"),
    ],
)
def test_bad_arguments(tmp_path, family, arguments, message):
    with pytest.raises(ConfigError, match=message):
        build_tiny(family, TEXTS, tmp_path / "x", seed=0, **arguments)
    assert not (tmp_path / "x").exists()
