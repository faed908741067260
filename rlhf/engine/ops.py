"""DeepSpeed compiles some CPU kernels at their first use: say so before a silent minute."""

from __future__ import annotations

import os
from pathlib import Path

from rlhf.engine import comm

OP_OF_OFFLOAD = {"cpu": "cpu_adam", "nvme": "cpu_adam"}


def announce_compile(offload: str) -> None:
    """Prints one line on rank 0 if an op that this engine needs is not in the cache yet."""
    op = OP_OF_OFFLOAD.get(offload)
    if op and comm.rank() == 0 and not _is_cached(op):
        print(
            f"DeepSpeed compiles its {op} kernel with g++ and ninja now: once on this machine, "
            f"a minute or more, kept in {_cache_root()}",
            flush=True,
        )


def quiet_bf16_optimizer() -> None:
    """DeepSpeed's optimiser for bfloat16 prints the memory in nine lines for every engine, and
    resets the GPU's peak by it, which `engine.memory` is to know."""
    from deepspeed.runtime import bf16_optimizer

    bf16_optimizer.see_memory_usage = lambda *_, **__: None


def _cache_root() -> Path:
    default = Path.home() / ".cache" / "torch_extensions"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", default))


def _is_cached(op: str) -> bool:
    return any(_cache_root().glob(f"**/{op}/{op}.so"))
