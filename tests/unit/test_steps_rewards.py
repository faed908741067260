"""Step 3 with rewards that are functions: no reward artifact, each term logged, and a verdict."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import step3_ppo.evaluation
import step3_ppo.main
from rlhf.config.schema import ResolvedStep, RunConfig
from rlhf.errors import ArtifactError, ConfigError
from rlhf.harness import StepRun
from rlhf.rewards import RewardFailed
from rlhf.store import find_evaluation, read_json, verify
from tests.unit import model_help as help_
from tests.unit.test_steps_main import config, finite, metrics_of, root

__all__ = ["root"]  # a fixture
FUNCTIONS = """
def short(prompts, answers):
    return [-len(answer) / 50 for answer in answers]

def broken(prompts, answers):
    raise LookupError("no such key")

def named(prompts, answers, chosen):
    assert all(c.startswith(" It is ") for c in chosen)
    return [float(len(a) < len(c)) for a, c in zip(answers, chosen)]

def judge(prompts, answers, chosen):
    return [float(len(c) - len(a)) for a, c in zip(answers, chosen)]
"""


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    help_.world_of_one(monkeypatch)
    place = tmp_path_factory.mktemp("functions")
    (place / "step_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(place)
    monkeypatch.delitem(sys.modules, "step_rewards", raising=False)


def step3(root: Path, settings: RunConfig, run_dir: Path, *, reward: bool = False) -> StepRun:
    parents = {"sft": str(root / "run" / "step1_sft" / "artifact")}
    parents |= {"reward": str(root / "run" / "step2_reward" / "artifact")} if reward else {}
    run = StepRun(ResolvedStep(step=3, run_dir=str(run_dir), parents=parents, config=settings), 0)
    step3_ppo.main.main(run)
    return run


def verdict_of(run: StepRun) -> Any:
    return read_json(run.directory.artifact("evaluation") / "verdict.json")


@pytest.mark.parametrize("algorithm", ["ppo", "rloo"])
def test_a_function_alone_needs_no_reward_model(root: Path, tmp_path: Path, algorithm: str) -> None:
    """No reward artifact is given; PPO's critic starts from the SFT model with a new head."""
    samples = 2 if algorithm == "rloo" else 1
    rollout = {"samples_per_prompt": samples}
    settings = config(
        root, step3={"algorithm": algorithm, "rewards": ["step_rewards:short"], "rollout": rollout}
    )
    run = step3(root, settings, tmp_path)
    rows = metrics_of(tmp_path, "step3_ppo")
    assert len(rows) == 2
    assert finite(rows)
    for row in rows:
        assert row["term_short"] == pytest.approx(row["score_mean"], abs=1e-5)
        assert row["score_normalised"] == pytest.approx(row["score_mean"], abs=1e-5)
        assert ("value_loss" in row) == (algorithm == "ppo")
    artifact = run.directory.artifact("ppo")
    manifest = verify(artifact, "ppo")
    assert sorted(manifest.parents) == ["sft"]
    assert (artifact / "critic").exists() == (algorithm == "ppo")
    if algorithm == "ppo":
        card = (artifact / "critic" / "README.md").read_text()
        assert "step1_sft" in card
    assert "the reward is step_rewards:short" in (artifact / "actor" / "README.md").read_text()
    verdict = verdict_of(run)
    assert verdict["reward_model"] is None
    points = [point for point, _ in verdict["decisions"]["ppo"]["points"]]
    assert points == ["the reward rose", "at most 12.5% of answers no longer end"]
    text = (run.directory.artifact("evaluation") / "verdict.txt").read_text()
    assert "The reward: step_rewards:short." in text
    assert "The reward model" not in text
    lines = (run.directory.artifact("evaluation") / "answers.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        assert row["score"] == pytest.approx(-len(row["answer"]) / 50)
        assert row["rewards"] == {"short": pytest.approx(row["score"])}


def test_model_and_functions_with_a_column_of_the_data(root: Path, tmp_path: Path) -> None:
    """Each term by itself in metrics and answers, the sum in the score; the judge gets it too."""
    terms = ["model", {"use": "step_rewards:named", "weight": 3.0, "label": "below"}]
    settings = config(
        root,
        data={"keep_columns": ["chosen"]},
        step3={"rewards": terms, "eval": {"judge": "step_rewards:judge"}},
    )
    run = step3(root, settings, tmp_path, reward=True)
    for row in metrics_of(tmp_path, "step3_ppo"):
        assert row["score_mean"] == pytest.approx(
            row["term_model"] + 3 * row["term_below"], abs=1e-4
        )
    lines = (run.directory.artifact("evaluation") / "answers.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        chosen = row["columns"]["chosen"]
        assert row["rewards"]["below"] == float(len(row["answer"]) < len(chosen))
        assert row["score"] == pytest.approx(row["rewards"]["model"] + 3 * row["rewards"]["below"])
        assert row["judge"] == len(chosen) - len(row["answer"])
    assert verdict_of(run)["rewards"] == "model + 3 x step_rewards:named"
    assert "  below" in (run.directory.artifact("evaluation") / "verdict.txt").read_text()


def test_a_function_that_fails_stops_the_run(root: Path, tmp_path: Path) -> None:
    settings = config(root, step3={"rewards": ["step_rewards:broken"]})
    with pytest.raises(
        RewardFailed, match="reward 'step_rewards:broken' raised LookupError"
    ) as told:
        step3(root, settings, tmp_path)
    assert 'in broken\n    raise LookupError("no such key")' in str(told.value)
    assert not (tmp_path / "step3_ppo" / "artifact").exists()


def test_what_is_wrong_is_said_before_the_models_load(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step3_ppo.main, "load_roles", None)
    for term, said in (("step_rewards:shrt", "has no 'shrt'"), ("step_rewards:named", "'chosen'")):
        with pytest.raises(ConfigError, match=said):
            step3(root, config(root, step3={"rewards": [term]}), tmp_path)
    with pytest.raises(ArtifactError, match="needs a 'reward' artifact"):
        step3(root, config(root), tmp_path)
    judged = config(root, step3={"eval": {"judge": "step_rewards:judge"}})
    with pytest.raises(ConfigError, match="judge 'step_rewards:judge' needs 'chosen'"):
        step3(root, judged, tmp_path, reward=True)


def test_evaluated_again_with_other_rewards(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers are scored anew where the rewards are others, and kept where they are the same."""
    settings = config(root, step3={"rewards": ["step_rewards:short"]})
    run = step3(root, settings, tmp_path)

    def again(rewards: list[Any]) -> float:
        other = settings.model_copy(deep=True)
        other.step3.rewards = rewards
        resolved = run.resolved.model_copy(update={"config": other})
        step3_ppo.evaluation.main(StepRun(resolved, 0))
        assert find_evaluation(run.directory)[0] is not None
        return float(verdict_of(run)["models"]["sft"]["reward"])

    before = float(verdict_of(run)["models"]["sft"]["reward"])
    doubled = again([{"use": "step_rewards:short", "weight": 2.0}])
    assert doubled == pytest.approx(2 * before)
    monkeypatch.setattr(step3_ppo.evaluation, "published_cast", None)  # nothing may be loaded
    assert again([{"use": "step_rewards:short", "weight": 2.0}]) == doubled
