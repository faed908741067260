"""Submits a batch script, shows what the job prints, ends as the job ends. Standard library only.

    python slurm_job.py SCRIPT [NAME...]

NAME: variables of this shell that the job gets, by name; none other is passed on. On SIGTERM and
SIGINT the job is cancelled. A job that is requeued (a time limit, a preemption) is waited for; each
attempt has files of its own in the step's logs.
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
REQUEUE_POLLS = 10


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


class Output:
    """What a job prints: the script's own file, and one for the ranks of each attempt."""

    def __init__(self, job: str, logs: Path) -> None:
        self.job, self.logs, self.attempt = job, logs, 0
        self._seen: dict[Path, int] = {}

    def show(self, script: str) -> None:
        """What is new."""
        ranks = self.logs / f"slurm-{self.job}.attempt{self.attempt}.out"
        for path in (Path(script), ranks) if script else (ranks,):
            self._seen[path] = follow(path, self._seen.get(path, 0))

    def next(self, attempt: int) -> None:
        """The job has been requeued: signs of life and failures of the ranks that are gone are no
        longer those of the step."""
        for path in self.logs.glob("rank*.alive"):
            path.unlink(missing_ok=True)
        for path in self.logs.glob("rank*.failure.json"):
            rank = path.name.partition(".")[0]
            path.replace(path.with_name(f"{rank}.attempt{self.attempt}.failed.json"))
        self.attempt = attempt


def wait(job: str, logs: Path) -> int:
    """The job's exit code when it has ended."""
    output, shown, silent, ended = Output(job, logs), "", 0, 0
    while True:
        fields = state_of(job)
        silent = 0 if fields else silent + 1
        if silent > 60:
            sys.exit(f"slurm job {job}: scontrol has not answered for {silent} s")
        state = fields.get("JobState", shown)
        output.show(fields.get("StdOut", ""))
        if (attempt := int(fields.get("Restarts", output.attempt))) != output.attempt:
            output.next(attempt)
            shown = ""
            print(f"slurm job {job}: requeued; attempt {attempt} is to come", flush=True)
        if state != shown:
            why = f" ({fields['Reason']})" if fields.get("Reason", "None") != "None" else ""
            print(f"slurm job {job}: {state.lower()}{why}", flush=True)
            shown = state
        ended = ended + 1 if state in ENDED else 0
        # Of a job that it requeues, Slurm says for a moment that it failed or was preempted.
        patient = state != "COMPLETED" and fields.get("Requeue") == "1"
        if ended > (REQUEUE_POLLS if patient else 0):
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
    return wait(job, Path(argv[1]).with_name("logs"))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
