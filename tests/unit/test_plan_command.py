"""`rlhf plan`, the plan's place in the dry run and in preflight, and docs/scaling.md."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import train
from launch import hostcheck, plan_command
from launch import memory as launch_memory
from launch.checklist import CHECKS, Asking
from launch.checks import Check
from launch.commands import COMMANDS
from launch.options import parse_options
from launch.plan import describe, make_plan, plan_json
from rlhf.errors import ConfigError
from rlhf.plan import scaling
from rlhf.plan.hardware import gpu_speeds
from rlhf.plan.memory import CPU_IMPORTS
from rlhf.stages import SFT

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "no-hub"))
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 8000000 kB\n")
    monkeypatch.setattr(launch_memory, "MEMINFO", meminfo)
    monkeypatch.setattr(launch_memory, "CGROUP_LIMIT", tmp_path / "none")


def test_the_issues_example_needs_no_network(capsys: pytest.CaptureFixture[str]) -> None:
    """66B on 64 x 80 GB: all steps fit when sharded, step 3 if it generates layer by layer."""
    code = train.main(
        ["plan", "--gpus", "64", "--gpu-memory", "80GB", "--actor", "facebook/opt-66b"]
    )
    text = capsys.readouterr().out
    assert code == 1
    assert re.search(r"step 1 .*DOES NOT FIT\n.*cheapest change that fits: ZeRO 3 ", text)
    remedy = "ZeRO 3 for all four models, the policy gathered layer by layer"
    assert re.search(rf"step 3 .*DOES NOT FIT\n.*cheapest change that fits: {remedy} ", text)
    assert "step3.rollout.gather=never" in text


def test_json_and_exit_code_where_all_fits(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--gpus", "8", "--actor", "1.3b", "--reward_model", "350m", "--json"]
    assert train.main([*argv, "step3.micro_batch_size=4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"] == {"actor": "facebook/opt-1.3b", "reward": "facebook/opt-350m"}
    assert [step["step"] for step in found["steps"]] == [1, 2, 3]
    for step in found["steps"]:
        worst = step["moments"][step["at"]]
        assert sum(worst.values()) == pytest.approx(step["peak_bytes"], abs=10)
        assert step["fits"] is True


def test_this_machine_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["plan", "--step", "1"]) == 0
    text = capsys.readouterr().out
    limit = (8_000_000 * 1024 - CPU_IMPORTS) / 1e9
    assert f"of {limit:.3g} GB per process" in text
    assert "1 CPU process(es)" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gpus", "0"], "give 1 or more"),
        (["--gpus", "8", "--gpu", "a200"], "a100-80g"),
        (["--gpus", "8", "--gpu-memory", "much"], "80GB"),
        (["--gpus", "8", "--actor", "some/unknown-model"], "some/unknown-model"),
        (["--scaling", "--force"], "--scaling takes no settings"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_mistakes_are_explained(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["plan", *argv]) in (2, 3)
    assert message in capsys.readouterr().err


def test_batches_are_raised_to_the_ranks() -> None:
    config = parse_options([]).config
    assert plan_command.divisible(config, SFT, 5).step1.train.batch_size == 20
    assert plan_command.divisible(config, SFT, 8) is config


def plan_of(tmp_path: Path, *argv: str) -> Any:
    return make_plan(parse_options([*argv, "--dry-run", "--output-dir", str(tmp_path)]))


def test_the_dry_run_says_what_each_step_needs(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    text = describe(plan)
    assert len(re.findall(r"^ +memory \d", text, re.M)) == 3
    steps = plan_json(plan)["steps"]
    assert all(step["needs"]["fits"] for step in steps)


def test_a_model_that_is_not_known_costs_a_line_only(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "--actor-model", "some/unknown-model")
    assert describe(plan).count("memory not planned: model 'some/unknown-model'") == 3
    assert plan_json(plan)["steps"][0]["needs"] is None


def memory_checks(plan: Any, way: str = "dry-run") -> list[Check]:
    (item,) = [item for item in CHECKS if item.name == "memory"]
    return item.ask(Asking(plan, way))


def test_what_cannot_fit_fails(tmp_path: Path) -> None:
    """13B in fp32 in 8 GB: refused with the remedy before anything starts; or, asked to, warned."""
    argv = ["--actor-model", "facebook/opt-13b"]
    checks = memory_checks(plan_of(tmp_path, *argv))
    assert [check.state for check in checks] == ["FAIL"] * 3
    assert "DOES NOT FIT" in checks[0].line()
    assert "launch.check_memory=false" in checks[0].line()
    checks = memory_checks(plan_of(tmp_path, *argv, "launch.check_memory=false"))
    assert [check.state for check in checks] == ["warn"] * 3


def test_a_login_boxs_memory_is_not_the_clusters(tmp_path: Path) -> None:
    """Issue 10, 5: on many hosts its RAM says nothing; each is judged by what it has itself."""
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    flags = ["--deployment-type", "multi_node", "--hostfile", str(tmp_path / "hosts")]
    flags += ["--actor-model", "facebook/opt-13b", "--accelerator", "cuda"]
    plan = plan_of(tmp_path, *flags)
    assert plan.machine.memory is None
    assert "DOES NOT FIT" not in describe(plan)
    checks = memory_checks(plan)
    assert [check.state for check in checks] == ["warn"] * 3
    assert "what the machines have is not known here" in checks[0].found
    assert memory_checks(plan, "doctor") == []  # the hosts are asked
    small = {"ram": 2**33, "gpus": [24 * 1024]}
    assert [check.state for check in hostcheck._memory(plan, "a", small)] == ["FAIL"] * 3
    assert hostcheck._memory(plan, "a", small)[0].what == "a: memory for step 1"
    large = {"ram": 2**33, "gpus": [2000 * 1024]}
    assert [check.state for check in hostcheck._memory(plan, "a", large)] == ["ok"] * 3


def test_it_warns_where_it_may_not_fit(tmp_path: Path) -> None:
    """Within the plan's own error of the limit: a warning, and the run starts."""
    plan = plan_of(tmp_path)
    needs = plan.steps[2].needs
    tight = replace(plan.machine, memory=needs.memory.peak * 1.05)
    resolved, bases = plan.steps[2].resolved, {"sft": "tiny:llama", "reward": None}
    found, _ = launch_memory.step_report(resolved, tight, bases)
    assert found is not None
    assert not found.fits
    check = launch_memory.memory_check(found, tight, refuse=True)
    assert (check.what, check.state) == ("memory for step 3", "warn")
    assert "MAY NOT FIT; cheapest change that fits" in check.found
    assert launch_memory.memory_check(needs, plan.machine, refuse=True).state == "ok"


def test_memory_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch_memory.node_memory() == 8_000_000 * 1024
    limit = tmp_path / "limit"
    limit.write_text("1000000000\n")
    monkeypatch.setattr(launch_memory, "CGROUP_LIMIT", limit)
    assert launch_memory.node_memory() == 1e9
    limit.write_text("max\n")
    assert launch_memory.node_memory() == 8_000_000 * 1024
    two = launch_memory.cpu_machine(2, 2, 1)
    assert two.memory == 4_000_000 * 1024 - CPU_IMPORTS


def test_gpu_memory_is_the_smallest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\nif [ "$1" = -L ]; then echo "GPU 0: a"; echo "GPU 1: b"; '
        "else echo 81920; echo 40960; fi\n"
    )
    tool.chmod(0o755)
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert launch_memory.gpu_memory({}) == 40960 * 1024**2
    assert launch_memory.gpu_memory({"CUDA_VISIBLE_DEVICES": ""}) is None


def test_the_scaling_page_is_what_the_command_prints() -> None:
    """Some rows in full (all of them take seconds): `python train.py plan --scaling` makes them."""
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:opt|Llama)-.*\|$", page, re.M)
    assert len(rows) == len(scaling.MODELS) * len(scaling.GPU_COUNTS)
    speeds = gpu_speeds("a100-80g")
    for model, reward in scaling.MODELS:
        for gpus in (8, 512):
            assert scaling.line(scaling.plan_row(model, reward, gpus, speeds)) in rows
    assert scaling.HEAD in page
    assert "python train.py plan --scaling" in page


def test_planning_loads_nothing_heavy() -> None:
    """The dry run stays quick: no torch, no transformers."""
    code = (
        "import sys, train; train.main(['plan', '--gpus', '8', '--actor', '13b']);"
        "heavy = {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules);"
        "print('HEAVY', heavy)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "HEAVY set()" in done.stdout, done.stderr


def test_the_table_of_commands() -> None:
    assert "plan" in COMMANDS
    with pytest.raises(ConfigError, match=r"Did you mean --gpu-memory\?|unrecognized"):
        train.run(["plan", "--gpus", "8", "--gpu-memry", "80GB"])


def test_memory_is_kept_where_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """launch.keep_memory auto: 2.5 times the plan fits; unknown: no; said: as said."""
    for name in ("GLIBC_TUNABLES", *(n for n in os.environ if n.startswith("MALLOC_"))):
        monkeypatch.delenv(name, raising=False)
    plan = plan_of(tmp_path)
    needs = plan.steps[2].needs
    enough = replace(plan.machine, memory=needs.memory.peak * 2.51)
    short = replace(plan.machine, memory=needs.memory.peak * 2.49)
    unknown = replace(plan.machine, memory=None)
    keeps = launch_memory.keeps_memory
    assert keeps("auto", needs, enough)
    assert not any((keeps("auto", needs, short), keeps("auto", needs, unknown)))
    assert not keeps("auto", None, enough)
    assert keeps(True, None, unknown)
    assert not keeps(False, needs, enough)
    for argv, kept in (((), True), (("launch.keep_memory=false",), False),
                       (("--actor-model", "some/unknown-model"), False)):  # fmt: skip
        for step in plan_of(tmp_path, *argv).steps:
            assert ("GLIBC_TUNABLES" in step.spec.env) == kept
            assert step.resolved.config.launch.keep_memory is kept
