"""What a launch on several nodes needs for its time only: files, variables, signs of life."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from launch.fanout import SSH_OPTIONS
from launch.heartbeat import Heartbeat, beating
from launch.spec import LaunchSpec
from rlhf.errors import RequirementError
from rlhf.lifeline import FORWARDED, HEARTBEAT
from rlhf.redact import HIDDEN_SETTINGS

SSH_SECONDS = 30


@contextlib.contextmanager
def prepared(
    spec: LaunchSpec, logs: Path, grace: float
) -> Iterator[tuple[LaunchSpec, Heartbeat | None]]:
    """The spec as it is started now, and the heartbeat that its ranks watch.

    A command for this machine alone, or one of several that were started by hand, needs neither:
    the kernel ends its ranks with it. Raises RequirementError if a host cannot get its variables.
    """
    nodes = spec.nodes
    if nodes is None or nodes.by_hand:
        yield spec, None
        return
    with contextlib.ExitStack() as stack:
        more = {HEARTBEAT: str(nodes.heartbeat_seconds)}
        private = {name: os.environ[name] for name in nodes.forward}
        if HIDDEN_SETTINGS in spec.env:  # settings with a secret in them, which the ranks need
            private[HIDDEN_SETTINGS] = spec.env[HIDDEN_SETTINGS]
        if private and nodes.over_ssh:
            more[FORWARDED] = stack.enter_context(delivered(nodes.hosts, private))
        spec = with_variables(spec, more)
        if HIDDEN_SETTINGS in private and nodes.files:  # sbatch passes variables on by name
            spec = replace(spec, argv=[*spec.argv, HIDDEN_SETTINGS])
        nodes = spec.nodes or nodes
        if nodes.env_file is not None:
            path = stack.enter_context(private_file("deepspeed_env", nodes.env_file))
            spec = replace(spec, env={**spec.env, "DS_ENV_FILE": str(path)})
        for name, text in nodes.files.items():
            Path(name).write_text(text, encoding="utf-8")
        yield spec, stack.enter_context(beating(logs, nodes.heartbeat_seconds, grace))


def with_variables(spec: LaunchSpec, more: Mapping[str, str]) -> LaunchSpec:
    """Variables for the ranks, by each way that a launcher has; none of their values is secret."""
    nodes = spec.nodes
    if nodes is None or nodes.by_hand:
        return replace(spec, env={**spec.env, **more})
    if nodes.env_file is not None:
        lines = "".join(f"{name}={value}\n" for name, value in more.items())
        nodes = replace(nodes, env_file=nodes.env_file + lines)
    exports = "".join(f"export {name}={value}\n" for name, value in more.items())
    nodes = replace(
        nodes,
        files={
            p: text.replace("set -eu\n", f"set -eu\n{exports}") for p, text in nodes.files.items()
        },
    )
    argv = list(spec.argv)
    settings = [f"{name}={value}" for name, value in more.items()]
    for position, word in enumerate(argv):
        if word.startswith("--chdir="):  # `env --chdir=... NAME=value ...` on each node
            argv[position + 1 : position + 1] = settings
            break
        if word.startswith("--launcher_args=") and "--launcher=openmpi" in argv:
            argv[position] += "".join(f" -x {name}" for name in more)
            break
    return replace(spec, argv=argv, env={**spec.env, **more}, nodes=nodes)


@contextlib.contextmanager
def private_file(name: str, content: str) -> Iterator[Path]:
    """A file that only this user can read, in a directory of its own; removed at the end."""
    directory = Path(tempfile.mkdtemp(prefix="rlhf-"))  # mode 0700
    try:
        path = directory / name
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(content)
        yield path
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def delivered(hosts: Sequence[str], values: Mapping[str, str]) -> Iterator[str]:
    """The path, on each host, of a file with mode 0600 that holds the values; removed at the end.

    They go through ssh's standard input into memory (/dev/shm): on no command line, on no disk.
    """
    directory = f"/dev/shm/rlhf-{secrets.token_hex(16)}"
    write = f"umask 077 && mkdir -p {directory} && cat > {directory}/env"
    try:
        for host in hosts:
            done = on_host(host, ["sh", "-c", write], json.dumps(values))
            if done.returncode != 0:
                raise RequirementError(
                    f"--forward {' '.join(values)}: cannot be written on {host}: "
                    f"{done.stderr.strip() or f'ssh ended with {done.returncode}'}. "
                    f"Check `ssh {host}`, or leave the flag out"
                )
        yield f"{directory}/env"
    finally:
        for host in hosts:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                on_host(host, ["rm", "-rf", directory])


def on_host(
    host: str, command: Sequence[str], text: str = "", timeout: float = SSH_SECONDS
) -> subprocess.CompletedProcess[str]:
    """A command on a host by ssh, with `text` as its input."""
    return subprocess.run(
        ["ssh", *SSH_OPTIONS, host, shlex.join(command)],
        input=text,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
