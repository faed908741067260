"""Submits a batch script, shows what the job prints, ends as the job ends. Standard library only.

    python slurm_job.py SCRIPT [NAME...]

NAME: variables of this shell that the job gets, by name; none other is passed on. On SIGTERM and
SIGINT the job is cancelled.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ENDED = {
    "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL",
    "DEADLINE", "PREEMPTED", "REVOKED",
}  # fmt: skip
POLL_SECONDS = 1.0


def submit(script: str, names: list[str]) -> str:
    """The job's id. Ends the program if it is refused."""
    exported = ",".join(names) if names else "NONE"
    command = ["sbatch", "--parsable", f"--export={exported}", script]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        sys.exit("sbatch: not found: --launcher slurm needs Slurm's client commands here")
    if done.returncode != 0:
        sys.exit(f"sbatch refused {script}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def state_of(job: str) -> dict[str, str]:
    """The job's fields as scontrol knows them; empty while it does not answer."""
    done = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True)
    return dict(re.findall(r"(\w+)=(\S*)", done.stdout)) if done.returncode == 0 else {}


def follow(path: Path, seen: int) -> int:
    """Copies what is new in the job's output; returns how far it has been shown."""
    if not path.exists():
        return seen
    with path.open("rb") as stream:
        stream.seek(seen)
        text = stream.read()
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()
    return seen + len(text)


def wait(job: str) -> int:
    """The job's exit code when it has ended."""
    seen, shown, silent = 0, "", 0
    while True:
        fields = state_of(job)
        silent = 0 if fields else silent + 1
        if silent > 60:
            sys.exit(f"slurm job {job}: scontrol has not answered for {silent} s")
        state = fields.get("JobState", shown)
        if state != shown:
            why = f" ({fields['Reason']})" if fields.get("Reason", "None") != "None" else ""
            print(f"slurm job {job}: {state.lower()}{why}", flush=True)
            shown = state
        if "StdOut" in fields:
            seen = follow(Path(fields["StdOut"]), seen)
        if state in ENDED:
            code, _, number = fields.get("ExitCode", "1:0").partition(":")
            if state == "COMPLETED" and (code, number) == ("0", "0"):
                return 0
            return 128 + int(number) if number.isdigit() and int(number) else int(code) or 1
        time.sleep(POLL_SECONDS)


def main(argv: list[str]) -> int:
    job = ""

    def cancel(number: int, frame: Any) -> None:
        if job:
            subprocess.run(["scancel", job])
        os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, cancel)
    job = submit(argv[1], argv[2:])
    print(f"slurm job {job}: submitted {argv[1]}", flush=True)
    return wait(job)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
