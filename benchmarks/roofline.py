"""Measured matmul peak against the floating-point work of a phase: `python -m benchmarks.roofline`.

The peak is the best rate of square products in the dtype, one thread, measured between the runs of
the phase. The floor of a phase is its work at that rate; the share says how much of the time the
work would need there. Work counts products and attention of real tokens; norms, softmax, sampling
and whatever the implementation does besides count as nothing. In CPU time, which a busy machine
distorts less than the clock on the wall.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.pairs import as_launched, measure, print_line
from benchmarks.rollout import ANSWER, PROMPT, FixedEnd, build_model, continuous, prompts_for
from rlhf.algo.losses import sum_of_nll
from rlhf.models.causal import CausalModel
from rlhf.rollout.packing import weight_and_bias

SIZE = 1024


def matmul_peak(dtype: torch.dtype, seconds: float = 0.5) -> float:
    """Best floating-point operations per CPU second of a product of SIZE x SIZE matrices."""
    a, b = torch.randn(SIZE, SIZE).to(dtype), torch.randn(SIZE, SIZE).to(dtype)
    F.linear(a, b)
    best, end = 0.0, time.process_time() + seconds
    while time.process_time() < end:
        began = time.process_time()
        F.linear(a, b)
        best = max(best, 2 * SIZE**3 / (time.process_time() - began))
    return best


def linear_work(model: Any) -> tuple[float, float]:
    """Floating-point operations per token of all linear layers but the head, and of the head."""
    head = model.get_output_embeddings()
    total = 0.0
    for module in model.modules():
        found = weight_and_bias(module)
        if found is not None and module is not head:
            total += 2.0 * found[0].numel()
    return total, 2.0 * head.weight.numel()


def attention_work(model: Any, pairs: float) -> float:
    """Operations of attention over so many (query, key) pairs, all layers: two products."""
    config = model.config
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 4.0 * pairs * heads * size * config.num_hidden_layers


def rollout_work(model: Any, rows: int) -> float:
    """Prompts once, then one token a step; the head for sampled positions only."""
    body, head = linear_work(model)
    tokens = rows * (PROMPT + ANSWER - 1)  # the last token is never read
    pairs = rows * (PROMPT + ANSWER - 1) * (PROMPT + ANSWER) / 2
    return tokens * body + rows * ANSWER * head + attention_work(model, pairs)


def score_work(model: Any, rows: int) -> float:
    """One forward over prompt + answer, the head for answer tokens only."""
    body, head = linear_work(model)
    length = PROMPT + ANSWER
    pairs = rows * length * (length + 1) / 2
    return rows * (length * body + ANSWER * head) + attention_work(model, pairs)


def rollout_phase(model: Any, rows: int) -> tuple[float, Callable[[], Any]]:
    """Its work, counted for the head as it is, and a run that never ends early."""
    work = rollout_work(model, rows)
    ids = prompts_for(model.config.vocab_size, rows)
    model.lm_head = FixedEnd(model.lm_head, early=False)
    return work, continuous(model, ids, rows)


def score_inputs(model: Any, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, model.config.vocab_size, (rows, PROMPT + ANSWER))
    answers = torch.zeros_like(ids, dtype=torch.bool)
    answers[:, PROMPT:] = True
    return ids, torch.ones_like(answers), answers


def score_phase(model: Any, rows: int) -> tuple[float, Callable[[], Any]]:
    policy, inputs = CausalModel(model), score_inputs(model, rows)

    def run() -> float:
        with torch.no_grad():
            policy(*inputs)
        return 1.0

    return score_work(model, rows), run


def update_phase(model: Any, rows: int) -> tuple[float, Callable[[], Any]]:
    """Forward and backward of a loss on the answers' log-probs: three times the forward's work."""
    policy, inputs = CausalModel(model.train()), score_inputs(model, rows)

    def run() -> float:
        policy(*inputs, token_loss=sum_of_nll)[0].backward()
        for parameter in policy.parameters():
            parameter.grad = None
        return 1.0

    return 3 * score_work(model, rows), run


PHASES = {"rollout": rollout_phase, "score": score_phase, "update": update_phase}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--phase", choices=sorted(PHASES), default="rollout")
    parser.add_argument("--model", default="opt-6m", help="opt-6m, or a name as in the recipes")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rows", type=int, default=16, help="rows in a batch")
    parser.add_argument("--runs", type=int, default=5, help="runs, with the peak measured between")
    args = parser.parse_args()
    as_launched()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    work, run = PHASES[args.phase](build_model(args.model, args.dtype), args.rows)
    run()
    shares, peaks, seconds = [], [], []
    for _ in range(args.runs):
        peaks.append(matmul_peak(dtype))
        seconds.append(measure(run).cpu_seconds)
        shares.append(work / peaks[-1] / seconds[-1])
    result = {
        "gigaflop": round(work / 1e9, 2),
        "peak_gflops": round(statistics.median(peaks) / 1e9, 1),
        "floor_seconds": round(statistics.median(work / peak for peak in peaks), 4),
        "cpu_seconds": round(statistics.median(seconds), 4),
        "median_share_of_floor": round(statistics.median(shares), 3),
        "spread": [round(min(shares), 3), round(max(shares), 3)],
    }
    print_line("roofline", vars(args), result)


if __name__ == "__main__":
    main()
