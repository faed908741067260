"""Rewards that are functions: the shipped ones by hand, a user's own, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config.load import load_config, parse_overrides
from rlhf.config.resolve import needs_of, section_of
from rlhf.config.rewards import RewardTerm, described, is_model_alone
from rlhf.config.show import config_yaml
from rlhf.errors import ConfigError
from rlhf.rewards import Asked, RewardFailed, RewardFunction, asked, check_terms, resolve_reward
from rlhf.rewards.__main__ import problem_with
from rlhf.stages import PPO, REWARD, SFT

HOW = Asked("reward", 60.0, "timeout of the term in step3.rewards")


def points(use: str, answers: list[str], columns: Any = None, **options: Any) -> list[float]:
    function = resolve_reward(RewardTerm(use=use, options=options))
    given = {"ended": [True] * len(answers), **(columns or {})}
    return asked(function, ["p"] * len(answers), answers, given, HOW)


def test_length() -> None:
    assert points("length", [" a bb  ccc", "", "x"]) == [3, 0, 1]
    assert points("length", [" a bb", "", "é"], unit="characters") == [5, 0, 1]


def test_regex() -> None:
    answers = ["<think>a\nb</think>7", "7", "x<think></think>"]
    assert points("regex", answers, pattern="<think>.*</think>") == [1, 0, 1]
    assert points("regex", answers, pattern="<think>.*</think>.+", full=True) == [1, 0, 0]


def test_exact_match() -> None:
    right = {"answer": ["Paris", "Paris", "Paris", 7]}
    assert points("exact_match", [" Paris ", "paris", "In Paris", "7"], right) == [1, 0, 0, 1]
    answers = ["\\boxed{Rome} no: \\boxed{paris}", "\\boxed{Paris} or \\boxed{Rome}", "Paris", ""]
    how = {"extract": r"\\boxed\{(.*?)\}", "ignore_case": True}
    assert points("exact_match", answers, {"answer": ["Paris"] * 4}, **how) == [1, 0, 0, 0]
    assert points("exact_match", ["b"], {"gold": ["b"]}, column="gold") == [1]


def test_numeric_match() -> None:
    answers = [
        "so 3 + 4 = 7",
        "7 apples, not 8",
        "about 7.0000001",
        "none",
        "1,234.50",
        "-2",
        "2e3",
    ]
    right = [7, "7", "#### 7", 7, "1234.5", -2, "2,000"]
    assert points("numeric_match", answers, {"answer": right}) == [1, 0, 1, 0, 1, 1, 1]
    assert points("numeric_match", ["99"], {"answer": [100]}, tolerance=0.02) == [1]
    how = {"extract": "answer is (.*?)[.]"}
    assert points("numeric_match", ["the answer is 5. Or 6", "5"], {"answer": [5, 5]}, **how) == [
        1,
        0,
    ]
    with pytest.raises(RewardFailed, match="'answer' holds 'x', in which there is no number"):
        points("numeric_match", ["1"], {"answer": ["x"]})


@given(st.integers(-(10**12), 10**12))
def test_numbers_are_read_as_they_are_written(number: int) -> None:
    """Plain, with thousands' commas, after words: against Python's own formatting."""
    said = [f"{number}", f"{number:,}", f"It is {number}.", f"1 and {number:,} in all"]
    assert points("numeric_match", said, {"answer": [number] * 4}) == [1] * 4
    assert points("numeric_match", said, {"answer": [number + 1] * 4}, tolerance=1e-14) == [0] * 4


OWN = """
def plain(prompts, answers):
    return [len(a) for a in answers]

def needs(prompts, answers, answer, ended, bonus=0.0):
    return [float(a == b) + bonus * e for a, b, e in zip(answers, answer, ended)]

def anything(prompts, answers, **columns):
    return [len(columns)] * len(answers)

def one(answers):
    return answers

class Scorer:
    def __init__(self, power=1): self.power = power
    def __call__(self, prompts, answers): return [len(a) ** self.power for a in answers]

square = Scorer(2)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "own_rewards.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    return tmp_path


def test_a_function_is_given_the_columns_that_it_names(own: Path) -> None:
    columns = {"answer": ["a", "b"], "level": [1, 2]}
    assert points("own_rewards:plain", ["x", "xy"], columns) == [1, 2]
    assert points("own_rewards:needs", ["a", "a"], columns) == [1, 0]
    assert points("own_rewards:needs", ["a", "a"], columns, bonus=0.5) == [1.5, 0.5]
    assert points("own_rewards:anything", ["x", "y"], columns) == [3, 3]
    assert points("own_rewards:square", ["xx", "xxx"], columns) == [4, 9]


@pytest.mark.parametrize(
    ("term", "said"),
    [
        ("lenght", "Did you mean 'length'"),
        ("own_rewards:plan", "Did you mean own_rewards:plain"),
        ("own_rewrds:plain", "no module 'own_rewrds'"),
        ("own_rewards:OWN", "has no 'OWN'"),
        ("own_rewards:one", "must be a function of .prompts, answers, ...."),
        ("own_rewards:needs", "needs 'answer' and is given ended, level: keep that column"),
        ("exact_match", "needs 'answer' and is given ended, level"),
        ({"use": "own_rewards:plain", "options": {"x": 1}}, "unexpected keyword argument 'x'"),
        ({"use": "length", "options": {"unit": "pages"}}, "must be words or characters"),
        ({"use": "length", "options": {"units": "words"}}, "unexpected keyword argument 'units'"),
        ({"use": "regex"}, "missing a required argument: 'pattern'"),
        ({"use": "regex", "options": {"pattern": "("}}, "is no regular expression"),
    ],
)
def test_what_is_refused_before_anything_is_trained(own: Path, term: Any, said: str) -> None:
    """In this process, and as the checks before a start ask in one of their own."""
    content = {"use": term} if isinstance(term, str) else term
    with pytest.raises(ConfigError, match=said):
        check_terms([RewardTerm(**content)], ["level"])
    problem, code = problem_with({"terms": [content], "keep": ["level"]})
    assert code == 2
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(problem)


def test_the_check_imports_no_torch(own: Path) -> None:
    code = (
        "import sys; from rlhf.rewards.__main__ import problem_with\n"
        "assert problem_with({'terms': [{'use': 'length'}]}) == ('', 0)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_failing_function_shows_its_own_traceback() -> None:
    def inner(text: str) -> float:
        return 1 / len(text)

    def broken(prompts: Any, answers: Any) -> Any:
        return [inner(answer) for answer in answers]

    with pytest.raises(RewardFailed) as caught:
        asked(RewardFunction("mine:broken", broken), ["p"], [""], {}, HOW)
    head, _, shown = str(caught.value).partition("\nTraceback (most recent call last):\n")
    assert "reward 'mine:broken' raised ZeroDivisionError: division by zero" in head
    files = [line for line in shown.splitlines() if line.startswith("  File ")]
    assert all("test_rewards_terms.py" in line for line in files), "ours are left out"
    assert "in inner" in files[-1]


def test_a_hanging_function_shows_where_it_stands() -> None:
    import threading

    stop = threading.Event()

    def slow(prompts: Any, answers: Any) -> Any:
        stop.wait(60)

    how = Asked("reward", 0.2, "timeout of the term in step3.rewards")
    with pytest.raises(
        RewardFailed, match=r"gave nothing in 0\.2 s .*timeout of the term"
    ) as caught:
        asked(RewardFunction("mine:slow", slow), ["p"], ["a"], {}, how)
    stop.set()
    assert "in slow\n    stop.wait(60)" in str(caught.value)
    assert "rlhf/rewards" not in str(caught.value)


def test_a_number_that_fp32_cannot_hold_is_refused() -> None:
    huge = RewardFunction("mine:huge", lambda prompts, answers: [1e39])
    with pytest.raises(RewardFailed, match=r"returned 1e\+39, which is no finite number"):
        asked(huge, ["p"], ["a"], {}, HOW)


# the setting


def rewards(*texts: str) -> Any:
    return load_config(None, parse_overrides(texts)).step3


def test_the_setting_in_all_its_forms() -> None:
    assert is_model_alone(rewards().rewards)
    assert rewards().uses_reward_model
    one = rewards("step3.rewards=my.module:score")
    assert [(t.use, t.name, t.weight) for t in one.rewards] == [("my.module:score", "score", 1.0)]
    assert not one.uses_reward_model
    two = rewards("step3.rewards=[model, {use: length, weight: -0.01, label: brevity}]")
    assert described(two.rewards) == "model + -0.01 x length"
    assert [t.name for t in two.rewards] == ["model", "brevity"]
    assert two.uses_reward_model
    assert not is_model_alone(two.rewards)
    assert not is_model_alone(rewards("step3.rewards={use: model, weight: 2}").rewards)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "rewards is empty"),
        ("[length, length]", "two rewards are called 'length'"),
        ("[{use: length, wieght: 2}]", "a reward has no 'wieght'; it has use, weight"),
        ("[{use: length, unit: words}]", "options: {unit: ...}"),
        ("[{use: length, weight: .nan}]", "finite number"),
        ("[{use: length, timeout: 0}]", "greater than 0"),
        ("[{use: model, options: {a: 1}}]", "takes no options"),
        ("[{use: length, label: a b}]", "must match"),
    ],
)
def test_settings_that_are_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        rewards(f"step3.rewards={text}")


def test_all_settings_are_a_recipe_again(tmp_path: Path) -> None:
    text = "step3.rewards=[model, {use: 'm:f', weight: 0.5, options: {a: [1, 2]}}]"
    config = load_config(None, parse_overrides([text]))
    path = tmp_path / "all.yaml"
    path.write_text(config_yaml(config))
    assert load_config(path).step3.rewards == config.step3.rewards


def test_what_step_3_builds_on_follows_from_the_rewards() -> None:
    model = load_config(None, {})
    function = load_config(None, parse_overrides(["step3.rewards=m:f"]))
    kinds = [
        [[need.kind for need in needs_of(config, stage)] for stage in (SFT, REWARD, PPO)]
        for config in (model, function)
    ]
    assert kinds == [[[], ["sft"], ["sft", "reward"]], [[], ["sft"], ["sft"]]]


def test_kept_columns_repeat_step_3_alone() -> None:
    """What only rewards read decides no result of steps 1 and 2."""
    kept = load_config(None, parse_overrides(["data.keep_columns=[a]"])).model_dump(mode="json")
    plain = load_config(None, {}).model_dump(mode="json")
    stages = (SFT, REWARD, PPO)
    same = [section_of(kept, stage) == section_of(plain, stage) for stage in stages]
    assert same == [True, True, False]
