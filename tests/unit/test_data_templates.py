"""Tokenizers, templates and text to ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf.data.templates import apply_template, prepends_bos
from rlhf.data.tokenizers import Encoder, fingerprint, prepare_tokenizer
from rlhf.errors import ConfigError
from tests.unit.data_help import (
    TOKENIZERS,
    eos_appending,
    gpt2_like,
    llama_like,
    opt_like,
    run,
    smollm_like,
    write_jsonl,
)

QUESTION = "Which colour is the sky?"
PROMPT = f"\n\nHuman: {QUESTION}\n\nAssistant:"
every_tokenizer = pytest.mark.parametrize("kind", TOKENIZERS)


@every_tokenizer
def test_pad_is_never_eos(kind: str) -> None:
    """ALGORITHM 1."""
    tokenizer = TOKENIZERS[kind]()
    before = len(tokenizer)
    added = prepare_tokenizer(tokenizer)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id, tokenizer.bos_token_id)
    assert len(tokenizer) - before == added
    assert prepare_tokenizer(tokenizer) == 0


def test_pad_choice() -> None:
    """ALGORITHM 1: an own pad stays, an unused special token is taken, else one is added."""
    smollm, opt, gpt2 = smollm_like(), opt_like(), gpt2_like()
    assert (prepare_tokenizer(smollm), smollm.pad_token) == (0, "<|endoftext|>")
    assert (prepare_tokenizer(opt), opt.pad_token) == (0, "<pad>")
    assert (prepare_tokenizer(gpt2), gpt2.pad_token) == (1, "<|pad|>")
    assert gpt2.pad_token_id == len(gpt2) - 1
    no_bos = gpt2_like()
    no_bos.bos_token = None
    assert (prepare_tokenizer(no_bos), no_bos.pad_token) == (1, "<|pad|>")


def test_tokenizer_without_eos_is_refused() -> None:
    """ALGORITHM 1 and 2."""
    tokenizer = gpt2_like()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no eos token"):
        prepare_tokenizer(tokenizer)


@every_tokenizer
def test_template_is_the_training_prompt(kind: str, tmp_path: Path) -> None:
    """ALGORITHM 4: the saved template gives the training prompt's bytes and ids, for rm-static
    text and for conversational rows, and after a trip through the disk."""
    tokenizer = TOKENIZERS[kind]()
    prepare_tokenizer(tokenizer)
    apply_template(tokenizer, "human_assistant")
    tokenizer.save_pretrained(tmp_path / "saved")
    saved: Any = AutoTokenizer.from_pretrained(tmp_path / "saved")
    turns = [{"role": "user", "content": QUESTION}]
    text = saved.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = saved.apply_chat_template(turns, add_generation_prompt=True).input_ids
    encoder = Encoder(tokenizer, "human_assistant")
    assert text == encoder.prompt_text(PROMPT)
    assert text == (tokenizer.bos_token if prepends_bos(tokenizer) else "") + PROMPT
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": PROMPT}])
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"prompt": turns}])
    for path in (rows, chats):
        data = run(path, tokenizer, tmp_path / "cache", 3, split=(0, 0, 1), eval_fraction=0)
        assert data.dataset["prompt_ids"][0] == ids
        assert data.dataset["prompt"][0] == PROMPT


@every_tokenizer
def test_answer_ids(kind: str) -> None:
    """ALGORITHM 2: EOS is one id, once, at the end; no bos; the text survives."""
    tokenizer = TOKENIZERS[kind]()
    eos = tokenizer.eos_token_id
    encoder = Encoder(tokenizer, "human_assistant")
    (prompt,) = encoder.prompts([PROMPT])
    texts = [" It is blue.", f" It is blue.{tokenizer.eos_token}", " It is blue.</s><|im_end|>"]
    for ids, text in zip(encoder.answers(texts), texts, strict=True):
        assert ids.count(eos) == 1
        assert ids[-1] == eos
        whole = tokenizer.decode(prompt + ids, skip_special_tokens=False)
        assert whole.startswith(encoder.bos)
        assert PROMPT + " It is blue." in whole
        if text.endswith(".") or text.endswith(f".{tokenizer.eos_token}"):
            assert len(ids) == len(encoder.answers([texts[0]])[0])
    assert eos not in prompt[1:]


@pytest.mark.parametrize("scheme", ["first", "always", "legacy"])
def test_no_double_space_after_the_prompt(scheme: str) -> None:
    """ALGORITHM 4: a SentencePiece dummy space does not re-space the answer."""
    tokenizer = llama_like(scheme)
    encoder = Encoder(tokenizer, "human_assistant")
    (prompt,), (answer,) = encoder.prompts(["sky:"]), encoder.answers([" is"])
    assert tokenizer.decode(prompt + answer[:-1], skip_special_tokens=True).endswith("sky: is")


def test_turns_and_roles() -> None:
    """ALGORITHM 4: several turns, a system text, an unknown role."""
    tokenizer = gpt2_like()
    apply_template(tokenizer, "human_assistant")
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " a "},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "Be brief.\n\nHuman:  a \n\nAssistant: b\n\nHuman: c"


def test_chatml() -> None:
    """ALGORITHM 4: ChatML, where the vocabulary has its tokens."""
    tokenizer = smollm_like()
    apply_template(tokenizer, "chatml")
    turns = [{"role": "user", "content": "q"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ConfigError, match=r"no token <\|im_start\|>"):
        apply_template(gpt2_like(), "chatml")


@pytest.mark.parametrize("name", ["model", "humen_assistant", "{{ oops"])
def test_templates_that_cannot_work(name: str) -> None:
    """ALGORITHM 4."""
    with pytest.raises(ConfigError, match=r"data\.template"):
        apply_template(gpt2_like(), name)


def test_own_jinja_and_the_models_own() -> None:
    """ALGORITHM 4: any template decides by itself whether a bos comes first."""
    tokenizer = opt_like()
    own = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    apply_template(tokenizer, own)
    apply_template(tokenizer, "model")
    assert tokenizer.chat_template == own
    turns = [{"role": "user", "content": "sky"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True).input_ids
    assert Encoder(tokenizer, "model").prompts(["<user>sky"]) == [ids]
    assert ids[0] != tokenizer.bos_token_id


def test_fingerprint() -> None:
    """The fingerprint sees added tokens and eos, not the leftovers of a padded call."""
    one, two = eos_appending(), eos_appending()
    two(["a", "b c d"], padding=True, truncation=True, max_length=3)
    assert fingerprint(one) == fingerprint(two)
    two.add_tokens(["<extra>"])
    assert fingerprint(one) != fingerprint(two)
    assert fingerprint(gpt2_like()) != fingerprint(smollm_like())
