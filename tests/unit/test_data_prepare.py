"""From settings to tokenised rows: limits, counts and the cache."""

from __future__ import annotations

import errno
import importlib
import json
import multiprocessing
import stat
from pathlib import Path
from typing import Any

import pytest

from rlhf.data import cache
from rlhf.data.cutting import LEFT
from rlhf.data.report import DataReport
from rlhf.data.templates import apply_template
from rlhf.data.tokenizers import Encoder, prepare_tokenizer
from rlhf.errors import ConfigError, DataError, RequirementError
from tests.unit.data_help import (
    SHARED,
    gpt2_like,
    llama_like,
    needs_shared,
    opt_like,
    pair,
    run,
    write_jsonl,
)

ONLY: dict[int, dict[str, Any]] = {
    1: {"split": (1, 0, 0), "eval_fraction": 0},
    2: {"split": (0, 1, 0), "eval_fraction": 0},
    3: {"split": (0, 0, 1), "eval_fraction": 0},
}


def test_rows_of_each_step(tmp_path: Path) -> None:
    """ALGORITHM 2 and 4: columns, ids of prompt and answers, margin, prompt key."""
    tokenizer = opt_like()
    encoder = Encoder(tokenizer, "human_assistant")
    row = pair(1, response=" other", margin=0.5)
    path = write_jsonl(tmp_path / "r.jsonl", [row])
    (prompt,) = encoder.prompts([row["prompt"]])
    chosen, rejected, other = encoder.answers([row["chosen"], row["rejected"], " other"])
    assert prompt[0] == tokenizer.bos_token_id
    one = run(path, tokenizer, tmp_path / "c", 1, **ONLY[1]).dataset[0]
    assert one == {"prompt_ids": prompt, "answer_ids": other, "unlearned": []}
    one = run(path, tokenizer, tmp_path / "c", 1, response_column="chosen", **ONLY[1]).dataset[0]
    assert one == {"prompt_ids": prompt, "answer_ids": chosen, "unlearned": []}
    two = run(path, tokenizer, tmp_path / "c", 2, **ONLY[2]).dataset[0]
    key = two.pop("prompt_key")
    assert two == {
        "prompt_ids": prompt,
        "chosen_ids": chosen,
        "rejected_ids": rejected,
        "margin": 0.5,
    }
    assert -(2**63) <= key < 2**63
    three = run(path, tokenizer, tmp_path / "c", 3, **ONLY[3]).dataset[0]
    assert three == {"prompt_ids": prompt, "prompt": row["prompt"]}


def test_long_prompts_lose_their_beginning(tmp_path: Path) -> None:
    """ALGORITHM 5: cut from the left, bos kept, counted; or dropped, counted."""
    tokenizer = opt_like()
    long = pair(1, prompt="Once " + "word " * 30 + "end?")
    path = write_jsonl(tmp_path / "r.jsonl", [pair(0), long])
    (ids,) = Encoder(tokenizer, "human_assistant").prompts([long["prompt"]])
    limits: dict[str, Any] = {"max_prompt_length": len(ids) - 7, **ONLY[2]}
    data = run(path, tokenizer, tmp_path / "c", **limits)
    assert [ids[0], *ids[8:]] in list(data.dataset["prompt_ids"])
    assert data.report.truncated == {LEFT: 1}
    assert data.report.kept == 2
    data = run(path, tokenizer, tmp_path / "c", long_prompts="drop", **limits)
    assert (data.report.kept, data.report.dropped) == (1, {"prompt over the limit": 1})
    assert f"dropped: prompt over the limit: 1 ({path}:2)" in data.report.lines()


def test_long_answers_are_cut_and_equal_pairs_dropped(tmp_path: Path) -> None:
    """ALGORITHM 2 and 5: a cut answer has no EOS; pairs that become equal are counted."""
    tokenizer = gpt2_like()
    same = " same start of every answer here,"
    rows = [
        pair(0, chosen=same + " good", rejected=same + " bad"),
        pair(1, chosen=" yes", rejected=same + " bad"),
    ]
    path = write_jsonl(tmp_path / "r.jsonl", rows)
    encoder = Encoder(tokenizer, "human_assistant")
    (prompt,), (start,) = encoder.prompts([rows[1]["prompt"]]), encoder.answers([same])
    size = len(prompt)
    limits = {"max_prompt_length": size, "max_length": size + len(start) - 1}
    data = run(path, tokenizer, tmp_path / "c", **limits, **ONLY[2])
    assert data.report.dropped == {"pair equal once cut": 1}
    assert data.report.truncated == {"answer": 1}
    (row,) = list(data.dataset)
    assert row["rejected_ids"] == start[:-1]
    assert row["chosen_ids"][-1] == tokenizer.eos_token_id


def test_pairs_of_the_same_tokens_are_dropped(tmp_path: Path) -> None:
    """Llama 2's tokenizer begins every text with a space: " a" and "a" are one answer."""
    path = write_jsonl(tmp_path / "r.jsonl", [pair(0), pair(1, chosen=" a", rejected="a")])
    data = run(path, llama_like("legacy"), tmp_path / "c", **ONLY[2])
    assert data.report.dropped == {"chosen and rejected have the same tokens": 1}


def test_limits_without_room(tmp_path: Path) -> None:
    """ALGORITHM 5."""
    path = write_jsonl(tmp_path / "r.jsonl", [pair(0)])
    with pytest.raises(ConfigError, match="answers need room"):
        run(path, gpt2_like(), tmp_path / "c", max_prompt_length=8, max_length=8)


def test_no_rows_left(tmp_path: Path) -> None:
    """C14: a share of 0 or dropping everything is an error that lists what happened."""
    path = write_jsonl(tmp_path / "r.jsonl", [pair(0), pair(1)])
    with pytest.raises(DataError, match="step 1 has no training rows left"):
        run(path, gpt2_like(), tmp_path / "c", 1, split=(0, 1, 1))
    with pytest.raises(DataError, match="prompt over the limit: 2"):
        run(path, gpt2_like(), tmp_path / "c", max_prompt_length=1, long_prompts="drop", **ONLY[2])
    assert len(run(path, gpt2_like(), tmp_path / "c", part="eval", **ONLY[2]).dataset) == 0


def test_held_out_prompts_without_answers(tmp_path: Path) -> None:
    """D1, C14: a test row needs only its prompt; steps that need more leave it out, counted."""
    write_jsonl(tmp_path / "d/train.jsonl", [pair(i) for i in range(9)])
    write_jsonl(tmp_path / "d/test.jsonl", [{"prompt": f"q{i}"} for i in range(150)])
    data = run(tmp_path / "d", gpt2_like(), tmp_path / "c", 1, part="eval")
    assert data.report.dropped == {"held-out row without 'chosen'": 150}
    assert run(tmp_path / "d", gpt2_like(), tmp_path / "c", 3, part="eval").report.kept == 150


def test_report_survives_json() -> None:
    """C14."""
    report = DataReport(read=9, kept=2)
    for line in range(7):
        report.add_bad("broken JSON", f"f:{line}")
    report.dropped["x"] += 1
    again = DataReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again == report
    assert again.bad == {"broken JSON": (7, ["f:0", "f:1", "f:2", "f:3", "f:4"])}
    assert "bad: broken JSON: 7 (f:0, f:1, f:2, f:3, f:4, ...)" in again.lines()


class Builds:
    """Counts how often rows are made and not taken from the cache."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        # The package's attribute of that name is the function.
        module = importlib.import_module("rlhf.data.prepare")
        real = module._build

        def build(*args: Any) -> None:
            self.count += 1
            real(*args)

        monkeypatch.setattr(module, "_build", build)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Builds:
    return Builds(monkeypatch)


def test_cache_is_keyed_by_content(builds: Builds, tmp_path: Path) -> None:
    """The cache is hit again for a renamed file, and missed for anything that matters."""
    rows = [pair(i) for i in range(40)]
    a = write_jsonl(tmp_path / "a/r.jsonl", rows)
    b = write_jsonl(tmp_path / "b/other.jsonl", rows)
    store = tmp_path / "c"
    tokenizer = gpt2_like()
    first = run(a, tokenizer, store)
    again = run(b, tokenizer, store)
    assert builds.count == 1
    assert first.fingerprint == again.fingerprint
    assert first.report == again.report
    assert list(first.dataset) == list(again.dataset)
    changed: list[dict[str, Any]] = [
        {"seed": 2},
        {"step": 1},
        {"part": "eval"},
        {"max_length": 299},
        {"max_prompt_length": 199},
        {"response_column": "chosen"},
        {"long_prompts": "drop"},
        {"split": (1, 1, 1)},
        {"eval_fraction": 0.2},
        {"max_train_rows": 5},
        {"template": "{{ messages[0].content }}"},
        {"response_format": " {text}"},
        {"columns": {"chosen": "rejected", "rejected": "chosen"}},
    ]
    for number, change in enumerate(changed, 2):
        run(a, tokenizer, store, **change)
        assert builds.count == number, change
    prepare_tokenizer(tokenizer)
    run(a, tokenizer, store)
    write_jsonl(a, [*rows, pair(99)])
    run(a, tokenizer, store)
    assert builds.count == len(changed) + 3
    assert run(a, tokenizer, store).fingerprint != first.fingerprint


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "no json", "bad json", "swap"])
def test_damaged_cache_is_rebuilt(damage: str, builds: Builds, tmp_path: Path) -> None:
    """A cache file that is not what was written is seen and made again."""
    path = write_jsonl(tmp_path / "r.jsonl", [pair(i) for i in range(40)])
    store = tmp_path / "c"
    first = run(path, gpt2_like(), store)
    rows, print_ = list(first.dataset), first.fingerprint
    (arrow,), (info,) = store.glob("*.arrow"), store.glob("*.json")
    content = bytearray(arrow.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "flip":
        arrow.write_bytes(content)
    elif damage == "cut":
        arrow.write_bytes(content[:100])
    elif damage == "remove":
        arrow.unlink()
    elif damage == "no json":
        info.unlink()
    elif damage == "bad json":
        info.write_text("[1]")
    else:
        other = run(path, gpt2_like(), tmp_path / "other", seed=9)
        arrow.write_bytes(Path(other.dataset.cache_files[0]["filename"]).read_bytes())
        builds.count = 1
    again = run(path, gpt2_like(), store)
    assert builds.count == 2
    assert (list(again.dataset), again.fingerprint) == (rows, print_)


def test_cache_place_and_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is private, under the home or $RLHF_CACHE; arrow and JSON only, no leftovers."""
    path = write_jsonl(tmp_path / "r.jsonl", [pair(i) for i in range(9)])
    store = tmp_path / "new" / "c"
    data = run(path, gpt2_like(), store)
    assert stat.S_IMODE(store.stat().st_mode) == 0o700
    assert sorted(file.suffix for file in store.iterdir()) == [".arrow", ".json"]
    assert data.dataset.cache_files[0]["filename"].startswith(str(store))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RLHF_CACHE", raising=False)
    assert cache.data_root(None) == tmp_path / "home/.cache/rlhf/data"
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "mine"))
    assert cache.data_root(None) == tmp_path / "mine/data"
    (tmp_path / "file").write_text("")
    with pytest.raises(RequirementError, match=r"data\.cache_dir"):
        run(path, gpt2_like(), tmp_path / "file")


def test_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk gives a DataError with the remedy, and no file that a later start would find."""
    path = write_jsonl(tmp_path / "r.jsonl", [pair(i) for i in range(9)])

    def full(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", source)

    with monkeypatch.context() as patched:
        patched.setattr(cache.os, "replace", full)
        with pytest.raises(DataError, match=r"No space left .*data\.cache_dir"):
            run(path, gpt2_like(), tmp_path / "c")
    assert list((tmp_path / "c").iterdir()) == []
    assert run(path, gpt2_like(), tmp_path / "c").report.read == 9


def _one_process(path: Path, store: Path, queue: Any) -> None:
    queue.put(run(path, gpt2_like(), store).fingerprint)


def test_processes_at_once(tmp_path: Path) -> None:
    """Ranks that start together with an empty cache all get the same whole rows."""
    path = write_jsonl(tmp_path / "r.jsonl", [pair(i) for i in range(300)])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [
        context.Process(target=_one_process, args=(path, tmp_path / "c", queue)) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    prints = {queue.get(timeout=120) for _ in workers}
    for worker in workers:
        worker.join()
    assert prints == {run(path, gpt2_like(), tmp_path / "c").fingerprint}
    assert len(list((tmp_path / "c").iterdir())) == 2


@needs_shared("movie_sentiment")
def test_movie_sentiment(tmp_path: Path) -> None:
    """C10, C11 on real data: 4,000 rows over the steps as 2,4,4; the test file is held out."""
    tokenizer = gpt2_like()
    prepare_tokenizer(tokenizer)
    apply_template(tokenizer, "human_assistant")
    limits = {"max_prompt_length": 100, "max_length": 600}
    kept = []
    for step in (1, 2, 3):
        data = run(SHARED / "movie_sentiment", tokenizer, tmp_path, step, **limits)
        kept.append(data.report.kept)
        assert (data.report.read, data.report.bad_rows) == (4400, 0)
    assert kept == [800, 1600, 1600]
    data = run(SHARED / "movie_sentiment", tokenizer, tmp_path, 2, part="eval", **limits)
    assert data.report.kept == 400
    row = data.dataset[0]
    text = tokenizer.decode(row["prompt_ids"] + row["chosen_ids"][:-1])
    lines = (SHARED / "movie_sentiment/test.jsonl").read_text().splitlines()
    assert text in {one["prompt"] + one["chosen"] for one in map(json.loads, lines)}
