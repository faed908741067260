"""The table of judges: names, import paths, what is said when one cannot be had."""

from __future__ import annotations

import builtins
import sys

import pytest

from rlhf.errors import ConfigError, RequirementError
from rlhf.rewards.judges import JUDGES, Judge, resolve_judge


def points(judge: Judge, prompts, answers, ended):
    return judge.score(prompts, answers, {"ended": ended})


PROMPT = "\n\nHuman: What is the capital of France?\n\nAssistant:"


def test_courtesy():
    judge = resolve_judge("courtesy")
    answers = [" Sure! Paris is the capital of France. Enjoy!", " Paris.", " Sure!"]
    scores = points(judge, [PROMPT] * 3, answers, [True, True, False])
    assert scores == [3.0, 2.0, 0.0]
    assert [judge.good(s) for s in scores] == [True, False, False]
    assert judge.name == "courtesy"


def test_rows_must_match():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        points(resolve_judge("courtesy"), [PROMPT], [" Paris.", " Rome."], [True, True])


def test_vader_scores_the_answer_alone():
    pytest.importorskip("vaderSentiment")
    judge = resolve_judge("vader")
    scores = points(judge, ["Terrible!"] * 3, ["I love it.", "It is awful.", ""], [True] * 3)
    # compound = s / sqrt(s^2 + 15); "love" has valence 3.2, "awful" -2.0 in vader's lexicon.
    assert scores == pytest.approx([3.2 / (3.2**2 + 15) ** 0.5, -2.0 / 19**0.5, 0.0], abs=1e-4)
    assert [judge.good(s) for s in (*scores, 0.05, 0.051)] == [True, False, False, False, True]


def test_vader_missing(monkeypatch):
    """Exit code 3 and the command that installs it."""
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("vaderSentiment"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RequirementError, match="pip install vaderSentiment") as caught:
        resolve_judge("vader")
    assert caught.value.exit_code == 3


OWN = """
import statistics

def length(prompts, answers, ended):
    return [len(a) for a in answers]

length.good = lambda score: score < 5

def plain(prompts, answers, ended):
    return [1, -1]

def broken(prompts, answers, ended):
    raise ZeroDivisionError("mine")

constant = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_judges.py").write_text(OWN)
    (tmp_path / "own_needs.py").write_text("import not_installed_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("own_judges", "own_needs"):
        sys.modules.pop(name, None)


def test_import_path(own):
    """G2's form: your own function by import path."""
    judge = resolve_judge("own_judges:length")
    assert points(judge, ["", ""], ["abc", "abcdefg"], [True, True]) == [3.0, 7.0]
    assert (judge.good(3), judge.good(7)) == (True, False)
    plain = resolve_judge("own_judges:plain")
    assert [plain.good(s) for s in points(plain, ["", ""], ["", ""], [True, True])] == [True, False]


def test_own_exception_propagates(own):
    """G2: a failing function stops the run with its traceback."""
    with pytest.raises(ZeroDivisionError, match="mine"):
        points(resolve_judge("own_judges:broken"), [""], [""], [True])
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        resolve_judge("own_needs:anything")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("corteous", "choose one of courtesy, vader"),
        ("own_judges:", "choose one of"),
        (":length", "choose one of"),
        ("no_such_package.judges:f", "no module 'no_such_package'"),
        ("own_judges:missing", "has no 'missing'"),
        ("own_judges:constant", "is a int, no function"),
    ],
)
def test_bad_names(own, name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve_judge(name)
    assert caught.value.exit_code == 2


def test_table():
    assert set(JUDGES) == {"courtesy", "vader"}
