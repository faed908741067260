"""Two fake hosts for all tests of this folder, and the small run that they share."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.multinode import fakeslurm
from tests.multinode.fakehosts import FakeHosts, fake_hosts, missing

ROOT = Path(__file__).resolve().parents[2]
COLOURS = ["blue", "red", "green", "grey", "white", "brown", "pink", "black"]
# As small as a run can be that still does everything; float32, so that losses can be compared.
TINY = [
    "step1.model.dtype=float32", "step2.model.dtype=float32",
    "step3.actor.model.dtype=float32", "step3.critic.model.dtype=float32",
    "step1.train.batch_size=8", "step1.train.micro_batch_size=4", "step1.train.max_steps=3",
    "step1.train.log_every=1", "step1.max_prompt_length=40", "step1.max_length=64",
    "step2.train.batch_size=8", "step2.train.micro_batch_size=4", "step2.train.max_steps=3",
    "step2.train.log_every=1",
    "step3.rollout.prompts=8", "step3.rollout.batch_size=8", "step3.rollout.max_new_tokens=6",
    "step3.iterations=2", "step3.micro_batch_size=4", "step3.eval.prompts=8",
    "track.trackers=[]",
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = missing()
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.multinode)
            if why:
                item.add_marker(pytest.mark.skip(reason=why))


@dataclass
class Cluster:
    """The hosts with a data set and the command that trains on it."""

    hosts: FakeHosts
    root: Path

    def command(self, name: str, *flags: str, steps: tuple[int, ...] = (1, 2, 3)) -> list[str]:
        """train.py's command line for a run called `name`; of the multi-node kind if it says so."""
        return [
            sys.executable, str(ROOT / "train.py"), "--step", *map(str, steps),
            "--output-dir", str(self.root), "--name", name, "--data-path", str(self.root / "data"),
            "--actor-model", "tiny:llama", f"data.cache_dir={self.root / 'cache'}", *TINY, *flags,
        ]  # fmt: skip

    def many(self, name: str, *flags: str, steps: tuple[int, ...] = (1, 2, 3)) -> list[str]:
        """The same on both hosts."""
        hostfile = str(self.hosts.hostfile())
        nodes = ["--deployment-type", "multi_node", "--hostfile", hostfile]
        return self.command(name, *nodes, *flags, steps=steps)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("cluster")
    home = tmp_path_factory.mktemp("hosts")
    write_rows(root / "data")
    with fake_hosts(home) as hosts:
        yield Cluster(hosts, root)


@pytest.fixture(scope="session")
def slurm(cluster: Cluster) -> Iterator[dict[str, str]]:
    """Slurm on the first host: the variables of its commands."""
    if why := fakeslurm.missing():
        pytest.skip(why)
    with fakeslurm.slurm(cluster.hosts) as env:
        yield env


def write_rows(directory: Path) -> None:
    directory.mkdir()
    for name, count in (("train", 200), ("test", 16)):
        with (directory / f"{name}.jsonl").open("w") as stream:
            for i in range(count):
                prompt = f"\n\nHuman: Which colour has thing {i} of {name}?\n\nAssistant:"
                good = f" It is {COLOURS[i % 8]}, I am glad that you ask." + " Really." * (i % 3)
                row = {"prompt": prompt, "chosen": good, "rejected": " No."}
                stream.write(json.dumps(row) + "\n")
