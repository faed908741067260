"""Stop strings across tokenizers: characters, bytes, words with leading spaces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from rlhf.rollout.stopping import StopStrings
from tests.unit.rollout_support import VOCAB, char_tokenizer


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(BPE({char: i for i, char in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def word_tokenizer(decoder):
    words = ["▁User", "▁", ":", "▁hello", "x", "▁world", "<end>"]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="x"))
    core.decoder = decoder
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    return tokenizer


def ends(tokenizer, stop, ids):
    tokens = torch.tensor([ids])
    return int(StopStrings(tokenizer, stop).first_ends(tokens, torch.tensor([len(ids)])))


def test_bytes_that_only_together_make_the_character():
    """ "é" is two bytes: the answer ends at the second."""
    tokenizer = byte_tokenizer()
    ids = tokenizer("abécé").input_ids
    assert len(ids) == 7
    assert ends(tokenizer, ["é"], ids) == 4
    assert ends(tokenizer, ["cé"], ids) == 7
    assert ends(tokenizer, ["z"], ids) == 0


@pytest.mark.parametrize("prepend", ["always", "first", "never"])
def test_leading_spaces_and_special_tokens(prepend):
    """A stop string may end in the space that a word piece brings, or be a special token."""
    tokenizer = word_tokenizer(decoders.Metaspace(prepend_scheme=prepend))
    ids = [4, 0, 2, 3, 6, 5]  # x, " User", ":", " hello", <end>, " world"
    assert ends(tokenizer, ["User:"], ids) == 3
    assert ends(tokenizer, [": "], ids) == 4
    assert ends(tokenizer, ["<end>"], ids) == 5
    assert ends(tokenizer, ["world", "hello"], ids) == 4


@settings(max_examples=100, deadline=None)
@given(
    ids=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
    stop=st.lists(st.text("abc<>pd", min_size=1, max_size=3), min_size=1, max_size=3),
    data=st.data(),
)
def test_the_table_never_hides_an_end(ids, stop, data):
    """Against the definition: the first prefix whose text contains a stop string."""
    tokenizer = char_tokenizer()
    ids = [data.draw(st.sampled_from([3, 4, 5, i])) for i in ids]
    expected = 0
    for count in range(1, len(ids) + 1):
        text = "".join(tokenizer.convert_ids_to_tokens(ids[:count]))
        if any(s in text for s in stop):
            expected = count
            break
    found = StopStrings(tokenizer, stop)
    assert int(found.first_ends(torch.tensor([ids]), torch.tensor([len(ids)]))) == expected
    steps = [
        bool(found.completed(torch.tensor([ids + [0] * 3]), torch.tensor([count])))
        for count in range(1, (expected or len(ids)) + 1)
    ]
    assert steps == [False] * (len(steps) - 1) + [expected > 0]


def test_ids_beyond_the_tokenizer_have_no_text():
    """Embeddings padded to a round number: such an id neither fails nor stops."""
    assert ends(char_tokenizer(), ["b"], [VOCAB + 7, 3]) == 2


def test_only_the_counted_tokens_are_read():
    stop = StopStrings(char_tokenizer(), ["b"])
    tokens = torch.tensor([[2, 3, 3], [2, 2, 3]])
    assert stop.first_ends(tokens, torch.tensor([1, 2])).tolist() == [0, 0]
    assert stop.first_ends(tokens, torch.tensor([3, 3])).tolist() == [2, 3]


def test_no_stop_string_is_false():
    assert not StopStrings(None, [])
