"""Step 1: supervised fine-tuning. Read `main` from top to bottom."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch

from rlhf import data, models
from rlhf.algo.losses import cross_entropy_sum, sum_of_nll
from rlhf.data.batches import SFTBatch
from rlhf.engine import comm
from rlhf.engine.train import TrainEngine
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

MAX_EXPONENT = math.log(sys.float_info.max)


def main(run: StepRun) -> None:
    settings = run.config.step1
    run.rank, world = comm.init_distributed()
    torch.manual_seed(run.config.seed)

    with run.phase("read the data"):
        with comm.rank_zero_first():
            base = models.materialise(
                settings.model.name or "tiny:llama",
                made_in=run.directory.path / "base",
                texts=lambda: data.texts(run.config.data),
                seed=run.config.seed,
            )
        tokenizer = models.load_tokenizer(base, template=None)
        with comm.rank_zero_first():
            template = data.choose_template(tokenizer, run.config.data)
        run.say(f"chat template: {template.sentence}")
        column = settings.response_column
        rows: dict[str, data.StageData] = {
            split: read_rows(run, settings, tokenizer, split, response_column=column)
            for split in SPLITS
        }

    with run.phase("load the base model"):
        dtype = models.choose_dtype(settings.model.dtype)
        model = models.load_causal(
            base,
            settings.model,
            engine=settings.engine,
            dtype=dtype,
            pad_token_id=tokenizer.pad_token_id,
            vocab_size=len(tokenizer),
            dropout=True,
        )
        models.check_positions(model, settings.max_length)
        run.say(models.describe(model, dtype))

    with run.phase("train"):
        plans = plan_epochs(run, settings.train, rows["train"].dataset, world)
        total = planned_steps(plans, settings.train)
        engine = TrainEngine(model, settings.engine, settings.optim, dtype=dtype, total_steps=total)
        work = supervised(run, engine, rows, plans, tokenizer.pad_token_id)
        evaluation = work.run(run, engine, rows["train"].fingerprint)

    with run.phase("publish"):
        snapshot = models.Snapshot(engine.module)
        card = models.model_card(
            "SFT model",
            base=settings.model.name or base,
            lines=[*card_lines(evaluation, rows["eval"]), f"{total} steps"],
        )
        run.publish(
            lambda directory: snapshot.write(directory, tokenizer, card=card),
            kind="sft",
            data_fingerprint=rows["train"].fingerprint,
            metrics=evaluation | provenance(rows) | {"steps": total, "base": base},
            tokenizer_fingerprint=models.fingerprint(tokenizer),
        )
    comm.barrier()


def supervised(
    run: StepRun, engine: TrainEngine, rows: dict[str, Any], plans: Plans, pad_id: int
) -> Supervised:
    """What training does in this step."""
    settings = run.config.step1
    dataset, held_out = rows["train"].dataset, rows["eval"].dataset

    def collate(index: list[int]) -> SFTBatch:
        found = dataset.select(index).to_list()
        batch = data.collate_sft(found, pad_id, prompt_loss=settings.prompt_loss)
        return batch.to(engine.device)

    return Supervised(
        "SFT",
        settings.train,
        plans,
        collate=collate,
        step=lambda batches: sft_step(engine, batches),
        evaluate=lambda: evaluate(run, engine, held_out, pad_id),
        shown=("loss",),
        compared=("perplexity", "loss"),
        epoch_line=lambda found: f"held-out perplexity {found['perplexity']:.3f}",
    )


def sft_step(engine: TrainEngine, batches: list[SFTBatch]) -> dict[str, float]:
    """One optimiser step; the loss is the mean over all counted tokens of all ranks."""
    counted = sum(int((batch.labels[:, 1:] != data.IGNORED).sum()) for batch in batches)
    tokens = comm.sum_over_ranks({"tokens": counted})["tokens"]
    total = 0.0

    def loss_of(batch: SFTBatch) -> torch.Tensor:
        nonlocal total
        loss, _ = engine(
            batch.input_ids, batch.attention_mask, _counted(batch), token_loss=sum_of_nll
        )
        total += float(loss.detach())
        return loss / max(tokens, 1.0)

    rate = engine.learning_rate
    norm = engine.step(batches, loss_of)
    nll = comm.sum_over_ranks({"nll": total})["nll"]
    return {
        "loss": nll / max(tokens, 1.0),
        "tokens": tokens,
        "grad_norm": norm,
        "learning_rate": rate,
    }


def _nll(engine: Any, batch: SFTBatch) -> tuple[torch.Tensor, Any]:
    mask = _counted(batch)
    log_probs, _ = engine(batch.input_ids, batch.attention_mask, mask)
    return cross_entropy_sum(log_probs, mask)


def _counted(batch: SFTBatch) -> torch.Tensor:
    mask = batch.labels != data.IGNORED
    mask[:, 0] = False  # nothing predicts the first token
    return mask


def evaluate(run: StepRun, engine: TrainEngine, dataset: Any, pad_id: int) -> dict[str, float]:
    """Perplexity per answer token over the held-out rows, all ranks together; {} without rows."""
    plan = data.whole_pass(
        data.row_lengths(dataset),
        micro_batch_size=run.config.step1.train.eval_batch_size,
        rank=run.rank,
        world_size=comm.world_size(),
    )
    sums = {"nll": 0.0, "tokens": 0.0}
    with engine.evaluating():
        for index in plan:
            batch = data.collate_sft(dataset.select(index).to_list(), pad_id).to(engine.device)
            nll, stats = _nll(engine, batch)
            sums["nll"] += float(nll)
            sums["tokens"] += float(stats["tokens"])
    sums = comm.sum_over_ranks(sums)
    if not sums["tokens"]:
        return {}
    loss = sums["nll"] / sums["tokens"]
    perplexity = math.inf if loss > MAX_EXPONENT else math.exp(loss)
    return {"loss": loss, "perplexity": perplexity, "tokens": sums["tokens"]}


if __name__ == "__main__":
    run_step("sft", main)
