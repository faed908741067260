"""Step 3 publishes before anything else, and is evaluated in an act of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import step3_ppo.evaluation
from rlhf.config.rewards import RewardTerm
from rlhf.config.schema import ResolvedStep, RunConfig
from rlhf.errors import ConfigError, UserError
from rlhf.harness import StepRun
from rlhf.rewards import RewardFailed
from rlhf.store import RunDir, find_evaluation, read_json, verify
from rlhf.text import normalised
from step3_ppo.answers import in_order, prompt_indices, share_of
from step3_ppo.cards import cards, figures, training_figures
from tests.unit import model_help as help_
from tests.unit.test_steps_main import config, root, step

__all__ = ["root"]  # a fixture
JUDGES = """
calls = []

def broken(prompts, answers, ended):
    raise LookupError("no such key")

def length(prompts, answers, ended):
    calls.append((prompts, answers, ended))
    return [len(answer) for answer in answers]
"""


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    help_.world_of_one(monkeypatch)


@pytest.fixture
def own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path_factory.mktemp("judges")
    (place / "step_judges.py").write_text(JUDGES)
    monkeypatch.syspath_prepend(place)
    monkeypatch.delitem(sys.modules, "step_judges", raising=False)


def evaluate(settings: RunConfig, parents: Path, run_dir: Path) -> RunDir:
    """As `python train.py evaluate` does, in this process."""
    places = {"sft": "step1_sft", "reward": "step2_reward"}
    resolved = ResolvedStep(
        step=3,
        run_dir=str(run_dir),
        parents={kind: str(parents / place / "artifact") for kind, place in places.items()},
        config=settings,
    )
    step3_ppo.evaluation.main(StepRun(resolved, rank=0))
    return RunDir(run_dir)


def rows_of(run: RunDir) -> list[dict[str, Any]]:
    lines = (run.artifact("evaluation") / "answers.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def asked(judge: str | None, prompts: int = 4, **more: Any) -> dict[str, Any]:
    return {"step3": {"eval": {"judge": judge, "prompts": prompts}, **more}}


def test_a_judge_that_fails_costs_no_run(root: Path, tmp_path: Path, own: None) -> None:
    """It raises after training: the policy is published, and judged later without generating."""
    ema = {"ppo": {"ema_decay": 0.5}}
    with pytest.raises(RewardFailed, match=r"step_judges:broken.*LookupError.*no such key"):
        step(3, config(root, **asked("step_judges:broken", **ema)), root / "run", tmp_path)
    run = RunDir(tmp_path)
    policy = verify(run.artifact("ppo"), "ppo")
    assert policy.metrics["training"]["logged_iterations"] == 2
    assert "evaluation" not in policy.metrics
    assert find_evaluation(run) == (None, "it has not been evaluated")
    assert not run.resume(3).exists()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step3_ppo.evaluation, "published_cast", None)  # nothing may be loaded
        evaluate(config(root, **asked("step_judges:length", **ema)), root / "run", tmp_path)
    verdict = read_json(run.artifact("evaluation") / "verdict.json")
    assert set(verdict["models"]) == {"base", "sft", "ppo", "ema"}
    rows = rows_of(run)
    assert len(rows) == 16
    assert all(row["judge"] == len(row["answer"]) for row in rows)
    assert not (run.step_dir(3) / "unjudged.jsonl").exists()
    assert verify(run.artifact("ppo"), "ppo").content_id == policy.content_id


def test_more_prompts_and_another_judge(root: Path, tmp_path: Path, own: None) -> None:
    """Loaded from the artifacts, the models answer as they did at the end of step 3; what there is
    is judged again as it is; more prompts are answered anew; what fails replaces nothing."""
    ema = {"ppo": {"ema_decay": 0.5}}
    step(3, config(root, **asked("step_judges:length", **ema)), root / "run", tmp_path)
    run = RunDir(tmp_path)
    live = rows_of(run)
    (run.artifact("evaluation") / "answers.jsonl").rename(tmp_path / "kept")  # must be made anew
    evaluate(config(root, **asked("step_judges:length", **ema)), root / "run", tmp_path)
    for ours, theirs in zip(rows_of(run), live, strict=True):
        same = ("model", "prompt", "ids", "ended", "judge")
        assert {k: ours[k] for k in same} == {k: theirs[k] for k in same}
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)
        assert ours["kl"] == pytest.approx(theirs["kl"], abs=1e-4)
    means = {n: [r["score"] for r in live if r["model"] == n] for n in ("ppo", "ema")}
    assert means["ppo"] != means["ema"], "the average is another model"

    evaluate(config(root, **asked(None, 8, **ema)), root / "run", tmp_path)
    rows = rows_of(run)
    assert len(rows) == 32
    assert all(row["judge"] is None for row in rows)
    assert len({normalised(row["prompt"]) for row in rows}) == 8
    evaluation, _ = find_evaluation(run)
    with pytest.raises(RewardFailed):
        evaluate(config(root, **asked("step_judges:broken", 8, **ema)), root / "run", tmp_path)
    assert find_evaluation(run)[0] == evaluation


def test_cards_say_what_was_measured_of_each(root: Path, tmp_path: Path) -> None:
    """The actor's card has the actor's figures, the average's its own, the critic's none."""
    step(3, config(root, **asked(None, ppo={"ema_decay": 0.5})), root / "run", tmp_path)
    run = RunDir(tmp_path)
    rows, policy = rows_of(run), verify(run.artifact("ppo"), "ppo")
    text = {
        part: (run.artifact(part) / "README.md").read_text("utf-8")
        for part in ("actor", "actor_ema", "critic")
    }
    for part, name in (("actor", "ppo"), ("actor_ema", "ema")):
        scores = [row["score"] for row in rows if row["model"] == name]
        mean = sum(scores) / len(scores)
        assert policy.metrics["evaluation"][name]["reward"] == pytest.approx(mean)
        assert f"Held-out reward {mean:.3f} (SFT model" in text[part]
        assert "4 answers to 4 prompts" in text[part]
    assert "In training" in text["actor"]
    assert "In training" not in text["actor_ema"]
    assert "decay 0.5" in text["actor_ema"]
    assert "reward" not in text["critic"].split("Started")[1].replace("step2_reward", "")
    training = policy.metrics["training"]
    assert f"explained variance {training['explained_variance']:.3f}" in text["critic"]
    assert f"value loss {training['value_loss']:.4f}" in text["critic"]


def test_nothing_held_out(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published without a verdict, and said so; not made up for ever after."""
    import step3_ppo.main as main

    read = main.read_prompts

    def empty(run: Any, tokenizer: Any, split: Any) -> Any:
        import dataclasses

        rows = read(run, tokenizer, split)
        return (
            dataclasses.replace(rows, dataset=rows.dataset.select([])) if split == "eval" else rows
        )

    monkeypatch.setattr(main, "read_prompts", empty)
    step(3, config(root), root / "run", tmp_path)
    run = RunDir(tmp_path)
    policy = verify(run.artifact("ppo"), "ppo")
    assert policy.metrics["evaluation"] == {}
    assert find_evaluation(run)[0] is not None
    assert sorted(p.name for p in run.artifact("evaluation").iterdir()) == [
        "MANIFEST.json",
        "no_verdict.txt",
    ]
    assert "NO VERDICT" in (run.artifact("evaluation") / "no_verdict.txt").read_text()


def test_other_prompts(root: Path, tmp_path: Path) -> None:
    """A file whose name says that it is held out is all that is answered; also where the run
    itself held nothing out."""
    settings = config(root, data={"path": [str(root / "data" / "train.jsonl")], "eval_fraction": 0})
    step(3, settings, root / "run", tmp_path)
    run = RunDir(tmp_path)
    assert not (run.artifact("evaluation") / "verdict.json").exists()
    settings.data.path = [str(root / "data" / "test.jsonl")]
    settings.step3.eval.prompts = 10
    evaluate(settings, root / "run", tmp_path)
    rows = [row for row in rows_of(run) if row["model"] == "ppo"]
    assert len(rows) == 10
    assert len({row["prompt"] for row in rows}) == 8
    assert all("of test?" in row["prompt"] for row in rows)
    assert rows[0]["prompt"] == rows[8]["prompt"]
    assert rows[0]["ids"] != rows[8]["ids"], "another draw"
    assert figures_of(run, "ppo")["prompts"] == 8.0


def figures_of(run: RunDir, model: str) -> dict[str, float]:
    return dict(verify(run.artifact("ppo"), "ppo").metrics["evaluation"][model])


def test_a_judge_that_does_not_exist_is_refused_before_training(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="corteous"):
        step(3, config(root, **asked("corteous")), root / "run", tmp_path)
    assert not (tmp_path / "step3_ppo" / "metrics.jsonl").exists()


def test_generation_that_dies(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is: the policy is there."""
    from step3_ppo.answers import Questions

    def dies(*_: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Questions, "_scored", dies)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        step(3, config(root), root / "run", tmp_path)
    verify(tmp_path / "step3_ppo" / "artifact", "ppo")


def test_training_again_leaves_no_old_verdict(root: Path, tmp_path: Path, own: None) -> None:
    """The verdict on the policy before is gone, although this one has none yet."""
    step(3, config(root), root / "run", tmp_path)
    changed = asked("step_judges:broken", ppo={"kl_coef": 0.5, "score_clip": 100.0})
    with pytest.raises(UserError):
        step(3, config(root, **changed), root / "run", tmp_path)
    assert not (tmp_path / "step3_ppo" / "evaluation").exists()


def test_different_prompts_first() -> None:
    prompts = ["One?", "two?", "ONE?", "three?", " two? ", "one ?"]
    assert prompt_indices(prompts, 3) == [0, 1, 3]
    assert prompt_indices(prompts, 2) == [0, 1]
    assert prompt_indices(prompts, 7) == [0, 1, 3, 5, 0, 1, 3], "one ? is another prompt"
    assert prompt_indices([], 7) == []


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 9])
@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_every_rank_count_gives_the_same_prompts(count: int, world: int) -> None:
    """As many on every rank; together, and without what fills up, all of them in their order."""
    indices = [10 * n for n in range(count)]
    parts = [share_of(indices, rank, world) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    gathered = [item for part in parts for item in part]
    assert in_order(gathered, count, world) == indices


def test_figures_of_training_are_means_of_the_last_lines() -> None:
    rows = [{"score_normalised": float(n), "kl_per_answer": 1.0} for n in range(12)]
    rows[-1]["value_loss"] = 0.5
    assert training_figures(rows) == {
        "logged_iterations": 10.0,
        "score_normalised": 6.5,
        "kl_per_answer": 1.0,
        "value_loss": 0.5,
    }
    assert training_figures([]) == {}


def test_a_card_without_figures_has_none() -> None:
    """What was not measured is absent."""
    found = cards(
        ["actor", "critic"],
        algorithm="ppo",
        sft="s",
        critic="r",
        rewards=[RewardTerm()],
        ema_decay=None,
        training={},
    )
    assert not any(character.isdigit() for text in found.values() for character in text)


def test_figures_of_answers() -> None:
    from rlhf.evaluation.answers import AnswerRecord

    rows = [
        AnswerRecord("a", "x", [1, 2], True, 1.0, 0.5, None),
        AnswerRecord("A ", "y", [1, 2, 3, 4], False, 3.0, 1.5, None),
    ]
    assert figures(rows) == {
        "answers": 2.0,
        "prompts": 1.0,
        "reward": 2.0,
        "kl": 1.0,
        "length": 3.0,
        "eos_fraction": 0.5,
    }
