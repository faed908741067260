"""`rlhf compare`: what differs, and what can be told apart."""

from __future__ import annotations

import json
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.compare import describe
from launch.sides import differing, pair, same_prompts, sides
from rlhf.config import load_config
from rlhf.config.load import parse_overrides
from rlhf.evaluation.answers import AnswerRecord
from rlhf.evaluation.verdict import build_verdict
from rlhf.stages import REWARD, SFT
from rlhf.store import RunDir, jsonable, publish, read_manifest
from tests.unit.driver_help import make_artifact
from train import main

REWARDS = [0.0, 1.0, 2.0, 3.0]
T3 = 3.182446  # Student's t, 3 degrees of freedom, 97.5%: from a table


def answer(prompt: str, score: float, **changes: Any) -> AnswerRecord:
    fields = {"answer": "a", "ids": [5, 6, 2], "ended": True, "kl": 0.5, "judge": 1.0, **changes}
    return AnswerRecord(prompt=prompt, score=score, **fields)


class Courtesy:
    name = "courtesy"

    @staticmethod
    def good(points: float) -> bool:
        return points >= 2


def make_run(
    path: Path,
    answers: Sequence[AnswerRecord] | None,
    *overrides: str,
    reward: bytes = b"weights",
    judge: Any = Courtesy,
    parents: dict[str, str] | None = None,
) -> RunDir:
    """All three steps and, with `answers` of the policy, their evaluation."""
    run = RunDir(path)
    config = load_config(None, parse_overrides(overrides))
    if parents is None:
        make_artifact(path, 1, config)
        make_artifact(path, 2, config, {"sft": str(run.artifact("sft"))}, weights=reward)
        parents = {name: str(run.artifact(name)) for name in ("sft", "reward")}
    make_artifact(path, 3, config, parents)
    if answers is None:
        return run
    policy = read_manifest(run.artifact("ppo"))
    sft = [answer(record.prompt, 0.0) for record in answers]
    verdict = build_verdict(
        {"sft": sft, "ppo": answers}, held_out=None, sft={}, reward={}, judge=judge, samples=0
    )

    def write(directory: Path) -> None:
        lines = [{"model": "sft", **record.as_json()} for record in sft]
        lines += [{"model": "ppo", **record.as_json()} for record in answers]
        (directory / "answers.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        (directory / "verdict.json").write_text(json.dumps(verdict))

    publish(
        run.step_dir(3), write, name="evaluation", kind="evaluation", step=3, parents={},
        data_fingerprint="d" * 64, tokenizer_fingerprint="t" * 64,
        config={"policy": policy.content_id}, metrics={},
    )  # fmt: skip
    return run


def scored(*rewards: float, **changes: Any) -> list[AnswerRecord]:
    return [answer(f"p{i}", reward, **changes) for i, reward in enumerate(rewards)]


def test_paired_by_hand(tmp_path: Path) -> None:
    """Rises of 1, 1, 2 and 0 on four prompts: 1 +- t(3) * s / 2; KL from 0.5 to 0.7 on each."""
    one = make_run(tmp_path / "one", scored(*REWARDS))
    after = scored(1.0, 2.0, 4.0, 3.0, kl=0.7)
    two = make_run(tmp_path / "two", list(reversed(after)))  # in another order
    found = pair(*sides([str(one.path), str(two.path)]))
    half = T3 * statistics.stdev([1, 1, 2, 0]) / math.sqrt(4)
    reward = found.figures["reward"]
    assert found.prompts == 4
    assert (reward.before, reward.after, reward.change) == (1.5, 2.5, 1.0)
    assert (reward.low, reward.high) == pytest.approx((1 - half, 1 + half), rel=1e-5)
    assert reward.outcome == "not told apart"
    assert found.figures["kl"].change == pytest.approx(0.2)
    assert found.figures["kl"].outcome == "higher"
    assert "judge_good" not in found.figures, "what is good, only the judge knows"
    assert found.left_out == {}


def test_only_prompts_that_both_answered_count() -> None:
    """As many answers to each in both, in one order; prompts are compared as a reader would."""
    one = [answer("a", 1), answer("b", 2), answer("a", 3), answer("c", 4)]
    two = [answer("C ", 5), answer("A", 6), answer("d", 7)]
    before, after = same_prompts(one, two)
    assert [record.score for record in before] == [1, 4]
    assert [record.score for record in after] == [6, 5]


def test_what_does_not_mean_the_same_is_not_compared(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", scored(*REWARDS))
    two = make_run(tmp_path / "two", scored(*REWARDS), reward=b"another", judge=None)
    found = pair(*sides([str(one.path), str(two.path)]))
    assert set(found.figures) & {"reward", "reward_within_lengths", "judge"} == set()
    assert found.left_out["reward"] == "scored by different reward models"
    assert found.left_out["judge"] == "judged by courtesy and None"
    assert "kl" in found.figures, "both have the same SFT weights"
    text = "\n".join(describe(sides([str(one.path), str(two.path)]), [found]))
    assert "SFT model: the same" in text
    assert "reward model: different ones" in text
    assert "reward: not compared: scored by different reward models" in text


def test_no_prompts_in_common(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", scored(*REWARDS))
    two = make_run(tmp_path / "two", [answer("x", 1.0), answer("p1", 2.0)])
    found = pair(*sides([str(one.path), str(two.path)]))
    assert found.figures == {}
    assert found.left_out == {"all figures": "they answered 1 prompt in common"}


def test_settings_that_differ(tmp_path: Path) -> None:
    """Three runs; an earlier record that lacks a setting has its default."""
    one = make_run(tmp_path / "one", None, "step3.ppo.kl_coef=0.02")
    two = make_run(tmp_path / "two", None, "step3.ppo.kl_coef=0.05", "name=two")
    three = make_run(tmp_path / "three", None, "step3.ppo.kl_coef=0.05", "step3.eval.prompts=7")
    found = sides([str(run.path) for run in (one, two, three)])
    default = load_config(None, {}).step3.eval.prompts
    differ, incomplete = differing(found)
    assert differ == {
        "step3.ppo.kl_coef": [0.02, 0.05, 0.05],
        "step3.eval.prompts": [default, default, 7],
    }
    assert incomplete == []
    config = jsonable(load_config(None, {}))
    del config["step3"]["ppo"]["gamma"]  # as a release wrote it that had no such setting
    make_artifact(tmp_path / "old", 3, config)
    make_artifact(tmp_path / "new", 3, load_config(None, parse_overrides(["step3.ppo.lam=0.5"])))
    found = sides([str(tmp_path / "old"), str(tmp_path / "new")])
    assert list(differing(found)[0]) == ["step3.ppo.lam"]


def test_a_run_that_was_given_its_parents(tmp_path: Path) -> None:
    """Settings of steps 1 and 2 are those of the parents; one that is gone is not guessed."""
    one = make_run(tmp_path / "one", scored(*REWARDS), "step1.optim.learning_rate=0.5")
    parents = {name: str(one.artifact(name)) for name in ("sft", "reward")}
    two = make_run(tmp_path / "two", scored(*REWARDS), parents=parents)
    found = sides([str(one.path), str(two.path)])
    assert differing(found) == ({}, [])
    assert pair(*found).left_out == {}
    other = make_run(tmp_path / "other", None, parents={"sft": "/gone", "reward": "/gone"})
    assert differing(sides([str(one.path), str(other.path)]))[1] == [SFT, REWARD]


def test_the_whole_of_it(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "output" / "kl05", scored(*REWARDS), "step3.ppo.kl_coef=0.05")
    make_run(tmp_path / "output" / "kl02", scored(4, 5, 6.5, 7), "step3.ppo.kl_coef=0.02")
    make_run(tmp_path / "output" / "bare", None, "step3.ppo.kl_coef=0.02")
    assert main(["compare", "kl05", "kl02", "bare"]) == 0
    out = capsys.readouterr().out
    assert "  step3.ppo.kl_coef  0.05  0.02  0.02\n" in out
    assert "kl02 against kl05, on 4 prompts that both answered" in out
    assert re.search(
        r"^  reward +1\.500 +5\.625 +\+4\.125 +\+3\.727 to \+4\.523 +better$", out, re.M
    )
    assert "all figures: not compared: bare has no answers to held-out prompts" in out
    assert "no verdict: it has not been evaluated" in out
    assert main(["compare", "kl05", "kl02", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == {"step3.ppo.kl_coef": [0.05, 0.02]}
    (comparison,) = found["comparisons"]
    assert comparison["figures"]["reward"]["change"] == 4.125
    assert comparison["figures"]["reward"]["outcome"] == "better"
    assert found["same_models"] == {"sft": True, "reward": True}
    assert found["runs"][0]["models"]["ppo"]["reward"] == 1.5


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["one"], 2, "give two runs or more"),
        (["one", "one"], 2, "one run is given twice"),
        (["one", "nowhere"], 3, "compare nowhere: no such run. Runs in output/: one."),
        (["one", "two", "--jsn"], 2, "Did you mean --json?"),
    ],
)
def test_what_cannot_be_compared(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, argv: list[str], code: int, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "output" / "one", None)
    assert main(["compare", *argv]) == code
    assert said in capsys.readouterr().err


def test_no_torch_is_loaded() -> None:
    code = "import sys, launch.compare; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
