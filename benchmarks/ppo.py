"""One PPO iteration against trl's: `python -m benchmarks.ppo --help`.

Both sides generate, score and update on the same random weights, prompts, lengths and dtype, with
one thread, in turn (benchmarks/pairs.py). trl comes into a directory of its own:

    pip install --no-deps --target DIR trl==1.10.0
    python -m benchmarks.ppo --against trl --trl DIR
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch

from benchmarks.pairs import as_launched, compare, measure, print_line, summary, worker
from benchmarks.workload import OurPPO, Workload

PACKAGES = ("torch", "transformers", "deepspeed", "accelerate")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", choices=["trl", "nothing"], default="trl")
    parser.add_argument("--trl", help="directory that trl was installed into with --target")
    parser.add_argument("--model", choices=["6m", "135m"], default="6m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rows", type=int, default=16, help="prompts per iteration")
    parser.add_argument("--micro", type=int, default=16, help="rows per forward, both sides")
    parser.add_argument("--micro-tokens", type=int, help="ours: step3.micro_batch_tokens")
    parser.add_argument("--epochs", type=int, default=1, help="PPO epochs")
    parser.add_argument("--early", action="store_true", help="mean answer 24 tokens, not 64")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument(
        "--old-log-probs",
        choices=["rollout", "forward"],
        default="rollout",
        help="ours: step3.ppo.old_log_probs; trl takes them from generation",
    )
    parser.add_argument(
        "--peer-bf16",
        choices=["default", "weights"],
        default="default",
        help="trl's bfloat16: fp32 weights and bf16=True, its own default, or bf16 weights",
    )
    parser.add_argument(
        "--peer-memory",
        choices=["kept", "default"],
        default="kept",
        help="trl's glibc allocator: set up as our driver sets it for its ranks, or not",
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    as_launched()
    torch.set_num_threads(1)
    workload = Workload(
        model=args.model,
        dtype=args.dtype,
        rows=args.rows,
        micro=min(args.micro, args.rows),
        micro_tokens=args.micro_tokens,
        early=args.early,
        epochs=args.epochs,
        old_log_probs=args.old_log_probs,
    )
    ours = OurPPO(workload)
    seen: list[dict[str, float]] = []

    def turn() -> float:
        before = resource.getrusage(resource.RUSAGE_SELF)
        stats = ours.iteration()
        after = resource.getrusage(resource.RUSAGE_SELF)
        stats["page_faults"] = after.ru_minflt - before.ru_minflt
        stats["kernel_seconds"] = after.ru_stime - before.ru_stime
        seen.append(stats)
        return workload.rows

    if args.against == "trl":
        with trl_worker("ppo", workload, args) as theirs:
            result = compare(turn, theirs, pairs=args.pairs)
    else:
        turn()
        result = {"ours": summary([measure(turn) for _ in range(args.pairs)])}
    phases = {
        name: round(statistics.median(stats[f"cpu_{name}"] for stats in seen[1:]), 4)
        for name in ("rollout", "score", "update")
    }
    result |= {
        "unit": "samples",
        "our_cpu_seconds": phases,
        "our_page_faults": statistics.median(stats["page_faults"] for stats in seen[1:]),
        "our_kernel_seconds": round(statistics.median(s["kernel_seconds"] for s in seen[1:]), 3),
        "our_peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "mean_answer": round(statistics.fmean(stats["answer_length"] for stats in seen), 2),
        "versions": versions(args.trl),
    }
    print_line("ppo", vars(args), result)


def trl_worker(kind: str, workload: Workload, args: argparse.Namespace) -> Any:
    """trl's side; its directory comes first on the path, in its process alone."""
    path = [args.trl, *sys.path] if args.trl else sys.path
    argv = [
        sys.executable,
        "-m",
        "benchmarks.trl_side",
        json.dumps([kind, asdict(workload), args.peer_bf16]),
    ]
    env = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}
    if getattr(args, "peer_memory", "kept") == "default":
        env["GLIBC_TUNABLES"] = ""
    return worker(argv, env)


def versions(trl: str | None) -> dict[str, str]:
    found = {name: metadata.version(name) for name in PACKAGES}
    path = [trl, *sys.path] if trl else sys.path
    peers = [d.version for d in metadata.distributions(name="trl", path=path)]
    return found | ({"trl": peers[0]} if peers else {})


if __name__ == "__main__":
    main()
