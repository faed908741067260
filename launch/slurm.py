"""The `slurm` launcher: a batch script in the run directory, and that file is submitted."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch import slurm_job
from launch.spec import Placement, check_even


def command(script: Path, args: Sequence[str], placement: Placement) -> list[str]:
    """Submits `job.sbatch` beside the step's resolved.json, shows its output, ends with it."""
    check_even(placement, "slurm")
    return [sys.executable, slurm_job.__file__, str(job_file(args)), *placement.config.forward]


def job_file(args: Sequence[str]) -> Path:
    """Where the batch script goes: beside the file that --config names."""
    return Path(args[list(args).index("--config") + 1]).with_name("job.sbatch")


def batch_script(
    script: Path,
    args: Sequence[str],
    placement: Placement,
    variables: Mapping[str, str],
    cwd: str,
) -> str:
    """The text of `job.sbatch`: allocation, variables that may be passed on, one srun."""
    logs = job_file(args).with_name("logs")
    directives = [
        f"--job-name=rlhf-{script.parent.name}",
        f"--nodes={len(placement.hosts)}",
        f"--ntasks={placement.world_size}",
        f"--ntasks-per-node={placement.per_node}",
        f"--output={logs}/slurm-%j.out",
    ]
    if placement.hostfile:
        directives.append(f"--nodelist={','.join(placement.hosts)}")
    if placement.accelerator == "cuda":
        directives.append(f"--gpus-per-node={placement.per_node}")
    directives += shlex.split(placement.config.launcher_args or "")
    master = placement.master_addr or '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
    # Jobs may share a node: a port of the job's own, unless one was asked for.
    wanted = placement.config.master_port
    port = "$((20000 + SLURM_JOB_ID % 20000))" if wanted == "auto" else str(wanted)
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {directive}" for directive in directives),
        "set -eu",
        f"cd {shlex.quote(cwd)}",
        *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
        f'export MASTER_ADDR="{master}" MASTER_PORT="{port}"',
        "# One task that fails ends the others; --export=ALL is this script's environment.",
        "exec srun --kill-on-bad-exit=1 --export=ALL "
        + shlex.join([sys.executable, "-u", str(script), *args]),
    ]
    return "\n".join(lines) + "\n"
