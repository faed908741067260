"""What all model loading shares: dtype, arguments, and errors that say what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rlhf.config.schema import ModelConfig
from rlhf.errors import ConfigError, RequirementError, UserError
from rlhf.plan.files import Part, model_faults
from rlhf.plan.read import snapshot


def choose_dtype(wanted: str) -> str:
    """`auto` is bfloat16 on a GPU that has it, float32 elsewhere.

    Raises:
        ConfigError: float16 without a GPU, which DeepSpeed rejects.
    """
    gpu = torch.cuda.is_available()
    if wanted == "auto":
        return "bfloat16" if gpu and torch.cuda.is_bf16_supported() else "float32"
    if wanted == "float16" and not gpu:
        raise ConfigError("dtype float16 needs a GPU: use bfloat16 or float32 on CPU.")
    return wanted


def load_arguments(settings: ModelConfig, dtype: str) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained`.

    Safetensors are preferred. Where a repository has only `.bin` files (facebook/opt-1.3b),
    transformers reads them with torch's `weights_only` unpickler, which runs no code.
    """
    arguments: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "trust_remote_code": settings.trust_remote_code,
    }
    if settings.attn_implementation:
        arguments["attn_implementation"] = settings.attn_implementation
    return arguments


def refuse_kernels(name: str, config: Any, settings: ModelConfig) -> None:
    """A config.json may name a hub repository whose compiled kernels transformers would load.

    Raises RequirementError, unless the settings name the backend or trust the model's code.
    """
    if settings.attn_implementation or settings.trust_remote_code:
        return
    for what in ("_attn_implementation", "_experts_implementation"):
        kernel = getattr(config, what, None)
        if isinstance(kernel, str) and "/" in kernel:
            raise RequirementError(
                f"model {name!r}: its config.json names {kernel!r} for {what.strip('_')}, which is "
                "compiled code from a hub repository: set model.attn_implementation (sdpa, eager), "
                "or model.trust_remote_code=true if you trust it"
            )


def check_complete(name: str, info: Any, *, may_lack: str = "no key") -> None:
    """Raises RequirementError where `from_pretrained` would have gone on with random weights.

    `info` is its loading info; keys that contain `may_lack` may be absent or of another shape.
    """
    keys = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    wrong = sorted(key for key in keys if may_lack not in key)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise RequirementError(
            f"model {name!r} lacks weights that {', '.join(wrong[:3])}{more} would need: it is "
            "another kind of model, or a part of its files is absent. Name a complete one."
        )


def refuse_broken(name: str, part: Part, *, trusted: bool) -> None:
    """Raises RequirementError for files of a model that are broken, before anything is built.

    Looked at is a directory, or what of a hub id is in the local cache already. `trusted`: the
    Python files that it brings may run. Errors say file, key, value and rule.
    """
    place = Path(name).expanduser() if Path(name).expanduser().is_dir() else snapshot(name)
    if place is None or not (place / "config.json").exists():
        return
    if faults := model_faults(place, part, own_code=trusted):
        raise RequirementError(f"model {name!r}: {faults[0].line()}")


@contextmanager
def explain_load_errors(name: str, part: Part, *, trusted: bool) -> Iterator[None]:
    """Refuses broken files, and turns the libraries' load errors into what the user can do.

    A hub's files are there only after the loading began, so they are looked at again after it
    failed. What DeepSpeed and torch raise (RuntimeError: no memory) passes.
    """
    refuse_broken(name, part, trusted=trusted)
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, (RuntimeError, MemoryError)) and not isinstance(error, RecursionError):
            raise
        refuse_broken(name, part, trusted=trusted)
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise RequirementError(
            f"model {name!r} cannot be loaded: {first_line}\n"
            "It must be a directory with config.json and weights (safetensors, or plain .bin), or "
            f"a repository of that kind on {endpoint}. Check the name, pass --hf-endpoint for a "
            "mirror, or download it elsewhere and give its path."
        ) from error
