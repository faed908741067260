"""Which of this shell's variables reach the processes on other nodes: those listed, no others."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from rlhf.errors import ConfigError, RequirementError
from rlhf.secrets import sounds_secret

ALLOWED = (
    "PATH", "LD_LIBRARY_PATH", "PYTHON*", "CUDA_HOME", "XDG_CACHE_HOME",
    "HF_ENDPOINT", "HF_HOME", "HF_HUB_*", "HF_XET_*", "HF_DATASETS_*", "TOKENIZERS_PARALLELISM",
    "NCCL_*", "GLOO_*", "UCX_*", "FI_*", "OMP_*", "MKL_NUM_THREADS", "KMP_*",
    "TORCH_EXTENSIONS_DIR", "TORCH_NCCL_*", "TORCH_HOME", "PYTORCH_*",
    "DS_ACCELERATOR", "RLHF_*",
)  # fmt: skip
_EXPANDED = re.compile(r'[$`"\\]')
_URL_PASSWORD = re.compile(r"://[^/\s@]*@")
# What is about this process and its machine alone.
_OURS_ONLY = ("RLHF_CI_TIMED", "PDSH_SSH_ARGS_APPEND", "RLHF_HIDDEN_SETTINGS")
# deepspeed passes these on by itself, values and all, on command lines (launcher/runner.py).
_DEEPSPEEDS = ("MLFLOW", "PYTHON", "MV2", "UCX", "NCCL")


def is_allowed(name: str) -> bool:
    """May this variable be passed on unasked? By its name; one that sounds secret never is."""
    if sounds_secret(name) or name in _OURS_ONLY:
        return False
    return any(fnmatchcase(name, pattern) for pattern in ALLOWED)


def deepspeed_may_see(name: str) -> bool:
    """False for what deepspeed's launcher would pass on although it is not on the list."""
    return not name.startswith(_DEEPSPEEDS) or is_allowed(name)


def forwarded(environ: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """The variables for other nodes: what may pass of the shell's, and over it `own`, ours.

    A value with a password in a URL is left out. Raises ConfigError for a value that a remote shell
    and pdsh cannot carry.
    """
    found = {name: value for name, value in environ.items() if is_allowed(name)}
    found = {name: value for name, value in found.items() if not _URL_PASSWORD.search(value)}
    found.update({name: value for name, value in own.items() if name not in _OURS_ONLY})
    for name, value in found.items():
        if "\n" in value or re.search(r"%[hnu]", value):
            raise ConfigError(
                f"{name}: a line break, %h, %n or %u in its value would not reach other nodes "
                f"unchanged: unset it, or pass it by file with --forward {name}"
            )
    return dict(sorted(found.items()))


def check_forward(names: Sequence[str], environ: Mapping[str, str]) -> None:
    """Raises RequirementError if a variable to forward is not set here."""
    for name in names:
        if name not in environ:
            raise RequirementError(
                f"--forward {name}: not set in this shell: `export {name}=...` first, or leave "
                "it out"
            )


def env_file(variables: Mapping[str, str]) -> str:
    """deepspeed's file of variables: `NAME=value` lines, no blank lines, no comments.

    deepspeed puts the values on the remote shell's command line, inside double quotes where they
    have unusual characters: what a shell would expand there is escaped.
    """
    escaped = {name: _EXPANDED.sub(r"\\\g<0>", value) for name, value in variables.items()}
    return "".join(f"{name}={value}\n" for name, value in escaped.items())
