"""The `slurm` launcher: a batch script in the run directory, and that file is submitted."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from launch import slurm_job
from launch.spec import Placement, check_even
from rlhf.lifeline import BEAT_FILE, ENDED, STOP

SIGNAL_SECONDS = 120  # before the time limit; Slurm may be a minute early
# What follows the variables in job.sbatch. Slurm tells the script (USR1: the time limit) or, where
# it preempts with a grace time, the ranks themselves (TERM) that the job has to go. The ranks save
# together and end with 143; the script puts the job back into the queue, unless the driver is gone
# or has asked for the end itself.
ENDING = Template(
    """\
attempt=$${SLURM_RESTART_COUNT:-0}
idle=$logs/slurm-$$SLURM_JOB_ID.idle
newest() { ls -d $resume/step-* 2>/dev/null | tail -n 1; }
fields() { scontrol show job -o "$$SLURM_JOB_ID" | tr ' ' '\\n'; }
told() { [ "$$warned" ] || fields | grep -q "^PreemptTime=[0-9]"; }
running() { fields | grep -qx "JobState=RUNNING"; }  # not cancelled
driven() {  # the driver counts in this file; it lives where the count goes on
  before=$$(cat $beat 2>/dev/null) || return 1
  for i in 1 2 3 4 5 6 7 8 9 10; do
    sleep 1
    now=$$(cat $beat 2>/dev/null) || return 1
    case $$now in $stop*|$ended*) return 1 ;; esac
    [ "$$now" = "$$before" ] || return 0
  done
  return 1
}
saved=$$(newest)
warned=
trap 'warned=1; scancel --signal=TERM "$$SLURM_JOB_ID"' USR1  # all ranks, not this script
# One task that fails ends the others; --export=ALL is this script's environment.
srun --kill-on-bad-exit=1 --export=ALL --output=$logs/slurm-$$SLURM_JOB_ID.attempt$$attempt.out \\
  $command &
step=$$!
while kill -0 "$$step" 2>/dev/null; do wait "$$step" || true; done  # a signal ends a wait
code=0
wait "$$step" || code=$$?
case $$code in 138|143) if told && running && driven; then
  # Twice without a checkpoint of its own: it needs more time, not another attempt.
  if [ "$$(newest)" != "$$saved" ]; then
    rm -f "$$idle"
  elif [ -e "$$idle" ]; then
    echo "job $$SLURM_JOB_ID: two attempts in a row had to end before they saved anything: not" \\
      "requeued. Give it more time: --launcher-args=--time=..."
    exit "$$code"
  else
    touch "$$idle"
  fi
  echo "job $$SLURM_JOB_ID: attempt $$attempt had to end; requeued"
  scontrol requeue "$$SLURM_JOB_ID" && sleep 60  # Slurm ends this script
fi ;; esac
exit "$$code"
"""
)


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
    logs, resume = (job_file(args).with_name(name) for name in ("logs", "resume"))
    directives = [
        f"--job-name=rlhf-{script.parent.name}",
        f"--nodes={len(placement.hosts)}",
        f"--ntasks={placement.world_size}",
        f"--ntasks-per-node={placement.per_node}",
        f"--output={logs}/slurm-%j.out",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{SIGNAL_SECONDS}",
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
    ]
    ending = ENDING.substitute(
        logs=shlex.quote(str(logs)),
        resume=shlex.quote(str(resume)),
        beat=shlex.quote(str(logs / BEAT_FILE)),
        stop=STOP,
        ended=ENDED,
        command=shlex.join([sys.executable, "-u", str(script), *args]),
    )
    return "\n".join(lines) + "\n" + ending
