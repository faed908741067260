"""Everything on one GPU, in under ten minutes: `python -m benchmarks.gpu_day --into DIR`.

Tests marked `gpu`, tests of whole steps, the embedded default and its verdict, and planned against
measured memory run side by side, since none of them is timed; then SFT, PPO and decoding at two
sizes, one after the other, ours and trl's (where trl is installed). Each part has a process of its
own and a time limit: one that fails, hangs or is killed ends alone. DIR/gpu_day.json and
DIR/gpu_day.md are written again after every part.

A machine without a network gets what it lacks by benchmarks/gpu_kit.sh. `--small` runs the same
parts with sizes for a CPU, to see that they work before a GPU is at hand.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_page import page

PROJECT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Part:
    """`limit` in seconds; `beside`: it runs beside others, since nothing in it is timed."""

    name: str
    limit: float
    beside: bool = False
    needs: str = ""
    """A package without which it is left out."""
    model: str = ""
    """Whose random weights it reads; the first part of a model makes them."""


PARTS = (
    Part("machine", 60),
    Part("kernels", 240, beside=True),
    Part("default", 240, beside=True),
    Part("tests", 200, beside=True),
    Part("suite", 240, beside=True),
    Part("memory", 240, beside=True),
    Part("ppo-135m", 60, model="135m"),
    Part("ppo-135m-trl", 60, needs="trl", model="135m"),
    Part("sft-135m", 45, model="135m"),
    Part("sft-135m-trl", 45, needs="trl", model="135m"),
    Part("decode-135m", 45, model="135m"),
    Part("ppo-1.3b", 90, model="1.3b"),
    Part("ppo-1.3b-trl", 90, needs="trl", model="1.3b"),
    Part("sft-1.3b", 60, model="1.3b"),
    Part("sft-1.3b-trl", 60, needs="trl", model="1.3b"),
    Part("decode-1.3b", 60, model="1.3b"),
)


@dataclass
class Running:
    part: Part
    process: subprocess.Popen[bytes]
    began: float
    file: Path

    @property
    def when(self) -> Path:
        """While it is absent, the part has only imported."""
        return self.file.with_suffix(".go")

    def go(self) -> None:
        self.when.touch()
        self.began = time.monotonic()

    def ended(self) -> bool:
        return self.process.poll() is not None

    def late(self, end: float) -> bool:
        now = time.monotonic()
        return now - self.began > self.part.limit or now > end

    def kill(self) -> None:
        """The part and everything it has started: it leads a process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Day:
    """What has been found by now, on disk after every part."""

    def __init__(self, into: Path, small: bool, budget: float) -> None:
        into.mkdir(parents=True, exist_ok=True)
        self.into, self.small = into.resolve(), small
        self.began, self.end = time.monotonic(), time.monotonic() + budget
        self.parts: dict[str, dict[str, Any]] = {}

    def start(self, part: Part) -> Running | None:
        """None: it cannot run; why is noted."""
        if part.needs and importlib.util.find_spec(part.needs) is None:
            self.note(part.name, state="left out", why=f"{part.needs} is not installed")
            return None
        if time.monotonic() > self.end:
            self.note(part.name, state="not run", why="the time was up")
            return None
        file = self.into / f"{part.name}.json"
        file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.gpu_parts", part.name, "--into", str(file)]
        if not part.beside:
            when = file.with_suffix(".go")
            when.unlink(missing_ok=True)
            command += ["--when", str(when)]
        if self.small:
            command.append("--small")
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        if part.model:
            root = self.into / f"models-{part.model}"
            root.mkdir(exist_ok=True)
            environment["RLHF_BENCHMARK_MODELS"] = str(root)
        with file.with_suffix(".log").open("wb") as log:
            process = subprocess.Popen(
                command, cwd=PROJECT, env=environment, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        return Running(part, process, time.monotonic(), file)

    def finish(self, running: Running) -> None:
        """Notes what a part found, however it ended."""
        state = "done"
        if not running.ended():
            running.kill()
            state = "cut off"
        elif running.process.returncode:
            state = "failed"
        seconds = round(time.monotonic() - running.began, 1)
        found: dict[str, Any] = {}
        if running.file.exists():
            found = json.loads(running.file.read_text())
        if state == "failed" and "failed" not in found:
            found["failed"] = f"ended with code {running.process.returncode}"
        if state != "done":
            log = running.file.with_suffix(".log").read_text(errors="replace")
            found["log"] = log[-3000:]
        self.note(running.part.name, state=state, part_seconds=seconds, **found)

    def note(self, name: str, **found: Any) -> None:
        self.parts[name] = found
        print(f"{self.seconds():6.0f} s  {name}: {found['state']}", flush=True)
        everything = {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "command": " ".join(["python -m benchmarks.gpu_day", *sys.argv[1:]]),
            "small": self.small,
            "seconds": round(self.seconds(), 1),
            "parts": self.parts,
        }
        for name, text in (
            ("gpu_day.json", json.dumps(everything, indent=1)),
            ("gpu_day.md", page(everything)),
        ):
            part = self.into / f"{name}.part"
            part.write_text(text)
            part.replace(self.into / name)

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def run(self, parts: list[Part]) -> None:
        """In the given order; neighbours that may run beside each other start together.

        A timed part's process starts one part ahead, and waits with its imports done.
        """
        waiting = [[part] for part in parts if not part.beside]
        first = [part for part in parts if part.beside]
        if first:
            waiting.insert(1 if waiting and waiting[0][0].name == "machine" else 0, first)
        ahead: list[Running] = []
        while waiting:
            group = waiting.pop(0)
            running = ahead or self.start_all(group)
            ahead = []
            for item in [*running]:
                if time.monotonic() < self.end:
                    item.go()
                    continue
                item.kill()
                running.remove(item)
                self.note(item.part.name, state="not run", why="the time was up")
            if waiting and not waiting[0][0].beside and not group[0].beside:
                ahead = self.start_all(waiting[0])
            self.wait(running)

    def start_all(self, parts: list[Part]) -> list[Running]:
        return [started for part in parts if (started := self.start(part))]

    def wait(self, running: list[Running]) -> None:
        while running:
            time.sleep(0.05)
            for item in [r for r in running if r.ended() or r.late(self.end)]:
                running.remove(item)
                self.finish(item)


def main() -> int:
    """0 where every part that ran is done and no test failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, default=Path("gpu_day"))
    parser.add_argument("--parts", nargs="+", choices=[p.name for p in PARTS], metavar="PART",
                        help="only these: " + ", ".join(p.name for p in PARTS))  # fmt: skip
    parser.add_argument("--seconds", type=float, default=590.0, help="for all parts; default 590")
    parser.add_argument("--small", action="store_true", help="sizes for a CPU")
    args = parser.parse_args()
    day = Day(args.into, args.small, args.seconds)
    day.run([part for part in PARTS if not args.parts or part.name in args.parts])
    print(f"{day.into / 'gpu_day.json'}\n{day.into / 'gpu_day.md'}")
    good = all(
        found["state"] in ("done", "left out") and not found.get("failures")
        for found in day.parts.values()
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
