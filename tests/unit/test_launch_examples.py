"""D9: the jobs for other schedulers: golden files, and LSF's script run with a stand-in blaunch."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.examples import EXAMPLES, main
from rlhf.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
FILES = {"kubernetes": "pytorchjob.yaml", "lsf": "lsf.sh"}


@pytest.mark.parametrize("kind", FILES)
def test_golden(kind: str) -> None:
    """The files of docs/examples are what their own first lines print."""
    text = (ROOT / "docs" / "examples" / FILES[kind]).read_text()
    (line,) = [line for line in text.splitlines() if line.startswith(f"# rlhf example {kind} ")]
    assert EXAMPLES[kind](shlex.split(line)[4:]) == text


def test_kubernetes_shape() -> None:
    job = yaml.safe_load(EXAMPLES["kubernetes"](["--num-nodes", "1", "--forward", "HF_TOKEN"]))
    assert list(job["spec"]["pytorchReplicaSpecs"]) == ["Master"]
    container = job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
    assert container["name"] == "pytorch"  # the operator looks for this name
    env = {entry["name"]: entry for entry in container["env"]}
    assert env["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "rlhf", "key": "HF_TOKEN"}
    assert "resources" not in container  # CPU


@pytest.mark.parametrize("code", [0, 3])
def test_lsf_starts_each_host_once(tmp_path: Path, code: int) -> None:
    """Every host once, in order, with its number and one address; a failure is the job's."""
    (tmp_path / "hosts").write_text("a\na\nb\nb\n")
    fake = tmp_path / "blaunch"
    fake.write_text(
        '#!/bin/sh\necho "$1 $NODE $MASTER_ADDR $MASTER_PORT" >>$LOG\nshift; exec "$@"\n'
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >>$LOG.argv\nexit {code}\n')
    for path in (fake, python):
        path.chmod(0o755)
    script = EXAMPLES["lsf"](["--num-nodes", "2", "--num-gpus", "2"])
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log"),
        "LSB_DJOB_HOSTFILE": str(tmp_path / "hosts"), "LSB_JOBID": "20005", "PROJECT": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(["bash"], input=script, text=True, env=env, capture_output=True)
    assert done.returncode == code, done.stderr
    started = sorted((tmp_path / "log").read_text().splitlines())
    assert code or started == ["a 0 a 20005", "b 1 a 20005"]
    argv = (tmp_path / "log.argv").read_text()
    numbers = (0, 1) if code == 0 else ()  # a failure may end the other before it says anything
    for number in numbers:
        assert f"--node-rank {number} --master-addr a --master-port 20005" in argv


def test_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="kubernetes, lsf"):
        main(["pbs"])
    with pytest.raises(ConfigError, match="--num-nodes"):
        main(["lsf"])
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "example", "lsf", "--num-nodes", "2"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stdout.startswith("#!/bin/bash\n")
