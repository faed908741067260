"""Kills a run at random moments until it is done, and compares it with one that nobody touched.

    python -m tests.soak --kills 100 --seed 1            # 1 and 2 ranks, ZeRO 0, 2 and 3
    python -m tests.soak --kills 6 --ranks 2 --zero 2    # one combination

The embedded default at small size, step by step. Killed (SIGKILL) are the driver, one rank, or
everything at once; a part of the kills waits for a checkpoint or an artifact to be half written;
some are a SIGTERM to the driver, which saves first. Then the weights and every logged number must
be the same to the last bit. Prints a line of JSON for each combination; exit code 1 if any differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.guard import descendants, is_rank
from rlhf.stages import PPO, REWARD, SFT
from rlhf.store import verify
from rlhf.track import read_metrics

ROOT = Path(__file__).resolve().parents[1]
STEP_DIRS = {stage.number: stage.folder for stage in (SFT, REWARD, PPO)}
SETTINGS = [
    "data.max_train_rows=400", "data.max_eval_rows=40", "track.trackers=[]",
    "step1.model.lora.rank=0", "step1.train.batch_size=8", "step1.train.micro_batch_size=4",
    "step1.train.epochs=1", "step1.train.max_steps=12", "step1.train.log_every=1",
    "step2.train.batch_size=8", "step2.train.micro_batch_size=4", "step2.train.epochs=1",
    "step2.train.max_steps=10", "step2.train.log_every=1", "step2.train.eval_every=4",
    "step3.rollout.prompts=8", "step3.rollout.batch_size=8", "step3.rollout.max_new_tokens=12",
    "step3.iterations=8", "step3.micro_batch_size=4", "step3.ppo.minibatches=2",
    "step3.ppo.ema_decay=0.9", "step3.ppo.ptx_coef=0.1", "step3.ppo.kl_target=2.0",
    "step3.ppo.kl_horizon=100", "step3.eval.prompts=8", "step3.ppo.max_kl=1000",
]  # fmt: skip
# What a clock or the machine decides.
NOT_COMPARED = ("time", "seconds", "tokens_per_second", "memory")
HALF_WRITTEN = ("resume/.step-*.tmp-*", ".artifact.tmp-*")


@dataclass
class Soak:
    """One combination of ranks and ZeRO stage, in a directory of its own."""

    root: Path
    ranks: int
    zero: int
    chance: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    seconds: dict[int, float] = field(default_factory=dict)

    def command(self, name: str, step: int) -> list[str]:
        several = ["--deployment-type", "single_node", "--num-gpus", str(self.ranks)]
        stages = [f"--{role}-zero-stage={self.zero}" for role in ("actor", "reward")]
        return [
            sys.executable, str(ROOT / "train.py"), "--step", str(step), "--name", name,
            "--output-dir", str(self.root), "--save-every", "1",
            *(several if self.ranks > 1 else []), *stages,
            f"data.cache_dir={self.root / 'cache'}", "launch.grace_seconds=30", *SETTINGS,
        ]  # fmt: skip

    def start(self, name: str, step: int) -> subprocess.Popen[bytes]:
        log = (self.root / f"{name}.out").open("ab")
        hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        env = {key: value for key, value in os.environ.items() if key not in hidden}
        with log:
            return subprocess.Popen(
                self.command(name, step), cwd=self.root, env=env, stdout=log, stderr=log
            )

    def finish(self, name: str, step: int) -> None:
        """Runs a step to its end; raises AssertionError with the log's end if it fails."""
        began = time.monotonic()
        code = self.start(name, step).wait(timeout=900)
        self.seconds.setdefault(step, time.monotonic() - began)
        tail = (self.root / f"{name}.out").read_text(errors="replace")[-3000:]
        assert code == 0, f"step {step} of {name} ended with {code}:\n{tail}"

    def torment(self, step: int, kills: int) -> None:
        """Starts the step and kills it, `kills` times, or until it has ended before the blow."""
        for _ in range(kills):
            process = self.start("soaked", step)
            self._wait_for_the_moment(process, step)
            if process.poll() is not None:
                if process.returncode == 0:
                    return
                tail = (self.root / "soaked.out").read_text(errors="replace")[-3000:]
                raise AssertionError(f"step {step} failed by itself:\n{tail}")
            self._strike(process)

    def _wait_for_the_moment(self, process: subprocess.Popen[bytes], step: int) -> None:
        place = self.root / "soaked" / STEP_DIRS[step]
        began = time.monotonic()
        end = began + self.chance.uniform(0.3, 1.0) * self.seconds[step]
        in_a_write = self.chance.random() < 0.4
        while time.monotonic() < end + (self.seconds[step] if in_a_write else 0):
            if process.poll() is not None:
                return
            half = in_a_write and time.monotonic() > began + 1
            if half and any(next(place.glob(pattern), None) for pattern in HALF_WRITTEN):
                if self.chance.random() < 0.3:  # not always the first one
                    time.sleep(self.chance.uniform(0, 0.02))
                    self.kills["while something was half written"] += 1
                    return
                time.sleep(0.05)
            time.sleep(0.002)

    def _strike(self, process: subprocess.Popen[bytes]) -> None:
        below = descendants(process.pid)
        ranks = [pid for pid in below if is_rank(pid)]
        what = self.chance.choice(["driver", "rank", "everything", "driver, SIGTERM"])
        if what == "rank" and not ranks:
            what = "everything"
        victims = {
            "driver": [process.pid],
            "driver, SIGTERM": [process.pid],
            "rank": [self.chance.choice(ranks)] if ranks else [],
            "everything": [process.pid, *below],
        }[what]
        self.kills[what] += 1
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if "SIGTERM" in what else signal.SIGKILL)
        process.wait(timeout=120)

    def differences(self) -> list[str]:
        """Where the two runs are not the same."""
        wrong = []
        for step, folder in STEP_DIRS.items():
            one, other = (self.root / name / folder for name in ("untouched", "soaked"))
            if digests(one) != digests(other):
                a, b = digests(one), digests(other)
                names = sorted(n for n in a.keys() | b.keys() if a.get(n) != b.get(n))
                wrong.append(f"step {step}: {', '.join(names[:5])}")
            if figures(one) != figures(other):
                wrong.append(f"step {step}: metrics.jsonl: {first_difference(one, other)}")
            if (other / "resume").exists():
                wrong.append(f"step {step}: checkpoints are left")
        return wrong


def digests(step_dir: Path) -> dict[str, str]:
    """sha256 of every published file, its manifest (which has a date) apart."""
    verify(step_dir / "artifact")
    files = [p for p in (step_dir / "artifact").rglob("*") if p.is_file()]
    found = {str(p.relative_to(step_dir)): p for p in files if p.name != "MANIFEST.json"}
    run = str(step_dir.parent).encode()  # model cards name their base by its path
    return {
        name: hashlib.sha256(path.read_bytes().replace(run, b"RUN")).hexdigest()
        for name, path in found.items()
    }


def figures(step_dir: Path) -> list[dict[str, Any]]:
    """The logged numbers, but for those of a clock."""
    return [
        {key: value for key, value in row.items() if not any(w in key for w in NOT_COMPARED)}
        for row in read_metrics(step_dir / "metrics.jsonl")
    ]


def first_difference(one: Path, other: Path) -> str:
    a, b = figures(one), figures(other)
    for x, y in zip(a, b, strict=False):
        if x != y:
            keys = [key for key in x.keys() | y.keys() if x.get(key) != y.get(key)]
            return f"at step {x.get('step')}: {sorted(keys)[:4]}"
    return f"{len(a)} and {len(b)} lines"


def soak(root: Path, ranks: int, zero: int, kills: int, seed: int) -> dict[str, Any]:
    """All three steps, `kills` kills in all; what came of it."""
    soaked = Soak(root, ranks, zero, random.Random(seed))
    began = time.monotonic()
    for step in STEP_DIRS:
        soaked.finish("untouched", step)
    for step in STEP_DIRS:
        for share in range(3):  # a step that ended before its kills are used up is done again
            left = round(kills * step / 3) - sum(
                count for what, count in soaked.kills.items() if "written" not in what
            )
            if left <= 0:
                break
            if share:
                done = root / "soaked" / STEP_DIRS[step] / "artifact"
                done.rename(root / f"first{step}-{share}")
            soaked.torment(step, left)
        soaked.finish("soaked", step)
    wrong = soaked.differences()
    return {
        "ranks": ranks,
        "zero": zero,
        "kills": sum(n for what, n in soaked.kills.items() if "written" not in what),
        "by_kind": dict(soaked.kills),
        "identical": not wrong,
        "differences": wrong,
        "seconds": round(time.monotonic() - began),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=100, help="over all combinations")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--zero", type=int, nargs="+", default=[0, 2, 3])
    parser.add_argument("--keep", action="store_true", help="keep the runs' directories")
    asked = parser.parse_args(argv)
    pairs = [(ranks, zero) for ranks in asked.ranks for zero in asked.zero]
    good = True
    for number, (ranks, zero) in enumerate(pairs):
        share = asked.kills * (number + 1) // len(pairs) - asked.kills * number // len(pairs)
        root = Path(tempfile.mkdtemp(prefix=f"soak-{ranks}-{zero}-"))
        result = soak(root, ranks, zero, share, asked.seed + 1000 * number)
        print(json.dumps(result), flush=True)
        good = good and result["identical"]
        if result["identical"] and not asked.keep:
            subprocess.run(["rm", "-rf", str(root)], check=True)
        else:
            print(f"kept: {root}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
