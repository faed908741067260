"""Peak memory of PPO, LoRA on one base against four full models: `python -m benchmarks.memory`.

Each side runs in a process of its own: two PPO iterations, then the peak of its resident set, less
what it was before any model was made. Beside it stands the sum of what must be there: weights,
gradients, optimiser state and the largest activation set (what autograd keeps of the policy's
forward over one micro-batch).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.pairs import as_launched, print_line
from benchmarks.workload import MODELS_AT, PROMPT, OurPPO, Workload, lora_reward, model_dirs

LORA = {"model": {"lora": {"rank": 16, "alpha": 32}}}
SIDES: dict[str, dict[str, Any]] = {
    "four_full": {},
    "four_lora": {"actor": LORA, "critic": LORA, "share_base": False},
    "one_base": {"actor": LORA, "critic": LORA, "share_base": True},
}


def one_side(name: str, workload: Workload) -> dict[str, float]:
    """Figures of this process, in bytes and CPU seconds."""
    from rlhf.engine.memory import peak_memory, peak_since_last

    reward = None if name == "four_full" else lora_reward(workload.model)
    model_dirs(workload.model)
    before = _resident()
    peak_since_last()
    ours = OurPPO(workload, SIDES[name], reward)
    ours.iteration()
    began = time.process_time()
    stats = ours.iteration()
    seconds = time.process_time() - began
    peak = peak_since_last()
    assert peak <= peak_memory()
    parts = _parts(ours)
    return {
        "peak": peak - before,
        "before": before,
        "cpu_seconds": seconds,
        "sum": sum(parts.values()),
        **parts,
        "kl": stats["kl_per_answer"],
    }


def _resident() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * float(os.sysconf("SC_PAGE_SIZE"))


def _parts(ours: OurPPO) -> dict[str, float]:
    """Bytes of what an iteration cannot do without."""
    roles = ours.roles
    engines = [e for e in (roles.actor, roles.reference, roles.reward, roles.critic) if e]
    storages = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
        for engine in engines
        for p in engine.module.parameters()
    }
    half = roles.actor_dtype != "float32"
    trained = [
        sum(p.numel() for p in e.module.parameters() if p.requires_grad)
        for e in (roles.actor, roles.critic)
        if e
    ]
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows = min(ours.workload.micro, ours.workload.rows)
    length = PROMPT + ours.settings.rollout.max_new_tokens
    ids = torch.randint(3, 100, (rows, length))
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = roles.actor.module.hidden(ids, mask)
    activations = sum(kept.values())
    del hidden
    return {
        "weights": float(sum(storages.values())),
        # Gradients are accumulated in fp32, the policy's before the critic's: both may be there.
        "gradients": float(sum(trained) * 4),
        "optimiser": float(sum(trained) * (12 if half else 8)),
        "activations": float(activations),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["6m", "135m"], default="135m")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--rows", type=int, default=4, help="prompts per iteration")
    parser.add_argument("--micro", type=int, default=4, help="rows per forward")
    parser.add_argument("--side", choices=sorted(SIDES), help=argparse.SUPPRESS)
    args = parser.parse_args()
    as_launched()
    torch.set_num_threads(1)
    workload = Workload(model=args.model, dtype=args.dtype, rows=args.rows, micro=args.micro)
    if args.side:
        print("\n" + json.dumps(one_side(args.side, workload)), flush=True)
        return
    # Made here: what a process has freed again would hide in its resident set.
    lora_reward(args.model)
    env = os.environ | {MODELS_AT: str(Path(model_dirs(args.model)[0]).parent)}
    found: dict[str, dict[str, float]] = {}
    for side in SIDES:
        argv = [sys.executable, "-m", "benchmarks.memory", "--side", side]
        argv += [f"--{k}={v}" for k, v in vars(args).items() if k != "side"]
        output = subprocess.run(argv, check=True, capture_output=True, text=True, env=env).stdout
        found[side] = json.loads(output.strip().splitlines()[-1])
    one, four = found["one_base"], found["four_full"]
    result = {
        "peak_ratio": round(one["peak"] / four["peak"], 3),
        "peak_over_sum": {k: round(v["peak"] / v["sum"], 3) for k, v in found.items()},
        "cpu_seconds": {k: round(v["cpu_seconds"], 2) for k, v in found.items()},
        "megabytes": {
            side: {k: round(v / 1e6) for k, v in figures.items() if k not in ("cpu_seconds", "kl")}
            for side, figures in found.items()
        },
    }
    print_line("memory", {k: v for k, v in vars(args).items() if k != "side"}, result)


if __name__ == "__main__":
    main()
