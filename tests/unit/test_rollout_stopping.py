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


def piece_tokenizer():
    """Bytes, and the merged pieces "ab", " c", "\n\nH" and "uman:"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("Ġ", "c"), ("Ċ", "Ċ"), ("ĊĊ", "H")]
    merges += [("u", "m"), ("um", "a"), ("uma", "n"), ("uman", ":")]
    words = [*alphabet, *("".join(pair) for pair in merges), "<eos>"]
    core = Tokenizer(BPE({word: i for i, word in enumerate(words)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    return tokenizer


READ = [
    # (sampled pieces, stop string, pieces that are read before EOS)
    (["ab", " c", "\n\nH", "uman:"], "\n\nHuman:", ["ab", " c"]),  # whole tokens
    (["ab", " c", "\n\nH", "uman:"], "\nHuman", ["ab", " c", "\n"]),  # inside one, to inside one
    (["ab", " c", "\n\nH"], "b", ["a"]),  # begins and ends inside the first
    (["ab", " c"], "ab", []),  # nothing is left
    (["a", "ab", " c"], " ", ["a", "ab"]),  # sampled otherwise than the tokenizer would: kept
    (["a", "ab", "b"], "bb", ["a", "a"]),
]


@pytest.mark.parametrize(("pieces", "stop", "expected"), READ)
def test_what_is_read_by_hand(pieces, stop, expected):
    """ALGORITHM 16: the text before the stop string, its tokens as they were sampled where they
    lie before it, and EOS; wherever the string begins and ends inside tokens."""
    tokenizer = piece_tokenizer()

    def ids(texts):
        return [i for text in texts for i in tokenizer(text).input_ids]

    sampled = ids(pieces)
    assert len(sampled) == len(pieces)
    strings = StopStrings(tokenizer, [stop, "never"])
    end = int(strings.first_ends(torch.tensor([sampled]), torch.tensor([len(sampled)])))
    eos = tokenizer.eos_token_id
    assert strings.read(sampled[:end], eos, 8) == [*ids(expected), eos]


def test_the_earliest_stop_string_counts():
    """Two strings are completed by one token: what is read ends before the first of them."""
    tokenizer = piece_tokenizer()
    sampled = tokenizer("ab\n\nHuman:").input_ids
    strings = StopStrings(tokenizer, ["H", "\n"])
    assert int(strings.first_ends(torch.tensor([sampled]), torch.tensor([len(sampled)]))) == 2
    ids = strings.read(sampled[:2], tokenizer.eos_token_id, 8)
    assert ids == [*tokenizer("ab").input_ids, tokenizer.eos_token_id]


def test_no_room_for_the_end():
    """The token "\n\nH" of which "\n\n" stays leaves a token more than were sampled with EOS:
    within the limit there was no end."""
    tokenizer = piece_tokenizer()
    sampled = tokenizer("ab\n\nH").input_ids
    assert len(sampled) == 2
    strings = StopStrings(tokenizer, ["H"])
    eos = tokenizer.eos_token_id
    assert strings.read(sampled, eos, 3) == [*tokenizer("ab\n\n").input_ids, eos]
    assert strings.read(sampled, eos, 2) is None


def test_a_special_tokens_name_stays_text():
    """Text that is encoded anew has no special token, whatever it spells."""
    tokenizer = piece_tokenizer()
    tokenizer.add_tokens(["<eos>X"])
    sampled = [tokenizer.convert_tokens_to_ids("<eos>X")]
    read = StopStrings(tokenizer, ["X"]).read(sampled, tokenizer.eos_token_id, 99)
    assert read == [*map(tokenizer.convert_tokens_to_ids, "<eos>"), tokenizer.eos_token_id]


@settings(max_examples=100, deadline=None)
@given(
    pieces=st.lists(st.sampled_from(["ab", " c", "\n\nH", "uman:", "é", "a", "b", "\n"])),
    stop=st.sampled_from(["b", "\nH", "\n\n", "Human:", " c", "ma", "é"]),
)
def test_what_is_read_has_the_text_before_the_stop_string(pieces, stop):
    """ALGORITHM 16, against plain strings."""
    tokenizer = piece_tokenizer()
    sampled = [i for piece in pieces for i in tokenizer(piece).input_ids]
    strings = StopStrings(tokenizer, [stop])
    text = "".join(pieces)
    end = int(strings.first_ends(torch.tensor([sampled or [0]]), torch.tensor([len(sampled)])))
    assert (end > 0) == (stop in text)
    if end:
        read = strings.read(sampled[:end], tokenizer.eos_token_id, 999)
        assert tokenizer.decode(read) == text[: text.find(stop)] + "<eos>"
