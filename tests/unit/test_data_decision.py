"""The decision on the chat template: what trains, and what the artifact carries (issue 10)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf.config.schema import DataConfig, ResolvedStep, RunConfig
from rlhf.data.decision import (
    UNKNOWN,
    Prompts,
    choose_template,
    decide_template,
    own_template,
    stage_templates,
)
from rlhf.data.dialogue import parse_dialogue, write_dialogue
from rlhf.data.prepare import prepare
from rlhf.data.preview import look
from rlhf.data.tokenizers import prepare_tokenizer
from rlhf.errors import ConfigError
from tests.unit.data_help import TOKENIZERS, gpt2_like, pair, smollm_like, write_jsonl

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{% for message in messages %}{{- '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
STRIPS = (
    "{% for message in messages %}[{{ message.role }}]{% if message.role == 'assistant' and not "
    "loop.last %}{{ message.content.split('</think>')[-1] }}{% else %}{{ message.content }}"
    "{% endif %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
NO_SYSTEM = (
    "{% for message in messages %}{% if message.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<{{ 'model' if message.role == 'assistant' else 'user' }}>"
    "{{ message.content }}{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
)
HUMAN = "\n\nHuman: hi\n\nAssistant:"
OWN = {"chatml": CHATML, "llama3": LLAMA3, "strips": STRIPS, "no_system": NO_SYSTEM, "none": None}


def turns(*contents: str, system: str = "") -> list[dict[str, str]]:
    roles = ("user", "assistant")
    found = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *found] if system else found


def prepared(path: Path, tokenizer: Any, tmp_path: Path, step: int, **settings: Any) -> Any:
    data = DataConfig(
        path=[str(path)],
        split=tuple(float(step == one) for one in (1, 2, 3)),
        eval_fraction=0,
        cache_dir=str(tmp_path / "cache"),
        **settings,
    )
    template = choose_template(tokenizer, data)
    rows = prepare(data, step, tokenizer, seed=0, max_prompt_length=300, max_length=600)  # type: ignore[arg-type]
    return template, rows


@pytest.mark.parametrize("step", [1, 2, 3])
@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("kind", ["smollm", "opt", "llama", "gpt2"])
def test_what_is_saved_gives_the_prompts_of_the_training(
    kind: str, own: str, step: int, tmp_path: Path
) -> None:
    """Conversations: the published artifact's apply_chat_template gives the training's ids, in all
    three steps, for chat models of each kind and a base model; the model's own is kept."""
    tokenizer = TOKENIZERS[kind]()
    prepare_tokenizer(tokenizer)
    tokenizer.chat_template = OWN[own]
    system = "" if own == "no_system" else "Be brief."
    chat = turns("What is it?", "It is that.", "Why?", system=system)
    row = {"prompt": chat, "chosen": turns("", "So.")[1:], "rejected": turns("", "No.")[1:]}
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    template, rows = prepared(path, tokenizer, tmp_path, step)
    tokenizer.save_pretrained(tmp_path / "artifact")
    saved: Any = AutoTokenizer.from_pretrained(tmp_path / "artifact")
    if OWN[own] is not None:
        assert saved.chat_template == OWN[own]
        assert template.origin == "own"
    ids = saved.apply_chat_template(chat, add_generation_prompt=True).input_ids
    assert rows.dataset[0]["prompt_ids"] == ids
    if step == 3:
        text = saved.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert text.endswith(rows.dataset[0]["prompt"])


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("kind", ["smollm", "opt", "llama", "gpt2"])
def test_dialogues_in_text(kind: str, own: str, tmp_path: Path) -> None:
    """rm-static's text stays as it is, whatever the model's own template; what is saved gives it
    for the user's message."""
    tokenizer = TOKENIZERS[kind]()
    prepare_tokenizer(tokenizer)
    tokenizer.chat_template = OWN[own]
    path = write_jsonl(tmp_path / "rows.jsonl", [pair(0)])
    template, rows = prepared(path, tokenizer, tmp_path, 3)
    tokenizer.save_pretrained(tmp_path / "artifact")
    saved: Any = AutoTokenizer.from_pretrained(tmp_path / "artifact")
    ids = saved.apply_chat_template(turns("question 0?"), add_generation_prompt=True).input_ids
    assert rows.dataset[0]["prompt_ids"] == ids
    assert rows.dataset[0]["prompt"] == pair(0)["prompt"]
    assert ("own template is not used" in template.sentence) == (OWN[own] is not None)


def test_text_of_no_form_leaves_no_template(tmp_path: Path) -> None:
    """A chat model trained on openings of reviews was never trained with its template."""
    tokenizer = smollm_like()
    prepare_tokenizer(tokenizer)
    tokenizer.chat_template = CHATML
    rows = [pair(i, prompt=f"The film {i} was") for i in range(3)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    template, found = prepared(path, tokenizer, tmp_path, 3)
    assert template.saved is None
    assert "no chat template is saved" in template.sentence
    tokenizer.save_pretrained(tmp_path / "artifact")
    assert AutoTokenizer.from_pretrained(tmp_path / "artifact").chat_template is None
    expected = [tokenizer(row["prompt"], add_special_tokens=False).input_ids for row in rows]
    assert sorted(found.dataset["prompt_ids"]) == sorted(expected)


def test_plain_text_gets_no_turns_beginning_in_a_mixture(tmp_path: Path) -> None:
    """SmolLM2's bos is <|im_start|>, which begins its template: plain text beside conversations
    does not get it."""
    tokenizer = smollm_like()
    prepare_tokenizer(tokenizer)
    tokenizer.chat_template = CHATML
    rows = [pair(0, prompt="The film was"), {"prompt": turns("hi")}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    template, found = prepared(path, tokenizer, tmp_path, 3)
    assert template.saved == CHATML
    assert "does not write their form" in template.sentence
    ids = {tuple(one) for one in found.dataset["prompt_ids"]}
    assert tuple(tokenizer("The film was", add_special_tokens=False).input_ids) in ids


@pytest.mark.parametrize(
    ("prompt", "chat"),
    [
        ("The film was", turns("The film was")),
        (
            "Be kind.\n\nHuman: hi \n\nAssistant: yes\n\nHuman: why?\n\nAssistant:",
            turns("hi ", "yes", "why?", system="Be kind."),
        ),
    ],
)
def test_plain_prompts_as_turns(prompt: str, chat: Any, tmp_path: Path) -> None:
    """data.plain_prompts=turns: text becomes turns, and the saved template gives the prompt."""
    tokenizer = smollm_like()
    prepare_tokenizer(tokenizer)
    tokenizer.chat_template = CHATML
    path = write_jsonl(tmp_path / "rows.jsonl", [pair(0, prompt=prompt)])
    template, found = prepared(path, tokenizer, tmp_path, 2, plain_prompts="turns")
    assert template.saved == tokenizer.chat_template == CHATML
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True).input_ids
    assert found.dataset[0]["prompt_ids"] == ids
    said = "yes 0." if "Human" in prompt else " yes 0."
    assert tokenizer.decode(found.dataset[0]["chosen_ids"]) == f"{said}<|im_end|>"


def test_a_template_that_is_told(tmp_path: Path) -> None:
    """A set template replaces the model's own, and the sentence says so; one that nothing would be
    trained with is refused; `model` needs one."""
    chats, texts = Prompts(3, ()), Prompts(0, ("The film was",))
    told = decide_template("human_assistant", CHATML, chats)
    assert (told.saved, told.origin) == ("human_assistant", "setting")
    assert "in place of its own" in told.sentence
    with pytest.raises(ConfigError, match=r"nothing would be trained with it.*plain_prompts=turns"):
        decide_template("chatml", CHATML, texts)
    written = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert decide_template("chatml", None, Prompts(0, (written,))).saved == "chatml"
    with pytest.raises(ConfigError, match="no chat template of its own"):
        decide_template("model", None, chats)
    assert decide_template("auto", None, chats).text == "human_assistant"
    assert decide_template("auto", UNKNOWN, chats).sentence.startswith(
        "conversations are written by the model's own chat template, if it has one, else"
    )
    tokenizer = gpt2_like()
    tokenizer.chat_template = {"rag": CHATML}
    data = DataConfig(path=[str(write_jsonl(tmp_path / "rows.jsonl", [pair(0)]))])
    with pytest.raises(ConfigError, match="none called default"):
        choose_template(tokenizer, data)


def test_the_plan_decides_as_the_steps_do(tmp_path: Path) -> None:
    """Without a tokenizer: a chat model's own template goes from step 1 to the steps on its model;
    a tiny model has none."""
    tokenizer = gpt2_like()
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "model")
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": turns("hi")}])
    for name, saved in ((str(tmp_path / "model"), CHATML), ("tiny:llama", "human_assistant")):
        config = RunConfig(data={"path": [str(path)]}, step1={"model": {"name": name}})
        stages = [
            ResolvedStep(
                step=step,
                run_dir=str(tmp_path),
                world_size=1,
                parents={"sft": str(tmp_path / "step1_sft")} if step > 1 else {},
                inherited={},
                config=config,
            )
            for step in (1, 2, 3)
        ]
        assert [one.saved for one in stage_templates(stages)] == [saved] * 3
        rows = look(stages).stages[2]["lines"]
        assert rows[0].startswith("chat template: conversations are written by the ")
        shown = "<|im_start|>user" if saved == CHATML else "Human: hi"
        assert any("  prompt " in line and shown in line for line in rows)
    (alone,) = stage_templates(stages[2:])
    assert alone.text == UNKNOWN


def test_the_own_template_of_a_directory(tmp_path: Path) -> None:
    """Read without transformers, for the plan: in both of the places where it is saved."""
    tokenizer = gpt2_like()
    tokenizer.save_pretrained(tmp_path / "none")
    assert own_template(str(tmp_path / "none")) is None
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "file")
    assert own_template(str(tmp_path / "file")) == CHATML
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "tokenizer_config.json").write_text('{"chat_template": "{{ 1 }}"}')
    assert own_template(str(tmp_path / "old")) == "{{ 1 }}"
    assert own_template("owner/name") == UNKNOWN


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (HUMAN, 1),
        ("Be kind.\n\nHuman: a\n\nAssistant:  b\n\nHuman: c\n\nAssistant:", 4),
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant:", None),
        ("\n\nHuman:a\n\nAssistant:", None),
        ("\n\nHuman: a\n\nAssistant: b", None),
        ("no dialogue", None),
    ],
)
def test_dialogues_are_read_only_where_they_are_written_back(text: str, number: int | None) -> None:
    """Byte for byte."""
    found = parse_dialogue(text)
    assert (found and len(found)) == number
    assert found is None or write_dialogue(found) == text
