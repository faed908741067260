"""What every host of a run is asked before it starts, by ssh and at the same time."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch import probe
from launch.checks import BAD_SETTING, Check, judge
from launch.forward import forwarded
from launch.memory import memory_check
from launch.nodes import on_host
from launch.plan import Plan
from launch.ports import free_port
from launch.spec import PROJECT_ROOT, Placement
from rlhf.plan.memory import CPU_IMPORTS

SKEW_SECONDS = 5.0
REDUCE_SECONDS = 90.0
SPARE_BYTES = 300 * 10**6
COMPARED = ("torch", "deepspeed", "transformers", "datasets", "accelerate", "peft", "tokenizers")
PARTS = ("train.py", "launch/**/*.py", "rlhf/**/*.py", "step*/**/*.py")


def on_hosts(plan: Plan) -> list[Check]:
    """Every host's checks, asked at the same time, and an all-reduce among those that answer."""
    hosts = list(plan.placement.hosts)
    mark = f".probe-{secrets.token_hex(8)}"
    plan.run.path.mkdir(parents=True, exist_ok=True)
    try:
        (plan.run.path / mark).write_text("driver", encoding="utf-8")
        with ThreadPoolExecutor(max_workers=min(32, len(hosts))) as pool:
            answers = list(pool.map(lambda host: ask(plan, host, mark), hosts))
        wrote = {host for host in hosts if (plan.run.path / f"{mark}.{host}").exists()}
    finally:
        for path in plan.run.path.glob(f"{mark}*"):
            path.unlink(missing_ok=True)
    local = probe.main({**question(plan, "", mark), "run_dir": os.devnull})
    checks = []
    for host, answer in zip(hosts, answers, strict=True):
        checks += host_checks(plan, host, answer, local, host in wrote)
    checks.append(same_machine(dict(zip(hosts, answers, strict=True))))
    if not any(check.state == "FAIL" for check in checks):
        checks.append(reduce_over_hosts(plan))
    return checks


def same_machine(answers: Mapping[str, dict[str, Any]]) -> Check:
    """A machine under two names would start two ranks on one GPU."""
    names: dict[tuple[str, ...], list[str]] = {}
    for host, answer in answers.items():
        if answer.get("machine"):
            names.setdefault(tuple(answer["machine"]), []).append(host)
    twice = [same for same in names.values() if len(same) > 1]
    told = "; ".join(
        f"{' and '.join(same)} are one machine ({answers[same[0]]['hostname']})" for same in twice
    )
    kept = twice[0][0] if twice else ""
    return judge(
        "each host a machine of its own",
        not twice,
        told or f"{len(answers)}",
        "no machine under two names",
        f"keep one name in the hostfile, with slots for all of its processes (`{kept} slots=N`)",
        exit_code=BAD_SETTING,
    )


def question(plan: Plan, host: str, mark: str) -> dict[str, Any]:
    cache = plan.config.data.cache_dir or os.environ.get("RLHF_CACHE") or "~/.cache/rlhf"
    return {
        "host": host,
        "run_dir": str(plan.run.path),
        "mark": mark,
        "packages": COMPARED,
        "root": str(PROJECT_ROOT),
        "parts": PARTS,
        "disks": [cache],
        "port": plan.placement.master_port,
    }


def ask(plan: Plan, host: str, mark: str) -> dict[str, Any]:
    """What the host says of itself, with `skew` in seconds; or {"error": why it says nothing}."""
    source = Path(probe.__file__).read_text(encoding="utf-8")
    began = time.time()
    command = [sys.executable, "-", json.dumps(question(plan, host, mark))]
    try:
        done = on_host(host, command, source)
    except subprocess.TimeoutExpired as error:
        return {"error": f"no answer within {error.timeout:.0f} s"}
    except FileNotFoundError:
        return {"error": "there is no ssh on this machine"}
    ended = time.time()
    if done.returncode != 0:
        return {"error": (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]}
    answer = json.loads(done.stdout.splitlines()[-1])
    # Outside the time in which it can have been asked, the clocks differ by at least this.
    answer["skew"] = max(0.0, began - answer["time"], answer["time"] - ended)
    return dict(answer)


def host_checks(
    plan: Plan, host: str, answer: dict[str, Any], local: dict[str, Any], wrote: bool
) -> list[Check]:
    """One host's answer, judged against this machine's."""
    if "error" in answer:
        remedy = (
            f"make `ssh -o BatchMode=yes {host} hostname` work (keys, ~/.ssh/config), and have "
        )
        remedy += f"{sys.executable} there"
        return [Check(f"{host}: ssh", "FAIL", answer["error"], "an answer", remedy)]
    theirs, ours = answer["packages"], local["packages"]
    other = [
        f"{name} {theirs[name]} (here {ours[name]})" for name in ours if theirs[name] != ours[name]
    ]
    python, here_python = answer["python"], local["python"]
    if python.split(".")[:2] != here_python.split(".")[:2]:
        other.insert(0, f"Python {python} (here {here_python})")
    same = answer["project"] == local["project"]
    path = str(plan.run.path)
    trouble = answer["write_problem"] or ("" if wrote else "what it writes does not appear here")
    sees = "visible" if answer["sees_mark"] else "NOT visible"
    checks = [
        Check(f"{host}: ssh", "ok", f"answers as {answer['hostname']}"),
        judge(
            f"{host}: this project",
            same,
            "the same" if same else "another version or absent",
            f"the same files in {PROJECT_ROOT}",
            "install or share the same version",
        ),
        judge(
            f"{host}: packages",
            not other,
            "; ".join(other) or "the same versions",
            "the same versions",
            "`pip install` the versions of this machine",
        ),
        judge(
            f"{host}: {path}",
            answer["sees_mark"] and not trouble,
            f"{sees}, {trouble or 'writable'}",
            "one directory that all hosts share",
            "mount it on every host, or --output-dir on a shared file system",
        ),
        judge(
            f"{host}: clock",
            answer["skew"] <= SKEW_SECONDS,
            f"{answer['skew']:.1f} s off",
            f"within {SKEW_SECONDS:g} s",
            "run an NTP client on every host",
        ),
        _gpus(plan.placement, host, answer["gpus"]),
        _own_name(plan.placement, host, answer["address"]),
    ]
    checks += _memory(plan, host, answer)
    for place, free in answer["free"].items():
        checks.append(
            judge(
                f"{host}: free disk for tokenised data",
                free >= SPARE_BYTES,
                f"{free / 1e9:.2f} GB",
                f"{SPARE_BYTES / 1e9:.1f} GB in {place}",
                "free some space, or set data.cache_dir",
            )
        )
    if host == next(iter(plan.placement.hosts)):
        port = plan.placement.master_port
        checks.append(
            judge(
                f"{host}: port {port}",
                not answer["port_problem"],
                answer["port_problem"] or "free",
                "free on the first host",
                f"--master-port with another one, e.g. {free_port()}",
            )
        )
    return checks


def _gpus(placement: Placement, host: str, memory: list[int]) -> Check:
    devices = placement.hosts[host]
    found = f"{len(memory)}, {min(memory) / 1024:.0f} GiB each at least" if memory else "none"
    if placement.accelerator == "cpu":
        return judge(
            f"{host}: GPUs",
            not memory,
            found,
            "none: this run is on CPUs",
            "to use them: --accelerator cuda",
            fatal=False,
        )
    return judge(
        f"{host}: GPUs",
        len(memory) > max(devices),
        found,
        f"{len(devices)}",
        "correct its slots in the hostfile, or check its driver (`nvidia-smi`)",
    )


def _memory(plan: Plan, host: str, answer: dict[str, Any]) -> list[Check]:
    """Each step's need against what this host has, as the planner counts it."""
    placement, refuse = plan.placement, plan.config.launch.check_memory
    ranks = len(placement.hosts[host])
    if placement.accelerator == "cpu":
        ram = answer["ram"]
        memory = max(ram / ranks - CPU_IMPORTS, 1.0) if ram else None
    else:
        memory = min(answer["gpus"]) * 1024**2 if answer["gpus"] else None
    machine = replace(plan.machine, memory=memory)
    needs = [item.needs for item in plan.steps if item.needs and not item.done]
    return [memory_check(one, machine, refuse, f"{host}: ") for one in needs] if memory else []


def _own_name(placement: Placement, host: str, address: str) -> Check:
    """Debian's installer maps the host name to 127.0.1.1: gloo then offers that to other hosts."""
    alone = len(placement.hosts) == 1
    good = alone or not address.startswith("127.") or bool(os.environ.get("GLOO_SOCKET_IFNAME"))
    return judge(
        f"{host}: what its own name means",
        good,
        address,
        "an address that other hosts reach, or GLOO_SOCKET_IFNAME",
        "export GLOO_SOCKET_IFNAME=eth0 (its interface), or correct /etc/hosts there",
        fatal=placement.accelerator == "cpu",
    )


def reduce_over_hosts(plan: Plan) -> Check:
    """One rank on each host, as the run will meet."""
    placement = plan.placement
    own = {
        "PYTHONPATH": str(PROJECT_ROOT),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(len(placement.hosts)),
    }
    own |= {"MASTER_ADDR": placement.master, "MASTER_PORT": str(placement.master_port)}
    variables = forwarded(os.environ, own)

    def one(numbered: tuple[int, str]) -> str:
        rank, host = numbered
        settings = [f"{name}={value}" for name, value in variables.items()]
        module = [sys.executable, "-m", "rlhf.engine.reduce_check", placement.accelerator]
        command = ["env", *settings, f"RANK={rank}", *module]
        try:
            done = on_host(host, command, timeout=REDUCE_SECONDS)
        except subprocess.TimeoutExpired:
            return f"{host}: no end within {REDUCE_SECONDS:g} s"
        return "" if done.returncode == 0 else f"{host}: {last_line(done.stderr)}"

    with ThreadPoolExecutor(max_workers=len(placement.hosts)) as pool:
        troubles = [text for text in pool.map(one, enumerate(placement.hosts)) if text]
    return reduce_check(troubles, f"{len(placement.hosts)} hosts meet")


def loopback_reduce(placement: Placement) -> Check:
    """Two ranks on this machine (one, where it has one GPU)."""
    world = 2 if placement.accelerator == "cpu" else min(2, placement.world_size)
    env = {**os.environ, "PYTHONPATH": str(PROJECT_ROOT), "OMP_NUM_THREADS": "1"}
    env |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "rlhf.engine.reduce_check", placement.accelerator]
    children = [
        subprocess.Popen(
            command,
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    troubles = []
    for rank, child in enumerate(children):
        try:
            _, errors = child.communicate(timeout=REDUCE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            _, errors = child.communicate()
        if child.returncode != 0:
            troubles.append(f"rank {rank}: {last_line(errors)}")
    return reduce_check(troubles, f"{world} ranks meet here")


def reduce_check(troubles: list[str], good: str) -> Check:
    return judge(
        "all-reduce",
        not troubles,
        "; ".join(troubles) or good,
        "a right sum",
        "open the ports between the hosts (all of them: gloo and NCCL choose), check "
        "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME, or --master-addr",
    )


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no word"])[-1]
