"""One all-reduce over the ranks that the environment describes; says how long it took.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python -m rlhf.engine.reduce_check cpu
"""

from __future__ import annotations

import datetime
import os
import sys
import time

import torch
import torch.distributed as dist

SECONDS = 20


def main(accelerator: str) -> None:
    """Prints one line. An exception ends it: the caller shows its last line."""
    on_gpu = accelerator == "cuda"
    timeout = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else "cpu"
    ones = torch.ones(1 << 18, device=device)
    began = time.perf_counter()
    dist.all_reduce(ones)
    world = dist.get_world_size()
    assert float(ones.sum()) == world * ones.numel(), "the all-reduce gave a wrong sum"
    seconds = time.perf_counter() - began
    print(f"all-reduce of 1 MiB over {world} ranks in {seconds * 1000:.1f} ms", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
