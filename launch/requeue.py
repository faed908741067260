"""A driver inside a Slurm job whose time is up: the job is put back into the queue."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Mapping

SECONDS = 30


def requeue_own_job(number: int, environ: Mapping[str, str]) -> str:
    """After SIGUSR1 (`#SBATCH --signal=B:USR1@120`) inside a job of Slurm, when all has been saved:
    asks for the job's next attempt. What became of that, for a person; "" where it is not asked."""
    job = environ.get("SLURM_JOB_ID", "")
    if number != signal.SIGUSR1 or not job:
        return ""
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"slurm job {job}: cannot be requeued: {error}"
    if done.returncode == 0:
        return f"slurm job {job}: requeued; its next attempt goes on from there"
    return f"slurm job {job}: not requeued: {done.stderr.strip()}"
