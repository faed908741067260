"""The parts of a day on a GPU (benchmarks.gpu_day), each in a process of its own.

`python -m benchmarks.gpu_parts NAME --into FILE` writes what it finds to FILE, more than once
where it finds things one after the other: what cuts it off loses nothing. `--small` takes sizes for
a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.gpu_measure import Found, inside, median_seconds, planned, profiled, timed

PROJECT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "datasets", "peft", "trl", "triton")
# Compile DeepSpeed's kernels: a part of their own, so that a failing compiler costs only it.
COMPILED = "deepspeeds_kernels or offload"


def machine(found: Found) -> None:
    """What it is, and two ceilings: bytes per second of a copy, FLOP/s of a matrix product."""
    import torch

    on_gpu = torch.cuda.is_available()
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    found.add(python=sys.version.split()[0], versions=versions, cores=os.cpu_count())
    device = torch.device("cuda" if on_gpu else "cpu")
    if on_gpu:
        about = torch.cuda.get_device_properties(0)
        query = [
            "nvidia-smi",
            "--query-gpu=name,memory.total,driver_version",
            "--format=csv,noheader",
        ]
        smi = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout.strip()
        found.add(gpu=about.name, memory=about.total_memory, cuda=torch.version.cuda, smi=smi)
    size = 256 if found.small else 8192
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    b = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    large = torch.empty(2**22 if found.small else 2**31, device=device, dtype=torch.bfloat16)
    other = torch.empty_like(large)
    copy = median_seconds(lambda: other.copy_(large))
    product = median_seconds(lambda: a @ b)
    found.add(copy_bytes_per_second=2.0 * large.numel() * 2 / copy)
    found.add(bf16_flops_per_second=2.0 * size**3 / product)


def tests(found: Found) -> None:
    """`pytest -m gpu`, without what has to be compiled first."""
    _pytest(found, "tests/gpu", "-m", "gpu", "-k", f"not ({COMPILED})", workers=4)


def kernels(found: Found) -> None:
    """The tests of DeepSpeed's compiled kernels: inference (`hybrid_kernels`) and CPU Adam."""
    _pytest(found, "tests/gpu", "-m", "gpu", "-k", COMPILED, workers=3)


def suite(found: Found) -> None:
    """Tests that know nothing of GPUs and run whole steps: here they run on one."""
    few = ["-k", "steps_1_and_2"] if found.small else []
    _pytest(found, "tests/unit/test_steps_main.py",
            "tests/faults/test_resume.py::test_it_ends_as_if_nothing_had_happened",
            *few, workers=4)  # fmt: skip


def default(found: Found) -> None:
    """The embedded default by its one command; its verdict."""
    from rlhf.store import RunDir, find_evaluation, read_manifest

    place = found.path.parent / "default"
    command = [
        "train.py",
        "--deployment-type",
        "single_gpu",
        "--output-dir",
        str(place),
        "--name",
        "day",
    ]
    if found.small:
        command += ["step1.train.max_steps=4", "step2.train.max_steps=4", "step3.iterations=2",
                    "step3.eval.prompts=4"]  # fmt: skip
    began = time.perf_counter()
    log = found.path.with_suffix(".run.log")
    with log.open("w") as stream:
        done = subprocess.run([sys.executable, *command], cwd=PROJECT, stdout=stream, stderr=stream)
    found.add(command="python " + " ".join(command), exit_code=done.returncode,
              seconds=round(time.perf_counter() - began, 1))  # fmt: skip
    if done.returncode:
        found.add(failed=log.read_text(errors="replace")[-4000:])
    run = RunDir(place / "day")
    for kind in ("sft", "reward", "ppo"):
        with found.trying(kind):
            metrics = read_manifest(run.artifact(kind)).metrics
            plain = {k: v for k, v in metrics.items() if isinstance(v, int | float | dict)}
            found.add(**{kind: plain})
    evaluation, why = find_evaluation(run)
    found.add(evaluation=evaluation.metrics if evaluation else why)
    said = log.read_text(errors="replace").split("\nVERDICT: ")
    if len(said) == 2:
        found.add(verdict=said[1].splitlines()[0], report="VERDICT: " + said[1])


def memory(found: Found) -> None:
    """Peaks of real steps against the planner's figures: benchmarks.plan --gpu."""
    if found.small:
        found.add(skipped="benchmarks.plan --gpu needs a GPU; on CPUs: python -m benchmarks.plan")
        return
    from benchmarks.plan import GPU_CASES

    cases: list[Any] = []
    with ThreadPoolExecutor(4) as pool:  # together at most two thirds of 80 GB, as planned
        for case in pool.map(_measured, [case.name for case in GPU_CASES]):
            cases.append(case)
            found.add(cases=cases)


def _measured(name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.plan", "--gpu", "--only", name]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"case": name, "failed": (done.stderr or done.stdout)[-1500:]}
    return dict(json.loads(lines[-1]))


def sft(found: Found, name: str) -> None:
    """Step 1's optimiser steps."""
    from benchmarks.sft import OurSFT

    workload = workload_of(name, found.small)
    ours = OurSFT(workload)
    timed(found, ours, "rows", 3)
    with found.trying("profile"):
        found.add(profile=profiled(lambda around: inside(around("steps"), ours)))


def ppo(found: Found, name: str) -> None:
    """PPO iterations by phase, their peak and the planner's, and a profile of one."""
    from benchmarks.workload import OurPPO, model_dirs

    workload = workload_of(name, found.small)
    ours = OurPPO(workload)
    seen: list[dict[str, float]] = []

    def turn() -> float:
        seen.append(ours.iteration())
        return float(workload.rows)

    timed(found, turn, "samples", 2)
    found.add(phases={
        phase: statistics.median(stats[f"seconds_{phase}"] for stats in seen[1:])
        for phase in ("rollout", "score", "update")
    })  # fmt: skip
    with found.trying("planned"):
        found.add(planned=planned(ours.settings, *model_dirs(workload.model)))
    with found.trying("profile"):
        found.add(profile=profiled(ours.iteration))


def peer(found: Found, kind: str, name: str) -> None:
    """The same work by trl: fp32 weights and bf16=True, its own default."""
    from benchmarks import trl_side

    workload = workload_of(name, found.small)
    build = {"sft": trl_side.sft, "ppo": trl_side.ppo}[kind]
    held, train = build(workload, "default")
    trouble: list[str] = []

    def guarded() -> None:
        try:
            train()
        except BaseException as error:  # noqa: BLE001 - this thread's end must not hang the other
            trouble.append(f"{type(error).__name__}: {error}")
            held.fail()

    import threading

    threading.Thread(target=guarded, daemon=True).start()

    def turn() -> float:
        work = held()
        if trouble:
            raise RuntimeError(trouble[0])
        return work

    timed(found, turn, {"sft": "rows", "ppo": "samples"}[kind], 2)


def decode(found: Found, name: str) -> None:
    """Tokens per second of each rollout engine."""
    import torch
    from deepspeed.runtime.rollout import RolloutRequest, SamplingConfig
    from transformers import AutoModelForCausalLM

    from benchmarks.workload import EOS, PAD, end_answers, model_dirs, prompts
    from rlhf.rollout import build_rollout

    workload = workload_of(name, found.small)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        model_dirs(workload.model)[0], dtype=torch.bfloat16
    )
    model.generation_config.eos_token_id = None
    end_answers(model, early=False)
    model.to(device).eval()
    engine = SimpleNamespace(module=_wrapped(model))
    ids = prompts(workload).to(device)
    request = RolloutRequest(ids, torch.ones_like(ids))
    tokens = 8 if found.small else 64
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    found.add(rows=len(ids), prompt=ids.shape[1], answer=tokens, weight_bytes=weights, engines={})
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "continuous": ("continuous", {}),
        "continuous, without CUDA graphs": ("continuous", {"graphs": False}),
        "continuous, the model's own forward": ("continuous", {"lean": False}),
        "hybrid (transformers' generate)": ("hybrid", {}),
    }
    for label, (kind, options) in kinds.items():
        with found.trying(label):
            sampler = build_rollout(
                kind, engine, SimpleNamespace(pad_token_id=PAD, eos_token_id=EOS),
                batch_size=len(ids), seed=0, **options,
            )  # fmt: skip
            sampling = SamplingConfig(max_new_tokens=tokens)
            seconds = median_seconds(lambda s=sampler, g=sampling: s.generate(request, g), 2)
            engines = found.values["engines"] | {
                label: {"seconds": seconds, "tokens_per_second": len(ids) * tokens / seconds,
                        "seconds_per_step": seconds / tokens}
            }  # fmt: skip
            found.add(engines=engines)


def wait_for(file: Path) -> None:
    """The imports, which take longer than many a part, while another part runs."""
    import datasets  # noqa: F401
    import deepspeed  # noqa: F401
    import transformers  # noqa: F401

    import benchmarks.sft  # noqa: F401

    while not file.exists():
        time.sleep(0.02)


def workload_of(name: str, small: bool) -> Any:
    """Sizes that fill a GPU, or a CPU's few seconds. All of a name share one set of weights."""
    import torch

    from benchmarks import workload

    sizes = {"135m": {"rows": 128, "micro": 32}, "1.3b": {"rows": 64, "micro": 16}}[name]
    model = "6m" if small else name
    if small:
        sizes = {"rows": 4, "micro": 2}
    root = os.environ.get(workload.MODELS_AT)
    if root and not (Path(root) / "reward" / "config.json").exists():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.device(device):
            workload.make_models(model, Path(root), dtype=torch.bfloat16)
    return workload.Workload(model=model, **sizes)


def _wrapped(model: Any) -> Any:
    from torch import nn

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.config = model, model.config

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            return self.model.generate(*args, **kwargs)

    return Wrapper()


def _pytest(found: Found, *arguments: str, workers: int) -> None:
    """Counts, and the end of what each failed test said."""
    report, log = found.path.with_suffix(".xml"), found.path.with_suffix(".pytest.log")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short",
               "-n", str(workers), f"--junitxml={report}", *arguments]  # fmt: skip
    if workers:
        command.append("--dist=load")
    with log.open("w") as stream:
        code = subprocess.run(command, cwd=PROJECT, stdout=stream, stderr=stream).returncode
    found.add(exit_code=code, **read_report(report.read_text() if report.exists() else ""))
    if not report.exists():
        found.add(tail=log.read_text(errors="replace")[-3000:])


def read_report(text: str) -> dict[str, Any]:
    """Counts of a JUnit report, and (test, the end of what it said) of those that failed."""
    if not text:
        return {}
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures = []
    for case in ElementTree.fromstring(text).iter("testcase"):
        wrong = [child for child in case if child.tag in ("failure", "error")]
        skipped = any(child.tag == "skipped" for child in case)
        counts["failed" if wrong else "skipped" if skipped else "passed"] += 1
        for child in wrong:
            said = (child.text or child.get("message") or "").strip()
            failures.append([f"{case.get('classname')}::{case.get('name')}", said[-1500:]])
    return {**counts, "failures": failures}


PARTS: dict[str, Callable[[Found], None]] = {
    "machine": machine,
    "tests": tests,
    "kernels": kernels,
    "suite": suite,
    "default": default,
    "memory": memory,
    **{f"sft-{name}": lambda found, n=name: sft(found, n) for name in ("135m", "1.3b")},
    **{f"ppo-{name}": lambda found, n=name: ppo(found, n) for name in ("135m", "1.3b")},
    **{f"decode-{name}": lambda found, n=name: decode(found, n) for name in ("135m", "1.3b")},
    **{
        f"{kind}-{name}-trl": lambda found, k=kind, n=name: peer(found, k, n)
        for kind in ("sft", "ppo")
        for name in ("135m", "1.3b")
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=sorted(PARTS))
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--when", type=Path, help="import, then wait for this file to be there")
    args = parser.parse_args()
    if args.when:
        wait_for(args.when)
    found = Found(args.into.resolve(), args.small)
    code = 0
    try:
        PARTS[args.name](found)
    except BaseException as error:  # noqa: BLE001 - also SystemExit: the file says why it ended
        import traceback

        traceback.print_exc()
        found.add(failed=f"{type(error).__name__}: {error}"[-3000:])
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of DeepSpeed's and trl's may keep a normal end waiting


if __name__ == "__main__":
    main()
