"""What a plan assumes of the machines, and speeds of common GPUs from their data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlhf.errors import ConfigError


@dataclass(frozen=True)
class Speeds:
    """Of one rank. Rates are what is reached, not the data sheet's peak."""

    flops: float
    """Floating-point operations per second in the model's dtype, in matrix products."""
    memory: float
    """Bytes per second that decoding reads weights and cache with."""
    inside: float
    """Bytes per second that a rank sends to ranks of its node."""
    between: float
    """Bytes per second that a rank sends to other nodes."""
    host: float = 20e9
    """Bytes per second between a device and RAM, one way."""
    host_memory: float = 20e9
    """Bytes per second of RAM that a rank's share of DeepSpeed's CPU optimiser reaches."""


@dataclass(frozen=True)
class Gpu:
    """A data sheet: dense 16-bit FLOP/s, bytes, bytes/s of memory, bytes/s of links a way."""

    flops: float
    memory: float
    bandwidth: float
    link: float


GPUS = {
    "v100-32g": Gpu(125e12, 32e9, 0.9e12, 150e9),
    "a100-40g": Gpu(312e12, 40e9, 1.555e12, 300e9),
    "a100-80g": Gpu(312e12, 80e9, 2.0e12, 300e9),
    "h100-80g": Gpu(989e12, 80e9, 3.35e12, 450e9),
    "h200-141g": Gpu(989e12, 141e9, 4.8e12, 450e9),
    "l4": Gpu(121e12, 24e9, 0.3e12, 32e9),
    "rtx-4090": Gpu(165e12, 24e9, 1.0e12, 32e9),
}
# Shares of the data sheet's figures that training and decoding reach. Assumptions: DeepSpeed-Chat
# reports 40 to 65 % in training of 6.7B to 66B and up to 60 % of the memory bandwidth.
COMPUTE_SHARE, BANDWIDTH_SHARE, LINK_SHARE = 0.40, 0.50, 0.60
NODE_LINK = 25e9  # bytes/s a GPU and way between nodes: a 200 Gbit/s card for each
# One core of a server: what torch reaches in fp32 matrix products; and what memory gives one core.
CPU_CORE = Speeds(flops=50e9, memory=8e9, inside=2e9, between=0.1e9)


def gpu_speeds(name: str, node_link: float = NODE_LINK) -> Speeds:
    """Raises ConfigError for a GPU that is not in GPUS."""
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise ConfigError(f"GPU {name!r}: not known; choose one of {', '.join(GPUS)}")
    return Speeds(
        gpu.flops * COMPUTE_SHARE,
        gpu.bandwidth * BANDWIDTH_SHARE,
        gpu.link * LINK_SHARE,
        node_link * LINK_SHARE,
    )


_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def parse_bytes(text: str) -> float:
    """`80GB`, `80G`, `1.5TB`, `24GiB` or plain bytes. Raises ConfigError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.I)
    if found is None or not float(found[1]):
        raise ConfigError(f"{text!r} is no amount of memory: write e.g. 80GB or 24GiB")
    exponent = " KMGT".index(found[2].upper() or " ")
    if found[3]:
        return float(found[1]) * 1024.0**exponent
    return float(found[1]) * _UNITS[found[2].upper()]
