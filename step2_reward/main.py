"""Step 2: the reward model, from pairs. Read `main` from top to bottom."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from rlhf import data, models
from rlhf.algo.losses import pairwise_loss, token_wise_pairwise_loss
from rlhf.data.batches import PairBatch
from rlhf.engine import comm
from rlhf.engine.train import TrainEngine
from rlhf.errors import ArtifactError
from rlhf.evaluation.reward_metrics import pair_metrics
from rlhf.evaluation.reward_model import judge_reward_model
from rlhf.harness import StepRun, run_step
from rlhf.supervised import (
    SPLITS,
    Plans,
    Supervised,
    card_lines,
    plan_epochs,
    planned_steps,
    provenance,
    read_rows,
)


def main(run: StepRun) -> None:
    settings = run.config.step2
    run.rank, world = comm.init_distributed()
    torch.manual_seed(run.config.seed)

    with run.phase("read the data"):
        base, tokenizer = _base(run)
        with comm.rank_zero_first():
            template = data.choose_template(tokenizer, run.config.data)
        run.say(f"chat template: {template.sentence}")
        margins = settings.margin == "column"
        rows: dict[str, data.StageData] = {
            split: read_rows(run, settings, tokenizer, split, margins=margins) for split in SPLITS
        }

    with run.phase("load the model to start from"):
        dtype = models.choose_dtype(settings.model.dtype)
        model = models.load_scalar(
            base,
            settings.model,
            engine=settings.engine,
            dtype=dtype,
            pad_token_id=tokenizer.pad_token_id,
            vocab_size=len(tokenizer),
            new_head=True,
            seed=run.config.seed,
            dropout=True,
        )
        models.check_positions(model, settings.max_length or 0)
        run.say(models.describe(model, dtype))

    with run.phase("train"):
        dataset = rows["train"].dataset
        groups = dataset["prompt_key"] if settings.group_by_prompt else None
        plans = plan_epochs(run, settings.train, dataset, world, sides=2, groups=groups)
        total = planned_steps(plans, settings.train)
        engine = TrainEngine(
            model,
            settings.engine,
            settings.optim,
            dtype=dtype,
            total_steps=total,
            head_learning_rate=settings.head_learning_rate,
        )
        work = supervised(run, engine, rows, plans, tokenizer.pad_token_id)
        evaluation = work.run(run, engine, rows["train"].fingerprint)

    with run.phase("publish"):
        scale = score_statistics(run, engine, rows, evaluation, tokenizer.pad_token_id)
        engine.module.set_statistics(scale["score_mean"], scale.get("score_std", 1.0))
        snapshot = models.Snapshot(engine.module)
        card = models.model_card(
            "Reward model",
            base=settings.model.name or base,
            lines=card_lines(evaluation, rows["eval"]),
        )
        run.publish(
            lambda directory: snapshot.write(directory, tokenizer, card=card),
            kind="reward",
            data_fingerprint=rows["train"].fingerprint,
            metrics=evaluation | scale | provenance(rows) | {"steps": total, "base": base},
            tokenizer_fingerprint=models.fingerprint(tokenizer),
        )
        run.say(judge_reward_model(evaluation).line())
    comm.barrier()


def _base(run: StepRun) -> tuple[str, Any]:
    """The model to start from, and the tokenizer, which must be the SFT model's."""
    settings = run.config.step2
    sft = run.resolved.parents.get("sft")
    name = settings.model.name
    if name is None:
        base = run.parent("sft")
        return base, models.load_tokenizer(base, template=None)
    with comm.rank_zero_first():
        base = models.materialise(
            name,
            made_in=run.directory.path / "base_reward",
            texts=lambda: data.texts(run.config.data),
            seed=run.config.seed,
        )
    tokenizer = models.load_tokenizer(base, template=None)
    if sft is not None:
        actors = models.fingerprint(models.load_tokenizer(sft, template=None))
        ours = models.fingerprint(tokenizer)
        if actors != ours:
            raise ArtifactError(
                f"step 2: the reward model's base {name!r} has tokenizer {ours[:12]}, the actor in "
                f"{sft} has {actors[:12]}: both must read the same tokens. Leave out "
                "--reward-model to start from the actor, or name a model of the same family."
            )
    return base, tokenizer


def supervised(
    run: StepRun, engine: TrainEngine, rows: dict[str, Any], plans: Plans, pad_id: int
) -> Supervised:
    """What training does in this step."""
    settings = run.config.step2
    dataset, held_out = rows["train"].dataset, rows["eval"].dataset

    def collate(index: list[int]) -> PairBatch:
        return data.collate_pairs(dataset.select(index).to_list(), pad_id).to(engine.device)

    def line(found: dict[str, float]) -> str:
        return f"held-out accuracy {found['accuracy']:.4f}, margin {found['margin']:.3f}"

    return Supervised(
        "reward",
        settings.train,
        plans,
        collate=collate,
        step=lambda batches: reward_step(engine, batches, settings.loss, settings.margin),
        evaluate=lambda: evaluate(run, engine, held_out, pad_id),
        shown=("loss", "accuracy"),
        compared=("accuracy", "margin", "loss"),
        epoch_line=line,
    )


def reward_step(
    engine: TrainEngine, batches: list[PairBatch], loss_kind: str, margin: float | str
) -> dict[str, float]:
    """One optimiser step; the loss is the mean over all pairs of all ranks."""
    counted = sum(int(batch.pair_mask.sum()) for batch in batches)
    pairs = max(comm.sum_over_ranks({"pairs": counted})["pairs"], 1.0)
    sums = {"loss": 0.0, "correct": 0.0, "margin": 0.0}

    def loss_of(batch: PairBatch) -> torch.Tensor:
        mask = batch.attention_mask
        read = models.last_tokens(mask) if loss_kind == "last" else None
        values = engine(batch.input_ids, mask, read)
        loss, stats = _loss(values, batch, loss_kind, margin)
        sums["loss"] += float(loss.detach())
        sums["correct"] += float(stats["correct"])
        sums["margin"] += float(stats["margin"])
        return loss / pairs

    rate = engine.learning_rate
    norm = engine.step(batches, loss_of)
    means = {key: value / pairs for key, value in comm.sum_over_ranks(sums).items()}
    return {
        "loss": means["loss"],
        "accuracy": means["correct"],
        "margin": means["margin"],
        "pairs": pairs,
        "grad_norm": norm,
        "learning_rate": rate,
    }


def _loss(
    values: torch.Tensor, batch: PairBatch, kind: str, margin: float | str
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    wanted = batch.margin if margin == "column" else float(margin)
    if kind == "last":
        chosen, rejected = models.last_values(values, batch.attention_mask).chunk(2)
        return pairwise_loss(chosen, rejected, wanted, batch.pair_mask)
    chosen, rejected = values.chunk(2)
    chosen_ids, rejected_ids = batch.input_ids.chunk(2)
    chosen_mask, rejected_mask = batch.attention_mask.chunk(2)
    return token_wise_pairwise_loss(
        chosen, rejected, chosen_ids, rejected_ids, chosen_mask, rejected_mask, wanted
    )


def evaluate(run: StepRun, engine: TrainEngine, dataset: Any, pad_id: int) -> dict[str, float]:
    """Accuracy, margin, calibration, by length; and the chosen answers' score statistics. {}
    without rows."""
    found = _scores(run, engine, dataset, pad_id)
    if not found:
        return {}
    columns = list(zip(*found, strict=True))
    return pair_metrics(*columns) | _statistics(columns[0])


def score_statistics(
    run: StepRun,
    engine: TrainEngine,
    rows: dict[str, data.StageData],
    evaluation: dict[str, float],
    pad_id: int,
) -> dict[str, Any]:
    """Mean and standard deviation of chosen answers' scores, by which step 3 normalises (10).

    `scores_of` says whose: held-out answers'; or training ones' where fewer than two are held out,
    or these score alike. Without `score_std` no two answers differ.
    """
    names = ("score_mean", "score_std")
    if evaluation.get("score_std"):
        return {name: evaluation[name] for name in names} | {"scores_of": "held-out answers"}
    dataset = rows["train"].dataset
    some = dataset.select(range(min(len(dataset), run.config.data.max_eval_rows)))
    found = _statistics([chosen for chosen, *_ in _scores(run, engine, some, pad_id)])
    run.say(f"score statistics are those of {len(some)} chosen answers from training")
    if not found.get("score_std"):
        run.say("warning: all of them score alike: rewards will be centred and not scaled")
        found.pop("score_std", None)
    return found | {"scores_of": "training answers"}


def _statistics(scores: Sequence[float]) -> dict[str, float]:
    """Population mean and standard deviation; one score has no deviation to measure."""
    spread = {"score_std": statistics.pstdev(scores)} if len(scores) > 1 else {}
    return {"score_mean": statistics.fmean(scores)} | spread


def _scores(
    run: StepRun, engine: TrainEngine, dataset: Any, pad_id: int
) -> list[tuple[float, float, int, int, int]]:
    """Of every pair, over all ranks: the scores of chosen and rejected, their tokens, and the
    prompt's key."""
    plan = data.whole_pass(
        data.row_lengths(dataset),
        micro_batch_size=run.config.step2.train.eval_batch_size,
        rank=run.rank,
        world_size=comm.world_size(),
    )
    found: list[tuple[float, float, int, int, int]] = []
    with engine.evaluating():
        for index in plan:
            rows = dataset.select(index).to_list()
            batch = data.collate_pairs(rows, pad_id).to(engine.device)
            mask = batch.attention_mask
            values = engine(batch.input_ids, mask, models.last_tokens(mask))
            chosen, rejected = models.last_values(values, mask).chunk(2)
            for row, c, r in zip(rows, chosen.tolist(), rejected.tolist(), strict=False):
                lengths = len(row["chosen_ids"]), len(row["rejected_ids"])
                found.append((c, r, *lengths, row["prompt_key"]))
    return comm.gather_lists(found)


if __name__ == "__main__":
    run_step("reward", main)
