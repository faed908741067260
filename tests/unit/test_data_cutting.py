"""Prompts over the limit, and which turns are learned (issue 10)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config.schema import DataConfig
from rlhf.data.batches import IGNORED, collate_sft
from rlhf.data.cutting import INSIDE, LEFT, TURNS, shortened
from rlhf.data.prepare import prepare
from rlhf.data.report import DataReport
from rlhf.data.tokenizers import prepare_tokenizer
from rlhf.errors import ConfigError, DataError
from tests.unit.data_help import gpt2_like, pair, smollm_like, write_jsonl
from tests.unit.test_data_decision import CHATML, LLAMA3, STRIPS, turns

CASES = Path(__file__).parents[3] / "shared" / "cases" / "data"
LONG = "very long " * 12


def prepared(
    tmp_path: Path, rows: list[Any], step: int, limit: int, template: str = CHATML, **settings: Any
) -> tuple[list[Any], DataReport, Any]:
    tokenizer = settings.pop("tokenizer", None) or smollm_like()
    total = settings.pop("total", limit + 200)
    prepare_tokenizer(tokenizer)
    data = DataConfig(
        path=[str(write_jsonl(tmp_path / "rows.jsonl", rows))],
        split=tuple(float(step == one) for one in (1, 2, 3)),
        eval_fraction=0,
        template=template,
        cache_dir=str(tmp_path / "cache"),
        **settings,
    )
    found = prepare(data, step, tokenizer, seed=0, max_prompt_length=limit, max_length=total)  # type: ignore[arg-type]
    return list(found.dataset), found.report, tokenizer


def rendered(tokenizer: Any, chat: Any, template: str = CHATML) -> tuple[list[int], str]:
    options = {"chat_template": template, "add_generation_prompt": True}
    ids = tokenizer.apply_chat_template(chat, **options).input_ids
    return ids, tokenizer.apply_chat_template(chat, tokenize=False, **options)


def test_whole_turns_go_and_the_system_message_stays(tmp_path: Path) -> None:
    """The model sees what the template writes for the kept turns, and so do judge and verdict."""
    tokenizer = smollm_like()
    chat = turns(LONG, LONG, "a?", "b.", "c?", system="Be terse.")
    kept, text = rendered(tokenizer, [chat[0], *chat[3:]])
    for limit in (len(kept), len(kept) + 3):
        (row,), report, _ = prepared(tmp_path, [{"prompt": chat}], 3, limit)
        assert row["prompt_ids"] == kept
        assert text.endswith(row["prompt"])
        assert "long" not in row["prompt"]
        assert report.truncated == {TURNS: 1}
    (row,), _, _ = prepared(tmp_path, [{"prompt": chat}], 3, len(kept) - 1)
    assert row["prompt_ids"] == rendered(tokenizer, [chat[0], chat[-1]])[0]
    with pytest.raises(DataError, match="prompt over the limit: 1"):
        prepared(tmp_path, [{"prompt": chat}], 3, len(kept), long_prompts="drop")


def test_a_turn_that_is_too_long_by_itself(tmp_path: Path) -> None:
    """Cut on its left, inside the template; where even that does not help, the row is dropped."""
    chat = turns("x", "y", LONG + "end?", system="Be terse.")
    (row,), report, _ = prepared(tmp_path, [{"prompt": chat}], 3, 70)
    assert len(row["prompt_ids"]) <= 70
    assert report.truncated == {INSIDE: 1}
    assert "Be terse." in row["prompt"]
    assert row["prompt"].endswith("end?<|im_end|>\n<|im_start|>assistant\n")
    assert "x" not in row["prompt"].replace("<|", "")
    with pytest.raises(DataError, match="over the limit even without its earlier turns: 1"):
        prepared(tmp_path, [{"prompt": chat}], 3, 12)


def test_a_dialogue_in_text_is_cut_by_turns(tmp_path: Path) -> None:
    """rm-static's form, without any template."""
    tokenizer = gpt2_like()
    text = f"Be kind.\n\nHuman: {LONG}\n\nAssistant: ok\n\nHuman: a?\n\nAssistant:"
    short = "Be kind.\n\nHuman: a?\n\nAssistant:"
    limit = len(tokenizer(short).input_ids)
    (row,), report, _ = prepared(
        tmp_path, [pair(0, prompt=text)], 2, limit, "auto", tokenizer=tokenizer
    )
    assert row["prompt_ids"] == tokenizer(short).input_ids
    assert report.truncated == {TURNS: 1}
    (row,), _, _ = prepared(tmp_path, [{"prompt": text}], 3, limit, "auto", tokenizer=tokenizer)
    assert row["prompt"] == short


def test_other_text_is_cut_on_the_left_and_said_so(tmp_path: Path) -> None:
    """The prompt's text is what the ids say, not what was cut off."""
    tokenizer = gpt2_like()
    (row,), report, _ = prepared(
        tmp_path, [{"prompt": LONG + "end"}], 3, 9, "auto", tokenizer=tokenizer
    )
    assert len(row["prompt_ids"]) == 9
    assert row["prompt"] == tokenizer.decode(row["prompt_ids"])
    assert row["prompt"].endswith("end")
    assert report.truncated == {LEFT: 1}


roles = st.lists(
    st.tuples(st.sampled_from(["user", "assistant", "tool"]), st.text("ab", max_size=12)),
    min_size=1,
    max_size=8,
)


@given(roles, st.text("s", max_size=5), st.integers(0, 60))
def test_kept_turns_are_system_and_a_suffix(said: Any, system: str, limit: int) -> None:
    """Never over the limit; the first kept turn is a user's; the system message stays."""
    chat = [{"role": role, "content": text} for role, text in said]
    whole = [{"role": "system", "content": system}, *chat] if system else chat

    def size(messages: Any) -> int:
        return sum(2 + len(one["content"]) for one in messages)

    found = shortened(whole, lambda one: size(one) <= limit, str)
    starts = [i for i, one in enumerate(chat) if one["role"] == "user" and i > 0]
    head = whole[: len(whole) - len(chat)]
    fitting = [i for i in starts if size([*head, *chat[i:]]) <= limit]
    if fitting:
        assert found == ([*head, *chat[fitting[0] :]], TURNS)
    elif found is not None:
        kept, kind = found
        last = max(i for i, one in enumerate(chat) if one["role"] == "user")
        user, *after = kept[len(head) :]
        assert (kind, kept[: len(head)], after) == (INSIDE, head, chat[last + 1 :])
        assert chat[last]["content"].endswith(user["content"])
        assert 0 < limit - size(kept) + 1 <= 1 or len(user["content"]) < len(chat[last]["content"])
        assert size(kept) <= limit


def test_shares_are_said() -> None:
    """Percentages, and a warning where most answers never end."""
    report = DataReport(read=9, kept=9, answers=9)
    report.add_truncated("answer", 7, "f:1")
    report.add_truncated(TURNS, 3, "f:2")
    lines = "\n".join(report.lines())
    assert "truncated: answer: 7 = 77.8% of 9 answers" in lines
    assert f"truncated: {TURNS}: 3 = 33.3% of 9 prompts" in lines
    assert "WARNING: 78% of the answers are cut, 22% have EOS" in lines
    few = DataReport(kept=90, answers=90)
    few.add_truncated("answer", 7, "f:1")
    assert "WARNING" not in "\n".join(few.lines())


@pytest.mark.parametrize("template", [CHATML, LLAMA3])
def test_all_turns_are_learned_with_their_ends(template: str, tmp_path: Path) -> None:
    """By hand: labels are the assistant's texts and one eos each, and nothing else; the ids are
    those of the rendered conversation."""
    chat = turns("a?", "b.", "c?", "d e.", system="Be terse.")
    (row,), _, tokenizer = prepared(
        tmp_path, [{"messages": chat}], 1, 300, template, multi_turn="all"
    )
    batch = collate_sft([row], tokenizer.pad_token_id)
    labels = batch.labels[0]
    learned = [int(one) for one in labels if one != IGNORED]
    end = [tokenizer.eos_token_id]
    encoded = [tokenizer(text, add_special_tokens=False).input_ids for text in ("b.", "d e.")]
    assert learned == encoded[0] + end + encoded[1] + end
    whole = tokenizer.apply_chat_template(chat, chat_template=template).input_ids
    ids = batch.input_ids[0].tolist()
    assert whole[: len(ids)] == ids
    assert (labels == batch.input_ids[0])[labels != IGNORED].all()
    (last,), _, _ = prepared(tmp_path, [{"messages": chat}], 1, 300, template)
    assert last["answer_ids"] == encoded[1] + end
    assert last["prompt_ids"] + last["answer_ids"] == ids
    assert int((collate_sft([row], 0, prompt_loss=True).labels != IGNORED).sum()) == len(ids)


def test_all_turns_over_the_limit_lose_the_oldest(tmp_path: Path) -> None:
    """The rest is what the kept turns alone give."""
    chat = turns(LONG, LONG, "a?", "b.", "c?", "d.")
    (row,), _, tokenizer = prepared(
        tmp_path, [{"messages": chat}], 1, 80, total=100, multi_turn="all"
    )
    kept = tokenizer.apply_chat_template(chat[2:], chat_template=CHATML).input_ids
    ids = row["prompt_ids"] + row["answer_ids"]
    assert kept[: len(ids)] == ids
    assert len(ids) <= 100


def test_templates_that_cannot_teach_all_turns(tmp_path: Path) -> None:
    """One that strips earlier reasoning, and one whose turns have no end: refused by name."""
    chat = turns("a?", "<think>x</think>b.", "c?", "d.")
    with pytest.raises(DataError, match=r"multi_turn=all: the template writes a turn differently"):
        prepared(tmp_path, [{"messages": chat}], 1, 300, STRIPS, multi_turn="all")
    with pytest.raises(ConfigError, match=r"multi_turn=all: .* does not end an assistant turn"):
        prepared(tmp_path, [{"messages": chat}], 1, 300, "human_assistant", multi_turn="all")


@pytest.mark.skipif(not CASES.exists(), reason="../shared/cases is not here")
@pytest.mark.parametrize("step", [2, 3])
def test_the_long_chat_of_the_cases(step: int, tmp_path: Path) -> None:
    """EXPECT.md: whole turns are dropped, oldest first, the system message stays; counted."""
    rows = [json.loads(line) for line in (CASES / "long_chat.jsonl").read_text().splitlines()]
    found, report, tokenizer = prepared(tmp_path, rows, step, 120)
    expected = {
        tuple(rendered(tokenizer, [row["prompt"][0], row["prompt"][-1]])[0]) for row in rows
    }
    assert {tuple(row["prompt_ids"]) for row in found} == expected
    assert report.truncated[TURNS] == len(rows)


@pytest.mark.skipif(not CASES.exists(), reason="../shared/cases is not here")
def test_a_later_system_message_of_the_cases(tmp_path: Path) -> None:
    """EXPECT.md: rendered by the template, never glued."""
    rows = [json.loads(line) for line in (CASES / "conv_system_mid.jsonl").read_text().splitlines()]
    for template in (CHATML, "human_assistant"):
        found, _, tokenizer = prepared(tmp_path, rows, 1, 300, template)
        for row in found:
            assert "\nBe brief." in tokenizer.decode(row["prompt_ids"])
