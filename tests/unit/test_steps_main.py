"""All three steps in this process on a few rows: every algorithm, and what they publish."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import step1_sft.main
import step2_reward.main
import step3_ppo.main
from rlhf.algo.algorithms import ALGORITHMS
from rlhf.config.schema import ResolvedStep, RunConfig
from rlhf.engine import comm
from rlhf.errors import ArtifactError, ConfigError
from rlhf.harness import StepRun
from rlhf.store import read_json, verify
from rlhf.track import read_metrics
from step3_ppo.main import _prompts_per_iteration
from tests.unit import model_help as help_

COLOURS = ["blue", "red", "green", "grey", "white", "brown", "pink", "black"]


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    help_.world_of_one(monkeypatch)


def config(root: Path, **changes: Any) -> RunConfig:
    train = {"batch_size": 4, "micro_batch_size": 2, "max_steps": 3, "log_every": 1}
    optim = {"learning_rate": 1e-3}
    content: dict[str, Any] = {
        "name": "run",
        "output_dir": str(root),
        "data": {"path": [str(root / "data")], "cache_dir": str(root / "cache")},
        "track": {"trackers": []},
        "step1": {
            "model": {"name": help_.tiny()},
            "train": train,
            "optim": optim,
            "max_prompt_length": 40,
            "max_length": 60,
        },
        "step2": {"train": train, "optim": optim, "max_prompt_length": 40, "max_length": 60},
        "step3": {
            "actor": {"optim": optim},
            "critic": {"optim": optim},
            "rollout": {
                "prompts": 4, "batch_size": 4, "max_prompt_length": 40, "max_new_tokens": 6,
            },
            "iterations": 2,
            "micro_batch_size": 4,
            "eval": {"prompts": 4, "samples": 1},
        },
    }  # fmt: skip
    return RunConfig(**merge(content, changes))


def merge(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    both = dict(one)
    for key, value in other.items():
        both[key] = merge(both.get(key, {}), value) if isinstance(value, dict) else value
    return both


def step(number: int, settings: RunConfig, parents: Path, run_dir: Path) -> StepRun:
    names = {"sft": "step1_sft", "reward": "step2_reward"}
    given = dict(list(names.items())[: number - 1])
    resolved = ResolvedStep(
        step=number,  # type: ignore[arg-type]
        run_dir=str(run_dir),
        parents={kind: str(parents / place / "artifact") for kind, place in given.items()},
        config=settings,
        world_size=comm.world_size(),
    )
    run = StepRun(resolved, rank=comm.rank())
    main = {1: step1_sft.main.main, 2: step2_reward.main.main, 3: step3_ppo.main.main}[number]
    main(run)
    return run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and the artifacts of steps 1 and 2."""
    path = tmp_path_factory.mktemp("steps")
    (path / "data").mkdir()
    for name, count in (("train", 60), ("test", 8)):
        with (path / "data" / f"{name}.jsonl").open("w") as stream:
            for i in range(count):
                prompt = f"\n\nHuman: Which colour has thing {i} of {name}?\n\nAssistant:"
                good, bad = f" It is {COLOURS[i % 8]}, I am glad that you ask.", " No."
                row = {"prompt": prompt, "chosen": good, "rejected": bad}
                stream.write(json.dumps(row) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        help_.world_of_one(patch)
        for number in (1, 2):
            step(number, config(path), path / "run", path / "run")
    return path


def metrics_of(run_dir: Path, folder: str) -> list[dict[str, Any]]:
    return list(read_metrics(run_dir / folder / "metrics.jsonl"))


def finite(rows: Iterator[dict[str, Any]] | list[dict[str, Any]]) -> bool:
    return all(
        math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float)
    )


def test_steps_1_and_2(root: Path) -> None:
    """Both publish verified artifacts that learned something and name their parents (10, 11)."""
    sft = verify(root / "run" / "step1_sft" / "artifact", "sft")
    reward = verify(root / "run" / "step2_reward" / "artifact", "reward")
    assert reward.parents["sft"].id == sft.id
    assert sft.metrics["perplexity"] == pytest.approx(math.exp(sft.metrics["loss"]))
    rows = metrics_of(root / "run", "step1_sft")
    assert finite(rows)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    plain = AutoModelForSequenceClassification.from_pretrained(
        root / "run" / "step2_reward" / "artifact"
    )
    assert plain.config.rlhf_score_mean == pytest.approx(reward.metrics["score_mean"])
    assert plain.config.rlhf_score_std == pytest.approx(reward.metrics["score_std"])
    assert {"accuracy", "margin", "calibration_error", "accuracy_chosen_longer"} <= set(
        reward.metrics
    )


@pytest.mark.parametrize("loss", ["last", "token_wise"])
def test_the_reward_model_learns(root: Path, tmp_path: Path, loss: str) -> None:
    """7, 9: a few steps suffice to tell a long courteous answer from "No."."""
    settings = config(
        root,
        step2={"loss": loss, "optim": {"learning_rate": 1e-2}, "train": {"max_steps": 6}},
    )
    step(2, settings, root / "run", tmp_path)
    manifest = verify(tmp_path / "step2_reward" / "artifact", "reward")
    assert manifest.metrics["accuracy"] == 1.0
    rows = metrics_of(tmp_path, "step2_reward")
    assert rows[-2]["train/learning_rate"] < 1e-2 / 5, "annealed"


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_every_algorithm(root: Path, tmp_path: Path, algorithm: str) -> None:
    """36, 37: two iterations without NaN; ratio 1 first (20); a verified artifact; a verdict."""
    samples = 1 if algorithm in ("ppo", "reinforce++") else 2
    settings = config(
        root,
        step3={
            "algorithm": algorithm,
            "rollout": {"samples_per_prompt": samples},
            # An untrained policy's scores are all below -5: clipped, they would teach nothing.
            "ppo": {"score_clip": 100.0},
        },
    )
    step(3, settings, root / "run", tmp_path)
    rows = metrics_of(tmp_path, "step3_ppo")
    assert len(rows) == 2
    assert finite(rows)
    needs_critic = ALGORITHMS[algorithm].needs_critic
    for row in rows:
        assert row["first_ratio_error"] < 1e-4
        assert abs(row["first_approx_kl"]) < 1e-5
        assert row["answers"] == 4 * samples
        assert ("kl_loss" in row) == (algorithm == "grpo")
        assert ("value_loss" in row) == needs_critic
        for name in ("score_mean", "score_std", "score_normalised", "kl_per_answer", "kl_per_token",
                     "kl_coef", "entropy", "approx_kl", "clip_fraction", "ratio_mean", "ratio_max",
                     "actor_grad_norm", "answer_length", "eos_fraction", "distinct_2",
                     "tokens_per_second", "seconds_rollout", "seconds_score", "seconds_update",
                     "peak_memory_bytes"):  # fmt: skip
            assert name in row, name
    assert abs(rows[0]["kl_per_answer"]) < 1e-4, "the policy starts as the reference"
    artifact = tmp_path / "step3_ppo" / "artifact"
    manifest = verify(artifact, "ppo")
    assert (artifact / "critic").exists() == needs_critic
    assert not (artifact / "actor_ema").exists()
    actor = AutoModelForCausalLM.from_pretrained(artifact / "actor")
    before = AutoModelForCausalLM.from_pretrained(root / "run" / "step1_sft" / "artifact")
    assert any(
        not torch.equal(a, b) for a, b in zip(actor.parameters(), before.parameters(), strict=True)
    )
    verdict = read_json(tmp_path / "step3_ppo" / "evaluation" / "verdict.json")
    assert set(verdict["models"]) == {"base", "sft", "ppo"}
    assert verdict["models"]["sft"]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert verdict["reward_accuracy"] is not None
    evaluation = verify(tmp_path / "step3_ppo" / "evaluation", "evaluation")
    assert evaluation.parents["ppo"].id == manifest.id
    text = (tmp_path / "step3_ppo" / "evaluation" / "verdict.txt").read_text(encoding="utf-8")
    assert text.strip()


def test_all_options_together(root: Path, tmp_path: Path) -> None:
    """24, 34, 35, 36, L2: adapters, EMA, ptx, warm-up, adaptive KL, a small bound, hybrid rollout,
    minibatches, more prompts asked for than there are."""
    lora = {"rank": 2, "dropout": 0.5}
    settings = config(
        root,
        step3={
            "actor": {"model": {"lora": lora}},
            "critic": {"model": {"lora": lora}},
            "rollout": {"engine": "hybrid", "prompts": 4096, "temperature": 0.7},
            "iterations": 3,
            "ppo": {
                "ema_decay": 0.5, "ptx_coef": 0.1, "critic_warmup": 1, "kl_target": 1.0,
                "kl_horizon": 100.0, "target_kl": 1e-9, "minibatches": 2,
            },
        },
    )  # fmt: skip
    step(3, settings, root / "run", tmp_path)
    warm, first, second = metrics_of(tmp_path, "step3_ppo")
    assert finite([warm, first, second])
    assert "policy_loss" not in warm
    assert warm["skipped_updates"] == 0
    assert warm["answers"] > 8, "all prompts of the step"
    assert first["ptx_loss"] > 0
    assert first["skipped_updates"] == 2.0, "stopped after the second of four steps"
    assert first["kl_coef"] != second["kl_coef"]
    assert first["first_ratio_error"] < 1e-4
    artifact = tmp_path / "step3_ppo" / "artifact"
    verify(artifact, "ppo")
    states = {
        name: AutoModelForCausalLM.from_pretrained(artifact / name).state_dict()
        for name in ("actor", "actor_ema")
    }
    names = [n for n, t in states["actor"].items() if not torch.equal(t, states["actor_ema"][n])]
    assert names
    assert all("proj" in name for name in names)
    assert (artifact / "actor" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_base_model_that_is_gone_costs_a_row_of_the_verdict(root: Path, tmp_path: Path) -> None:
    """What SFT started from may be on another machine; the trained model is published anyway."""
    import shutil

    base = tmp_path / "base"
    shutil.copytree(help_.tiny(), base)
    settings = config(root, step1={"model": {"name": str(base)}})
    step(1, settings, root / "run", tmp_path / "run")
    shutil.copytree(root / "run" / "step2_reward", tmp_path / "run" / "step2_reward")
    shutil.rmtree(base)
    settings.step3.iterations = 1
    step(3, settings, tmp_path / "run", tmp_path / "run")
    verify(tmp_path / "run" / "step3_ppo" / "artifact", "ppo")
    verdict = read_json(tmp_path / "run" / "step3_ppo" / "evaluation" / "verdict.json")
    assert set(verdict["models"]) == {"sft", "ppo"}


def test_tokenizers_must_agree(root: Path, tmp_path: Path) -> None:
    """A reward model that reads other tokens is refused before anything is trained (L: lineage)."""
    from rlhf.models.tiny import build_tiny

    other = tmp_path / "other"
    build_tiny("llama", ["quite other words"] * 4, other, seed=1, vocab_size=280, size=help_.SIZE)
    with pytest.raises(ArtifactError, match=r"step 2: .*tokenizer.*--reward-model"):
        step(2, config(root, step2={"model": {"name": str(other)}}), root / "run", tmp_path)
    resolved = ResolvedStep(
        step=3,
        run_dir=str(tmp_path),
        parents={"sft": str(root / "run" / "step1_sft" / "artifact"), "reward": str(other)},
        config=config(root),
    )
    with pytest.raises(ArtifactError, match=r"step 3: the reward model .*retrain step 2"):
        step3_ppo.main.main(StepRun(resolved, rank=0))
    assert not (tmp_path / "step3_ppo" / "artifact").exists()


@pytest.mark.parametrize(
    ("wanted", "there", "world_size", "expected"),
    [(8, 100, 2, 8), (8, 7, 2, 6), (8, 7, 1, 7), (8, 5, 4, 4)],
)
def test_prompts_per_iteration(wanted: int, there: int, world_size: int, expected: int) -> None:
    """Ranks must have equally many rows: with fewer they would wait for ever."""
    settings = RunConfig(step3={"rollout": {"prompts": wanted}}).step3
    assert _prompts_per_iteration(settings, there, world_size) == expected


@pytest.mark.parametrize(("there", "world_size"), [(1, 2), (3, 1)])
def test_too_few_prompts_are_refused(there: int, world_size: int) -> None:
    settings = RunConfig(step3={"ppo": {"minibatches": 4}}).step3
    with pytest.raises(ConfigError, match=r"minibatches = 4: lower that, or bring more prompts"):
        _prompts_per_iteration(settings, there, world_size)
