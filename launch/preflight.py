"""What a run needs of this machine: packages, trackers, programs, a compiler, room on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from launch.checks import Check, judge
from launch.plan import Plan, StepPlan
from launch.spec import Placement
from rlhf.config.schema import RunConfig
from rlhf.config.trees import at
from rlhf.errors import RequirementError
from rlhf.plan import disk
from rlhf.stages import Stage
from rlhf.track.forward import require_packages, tracker_names

PACKAGES = ("torch", "deepspeed", "transformers", "datasets")
SPARE_BYTES = 300 * 10**6
# Where the planner does not know the model: an artifact in fp32 from weights in 16 bits, and as
# much again.
BYTES_PER_WEIGHT_BYTE = 4
SMALLER = "free some space, --keep-last 1, or use --output-dir on another disk"
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")


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
        names += [at(config, item.stage.base) or ""] if item.stage.base else []
        names += [parent.path for parent in item.parents if parent.id is None and not parent.here]
    return list(dict.fromkeys(name for name in names if name))


def check_packages(config: RunConfig, stages: Iterable[Stage], models: Iterable[str]) -> None:
    """Installed? Asked of the package metadata: importing torch takes seconds."""
    wanted = dict.fromkeys(PACKAGES, "pip install -e .")
    stages = list(stages)
    if any(at(config, stage.model).lora.rank for stage in stages):
        wanted["peft"] = "pip install peft"
    if any(name.endswith(".gguf") or name.startswith("package:") for name in models):
        wanted["gguf"] = "pip install gguf"
    if any(stage.evaluates for stage in stages) and config.step3.eval.judge == "vader":
        wanted["vaderSentiment"] = "pip install vaderSentiment"
    if any(stage.generates for stage in stages) and config.step3.rollout.engine == "vllm":
        wanted["vllm"] = "pip install vllm, or step3.rollout.engine=continuous"
    if any(path.endswith(".zst") for path in config.data.path):
        wanted["zstandard"] = "pip install zstandard"
    absent = [f"{name} is not installed: {how}" for name, how in wanted.items() if _absent(name)]
    if absent:
        raise RequirementError(f"the package {'; the package '.join(absent)}")


def _absent(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return True
    return False


def check_trackers(config: RunConfig) -> None:
    """Known, and installed? Raises ConfigError, RequirementError."""
    require_packages(tracker_names(config.track))


def check_compiler(config: RunConfig, stages: Iterable[Stage]) -> None:
    """DeepSpeed compiles its CPU optimiser at first use, when optimiser state is offloaded."""
    places = [place for stage in stages for place in stage.models]
    offloading = any(at(config, place).engine.offload != "none" for place in places)
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")
    if not offloading or any(root.glob("**/cpu_adam.so")):
        return
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "c++", "g++") if name):
        raise RequirementError(
            "engine.offload needs DeepSpeed's CPU optimiser, which is compiled at first use, and "
            "there is no C++ compiler: install g++, or set offload to none"
        )


def disk_check(run_dir: Path, artifacts: float, everything: float) -> Check:
    """It fails where there is no room for the artifacts; checkpoints are for runs long enough to
    make some, so for them it warns."""
    existing = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    if not os.access(existing, os.W_OK):
        found = f"{existing} is not writable, and the run would be kept below it"
        return Check("disk", "FAIL", found, "", "use --output-dir")
    free, least = shutil.disk_usage(existing).free, SPARE_BYTES + artifacts
    found, most = f"{existing}: {free / 1e9:.1f} GB free", SPARE_BYTES + everything
    if free < least:
        return Check(
            "disk", "FAIL", found, f"about {least / 1e9:.1f} GB",
            "free some space, or use --output-dir on another disk",
        )  # fmt: skip
    needed = f"{most / 1e9:.1f} GB with the checkpoints that it may write"
    return judge("disk", free >= most, found, needed, SMALLER, fatal=False)


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
