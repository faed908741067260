"""Many nodes without any: which variables travel, what is written, what counts as success."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch import accelerate, heartbeat, probe, ranks, slurm, slurm_job
from launch.checks import problem
from launch.devices import place
from launch.forward import check_forward, deepspeed_may_see, env_file, forwarded, is_allowed
from launch.hostcheck import host_checks, same_machine
from launch.launchers import build_spec
from launch.nodes import prepared, private_file, with_variables
from launch.options import parse_options
from launch.plan import Plan, make_plan
from launch.requeue import requeue_own_job
from launch.spec import LaunchSpec, Placement
from rlhf.config import load_config
from rlhf.config.load import parse_overrides
from rlhf.errors import ConfigError, RequirementError
from rlhf.lifeline import Lifeline, adopt_environment, write

SCRIPT, ARGS = Path("/p/step1_sft/main.py"), ["--config", "/r/step1_sft/resolved.json"]
SECRETS = {"HF_TOKEN": "hf_planted", "HUGGING_FACE_HUB_TOKEN": "hf_planted",
           "RLHF_API_KEY": "hf_planted", "NCCL_SECRET": "hf_planted",
           "WANDB_API_KEY": "hf_planted", "MLFLOW_TRACKING_PASSWORD": "hf_planted",
           "AWS_ACCESS_KEY_ID": "hf_planted", "HF_HUB_X": "http://u:hf_planted@m"}  # fmt: skip
PLAIN = {"PATH": "/bin", "HF_HOME": "/h", "HF_HUB_ETAG_TIMEOUT": "5", "NCCL_DEBUG": "WARN",
         "GLOO_SOCKET_IFNAME": "eth0", "OMP_PROC_BIND": "x", "RLHF_CACHE": "/c"}  # fmt: skip
OTHER = {"EDITOR": "vi", "SSH_AUTH_SOCK": "/s", "HTTP_PROXY": "http://p"}


@pytest.fixture
def hostfile(tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("a slots=2\nb slots=2\n")
    return path


def spec_of(hostfile: Path, *overrides: str) -> LaunchSpec:
    flags = [f"launch.hostfile={hostfile}", "launch.deployment_type=multi_node", *overrides]
    config = load_config(None, parse_overrides(flags))
    environ = {**SECRETS, **PLAIN, **OTHER}
    return build_spec(config, SCRIPT, ARGS, place(config.launch), environ)


LAUNCHERS = [
    ["launch.launcher=deepspeed"],
    ["launch.node_launcher=openmpi"],
    ["launch.node_launcher=slurm"],
    ["launch.launcher=torchrun"],
    ["launch.launcher=accelerate"],
    ["launch.launcher=slurm"],
]


@pytest.mark.parametrize("flags", LAUNCHERS)
def test_no_launcher_shows_a_secret(hostfile: Path, flags: list[str]) -> None:
    """Y6: not on a command line, in a variable that we set, or in a file; the others arrive."""
    spec = spec_of(hostfile, *flags)
    nodes = spec.nodes
    assert nodes is not None
    text = json.dumps([spec.argv, spec.env, spec.shell(), nodes.env_file, nodes.files])
    assert "hf_planted" not in text
    assert not any(name in text for name in OTHER)
    if nodes.clean:
        seen = spec.environment({**SECRETS, **PLAIN, **OTHER})
        assert "MLFLOW_TRACKING_PASSWORD" not in seen
        assert set(PLAIN) <= set(seen)
    if flags != ["launch.node_launcher=slurm"]:
        assert "GLOO_SOCKET_IFNAME" in text
        assert "NCCL_DEBUG" in text


def test_what_may_travel() -> None:
    found = forwarded({**SECRETS, **PLAIN, **OTHER}, {"MASTER_ADDR": "a", "OMP_NUM_THREADS": "1"})
    assert found == dict(sorted({**PLAIN, "MASTER_ADDR": "a", "OMP_NUM_THREADS": "1"}.items()))
    assert is_allowed("TOKENIZERS_PARALLELISM")
    assert not is_allowed("RLHF_TOKEN")
    assert not deepspeed_may_see("MLFLOW_TRACKING_PASSWORD")
    assert deepspeed_may_see("HF_TOKEN")  # deepspeed's own launcher never passes it on
    with pytest.raises(ConfigError, match="line break"):
        forwarded({"RLHF_X": "a\nb"}, {})
    with pytest.raises(ConfigError, match="%h"):
        forwarded({"NCCL_DEBUG_FILE": "/tmp/%h"}, {})


def test_forward_needs_a_variable_and_shows_no_value() -> None:
    check_forward(["A"], {"A": "1"})
    with pytest.raises(RequirementError, match="--forward B: not set"):
        check_forward(["B"], {"A": "1"})
    with pytest.raises(ConfigError) as caught:
        load_config(None, parse_overrides(["launch.forward=['HF_TOKEN=hf_planted']"]))
    assert "hf_planted" not in str(caught.value)


def test_deepspeed_and_a_shell_read_the_env_file_as_we_mean_it(tmp_path: Path) -> None:
    """deepspeed quotes what is unusual and a remote shell expands it: the value arrives whole."""
    values = {"RLHF_A": 'say "x" $HOME `id` \\ end', "RLHF_B": "plain/1.2:3", "RLHF_C": "a b"}
    path = tmp_path / "env"
    path.write_text(env_file(values))
    code = (
        "import sys\nfrom deepspeed.launcher.multinode_runner import PDSHRunner\n"
        "from types import SimpleNamespace as N\n"
        "r = PDSHRunner(N(user_args=[], user_script='s'), '')\n"
        "for line in open(sys.argv[1]).readlines():\n"
        "    r.add_export(*line.split('=', maxsplit=1))\n"
        "print('; '.join(f'export {k}={v}' for k, v in r.exports.items()))"
    )
    env = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, env=env
    )
    exports = done.stdout.strip().splitlines()[-1]
    shown = subprocess.run(["sh", "-c", f"{exports}; env"], capture_output=True, text=True).stdout
    for name, value in values.items():
        assert f"{name}={value}\n" in shown


def test_private_file(tmp_path: Path) -> None:
    """Y6: mode 0600 in a directory of its own, and gone at the end."""
    with private_file("name", "text") as path:
        assert path.read_text() == "text"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.parent.exists()


@pytest.mark.parametrize("flags", LAUNCHERS)
def test_the_heartbeat_reaches_the_ranks(hostfile: Path, tmp_path: Path, flags: list[str]) -> None:
    """Whichever way a launcher passes variables on; the files are there for the launch only."""
    spec = spec_of(hostfile, *flags)
    if spec.nodes and spec.nodes.files:
        files = {str(tmp_path / "job.sbatch"): text for text in spec.nodes.files.values()}
        spec = replace(spec, nodes=replace(spec.nodes, files=files))
    with prepared(spec, tmp_path, 1.0) as (ready, heart):
        assert heart is not None
        places = [*ready.argv]
        if "DS_ENV_FILE" in ready.env:
            places.append(Path(ready.env["DS_ENV_FILE"]).read_text())
        places += [path.read_text() for path in tmp_path.glob("*.sbatch")]
        if flags == ["launch.node_launcher=slurm"]:
            places.append(f"RLHF_HEARTBEAT={ready.env['RLHF_HEARTBEAT']}")
        if flags == ["launch.node_launcher=openmpi"]:
            assert any("-x RLHF_HEARTBEAT" in place for place in places)
        else:
            assert any("RLHF_HEARTBEAT=60" in place for place in places)
    assert (tmp_path / "driver.beat").read_text() == "ended"


@pytest.mark.parametrize("flags", LAUNCHERS)
def test_what_is_found_out_later_reaches_the_ranks(
    hostfile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    """HF_HUB_OFFLINE from the hub check by every way; settings with a secret by none that shows."""
    sent: list[Any] = []

    @contextlib.contextmanager
    def delivered(hosts: Any, values: Any) -> Iterator[str]:
        sent.append(values)
        yield "/dev/shm/x/env"

    monkeypatch.setattr("launch.nodes.delivered", delivered)
    hidden = json.dumps({"config.data.path": ["https://u:hf_planted@m/rows"]})
    spec = with_variables(spec_of(hostfile, *flags), {"HF_HUB_OFFLINE": "1"})
    assert spec.nodes is not None
    files = {str(tmp_path / "job.sbatch"): text for text in spec.nodes.files.values()}
    spec = replace(
        spec,
        env={**spec.env, "RLHF_HIDDEN_SETTINGS": hidden},
        nodes=replace(spec.nodes, files=files),
    )
    with prepared(spec, tmp_path, 1.0) as (ready, _):
        assert ready.nodes is not None
        shown = json.dumps([ready.argv, ready.nodes.env_file, ready.nodes.files])
    assert "hf_planted" not in shown
    if spec.nodes.over_ssh:
        assert sent == [{"RLHF_HIDDEN_SETTINGS": hidden}]
        assert "/dev/shm/x/env" in shown or "-x RLHF_FORWARDED" in shown
    else:
        assert ready.env["RLHF_HIDDEN_SETTINGS"] == hidden  # srun and sbatch take it by name
        assert flags == ["launch.node_launcher=slurm"] or ready.argv[-1] == "RLHF_HIDDEN_SETTINGS"
    assert "HF_HUB_OFFLINE" in shown or flags == ["launch.node_launcher=slurm"]


def test_slurms_script() -> None:
    """Issue 4: resources, variables, one srun; what sbatch is told more comes last and wins."""
    config = load_config(
        None,
        parse_overrides(["launch.launcher=slurm", "launch.launcher_args=--partition=p --time=1:0"]),
    ).launch
    placement = Placement(
        "cuda", {"a": [0, 1], "b": [0, 1]}, None, 29500, "/h", multi_node=True, config=config
    )
    text = slurm.batch_script(SCRIPT, ARGS, placement, {"RLHF_X": "a 'b' $c"}, "/w d")
    lines = text.splitlines()
    for wanted in (
        "#SBATCH --nodes=2", "#SBATCH --ntasks=4", "#SBATCH --ntasks-per-node=2",
        "#SBATCH --nodelist=a,b", "#SBATCH --gpus-per-node=2", "#SBATCH --partition=p",
        "#SBATCH --output=/r/step1_sft/logs/slurm-%j.out", "cd '/w d'",
    ):  # fmt: skip
        assert wanted in lines
    assert lines.index("#SBATCH --time=1:0") > lines.index("#SBATCH --nodes=2")
    for wanted in ("--open-mode=append", "--requeue", "--signal=B:USR1@120"):
        assert f"#SBATCH {wanted}" in lines
    (started,) = [i for i, line in enumerate(lines) if line.startswith("srun ")]
    assert lines[started].startswith("srun --kill-on-bad-exit=1 --export=ALL ")
    output = "--output=/r/step1_sft/logs/slurm-$SLURM_JOB_ID.attempt$attempt.out"
    assert f" {output} \\" in lines[started]
    assert lines[started + 1].endswith("main.py --config /r/step1_sft/resolved.json &")
    shown = subprocess.run(
        ["bash", "-c", "".join(f"{x}\n" for x in lines if x.startswith("export RLHF_X")) + "env"],
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert "RLHF_X=a 'b' $c\n" in shown
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    with pytest.raises(ConfigError, match="same number"):
        slurm.command(SCRIPT, ARGS, Placement("cpu", {"a": [0], "b": [0, 1]}, None, 1))


def test_slurm_job_ends_as_its_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit codes and signals of a job as scontrol tells them; variables by name only."""
    tools = {
        "sbatch": 'echo "$@" >$LOG; echo 42\n',
        "scontrol": 'echo "JobId=42 JobState=$STATE Reason=None ExitCode=$CODE StdOut=$OUT"\n',
    }
    for name, body in tools.items():
        path = tmp_path / name
        path.write_text("#!/bin/sh\n" + body)
        path.chmod(0o755)
    out = tmp_path / "out"
    out.write_text("the job's words\n")
    for state, told, code in (
        ("COMPLETED", "0:0", 0), ("FAILED", "3:0", 3), ("CANCELLED", "0:15", 143),
        ("TIMEOUT", "0:0", 1),
    ):  # fmt: skip
        env = {
            **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log"),
            "STATE": state, "CODE": told, "OUT": str(out), "HF_TOKEN": "hf_planted",
        }  # fmt: skip
        command = [sys.executable, slurm_job.__file__, "/x.sbatch", "HF_TOKEN"]
        done = subprocess.run(command, capture_output=True, text=True, env=env)
        assert done.returncode == code, done.stderr
        assert "the job's words" in done.stdout
        assert (tmp_path / "log").read_text().strip() == "--parsable --export=HF_TOKEN /x.sbatch"


def test_a_job_that_is_requeued_is_followed(tmp_path: Path) -> None:
    """What its ranks said in each attempt is shown and kept; what the dead left does not count."""
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "rank1.alive").write_text("{}")
    (logs / "rank1.failure.json").write_text('{"rank": 1}')
    for attempt in (0, 1):
        (logs / f"slurm-42.attempt{attempt}.out").write_text(f"words of attempt {attempt}\n")
    told = ["RUNNING Restarts=0", "PREEMPTED Restarts=0", "FAILED Restarts=1",
            "PENDING Restarts=1", "RUNNING Restarts=1", "COMPLETED Restarts=1"]  # fmt: skip
    (tmp_path / "states").write_text("\n".join(told) + "\n")
    tools = {
        "sbatch": "echo 42\n",
        "scontrol": f"""cd {tmp_path}; n=$(wc -l <states)
            echo "JobId=42 JobState=$(head -n 1 states) Requeue=1 Reason=None ExitCode=0:0"
            [ "$n" = 1 ] || sed -i 1d states
        """,
    }
    for name, body in tools.items():
        path = tmp_path / name
        path.write_text("#!/bin/sh\n" + body)
        path.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, slurm_job.__file__, str(tmp_path / "job.sbatch")]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert re.search(
        "words of attempt 0.*preempted.*requeued; attempt 1.*words of attempt 1.*completed",
        done.stdout,
        re.DOTALL,
    )
    assert not (logs / "rank1.alive").exists()
    assert not (logs / "rank1.failure.json").exists()
    assert (logs / "rank1.attempt0.failed.json").read_text() == '{"rank": 1}'


def test_who_requeues_its_own_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only after SIGUSR1, only inside a job; what Slurm refuses is said."""
    tool = tmp_path / "scontrol"
    tool.write_text(
        '#!/bin/sh\necho "$@" >>$LOG; [ "$2" = 42 ] || { echo "no batch job" >&2; exit 1; }\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    assert requeue_own_job(signal.SIGTERM, {"SLURM_JOB_ID": "42"}) == ""
    assert requeue_own_job(signal.SIGUSR1, {}) == ""
    assert not (tmp_path / "log").exists()
    assert "42: requeued" in requeue_own_job(signal.SIGUSR1, {"SLURM_JOB_ID": "42"})
    assert (tmp_path / "log").read_text() == "requeue 42\n"
    told = requeue_own_job(signal.SIGUSR1, {"SLURM_JOB_ID": "43"})
    assert told == "slurm job 43: not requeued: no batch job"


def test_devices_that_a_launcher_cannot_choose(hostfile: Path) -> None:
    """Y3: a filter is honoured or refused, never dropped."""
    chosen = "launch.include=a:1@b:1"
    for launcher in ("torchrun", "accelerate", "slurm"):
        with pytest.raises(ConfigError, match="takes the first devices of every node"):
            spec_of(hostfile, f"launch.launcher={launcher}", chosen)
    assert "--include=a:1@b:1" in spec_of(hostfile, chosen).argv
    with pytest.raises(ConfigError, match="uses every slot of the hostfile"):
        spec_of(hostfile, "launch.node_launcher=openmpi", chosen)
    flags = ["launch.deployment_type=multi_node", "launch.launcher=slurm", "launch.num_nodes=2"]
    with pytest.raises(ConfigError, match="no hostfile to choose from"):
        place(load_config(None, parse_overrides([*flags, chosen])).launch)
    assert place(load_config(None, parse_overrides(flags)).launch).world_size == 2


def test_accelerate(tmp_path: Path) -> None:
    """Y5: what is ours overrides the file; types that would wrap the model are refused."""
    path = tmp_path / "a.yaml"
    overrides = [f"launch.accelerate_config={path}", "launch.launcher=accelerate"]
    config = load_config(None, parse_overrides(overrides)).launch
    here = Placement("cpu", {"localhost": [0, 1]}, "127.0.0.1", 4567, config=config)
    path.write_text("distributed_type: MULTI_CPU\n")
    command = accelerate.command(SCRIPT, ARGS, here)
    for option in (
        "--multi_gpu",
        "--num_processes=2",
        "--main_process_port=4567",
        "--machine_rank=0",
    ):
        assert option in command
    assert command[3] == f"--config_file={path}"
    path.write_text("distributed_type: FSDP\n")
    with pytest.raises(ConfigError, match="distributed_type FSDP"):
        accelerate.command(SCRIPT, ARGS, here)
    path.unlink()
    with pytest.raises(RequirementError, match="cannot be read"):
        accelerate.command(SCRIPT, ARGS, here)
    many = Placement("cpu", {"a": [0], "b": [0]}, None, 1, multi_node=True)
    assert "--machine_rank={node}" in accelerate.command(SCRIPT, ARGS, many)
    assert "--main_process_ip=a" in accelerate.command(SCRIPT, ARGS, many)


def test_ranks_of_schedulers(tmp_path: Path) -> None:
    """Only where the driver has said so: a shell inside an allocation is no rank."""
    theirs = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1"}
    environ = dict(theirs)
    adopt_environment(environ)
    assert environ == theirs
    environ = {**theirs, "RLHF_RANKS_FROM": "slurm"}
    adopt_environment(environ)
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["LOCAL_RANK"]) == ("3", "4", "1")
    (tmp_path / "env").write_text(json.dumps({"HF_TOKEN": "t"}))
    environ = {"RLHF_FORWARDED": str(tmp_path / "env"), "RANK": "0"}
    adopt_environment(environ)
    assert environ["HF_TOKEN"] == "t"


RANK = """
import os, sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from rlhf.lifeline import Lifeline
line = Lifeline(Path({logs!r}), 1, os.environ)
line.start()
print("up", flush=True)
time.sleep(60)
"""


def a_rank(logs: Path, timeout: float) -> subprocess.Popen[str]:
    root = str(Path(__file__).resolve().parents[2])
    child = subprocess.Popen(
        [sys.executable, "-c", RANK.format(root=root, logs=str(logs))],
        env={**os.environ, "RLHF_HEARTBEAT": str(timeout)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    return child


def test_a_rank_ends_with_its_driver(tmp_path: Path) -> None:
    """Issue 4: in a second or two when the driver says so; after the timeout when it is gone."""
    heart = heartbeat.Heartbeat(tmp_path, 30.0, 5.0)
    heart.start()
    child = a_rank(tmp_path, 30)
    time.sleep(1.5)
    assert child.poll() is None
    began = time.monotonic()
    heart.end()
    assert child.wait(10) == 143
    assert time.monotonic() - began < 8
    assert "the driver has ended this step" in child.stderr.read()  # type: ignore[union-attr]
    (tmp_path / "driver.beat").write_text("5")
    child = a_rank(tmp_path, 2)
    assert child.wait(15) == 143
    assert "no sign of life" in child.stderr.read()  # type: ignore[union-attr]


def test_a_driver_ends_a_step_that_lost_a_rank(tmp_path: Path) -> None:
    """Issue 4: a rank whose count stands still, and one that has recorded a failure."""
    ended = threading.Event()
    heart = heartbeat.Heartbeat(tmp_path, 2.0, 5.0)
    write(tmp_path / "rank1.alive", {"rank": 1, "host": "far", "count": 7, "ended": False})
    heart.launched(ended.set)
    heart.start()
    assert ended.wait(15)
    heart.end()
    assert heart.lost == "rank 1 on far has given no sign of life for 2 s"
    heartbeat.clear(tmp_path)
    assert not list(tmp_path.glob("rank*"))


def test_a_full_disk_is_no_lost_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life go on, by the files' times, where nothing can be written."""
    heart = heartbeat.Heartbeat(tmp_path, 3.0, 5.0)
    write(tmp_path / "rank1.alive", {"rank": 1, "host": "far", "count": 7, "ended": False})
    line = Lifeline(tmp_path, 1, {})
    line._sign()
    heart.start()
    before = [(tmp_path / name).stat().st_mtime_ns for name in ("driver.beat", "rank1.alive")]

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    line._sign()
    time.sleep(2.5)
    after = [(tmp_path / name).stat().st_mtime_ns for name in ("driver.beat", "rank1.alive")]
    assert all(late > early for early, late in zip(before, after, strict=True))
    monkeypatch.undo()
    heart.end()
    assert not heart.lost


def test_stop_reaches_the_ranks_before_their_launcher(tmp_path: Path) -> None:
    """Issue 5: told to stop, a rank gets SIGTERM through the heartbeat; the launcher is spared."""
    ended = threading.Event()
    heart = heartbeat.Heartbeat(tmp_path, 30.0, 30.0)
    heart.launched(ended.set)
    heart.start()
    child = a_rank(tmp_path, 30)
    heart.stop()
    assert child.wait(10) == -signal.SIGTERM
    assert not ended.is_set()
    heart.end()


def test_success_is_a_marker_of_every_rank(tmp_path: Path) -> None:
    """Issue 4: the missing ones are named with their hosts."""
    for rank in (0, 2):
        line = Lifeline(tmp_path, rank, {})
        line.start()
        line.end(finished=True)
    Lifeline(tmp_path, 1, {}).end(finished=False)
    assert ranks.unfinished(tmp_path, 3) == ["rank 1"]
    write(tmp_path / "rank1.alive", {"rank": 1, "host": "far", "count": 7})
    assert ranks.unfinished(tmp_path, 3) == ["rank 1 on far"]
    write(tmp_path / "rank1.done.json", {"rank": 1, "host": "far"})
    assert ranks.unfinished(tmp_path, 3) == []
    Lifeline(tmp_path, 1, {}).start()  # a new start takes the marker back
    assert ranks.unfinished(tmp_path, 3) == ["rank 1 on far"]


GOOD: dict[str, Any] = {
    "hostname": "a", "address": "10.0.0.1", "python": "3.11.7", "packages": {"torch": "2"},
    "project": "x", "sees_mark": True, "write_problem": "", "free": {"/c": 10**10}, "gpus": [],
    "port_problem": "", "skew": 0.1, "ram": 10**11,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, ""),
        ({"error": "refused"}, "a: ssh: refused"),
        ({"packages": {"torch": "3"}}, "torch 3 (here 2)"),
        ({"python": "3.12.1"}, "Python 3.12.1 (here 3.11.7)"),
        ({"project": None}, "another version or absent"),
        ({"sees_mark": False}, "NOT visible"),
        ({"write_problem": "read-only"}, "read-only"),
        ({"skew": 9.0}, "9.0 s off"),
        ({"address": "127.0.1.1"}, "127.0.1.1"),
        ({"free": {"/c": 5}}, "0.00 GB"),
        ({"port_problem": "in use"}, "port 29500: in use"),
    ],
)
def test_each_check_can_fail(
    hostfile: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    said: str,
) -> None:
    """Issue 4: what, found, needed, remedy, in one line."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    plan = plan_of(hostfile, tmp_path)
    found = host_checks(plan, "a", {**GOOD, **change}, GOOD, wrote=True)
    failed = [check for check in found if check.state == "FAIL"]
    assert len(failed) == bool(change)
    if change:
        line = failed[0].line()
        assert said in line
        assert "(needed: " in line
        assert " -> " in line
        error = problem(found)
        assert isinstance(error, RequirementError)
        assert "checks failed before the start" in str(error)


def plan_of(hostfile: Path, tmp_path: Path) -> Plan:
    flags = ["--deployment-type", "multi_node", "--hostfile", str(hostfile)]
    return make_plan(parse_options([*flags, "--output-dir", str(tmp_path), "--name", "r"], {}))


def test_one_machine_under_two_names() -> None:
    """Containers share a boot and are hosts of their own; what cannot be known is not compared."""
    here = probe.machine()
    assert here == probe.machine()
    one = {"machine": here, "hostname": "node1"}
    other = {"machine": [here[0], "net:[1]", here[2]], "hostname": "node2"}
    unknown = {"machine": None, "hostname": "node3"}
    lost = {"error": "no answer"}
    fine = same_machine({"a": one, "b": other, "c": unknown, "d": unknown, "e": lost})
    assert fine.state == "ok"
    found = same_machine({"a": one, "b": other, "a.example": one})
    assert found.state == "FAIL"
    assert found.exit_code == 2
    assert "a and a.example are one machine (node1)" in found.found
