"""Supervised fine-tuning against trl's SFTTrainer: `python -m benchmarks.sft --help`.

Four optimiser steps over rows of different lengths, the loss on the answers, on the same random
weights, rows, batch and dtype, with one thread, in turn. trl as for benchmarks.ppo.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.pairs import as_launched, compare, print_line
from benchmarks.ppo import trl_worker, versions
from benchmarks.workload import CONFIGS, PAD, Workload, model_dirs, sft_rows


class OurSFT:
    """Step 1's own optimiser steps over the rows, an epoch of them at a time."""

    def __init__(self, workload: Workload) -> None:
        from rlhf import data, models
        from rlhf.config.schema import EngineConfig, ModelConfig, OptimConfig
        from rlhf.engine import comm
        from rlhf.engine.train import TrainEngine

        comm.init_distributed()
        self.workload, self.rows = workload, sft_rows(workload)
        model = models.load_causal(
            model_dirs(workload.model, workload.seed)[0],
            ModelConfig(),
            engine=EngineConfig(),
            dtype=workload.dtype,
            pad_token_id=PAD,
            vocab_size=CONFIGS[workload.model]().vocab_size,
            dropout=True,
        )
        optim = OptimConfig(learning_rate=1e-6, scheduler="constant")
        self.engine = TrainEngine(
            model, EngineConfig(), optim, dtype=workload.dtype, total_steps=10_000
        )
        self.lengths = [len(r["prompt_ids"]) + len(r["answer_ids"]) for r in self.rows]
        self.plan_batches, self.collate = data.plan_batches, data.collate_sft
        self.epoch = 0

    def __call__(self) -> float:
        from step1_sft.main import sft_step

        plan = self.plan_batches(
            self.lengths,
            batch_size=self.workload.rows,
            micro_batch_size=self.workload.micro,
            rank=0,
            world_size=1,
            seed=0,
            epoch=self.epoch,
        )
        for step in plan:
            batches = [self.collate([self.rows[i] for i in part], PAD) for part in step]
            sft_step(self.engine, [batch.to(self.engine.device) for batch in batches])
        self.epoch += 1
        return len(self.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", choices=["trl"], default="trl")
    parser.add_argument("--trl", help="directory that trl was installed into with --target")
    parser.add_argument("--model", choices=["6m", "135m"], default="6m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rows", type=int, default=16, help="rows per optimiser step")
    parser.add_argument("--micro", type=int, default=8, help="rows per forward, both sides")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--peer-bf16", choices=["default", "weights"], default="default")
    args = parser.parse_args()
    as_launched()
    torch.set_num_threads(1)
    workload = Workload(
        model=args.model, dtype=args.dtype, rows=args.rows, micro=min(args.micro, args.rows)
    )
    ours = OurSFT(workload)
    with trl_worker("sft", workload, args) as theirs:
        result = compare(ours, theirs, pairs=args.pairs)
    print_line("sft", vars(args), result | {"unit": "rows", "versions": versions(args.trl)})


if __name__ == "__main__":
    main()
