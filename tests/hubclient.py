"""What the hub tests give their client processes: an environment, a small model, small data.

Clients run in fresh processes because `HF_ENDPOINT` is read when their packages are imported.
"""

from __future__ import annotations

import ast
import ipaddress
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# Runs in every Python process below the test, launcher and ranks included. Writes down what process
# it is and each address that its Python code connects to or looks up. Refuses to connect to another
# machine, so that a request past the stub is seen and cannot succeed.
GUARD = """
import os, sys
_log = os.open(os.environ["HUB_GUARD_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def _note(event, *values):
    os.write(_log, (repr((os.getpid(), event, *map(str, values))) + "\\n").encode())

def _guard(event, args):
    if event == "socket.getaddrinfo":
        _note("lookup", args[0])
    elif event == "socket.connect" and isinstance(args[1], tuple):
        host = str(args[1][0])
        _note("connect", host, args[1][1])
        if not (host.startswith("127.") or host == "::1"):
            raise OSError(f"hub test: connection to {host} refused by the test's guard")

_note("start", os.environ.get("HF_ENDPOINT"), os.environ.get("HF_HUB_DISABLE_XET"), *sys.orig_argv)
sys.addaudithook(_guard)
"""

TEXTS = [
    "\n\nHuman: What is the capital of Peru?\n\nAssistant: The capital is Lima. I hope this helps.",
    "\n\nHuman: How do I boil an egg?\n\nAssistant: Boil it for eight minutes, then cool it.",
]


def client_env(tmp: Path, endpoint: str | None, **extra: str) -> dict[str, str]:
    """Environment of a client process that knows no hub but `endpoint` (None: variable unset).

    Caches live below `tmp`; tokens, proxies and hub settings of the outer process are left out.
    """
    guard = tmp / "guard"
    guard.mkdir(parents=True, exist_ok=True)
    (guard / "sitecustomize.py").write_text(GUARD)
    drop = ("HF_", "HUGGING", "TRANSFORMERS_", "RLHF_")
    env = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(drop) and not key.lower().endswith("_proxy")
    }
    env |= {
        "HF_HOME": str(tmp / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "RLHF_CACHE": str(tmp / "rlhf"),
        "HUB_GUARD_LOG": str(tmp / "sockets.log"),
        "PYTHONPATH": f"{guard}{os.pathsep}{ROOT}",
        "OMP_NUM_THREADS": "1",
    }
    if endpoint is not None:
        env["HF_ENDPOINT"] = endpoint
    return env | extra


def run_python(
    code: str, env: dict[str, str], *arguments: str, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter; the last line that it prints is usually JSON."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def answer(done: subprocess.CompletedProcess[str]) -> Any:
    """The JSON value that the process printed last; its stderr explains a failure."""
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@dataclass
class Process:
    """One Python process below the test, as the guard saw it."""

    endpoint: str
    disable_xet: str
    argv: list[str]
    connected: set[str] = field(default_factory=set)
    looked_up: set[str] = field(default_factory=set)

    @property
    def outside(self) -> set[str]:
        """Hosts that it asked for which are neither loopback nor a name of this machine."""
        hosts = {address.rsplit(":", 1)[0] for address in self.connected} | self.looked_up
        return {host for host in hosts if not _is_local(host)}


def processes(tmp: Path) -> list[Process]:
    """All Python processes that ran with the environment of `client_env(tmp, ...)`.

    A forked child counts as a process of its own only once it starts another program.
    """
    found: dict[int, list[Process]] = {}
    for line in (tmp / "sockets.log").read_text().splitlines():
        pid, event, *values = ast.literal_eval(line)
        if event == "start":
            found.setdefault(pid, []).append(Process(values[0], values[1], values[2:]))
            continue
        process = found.setdefault(pid, [Process("", "", ["forked"])])[-1]
        if event == "connect":
            process.connected.add(":".join(values))
        else:
            process.looked_up.add(values[0])
    return [process for runs in found.values() for process in runs]


def outside_addresses(tmp: Path) -> set[str]:
    """Hosts other than this machine that any process connected to or looked up."""
    return set().union(*(process.outside for process in processes(tmp)))


def _is_local(host: str) -> bool:
    if host in ("None", "localhost", os.uname().nodename):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def write_tiny_model(directory: Path) -> Path:
    """A Hugging Face directory of a one-layer Llama with a byte-level BPE tokenizer (60 kB)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def pair_rows(count: int) -> list[dict[str, str]]:
    """Preference pairs in rm-static's schema, all different."""
    return [
        {
            "prompt": f"\n\nHuman: What is {i} plus {i}?\n\nAssistant:",
            "response": f" It is {2 * i}. Glad to help.",
            "chosen": f" It is {2 * i}. Glad to help.",
            "rejected": f" Count it yourself, {i} times.",
        }
        for i in range(count)
    ]


def write_pairs_jsonl(directory: Path, train: int = 6, test: int = 3) -> Path:
    """A data set of JSONL files whose names carry the split."""
    directory.mkdir(parents=True)
    rows = pair_rows(train + test)
    for name, part in (("train", rows[:train]), ("test", rows[train:])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return directory


def write_pairs_parquet(directory: Path, train: int = 6, test: int = 3) -> Path:
    """The same rows as the hub keeps rm-static: `data/train-00000-of-00001.parquet`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    (directory / "data").mkdir(parents=True)
    rows = pair_rows(train + test)
    for name, part in (("train", rows[:train]), ("test", rows[train:])):
        pq.write_table(
            pa.Table.from_pylist(part), directory / f"data/{name}-00000-of-00001.parquet"
        )
    (directory / "README.md").write_text("---\nlicense: mit\n---\n# pairs\n")
    return directory


def files_with(directory: Path, text: str) -> list[str]:
    """Files below `directory` that contain `text`, whatever their format."""
    needle = text.encode()
    return [
        str(path.relative_to(directory))
        for path in sorted(directory.rglob("*"))
        if path.is_file() and needle in path.read_bytes()
    ]
