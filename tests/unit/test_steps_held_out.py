"""What is measured on held-out rows, before and after training; and runs in which nothing is."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import step3_ppo.main
from rlhf import models
from rlhf.config.schema import RunConfig
from rlhf.errors import DataError
from rlhf.store import verify
from rlhf.track import read_metrics
from tests.unit import model_help as help_
from tests.unit.data_help import CASES, needs_shared
from tests.unit.test_steps_main import config, root, step

__all__ = ["root"]  # a fixture
FOLDERS = {1: "step1_sft", 2: "step2_reward", 3: "step3_ppo"}
KINDS = {1: "sft", 2: "reward", 3: "ppo"}


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    help_.world_of_one(monkeypatch)


def nine_rows(path: Path) -> Path:
    rows = [
        {
            "prompt": f"\n\nHuman: Which colour has thing {i}?\n\nAssistant:",
            "chosen": f" It is {'very ' * i}blue.",
            "rejected": " No.",
        }
        for i in range(9)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def settings_for(root: Path, path: Path, **data: Any) -> RunConfig:
    return config(root, data={"path": [str(path)], "cache_dir": str(root / "cache"), **data})


def row_ids(tokenizer: Any, row: dict[str, str]) -> tuple[list[int], int]:
    """A row as steps 1 and 2 read it, within 40 and 60 tokens; how many are the answer's."""
    prompt = tokenizer(row["prompt"]).input_ids[-40:]
    answer = tokenizer(row["chosen"], add_special_tokens=False).input_ids
    answer = [*answer, tokenizer.eos_token_id][: 60 - len(prompt)]
    return prompt + answer, len(answer)


def run_all(tmp_path: Path, path: Path, told: pytest.CaptureFixture[str]) -> None:
    """Three steps with nothing held out, as asked for: published, and no figure anywhere."""
    settings = settings_for(tmp_path, path, eval_fraction=0)
    for number, folder in FOLDERS.items():
        run = step(number, settings, tmp_path / "run", tmp_path / "run")
        out = "".join(told.readouterr())
        manifest = verify(tmp_path / "run" / folder / "artifact", KINDS[number])
        cards = [card.read_text() for card in run.step_dir.rglob("artifact/**/README.md")]
        figures = {"perplexity", "loss", "accuracy", "margin", "models", "gain", "pairs", "tokens"}
        assert not {n for n in manifest.metrics if n.removesuffix("_before") in figures}
        assert not [k for row in read_metrics(run.step_dir / "metrics.jsonl")
                    for k in row if k.startswith("eval/")]  # fmt: skip
        assert "eval data: no held-out rows: nothing is measured" in out
        assert cards
        for text in (out, *cards):
            assert not any(
                word in text for word in ("perplexity", "held-out accuracy", "held-out reward")
            )
        assert all("no held-out" in card for card in cards)
        if number < 3:
            nothing = {"rows": 0, "prompts": 0, "seen": 0}
            assert manifest.metrics["held_out"] == nothing
            assert "epoch 1: not measured, no held-out rows" in out
    assert not list((tmp_path / "run").rglob("verdict.*"))
    assert "so no verdict" in out


def test_nothing_held_out_as_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stale = tmp_path / "run" / "step3_ppo" / "verdict.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    run_all(tmp_path, nine_rows(tmp_path / "rows.jsonl"), capsys)


@needs_shared("../cases")
def test_the_case_of_nine_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_all(tmp_path, CASES / "nine_rows.jsonl", capsys)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_nothing_held_out_is_refused_before_training(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Exit code 3 with the remedy, before a model loads."""

    def loads(*args: Any, **named: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models, "load_causal", loads)
    monkeypatch.setattr(models, "load_scalar", loads)
    monkeypatch.setattr(step3_ppo.main, "load_roles", loads)
    settings = settings_for(root, nine_rows(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match=rf"step {number} has no held-out .*data\.eval_fraction=0"):
        step(number, settings, root / "run", tmp_path / "run")
    assert not list(tmp_path.rglob("artifact"))
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_scores_without_held_out_answers(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """10: mean and standard deviation are those of chosen answers that were trained on, told."""
    path = nine_rows(tmp_path / "rows.jsonl")
    settings = settings_for(root, path, eval_fraction=0, split=(0, 1, 0))
    step(2, settings, root / "run", tmp_path / "run")
    assert "score statistics are those of 9 chosen answers from training" in capsys.readouterr().out
    artifact = tmp_path / "run" / "step2_reward" / "artifact"
    metrics = verify(artifact, "reward").metrics
    assert metrics["scores_of"] == "training answers"
    model = AutoModelForSequenceClassification.from_pretrained(artifact).eval()
    tokenizer = AutoTokenizer.from_pretrained(artifact)
    scores = []
    for row in map(json.loads, path.read_text().splitlines()):
        ids, _ = row_ids(tokenizer, row)
        with torch.no_grad():
            scores.append(float(model(torch.tensor([ids])).logits))
    assert metrics["score_mean"] == pytest.approx(statistics.fmean(scores), abs=1e-5)
    assert metrics["score_std"] == pytest.approx(statistics.pstdev(scores), rel=1e-3)
    assert model.config.rlhf_score_std == pytest.approx(metrics["score_std"])


def test_perplexity_before_training(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base model's, as transformers computes it; printed, logged at step 0 and published."""
    step(1, config(root), root / "run", tmp_path)
    metrics = verify(tmp_path / "step1_sft" / "artifact", "sft").metrics
    base = AutoModelForCausalLM.from_pretrained(metrics["base"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "step1_sft" / "artifact")
    nll, tokens = 0.0, 0
    for row in map(json.loads, (root / "data" / "test.jsonl").read_text().splitlines()):
        ids, answer = row_ids(tokenizer, row)
        labels = torch.tensor([ids])
        labels[0, :-answer] = -100
        with torch.no_grad():
            nll += float(base(torch.tensor([ids]), labels=labels).loss) * answer
        tokens += answer
    expected = math.exp(nll / tokens)
    assert metrics["perplexity_before"] == pytest.approx(expected, rel=1e-4)
    assert metrics["perplexity"] < expected
    first = read_metrics(tmp_path / "step1_sft" / "metrics.jsonl")[0]
    assert (first["step"], first["eval/perplexity"]) == (0, metrics["perplexity_before"])
    out = "".join(capsys.readouterr())
    assert f"before training: held-out perplexity {expected:.3f}" in out
    card = (tmp_path / "step1_sft" / "artifact" / "README.md").read_text()
    assert f"({metrics['perplexity_before']:.4f} before training)" in card


def test_accuracy_before_training(root: Path, tmp_path: Path) -> None:
    """A learning rate of nothing leaves the untrained head's figures; a real one does not."""
    still = {"optim": {"learning_rate": 1e-12}, "train": {"max_steps": 1}}
    step(2, config(root, step2=still), root / "run", tmp_path / "still")
    untrained = verify(tmp_path / "still" / "step2_reward" / "artifact", "reward").metrics
    fast = {"optim": {"learning_rate": 1e-2}, "train": {"max_steps": 6}}
    step(2, config(root, step2=fast), root / "run", tmp_path / "fast")
    trained = verify(tmp_path / "fast" / "step2_reward" / "artifact", "reward").metrics
    for name in ("accuracy", "margin", "loss"):
        assert trained[f"{name}_before"] == pytest.approx(untrained[name], abs=1e-5)
    assert trained["accuracy"] == 1.0
    assert trained["loss"] < trained["loss_before"]
    assert trained["held_out"] == {"rows": 8, "prompts": 8, "seen": 0}
    assert trained["scores_of"] == "held-out answers"


def test_prompts_alone_measure_nothing_in_steps_1_and_2(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """D1: a test split of prompts serves step 3; it used to give a perplexity of 1.0."""
    place = tmp_path / "data"
    place.mkdir()
    nine_rows(place / "train.jsonl")
    lines = [json.dumps({"prompt": f"\n\nHuman: And {i}?\n\nAssistant:"}) for i in range(5)]
    (place / "test.jsonl").write_text("\n".join(lines))
    settings = settings_for(root, place)
    for number in (1, 2):
        step(number, settings, root / "run", tmp_path / "run")
        metrics = verify(tmp_path / "run" / FOLDERS[number] / "artifact", KINDS[number]).metrics
        assert not {"perplexity", "accuracy", "loss", "perplexity_before"} & set(metrics)
        assert "dropped: held-out row without 'chosen': 5" in capsys.readouterr().out
