"""Each step's metric glossary names exactly what the step logs: the code runs, on fakes."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch

import step1_sft.main as sft
import step2_reward.main as reward
import step3_ppo.main as ppo
from rlhf import data
from rlhf.config.load import load_config, parse_overrides
from rlhf.config.schema import RunConfig
from rlhf.rollout.generation import Generation
from rlhf.track.metrics import RESERVED
from step3_ppo.roles import Roles
from step3_ppo.update import PtxBatches
from tests.unit.test_docs import ROOT, blocks, inline_code, rows

PAD, EOS = 0, 2


def glossary(page: str) -> list[str]:
    """The names in the tables below `## Metrics`."""
    text = (ROOT / page).read_text(encoding="utf-8").split("## Metrics\n")[1]
    return [name for cells in rows(text) for name in inline_code(cells[0])]


class FakeEngine:
    """Stands for a TrainEngine and a FrozenEngine: numbers of the right shape, no training."""

    learning_rate = 0.1
    device = torch.device("cpu")
    deepspeed = None

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.module = SimpleNamespace(
            statistics=(0.0, 1.0), normalize=lambda x: x, parameters=lambda: [self.weight]
        )

    def __call__(
        self, ids: torch.Tensor, mask: torch.Tensor, *rest: Any, token_loss: Any = None
    ) -> Any:
        shape = torch.linspace(-2, -1, ids.numel()).view(ids.shape) * self.weight
        if self.kind == "scalar":
            return shape
        token_loss = token_loss or (rest[3] if len(rest) > 3 else None)
        if token_loss is not None:
            rows = shape[rest[0]]
            return token_loss(rows, rows.detach().abs(), slice(0, len(rows))), None
        counted = shape * rest[0]
        token_loss = rest[3] if len(rest) > 3 else token_loss
        if token_loss is not None:
            picked = counted[rest[0]]
            return token_loss(picked, picked.detach().abs(), slice(0, len(picked))), None
        return counted, counted.detach().abs() if len(rest) > 2 and rest[2] else None

    @contextmanager
    def evaluating(self) -> Any:
        with torch.no_grad():
            yield

    def step(self, batches: Any, loss: Any) -> float:
        for batch in batches:
            loss(batch).backward()
        return 1.0


class Recorder:
    """Stands for tracker, progress, keeper and the ranks' pace."""

    metrics_bytes = 0

    def __init__(self) -> None:
        self.names: set[str] = set()

    def log(self, metrics: dict[str, Any], step: int) -> None:
        assert all(isinstance(value, (int, float)) for value in metrics.values())
        self.names |= metrics.keys()

    def update(self, n: int, **numbers: float) -> None:
        pass

    def after(self, position: int, state: dict[str, Any], **how: Any) -> None:
        pass

    def write(self, text: str) -> None:
        pass

    lap = write

    def skip(self) -> None:
        pass

    def figures(self, position: int) -> dict[str, float]:
        return {}


def fake_run(*overrides: str) -> Any:
    config: RunConfig = load_config(None, parse_overrides(overrides))
    return SimpleNamespace(config=config, rank=0)


def logged(step: Any, run: Any, engine: FakeEngine, columns: dict[str, list[Any]]) -> set[str]:
    """What training in a step gives to its tracker in one epoch of one batch."""
    dataset = datasets.Dataset.from_dict(columns)
    rows = {split: SimpleNamespace(dataset=dataset) for split in ("train", "eval")}
    recorder = Recorder()
    plans = [[[list(range(len(dataset)))]]]
    work = step.supervised(run, engine, rows, plans, PAD)
    state = {"step": 0, "evaluation": {}}
    work.train(1, state, recorder, recorder, recorder, recorder)
    return recorder.names


def test_step_1_logs_what_its_glossary_says() -> None:
    columns = {"prompt_ids": [[5, 6], [7]], "answer_ids": [[8, EOS], [9, EOS]]}
    names = logged(sft, fake_run("step1.train.eval_every=1"), FakeEngine("causal"), columns)
    assert sorted(names) == sorted(glossary("step1_sft/README.md"))


@pytest.mark.parametrize("loss", ["last", "token_wise"])
def test_step_2_logs_what_its_glossary_says(loss: str) -> None:
    """With pairs of every kind of length; ALGORITHM 11."""
    columns: dict[str, list[Any]] = {
        "prompt_ids": [[5], [6], [7], [5], [6], [7]],
        "chosen_ids": [[8, EOS], [8, 9, EOS], [8, EOS], [8, EOS], [8, 8, 8, EOS], [9, EOS]],
        "rejected_ids": [[9, EOS], [9, EOS], [9, 9, EOS], [9, EOS], [9, EOS], [8, 8, 8, EOS]],
        "margin": [0.0] * 6,
        "prompt_key": [1, 2, 3, 4, 5, 6],  # two prompts of every kind: intervals
    }
    names = logged(reward, fake_run(f"step2.loss={loss}"), FakeEngine("scalar"), columns)
    assert sorted(names) == sorted(glossary("step2_reward/README.md"))


class FakeSampler:
    reports = False  # as vLLM does

    def generate(self, request: Any, sampling: Any) -> Generation:
        prompts = request.prompt_ids
        rows = len(prompts)
        answers = torch.tensor([[8, EOS], [9, 8]]).repeat(rows, 1)[:rows]
        return Generation(
            input_ids=torch.cat([prompts, answers], 1),
            attention_mask=torch.cat([request.prompt_attention_mask, torch.ones_like(answers)], 1),
            response_start_idx=torch.full((rows,), prompts.shape[1]),
            answer_mask=torch.ones_like(answers, dtype=torch.bool),
            ended=torch.tensor([True, False]).repeat(rows)[:rows],
            log_probs=torch.full(answers.shape, -1.0),
            sampler_log_probs=torch.full(answers.shape, -1.1) if self.reports else None,
        )

    def sync_weights(self, step: int) -> None:
        pass


def ppo_names(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> set[str]:
    """What the trainer yields for each of two iterations."""
    sampler = FakeSampler()
    sampler.reports = "step3.rollout.engine=vllm" in overrides
    monkeypatch.setattr(ppo, "build_rollout", lambda *args, **kwargs: sampler)
    run = fake_run("step3.rollout.prompts=4", "step3.iterations=2", *overrides)
    ids = [[5, 6], [7], [5], [6, 7, 5]]
    prompts = datasets.Dataset.from_dict({"prompt_ids": ids, "prompt": list("abcd")})
    fakes: dict[str, Any] = {
        role: FakeEngine("causal" if role in ("actor", "reference") else "scalar")
        for role in ("actor", "reference", "reward", "critic")
    }
    if not ppo.ALGORITHMS[run.config.step3.algorithm].needs_critic:
        fakes["critic"] = None
    roles = Roles(**fakes, actor_dtype="float32")
    tokenizer = SimpleNamespace(pad_token_id=PAD)
    trainer = ppo.Trainer(
        run=run,
        roles=roles,
        tokenizer=tokenizer,
        prompts=prompts,
        per_iteration=run.config.step3.rollout.prompts,
        iterations=2,
        world=1,
    )
    if trainer.ptx is not None:
        row = {"prompt_ids": [5], "answer_ids": [8, EOS]}
        batch = data.collate_sft([row], PAD)
        trainer.ptx = PtxBatches(iter([batch] * 100), run.config.step3.ppo.ptx_coef)
    recorder = Recorder()
    for stats in trainer.iterate():
        recorder.log(stats, trainer.iteration)
    return recorder.names


def test_step_3_logs_what_its_glossary_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """ALGORITHM, "What is logged at each iteration": all of it, with every option on."""
    everything = ("step3.ppo.ptx_coef=0.1", "step3.ppo.kl_loss_coef=0.1")
    everything += ("step3.rollout.engine=vllm", "step3.rollout.importance_cap=2")
    names = ppo_names(monkeypatch, *everything)
    assert sorted(names) == sorted(glossary("step3_ppo/README.md"))
    assert not names & set(RESERVED)


def test_what_depends_on_options_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain PPO logs all but the optional terms; GRPO nothing of a critic."""
    of_vllm = {"sampler_gap", "sampler_gap_max", "importance_weight"}
    optional = {"ptx_loss", "kl_loss"} | of_vllm
    of_critic = {"value_loss", "value_clip_fraction", "critic_grad_norm", "explained_variance"}
    everything = set(glossary("step3_ppo/README.md"))
    assert ppo_names(monkeypatch) == everything - optional
    group = ("step3.algorithm=grpo", "step3.rollout.samples_per_prompt=2")
    grpo = ppo_names(monkeypatch, *group, "step3.rollout.prompts=2")
    assert grpo == everything - of_critic - of_vllm - {"ptx_loss"}


def test_the_glossaries_have_no_name_twice() -> None:
    for folder in ("step1_sft", "step2_reward", "step3_ppo"):
        names = glossary(f"{folder}/README.md")
        assert len(names) == len(set(names)), folder
        assert blocks(Path(ROOT / folder / "README.md"), "sh"), "how to run it alone"
