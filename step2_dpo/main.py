"""DPO: a policy straight from pairs, without a reward model. Read `main` from top to bottom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rlhf import data, models
from rlhf.algo.dpo import dpo_loss, implicit_rewards
from rlhf.config.schema import DPOConfig
from rlhf.data.batches import PairBatch
from rlhf.engine import comm
from rlhf.engine.train import TrainEngine
from rlhf.evaluation.reward_metrics import pair_metrics
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
    settings = run.config.dpo
    run.rank, world = comm.init_distributed()
    torch.manual_seed(run.config.seed)

    with run.phase("read the data"):
        sft = run.parent("sft")
        tokenizer = models.load_tokenizer(sft, template=None)
        with comm.rank_zero_first():
            template = data.choose_template(tokenizer, run.config.data)
        run.say(f"chat template: {template.sentence}")
        rows: dict[str, data.StageData] = {
            split: read_rows(run, settings, tokenizer, split) for split in SPLITS
        }

    with run.phase("load the SFT model"):
        dtype = models.choose_dtype(settings.model.dtype)
        model = models.load_causal(
            sft,
            settings.model,
            engine=settings.engine,
            dtype=dtype,
            pad_token_id=tokenizer.pad_token_id,
            vocab_size=len(tokenizer),
            dropout=False,  # the policy's log-probs are compared with those of the model it was
        )
        models.check_positions(model, settings.max_length or 0)
        run.say(models.describe(model, dtype))
        plans = plan_epochs(run, settings.train, rows["train"].dataset, world, sides=2)
        total = planned_steps(plans, settings.train)
        engine = TrainEngine(model, settings.engine, settings.optim, dtype=dtype, total_steps=total)

    with run.phase("score with the reference"):
        # The reference is the model that training starts from: it is asked once, before the first
        # update, and is never in memory beside the policy. A resumed run asks it again, before the
        # checkpoint is read.
        pad = tokenizer.pad_token_id
        reference = {
            name: answer_log_probs(run, engine, one.dataset, pad) for name, one in rows.items()
        }

    with run.phase("train"):
        work = supervised(run, engine, rows, reference, plans, pad)
        evaluation = work.run(run, engine, rows["train"].fingerprint)

    with run.phase("publish"):
        snapshot = models.Snapshot(engine.module)
        card = models.model_card(
            "DPO policy",
            base=sft,
            lines=[*card_lines(evaluation, rows["eval"]), f"{total} steps, beta {settings.beta}"],
        )
        run.publish(
            lambda directory: snapshot.write(directory, tokenizer, card=card),
            kind="dpo",
            data_fingerprint=rows["train"].fingerprint,
            metrics=evaluation | provenance(rows) | {"steps": total, "base": sft},
            tokenizer_fingerprint=models.fingerprint(tokenizer),
        )
    comm.barrier()


@dataclass(frozen=True)
class ComparedPairs(PairBatch):
    """A batch of pairs with the reference's log-probs of its answers: (2B,) float32, in the order
    of the rows; 0 on a dummy pair."""

    reference: torch.Tensor


def answer_log_probs(run: StepRun, engine: TrainEngine, dataset: Any, pad_id: int) -> torch.Tensor:
    """(rows, 2) float32: the model's log-prob of each row's chosen and rejected answer, summed over
    the answer's tokens. All ranks have all of them. Collective."""
    found = torch.zeros(len(dataset), 2, device=engine.device)
    plan = data.whole_pass(
        data.row_lengths(dataset),
        micro_batch_size=run.config.dpo.train.eval_batch_size,
        rank=run.rank,
        world_size=comm.world_size(),
    )
    with engine.evaluating():
        for index in plan:
            rows = dataset.select(index).to_list()
            batch = data.collate_pairs(rows, pad_id).to(engine.device)
            if index:
                found[index] = _summed(engine, batch).view(2, -1).T
            else:
                _summed(engine, batch)  # other ranks' shards need this one's forward
    return comm.all_reduce(found).cpu()


def _summed(engine: TrainEngine, batch: PairBatch) -> torch.Tensor:
    """(2B,) float32 log-probs of the answers."""
    log_probs, _ = engine(batch.input_ids, batch.attention_mask, batch.answer_mask)
    total: torch.Tensor = log_probs.sum(dim=1)
    return total


def supervised(
    run: StepRun,
    engine: TrainEngine,
    rows: dict[str, Any],
    reference: dict[str, torch.Tensor],
    plans: Plans,
    pad_id: int,
) -> Supervised:
    """What training does in this stage."""
    settings = run.config.dpo
    dataset = rows["train"].dataset

    def collate(index: list[int]) -> ComparedPairs:
        batch = data.collate_pairs(dataset.select(index).to_list(), pad_id)
        known = reference["train"][index].T.flatten() if index else torch.zeros(2)
        return ComparedPairs(**vars(batch), reference=known).to(engine.device)

    def line(found: dict[str, float]) -> str:
        return f"held-out accuracy {found['accuracy']:.4f}, margin {found['margin']:.3f}"

    return Supervised(
        "DPO",
        settings.train,
        plans,
        collate=collate,
        step=lambda batches: dpo_step(engine, batches, settings),
        evaluate=lambda: evaluate(run, engine, rows["eval"].dataset, reference["eval"], pad_id),
        shown=("loss", "accuracy"),
        compared=("accuracy", "margin", "loss"),
        epoch_line=line,
    )


def dpo_step(
    engine: TrainEngine, batches: list[ComparedPairs], settings: DPOConfig
) -> dict[str, float]:
    """One optimiser step; the loss is the mean over all pairs of all ranks."""
    counted = sum(int(batch.pair_mask.sum()) for batch in batches)
    pairs = max(comm.sum_over_ranks({"pairs": counted})["pairs"], 1.0)
    sums = dict.fromkeys(("loss", "correct", "margin", "chosen_reward", "rejected_reward"), 0.0)

    def loss_of(batch: ComparedPairs) -> torch.Tensor:
        ratios = _summed(engine, batch) - batch.reference
        lengths = batch.answer_mask.sum(dim=1)
        rewards = implicit_rewards(ratios, lengths, settings.beta, settings.loss)
        chosen, rejected = rewards.chunk(2)
        loss, stats = dpo_loss(
            chosen,
            rejected,
            batch.pair_mask,
            beta=settings.beta,
            kind=settings.loss,
            label_smoothing=settings.label_smoothing,
        )
        for name in sums:
            sums[name] += float(loss.detach() if name == "loss" else stats[name])
        return loss / pairs

    rate = engine.learning_rate
    norm = engine.step(batches, loss_of)
    means = {key: value / pairs for key, value in comm.sum_over_ranks(sums).items()}
    return {
        "loss": means["loss"],
        "accuracy": means["correct"],
        "margin": means["margin"],
        "chosen_reward": means["chosen_reward"],
        "rejected_reward": means["rejected_reward"],
        "pairs": pairs,
        "grad_norm": norm,
        "learning_rate": rate,
    }


def evaluate(
    run: StepRun, engine: TrainEngine, dataset: Any, reference: torch.Tensor, pad_id: int
) -> dict[str, float]:
    """The policy as a reward model of the held-out pairs: which answer of each has it made likelier
    than the reference did. {} without rows."""
    if not len(dataset):
        return {}
    settings = run.config.dpo
    ratios = answer_log_probs(run, engine, dataset, pad_id) - reference
    lengths = torch.tensor(
        [[len(row["chosen_ids"]), len(row["rejected_ids"])] for row in dataset.to_list()]
    )
    rewards = implicit_rewards(ratios, lengths, settings.beta, settings.loss)
    chosen, rejected = rewards.T.tolist()
    chosen_lengths, rejected_lengths = lengths.T.tolist()
    prompts = list(dataset["prompt_key"])
    found = pair_metrics(chosen, rejected, chosen_lengths, rejected_lengths, prompts)
    means = rewards.mean(dim=0).tolist()
    return found | {"chosen_reward": means[0], "rejected_reward": means[1]}


if __name__ == "__main__":
    run_step("dpo", main)
