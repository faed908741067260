"""The embedded sample data and its judge (issue 2: variety, a ladder, length tells nothing)."""

from __future__ import annotations

import ast
import inspect
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data import courtesy, courtesy_judge, courtesy_text
from rlhf.data.courtesy import FULL_SCORE, LEVELS, PAIR_WEIGHTS, answer, judge, main, rows
from rlhf.data.courtesy_text import (
    CLOSINGS,
    FLAT,
    KINDS,
    OPENINGS,
    RUDE,
    RUDE_WORDS,
    Question,
    questions,
)
from rlhf.rewards import functions, judges

TRAIN = rows("train")
TEST = rows("test")
FRANCE = "\n\nHuman: What is the capital of France?\n\nAssistant:"
TIRED = "\n\nHuman: Hi! I am tired.\n\nAssistant:"


def words(text: str) -> int:
    return len(text.split())


def level_of(prompt: str, text: str) -> str:
    """The level by features that do not use the judge."""
    question = next(q for q in ALL[prompt])
    key = question.fact.split()[-1]
    right = re.search(rf"\b{key}\b", text, re.I)
    if any(text.strip().startswith(o) for o in OPENINGS):
        return "good" if right else "off_topic"
    if any(word in text.lower() for word in RUDE_WORDS):
        return "rude"
    return "curt" if right else "pointless"


ALL: dict[str, list[Question]] = defaultdict(list)
for _q in questions():
    ALL[_q.prompt].append(_q)


# --- the rows ---


def test_schema_and_sizes():
    """C10: rm-static's schema; prompt text exactly `\\n\\nHuman: ...\\n\\nAssistant:`."""
    assert (len(TRAIN), len(TEST)) == (9600, 400)
    for row in TRAIN + TEST:
        assert set(row) == {"prompt", "response", "chosen", "rejected"}
        assert re.fullmatch(r"\n\nHuman: \S[^\n]*\S\n\nAssistant:", row["prompt"])
        assert row["response"] == row["chosen"] != row["rejected"]
        for side in ("chosen", "rejected"):
            assert re.fullmatch(r" [A-Z][^\n]*[.!?]", row[side])
            assert "  " not in row[side]
            assert words(row[side]) <= 20


def test_deterministic_and_seeded():
    assert rows("train", seed=3, pairs=50) == rows("train", seed=3, pairs=50)
    assert rows("train", seed=3, pairs=50) != rows("train", seed=4, pairs=50)
    with pytest.raises(ValueError, match="choose train or test"):
        rows("dev")  # type: ignore[arg-type]


def test_same_rows_in_another_process():
    """No dependence on hash randomisation."""
    code = "import json; from rlhf.data.courtesy import rows; print(json.dumps(rows('test')))"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    out = subprocess.run([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, check=True)
    assert json.loads(out.stdout.splitlines()[-1]) == TEST


@pytest.mark.parametrize("module", [courtesy, courtesy_judge, courtesy_text, functions, judges])
def test_standard_library_only(module):
    """The modules themselves load nothing heavy, whatever their package does."""
    names = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    ours = {n for n in names if n.startswith("rlhf")}
    light = {"rlhf.data", "rlhf.errors", "rlhf.config.keys", "rlhf.rewards.functions"}
    assert ours <= light | {n for n in ours if "courtesy" in n}
    third = {n.split(".")[0] for n in names - ours} - set(sys.stdlib_module_names)
    assert third <= {"vaderSentiment"}


def test_test_prompts_never_in_train():
    """For all seeds: which prompts are held out depends on no seed."""
    seen = {row["prompt"] for seed in range(3) for row in rows("train", seed, pairs=1800)}
    held = {row["prompt"] for seed in range(3) for row in rows("test", seed=seed)}
    assert not seen & held
    assert len(seen) == 617
    assert len(held) == 103  # the verdict draws 128 rows from these


def test_test_prompts_are_new_combinations_of_known_parts():
    train = [q for q in questions() if not q.held_out]
    for q in questions():
        assert len(ALL[q.prompt]) == 1, f"ambiguous prompt {q.prompt!r}"
    entities = {(q.kind, q.entity) for q in train}
    assert entities == {(name, x) for name, kind in KINDS.items() for x in kind.facts}
    phrased = {(q.kind, _phrasing(q)) for q in train}
    assert phrased >= {(q.kind, _phrasing(q)) for q in questions() if q.held_out}
    shares = Counter(q.kind for q in questions() if q.held_out)
    assert set(shares) == set(KINDS)
    assert max(shares.values()) - min(shares.values()) <= 2


def _phrasing(q: Question) -> str:
    return re.sub(rf"\b{q.entity}\b", "*", q.prompt)


def test_ladder_shares():
    """Good answers are a fifth of the chosen ones, and both sides come from the ladder."""
    for split in (TRAIN, TEST):
        pairs = Counter(
            (level_of(r["prompt"], r["chosen"]), level_of(r["prompt"], r["rejected"]))
            for r in split
        )
        assert set(pairs) == set(PAIR_WEIGHTS)
        for (better, worse), count in pairs.items():
            assert LEVELS.index(better) < LEVELS.index(worse)
            assert count / len(split) == pytest.approx(PAIR_WEIGHTS[better, worse], abs=1e-3)
        good = sum(n for (better, _), n in pairs.items() if better == "good") / len(split)
        assert 0.20 <= good <= 0.25
        # Both comparisons that need the good answer's two virtues are there in numbers.
        assert min(pairs["good", "curt"], pairs["good", "off_topic"]) >= 0.07 * len(split)


def test_variety():
    answers = {row[side] for row in TRAIN for side in ("chosen", "rejected")}
    assert len(answers) > 5000
    prompts = Counter(row["prompt"] for row in TRAIN)
    assert max(prompts.values()) - min(prompts.values()) <= 1
    assert len({tuple(row.items()) for row in TRAIN}) > 0.99 * len(TRAIN)


# --- length tells nothing ---


@pytest.mark.parametrize("length", [len, words])
@pytest.mark.parametrize("split", ["train", "test"])
def test_longer_side_is_chosen_half_of_the_time(length, split):
    """Issue 2: a length bias must not be enough to tell the sides apart."""
    made = TRAIN if split == "train" else TEST
    longer = sum(length(r["chosen"]) > length(r["rejected"]) for r in made)
    shorter = sum(length(r["chosen"]) < length(r["rejected"]) for r in made)
    assert 0.45 <= longer / (longer + shorter) <= 0.55
    assert longer + shorter > 0.9 * len(made)


@pytest.mark.parametrize("length", [lambda text: len(text) // 4, words])
def test_no_function_of_length_ranks_the_sides(length):
    """A Bradley-Terry score for every length, fitted on train, is right on < 58% of new pairs."""
    score: defaultdict[int, float] = defaultdict(float)
    for _ in range(10):
        for row in TRAIN:
            a, b = length(row["chosen"]), length(row["rejected"])
            step = 0.02 / (1 + math.exp(score[a] - score[b]))
            score[a] += step
            score[b] -= step
    new = rows("train", seed=7)
    right = sum(_wins(score[length(r["chosen"])], score[length(r["rejected"])]) for r in new)
    assert right / len(new) < 0.58


def _wins(a: float, b: float) -> float:
    return 0.5 if a == b else float(a > b)


def test_every_level_has_short_and_long_answers():
    rng = Random(0)
    for level in LEVELS:
        lengths = [words(answer(q, level, rng)) for q in questions()]
        assert min(lengths) <= 7
        assert max(lengths) >= 17
        assert len(set(lengths)) >= 10


# --- writing ---


def test_write(tmp_path, capsys):
    """D1: train and test JSON lines that a directory source reads back."""
    assert main(["--write", str(tmp_path / "data")]) == 0
    for split, made in (("train", TRAIN), ("test", TEST)):
        lines = (tmp_path / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == made
    assert capsys.readouterr().out.count(".jsonl") == 2


# --- the texts keep the judge honest ---


def test_sentences_do_not_share_meaning():
    """No fact or entity in a sentence of manners; rude words in every remark and nowhere else."""
    facts = {fact.split()[-1].lower() for kind in KINDS.values() for fact in kind.facts.values()}
    entities = {x.lower() for kind in KINDS.values() for x in kind.facts}
    assert not facts & entities
    assert sum(len(kind.facts) for kind in KINDS.values()) == len(facts) == len(entities)
    forms = [f for kind in KINDS.values() for f in kind.terse + kind.statements]
    for sentence in (*OPENINGS, *CLOSINGS, *FLAT, *RUDE, *forms):
        assert not (facts | entities) & set(re.findall(r"\w+", sentence.lower()))
    rude = re.compile(r"\b(" + "|".join(RUDE_WORDS) + r")\b", re.I)
    assert all(rude.search(remark) for remark in RUDE)
    assert not any(rude.search(s) for s in (*OPENINGS, *CLOSINGS, *FLAT, *forms))


# --- the judge ---


def test_judge_on_the_ladder():
    """good 3; curt and off-topic 2 (one virtue, whole); pointless 1; unended one less."""
    rng = Random(0)
    for q in questions():
        scores = {level: judge(q.prompt, answer(q, level, rng), True) for level in LEVELS}
        assert scores["good"] == FULL_SCORE == 3
        assert scores["curt"] == scores["off_topic"] == 2
        assert scores["pointless"] == 1
        assert scores["rude"] in (1, 2)
        assert judge(q.prompt, answer(q, "good", rng), False) == 2


CASES = [
    # (answer, fact, courtesy, whole)
    (" Sure! Paris is the capital of France. Enjoy!", 1, 1, 1),
    (" Paris.", 1, 0, 1),
    (" Paris. That is the answer.", 1, 0, 1),
    (" Ugh. Paris. Go away.", 1, 0, 1),
    (" Ugh. Paris. Ugh.", 1, 0, 0),
    (" Sure! Woof. Enjoy!", 0, 1, 1),  # off the point
    (" Sure! The capital of France is Rome. Enjoy!", 0, 1, 1),  # another city
    (" Sure! The capital of Japan is Paris. Enjoy!", 0, 1, 1),  # another country
    (" Sure! It is Paris. It is Rome. Enjoy!", 0, 1, 0),  # several facts
    (" Sure! Paris, Rome, Tokyo, Cairo. Enjoy!", 0, 1, 0),
    (" Sure! It is Paris. It is Paris. Enjoy!", 0, 1, 0),  # repetition
    (" Sure! Paris Paris Paris. Enjoy!", 0, 1, 0),
    (" Sure! It is not Paris. Enjoy!", 0, 1, 0),  # negated
    (" Sure! The the of is Paris. Enjoy!", 1, 1, 0),  # word salad around the fact
    (" Sure! It is my pleasure indeed. Enjoy!", 0, 1, 0),  # courteous nonsense
    (" Sure! Enjoy!", 0, 0, 0),  # nothing between the courtesies
    (" Sure! Sure! Paris. Enjoy!", 1, 0, 0),  # courtesy repeated
    (" Sure! Paris. Enjoy! Enjoy!", 1, 0, 0),
    (" Sure! Happy to help! Paris. Enjoy! Best wishes!", 1, 0, 0),
    (" Sure! Paris.", 1, 0, 0),  # half courteous
    (" Paris. Enjoy!", 1, 0, 0),
    (" Enjoy! Paris. Sure!", 1, 0, 0),  # the wrong way round
    (" Sure! Go away. Paris. Enjoy!", 1, 0, 0),  # rude in the middle
    (" Sure! Paris, you idiot. Enjoy!", 1, 0, 0),
    (" Sure! Parisian. Enjoy!", 0, 1, 0),  # part of a word
    (" Sure! It is Paris", 1, 0, 0),  # cut off
    (" Sure! It is Paris. Enj", 1, 0, 0),
    ("Sure! Paris. Enjoy!", 1, 1, 0),  # no leading space
    (" Sure!  Paris. Enjoy!", 1, 1, 0),
    (" Sure! Paris. Enjoy!\n\nHuman: Thanks.\n\nAssistant: Sure!", 1, 0, 0),  # talks to itself
    (" Sure! Paris. Enjoy!!!", 1, 0, 0),
    ("", 0, 0, 0),
    (" ", 0, 0, 0),
    (" ...", 0, 0, 0),
    (" \ufffd\ufffd Paris", 1, 0, 0),
]


@pytest.mark.parametrize(("text", "fact", "courtesy", "whole"), CASES)
def test_judge_point_by_point(text, fact, courtesy, whole):
    """Adversarial answers; `ended` alone decides whether the third point is given."""
    assert judge(FRANCE, text, True) == fact + courtesy + whole
    assert judge(FRANCE, text, False) == fact + courtesy


def test_judge_knows_small_talk_and_articles():
    assert judge(TIRED, " Of course! Try a nap. Best wishes!", True) == 3
    assert judge(TIRED, " Of course! Try nap. Best wishes!", True) == 2  # no whole sentence
    assert judge(TIRED, " Of course! Try some soup. Best wishes!", True) == 2


def test_judge_gives_no_fact_for_unknown_prompts():
    assert judge("\n\nHuman: Who are you?\n\nAssistant:", " Sure! Paris. Enjoy!", True) == 2


def test_mixed_up_good_answers_lose_points():
    """Every good answer to another question, and every order of the three parts but the right."""
    rng = Random(1)
    asked = list(questions())
    for q, other in zip(asked, asked[::-1], strict=True):
        text = answer(q, "good", rng)
        if other.entity != q.entity:
            assert judge(other.prompt, text, True) == 2
        first, middle, last = re.findall(r"[^.!?]+[.!?]", text)
        assert judge(q.prompt, middle + last + first, True) < FULL_SCORE
        assert judge(q.prompt, text + text, True) < FULL_SCORE


POLICY_TOKENS = st.sampled_from(
    [*OPENINGS, *CLOSINGS, *RUDE, "Paris", "Rome.", "France", "It is", "the", ".", "!", " ", "not"]
)


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(), st.lists(POLICY_TOKENS).map(" ".join)), st.booleans())
def test_judge_takes_any_text(text, ended):
    """A score in range for whatever a policy writes; full only for what it should be full for."""
    score = judge(FRANCE, text, ended)
    assert score in (0.0, 1.0, 2.0, 3.0)
    if score == FULL_SCORE:
        assert ended
        assert text.count("Paris") == 1
        assert re.fullmatch(r" [^.!?]+! [^.!?]+\. [^.!?]+!", text)
