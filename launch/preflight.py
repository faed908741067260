"""What a run needs, asked before anything starts: packages, files, disk, compiler, hub."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from launch.checks import refuse
from launch.hostcheck import on_hosts
from launch.hub import check_hub
from launch.memory import check_memory
from launch.plan import Plan, StepPlan
from launch.spec import Placement
from rlhf.config.names import is_hub_dataset, is_hub_model, is_path_like
from rlhf.config.schema import EngineConfig, RunConfig
from rlhf.errors import RequirementError
from rlhf.plan import disk

PACKAGES = ("torch", "deepspeed", "transformers", "datasets")
SPARE_BYTES = 300 * 10**6
# Where the planner does not know the model: an artifact in fp32 from weights in 16 bits, and as
# much again.
BYTES_PER_WEIGHT_BYTE = 4
SMALLER = "free some space, --keep-last 1, or use --output-dir on another disk"
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")


def preflight(plan: Plan) -> tuple[dict[str, str], list[str]]:
    """(variables to add for every step, lines to print). Raises RequirementError."""
    config = plan.config
    steps = [item.step for item in plan.steps if not item.done]
    if not steps:
        return {}, []
    models = needed_models(plan)
    check_packages(config, steps, models)
    check_names(models, config.data.path)
    check_compiler(config, steps)
    lines = check_disk(plan.run.path, planned_artifacts(plan), planned_disk(plan))
    check_commands(plan.placement)
    offline, line = check_hub(models, config.data.path, config.hub.endpoint, config.hub.offline)
    lines += [line] if line else []
    if plan.placement.over_ssh and config.launch.preflight == "full":
        lines += check_hosts(plan)
    for item in plan.steps:
        if not item.done and item.needs is not None:
            lines += check_memory(item.needs, plan.machine, config.launch.check_memory)
    return {"HF_HUB_OFFLINE": "1"} if offline else {}, lines


def check_hosts(plan: Plan) -> list[str]:
    """Asks every host what `rlhf doctor` asks. Returns lines to print; raises RequirementError."""
    began = time.monotonic()
    checks = on_hosts(plan)
    hosts = len(plan.placement.hosts)
    refuse(checks, f"{len(checks)} checks of {hosts} host(s)")
    warnings = [check.line() for check in checks if check.state == "warn"]
    seconds = time.monotonic() - began
    return [*warnings, f"preflight: {len(checks)} checks of {hosts} host(s) hold, {seconds:.0f} s"]


def check_commands(placement: Placement) -> None:
    """Are the programs installed that this launcher runs? Raises RequirementError."""
    config = placement.config
    if not placement.multi_node or placement.by_hand:
        return
    kind = config.launcher if config.launcher != "deepspeed" else config.node_launcher
    wanted = {
        "pdsh": ("ssh", "pdsh"),
        "openmpi": ("ssh", "mpirun", "ompi_info"),
        "slurm": ("sbatch", "srun", "scontrol"),
    }.get(kind, ("ssh",))
    if absent := [name for name in wanted if shutil.which(name) is None]:
        raise RequirementError(
            f"{kind}: {', '.join(absent)} not found on this machine: install it (Debian: "
            "openssh-client pdsh openmpi-bin slurm-client), or use another --launcher or "
            "--node-launcher"
        )


def needed_models(plan: Plan) -> list[str]:
    """Every model by name that is not made by the run itself."""
    names: list[str] = []
    for item in plan.steps:
        if item.done:
            continue
        config = item.resolved.config
        bases = {1: config.step1.model.name, 2: config.step2.model.name}
        names += [bases.get(item.step) or ""]
        names += [parent.path for parent in item.parents if parent.id is None and not parent.here]
    return list(dict.fromkeys(name for name in names if name))


def check_packages(config: RunConfig, steps: Iterable[int], models: Iterable[str]) -> None:
    """Installed? Asked of the package metadata: importing torch takes seconds."""
    wanted = dict.fromkeys(PACKAGES, "pip install -e .")
    loras = [config.step1.model.lora, config.step2.model.lora, config.step3.actor.model.lora]
    if any(loras[step - 1].rank for step in steps):
        wanted["peft"] = "pip install peft"
    if any(name.endswith(".gguf") for name in models):
        wanted["gguf"] = "pip install gguf"
    if 3 in steps and config.step3.eval.judge == "vader":
        wanted["vaderSentiment"] = "pip install vaderSentiment"
    for package, remedy in wanted.items():
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError as error:
            raise RequirementError(f"the package {package} is not installed: {remedy}") from error


def check_names(models: Iterable[str], data: Iterable[str]) -> None:
    """Names that can only be files must exist."""
    for what, names in (("model", models), ("data", data)):
        for name in names:
            if ":" in name or Path(name).expanduser().exists():
                continue
            on_hub = is_hub_model(name) if what == "model" else is_hub_dataset(name)
            if not on_hub or is_path_like(name):
                setting = "--actor-model or --reward-model" if what == "model" else "--data-path"
                raise RequirementError(
                    f"{what} {name!r}: no such file or directory (from {os.getcwd()}). "
                    f"Check {setting}; a hub id looks like owner/name"
                )


def check_compiler(config: RunConfig, steps: Iterable[int]) -> None:
    """DeepSpeed compiles its CPU optimiser at first use, when optimiser state is offloaded."""
    engines: dict[int, list[EngineConfig]] = {
        1: [config.step1.engine],
        2: [config.step2.engine],
        3: [config.step3.actor.engine, config.step3.critic.engine],
    }
    offloading = any(engine.offload != "none" for step in steps for engine in engines[step])
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")
    if not offloading or any(root.glob("**/cpu_adam.so")):
        return
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++") if name):
        raise RequirementError(
            "engine.offload needs DeepSpeed's CPU optimiser, which is compiled at first use, and "
            "there is no C++ compiler: install g++, or set offload to none"
        )


def check_disk(run_dir: Path, artifacts: float, everything: float) -> list[str]:
    """Warnings. Raises RequirementError where there is no room for the artifacts; checkpoints are
    for runs long enough to make some, so for them it warns."""
    existing = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise RequirementError(
            f"{existing}: not writable, and the run would be kept below it: use --output-dir"
        )
    free, least = shutil.disk_usage(existing).free, SPARE_BYTES + artifacts
    if free < least:
        raise RequirementError(
            f"{existing}: {free / 1e9:.1f} GB free, about {least / 1e9:.1f} GB are needed: "
            "free some space, or use --output-dir on another disk"
        )
    if free < SPARE_BYTES + everything:
        return [
            f"warning: {existing}: {free / 1e9:.1f} GB free, and with its checkpoints the run may "
            f"write {(SPARE_BYTES + everything) / 1e9:.1f} GB: {SMALLER}"
        ]
    return []


def planned_artifacts(plan: Plan) -> float:
    """Bytes of what the steps to run are going to publish."""
    planned = [item.needs.disk.artifact for item in _to_run(plan) if item.needs]
    return sum(planned) + _unplanned(plan)


def planned_disk(plan: Plan) -> float:
    """Bytes of the run's fullest moment on the disk, checkpoints included."""
    return disk.needed(item.needs.disk for item in _to_run(plan) if item.needs) + _unplanned(plan)


def _to_run(plan: Plan) -> list[StepPlan]:
    return [item for item in plan.steps if not item.done]


def _unplanned(plan: Plan) -> float:
    """For steps of models that the planner does not know, as far as their files are here."""
    if all(item.needs for item in _to_run(plan)):
        return 0.0
    files = sum(_weight_bytes(Path(name).expanduser()) for name in needed_models(plan))
    return float(BYTES_PER_WEIGHT_BYTE * files)


def _weight_bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    if not path.is_dir():
        return 0
    return sum(file.stat().st_size for file in path.iterdir() if file.suffix in _WEIGHTS)
