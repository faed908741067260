"""Rendezvous ports. deepspeed never checks its port and torchrun hangs on port 0: we choose."""

from __future__ import annotations

import errno
import os
import socket
from typing import Literal

from rlhf.errors import ConfigError, RequirementError


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def port_problem(port: int) -> OSError | None:
    """Why a server could not listen on the port now; None if it could."""
    for family in (socket.AF_INET6, socket.AF_INET):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("", port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return error
    return None


def choose_port(wanted: int | Literal["auto"]) -> int:
    """A free port for `auto`, else the port asked for.

    Raises ConfigError outside 1-65535, RequirementError if something else is listening there.
    """
    if wanted == "auto":
        return free_port()
    if not 0 < wanted < 65536:
        raise ConfigError(f"--master-port {wanted}: ports are 1 to 65535, or `auto`")
    problem = port_problem(wanted)
    if problem is not None:
        why = "is in use" if problem.errno == errno.EADDRINUSE else os.strerror(problem.errno or 0)
        raise RequirementError(
            f"--master-port {wanted}: the port {why} on this machine. Use --master-port auto "
            f"(a free one is chosen), or end what listens there (`ss -ltnp 'sport = :{wanted}'`)"
        )
    return wanted
