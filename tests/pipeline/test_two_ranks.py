"""All three steps on two gloo ranks at ZeRO-2, as a user starts them; and what comes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from rlhf.config.schema import ResolvedStep
from rlhf.harness import StepRun
from rlhf.store import RunDir, read_json, verify
from rlhf.track import read_metrics
from tests.unit import model_help as help_

COLOURS = ["blue", "red", "green", "grey", "white", "brown", "pink", "black"]
SETTINGS = [
    "step1.train.batch_size=8",
    "step1.train.micro_batch_size=2",
    "step1.train.max_steps=4",
    "step1.train.log_every=1",
    "step1.optim.learning_rate=0.002",
    "step1.max_prompt_length=40",
    "step1.max_length=64",
    "step2.train.batch_size=8",
    "step2.train.micro_batch_size=4",
    "step2.train.max_steps=3",
    "step3.rollout.prompts=8",
    "step3.rollout.samples_per_prompt=2",
    "step3.rollout.batch_size=8",
    "step3.rollout.max_new_tokens=8",
    "step3.ppo.minibatches=2",
    "step3.ppo.ema_decay=0.9",
    "step3.iterations=2",
    "step3.micro_batch_size=4",
    "step3.eval.prompts=8",
    "step1.engine.zero_stage=2",
    "track.trackers=[]",
]


def write_rows(directory: Path) -> None:
    directory.mkdir()
    for name, count in (("train", 200), ("test", 16)):
        with (directory / f"{name}.jsonl").open("w") as stream:
            for i in range(count):
                prompt = f"\n\nHuman: Which colour has thing {i} of {name}?\n\nAssistant:"
                good = f" It is {COLOURS[i % 8]}, I am glad that you ask." + " Really." * (i % 3)
                stream.write(
                    json.dumps({"prompt": prompt, "chosen": good, "rejected": " No."}) + "\n"
                )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The finished run of the command in the module's first line."""
    root = tmp_path_factory.mktemp("ranks")
    write_rows(root / "data")
    command = [
        sys.executable, str(help_.ROOT / "train.py"), "--deployment-type", "single_node",
        "--num-gpus", "2", "--output-dir", str(root), "--name", "two",
        "--actor-model", help_.tiny(), "--data-path", str(root / "data"),
        "--actor-zero-stage", "2", "--reward-zero-stage", "2",
        f"data.cache_dir={root / 'cache'}", *SETTINGS,
    ]  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        command, cwd=root, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "The run is in" in done.stdout
    return RunDir(root / "two")


def resolved(run: RunDir, step: int) -> ResolvedStep:
    return ResolvedStep(**read_json(run.resolved(step)))


def test_two_ranks_at_zero_2(run: RunDir) -> None:
    """L4: every step had two processes, and stage 2 is what they were told."""
    for step in (1, 2, 3):
        told = resolved(run, step)
        assert told.world_size == 2
        assert (run.logs(step) / "rank1.log").is_file()
    config = resolved(run, 3).config
    stages = [
        config.step1.engine, config.step2.engine, config.step3.actor.engine,
        config.step3.critic.engine,
    ]  # fmt: skip
    assert [engine.zero_stage for engine in stages] == [2] * 4


def test_artifacts_verify_and_descend(run: RunDir) -> None:
    """Issue 2: manifests verify, and name their parents by id."""
    sft = verify(run.artifact("sft"), "sft")
    reward = verify(run.artifact("reward"), "reward")
    ppo = verify(run.artifact("ppo"), "ppo")
    assert reward.parents["sft"].id == sft.id
    assert {kind: parent.id for kind, parent in ppo.parents.items()} == {
        "sft": sft.id, "reward": reward.id,
    }  # fmt: skip
    assert sft.tokenizer_fingerprint == reward.tokenizer_fingerprint == ppo.tokenizer_fingerprint


def test_plain_transformers_open_them(run: RunDir) -> None:
    """Issue 2: every model loads whole and finite without our code; the policies answer."""
    for name in ("sft", "actor", "actor_ema"):
        model, info = AutoModelForCausalLM.from_pretrained(
            run.artifact(name), output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert all(torch.isfinite(p).all() for p in model.parameters())
        tokenizer = AutoTokenizer.from_pretrained(run.artifact(name))
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        answer = model.generate(**ids, max_new_tokens=5)
        assert ids["input_ids"].shape[1] < answer.shape[1] <= ids["input_ids"].shape[1] + 5
        settings = GenerationConfig.from_pretrained(run.artifact(name))
        assert settings.eos_token_id == tokenizer.eos_token_id
    for name in ("reward", "critic"):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            run.artifact(name), output_loading_info=True
        )
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 1)


def test_the_template_is_the_training_prompt(run: RunDir) -> None:
    """4: the saved chat template makes the training prompt byte for byte, and its ids are those
    that a policy was trained on."""
    row = json.loads((run.path.parent / "data" / "train.jsonl").read_text().splitlines()[0])
    question = row["prompt"].removeprefix("\n\nHuman: ").removesuffix("\n\nAssistant:")
    for name in ("sft", "reward", "actor"):
        tokenizer = AutoTokenizer.from_pretrained(run.artifact(name))
        messages = [{"role": "user", "content": question}]
        options: dict[str, Any] = {"add_generation_prompt": True}
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        assert text.encode() == row["prompt"].encode()
        ids = tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"]
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_ppo_ran_as_it_should(run: RunDir) -> None:
    """20, 30: ratio 1 at each iteration's first minibatch, on both ranks; all rows counted."""
    rows = list(read_metrics(run.metrics(3)))
    assert len(rows) == 2
    for row in rows:
        assert row["answers"] == 16
        assert row["first_ratio_error"] < 1e-4
        assert abs(row["first_approx_kl"]) < 1e-5
    verdict = read_json(run.artifact("evaluation") / "verdict.json")
    assert verdict["models"]["ppo"]["answers"] == 8
    assert set(verdict["models"]) == {"base", "sft", "ppo", "ema"}


def test_sft_losses_are_those_of_one_rank(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """30: step 1 again in this process, alone and at ZeRO-0: equal losses, gradient norms,
    perplexity and weights to 1e-5."""
    import step1_sft.main

    help_.world_of_one(monkeypatch)
    told = resolved(run, 1)
    told.config.step1.engine.zero_stage = 0
    told.config.step1.train.micro_batch_size = 8
    alone = told.model_copy(update={"run_dir": str(tmp_path / "one"), "world_size": 1})
    step1_sft.main.main(StepRun(alone, rank=0))
    one = RunDir(tmp_path / "one")
    names = ("train/loss", "train/grad_norm", "train/tokens", "eval/perplexity")
    found = [
        {name: row[name] for row in read_metrics(where.metrics(1)) for name in names if name in row}
        | {"losses": [r["train/loss"] for r in read_metrics(where.metrics(1)) if "train/loss" in r]}
        for where in (run, one)
    ]
    assert len(found[0]["losses"]) == 4
    assert found[0].pop("losses") == pytest.approx(found[1].pop("losses"), abs=1e-5)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    two, single = (
        AutoModelForCausalLM.from_pretrained(where.artifact("sft")).state_dict()
        for where in (run, one)
    )
    for name, tensor in two.items():
        torch.testing.assert_close(tensor, single[name], atol=1e-5, rtol=0, msg=name)
