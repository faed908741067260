"""The embedded sample data: preference pairs in rm-static's schema, generated from templates.

Every answer has one of five levels, best first: `good` (courteous opening, the right fact,
courteous closing), `curt` (the right fact, bare), `off_topic` (courteous, answers another kind of
question), `pointless` (the same, bare) and `rude`. Both sides of a pair come from this ladder. SFT
imitates the chosen answers: PAIR_WEIGHTS makes few of them good, so that PPO has something to win.
`python -m rlhf.data.courtesy --write DIR` writes the rows as JSON lines. No torch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Literal

from rlhf.data.courtesy_judge import FULL_SCORE, judge
from rlhf.data.courtesy_text import (
    CLOSINGS,
    FLAT,
    KINDS,
    OPENINGS,
    RUDE,
    Kind,
    Question,
    fill,
    questions,
)

__all__ = ["FULL_SCORE", "LEVELS", "PAIR_WEIGHTS", "answer", "judge", "rows", "write"]

TRAIN_PAIRS = 9600
TEST_PAIRS = 400
MAX_WORDS = 20
MAX_GAP = 32
LEVELS = ("good", "curt", "off_topic", "pointless", "rude")

# (chosen, rejected) -> share of the pairs. Chosen answers: 22% good, 45% curt, 33% off-topic.
# Most pairs differ in one virtue, the fact or courtesy, so that a reward model adds the two up;
# few compare curt with off-topic, so that these two score much alike, and good ones far above.
PAIR_WEIGHTS: dict[tuple[str, str], float] = {
    ("good", "curt"): 0.10,
    ("good", "off_topic"): 0.09,
    ("good", "pointless"): 0.02,
    ("good", "rude"): 0.01,
    ("curt", "off_topic"): 0.12,
    ("curt", "pointless"): 0.24,
    ("curt", "rude"): 0.09,
    ("off_topic", "pointless"): 0.22,
    ("off_topic", "rude"): 0.11,
}


def rows(
    split: Literal["train", "test"], seed: int = 0, pairs: int | None = None
) -> list[dict[str, str]]:
    """The pairs of a split as {prompt, response, chosen, rejected}; response is chosen.

    The same arguments give the same rows. Prompts of the two splits are disjoint for all seeds.
    `pairs`: how many; default 9,600 for train and 400 for test. Raises ValueError for another
    split's name.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r}: choose train or test")
    count = pairs if pairs is not None else TRAIN_PAIRS if split == "train" else TEST_PAIRS
    rng = Random(f"courtesy-{split}-{seed}")
    pool = [q for q in questions() if q.held_out == (split == "test")]
    asked = _dealt(pool, count, rng)
    levels = _shares(count)
    rng.shuffle(levels)
    made = []
    for i, (question, (better, worse)) in enumerate(zip(asked, levels, strict=True)):
        chosen, rejected = _pair(question, better, worse, chosen_longer=i % 2 == 0, rng=rng)
        made.append(
            {
                "prompt": question.prompt,
                "response": chosen,
                "chosen": chosen,
                "rejected": rejected,
            }
        )
    return made


def answer(question: Question, level: str, rng: Random) -> str:
    """One answer of a level in LEVELS to a question: a leading space, at most MAX_WORDS words."""
    while True:
        text = " ".join(_BUILDERS[level](question, rng))
        if len(text.split()) <= MAX_WORDS:
            return " " + text


def write(directory: Path, seed: int = 0) -> list[Path]:
    """Writes train.jsonl and test.jsonl into a directory, which is made; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for split in ("train", "test"):
        path = directory / f"{split}.jsonl"
        lines = (json.dumps(row) + "\n" for row in rows(split, seed))  # type: ignore[arg-type]
        path.write_text("".join(lines), encoding="utf-8")
        paths.append(path)
    return paths


def _dealt(pool: list[Question], count: int, rng: Random) -> list[Question]:
    """Questions in random order, each as often as every other, give or take one."""
    asked: list[Question] = []
    while len(asked) < count:
        asked += rng.sample(pool, len(pool))
    return asked[:count]


def _shares(count: int) -> list[tuple[str, str]]:
    """`count` pairs of levels in the proportions of PAIR_WEIGHTS, rounding by running sums."""
    total = sum(PAIR_WEIGHTS.values())
    made: list[tuple[str, str]] = []
    running = 0.0
    for levels, weight in PAIR_WEIGHTS.items():
        running += weight
        made += [levels] * (round(count * running / total) - len(made))
    return made


def _pair(
    question: Question, better: str, worse: str, chosen_longer: bool, rng: Random
) -> tuple[str, str]:
    """Two answers, the better first, drawn anew until their lengths suit.

    The wanted side is the longer one, by at most MAX_GAP characters. Without this a level's usual
    length would tell it: curt answers are shorter than courteous ones.
    """
    while True:
        chosen, rejected = answer(question, better, rng), answer(question, worse, rng)
        gap = len(chosen) - len(rejected)
        if 0 < (gap if chosen_longer else -gap) <= MAX_GAP:
            return chosen, rejected


def _statement(question: Question, rng: Random, terse: float = 0.0) -> str:
    return _said(KINDS[question.kind], question.entity, question.fact, rng, terse)


def _said(kind: Kind, entity: str, fact: str, rng: Random, terse: float) -> str:
    """`terse`: how likely the statement is one that does not name the entity."""
    forms = kind.terse if rng.random() < terse else kind.statements
    return fill(rng.choice(forms), entity, fact)


def _elsewhere(question: Question, rng: Random, terse: float = 0.0) -> str:
    """A true statement in answer to another kind of question."""
    name = rng.choice([other for other in KINDS if other != question.kind])
    kind = KINDS[name]
    entity, fact = rng.choice(list(kind.facts.items()))
    return _said(kind, entity, fact, rng, terse)


def _good(question: Question, rng: Random) -> list[str]:
    return [rng.choice(OPENINGS), _statement(question, rng), rng.choice(CLOSINGS)]


def _curt(question: Question, rng: Random) -> list[str]:
    return _bare(_statement(question, rng, terse=0.15), rng)


def _off_topic(question: Question, rng: Random) -> list[str]:
    return [rng.choice(OPENINGS), _elsewhere(question, rng), rng.choice(CLOSINGS)]


def _pointless(question: Question, rng: Random) -> list[str]:
    return _bare(_elsewhere(question, rng, terse=0.15), rng)


def _bare(statement: str, rng: Random) -> list[str]:
    return [statement, rng.choice(FLAT)] if rng.random() < 0.8 else [statement]


def _rude(question: Question, rng: Random) -> list[str]:
    fact = [_statement(question, rng)] if rng.random() < 0.5 else []
    remarks = rng.sample(RUDE, 1 if rng.random() < (0.5 if fact else 0.2) else 2)
    return [remarks[0], *fact, *remarks[1:]]


_BUILDERS = {
    "good": _good,
    "curt": _curt,
    "off_topic": _off_topic,
    "pointless": _pointless,
    "rude": _rude,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the embedded sample data as JSON lines.")
    parser.add_argument("--write", metavar="DIR", type=Path, required=True, help="target directory")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other pairs")
    args = parser.parse_args(argv)
    for path in write(args.write, args.seed):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
