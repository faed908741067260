"""How a run is run: processes, the hub, checkpoints, metrics. None of it decides a result."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from rlhf.config.base import NonNegative, Positive, Section, doc


class LaunchConfig(Section):
    deployment_type: Literal["single_gpu", "single_node", "multi_node"] = doc(
        "single_gpu", "One process, all devices of this machine, or several machines."
    )
    launcher: Literal["deepspeed", "torchrun", "accelerate", "slurm"] = doc(
        "deepspeed", "What starts the processes; slurm writes an sbatch script and submits it."
    )
    node_launcher: Literal["pdsh", "openmpi", "slurm"] = doc(
        "pdsh",
        "multi_node with the deepspeed launcher: what reaches the nodes (slurm: srun, inside an "
        "allocation).",
    )
    launcher_args: str | None = doc(
        None,
        "More arguments, as one text, for what starts the processes: pdsh, mpirun, srun, torchrun "
        "or accelerate; for the slurm launcher, sbatch (`--partition=gpu --time=8:00:00`).",
    )
    accelerate_config: str | None = doc(
        None, "The accelerate launcher's --config_file; processes and nodes are set from here."
    )
    accelerator: Literal["auto", "cuda", "cpu"] = doc(
        "auto",
        "What the processes compute on. auto: GPUs if this machine has any; say cuda where the "
        "driver runs on a machine without.",
    )
    num_gpus: Positive | None = doc(
        None, "Processes per node; on CPU, gloo ranks. Unset: the node's GPUs, or 1 on CPU."
    )
    threads: Positive | None = doc(
        None, "CPU threads per process. Unset: 1 with several ranks, else the cores."
    )
    hostfile: str | None = doc(None, "multi_node: lines of `host slots=N`.")
    num_nodes: Positive | None = doc(None, "multi_node: nodes to use.")
    node_rank: NonNegative | None = doc(None, "multi_node, started by hand: this node's number.")
    master_addr: str | None = doc(None, "multi_node: address of the first node.")
    master_port: int | Literal["auto"] = doc("auto", "Rendezvous port; auto: a free one.")
    include: str | None = doc(None, "Hosts and devices to use, `host:0,1@other`.")
    exclude: str | None = doc(None, "Hosts and devices to leave out.")
    check_memory: bool = doc(
        True, "Refuse to start a step that the planner is sure will not fit in memory."
    )
    keep_memory: bool | Literal["auto"] = doc(
        "auto",
        "On a CPU: processes keep what memory they free, in large pages: faster, in up to twice "
        "the memory. auto: where the plan leaves room for 2.5 times of what it says.",
    )
    forward: list[str] = doc(
        [],
        "multi_node: names of more environment variables for the processes on other nodes, tokens "
        "too; they travel in a file with mode 0600 that is removed at the end.",
    )
    preflight: Literal["full", "fast"] = doc(
        "full",
        "multi_node: full asks every host before the start (ssh, versions, disk, an all-reduce); "
        "fast checks this machine only.",
    )
    collective_timeout: Positive = doc(
        1800, "Seconds after which a collective operation that others do not join is an error."
    )
    stall_timeout: float = doc(
        3600.0,
        "Seconds without any progress (a forward pass, a token, rows read) after which a rank "
        "writes its stacks into its log and ends; the step can be resumed. 0: it waits for ever.",
        ge=0,
    )
    straggler_factor: float = doc(
        2.0,
        "Several ranks: one whose own work takes so many times as long as that of the others is "
        "named (docs/reliability.md). 0: none is.",
        ge=0,
    )
    straggler_seconds: float = doc(
        60.0, "So long a rank has to be slow, without a break, before it is named.", gt=0
    )
    heartbeat_timeout: Positive = doc(
        60,
        "multi_node: seconds without a sign of life after which ranks end without their driver, "
        "and the driver ends a step without one of its ranks.",
    )

    max_restarts: NonNegative = doc(
        0, "Start a failed step again, from its last checkpoint, at most so many times."
    )
    auto_batch: bool = doc(
        False, "Out of memory: halve the micro-batch (not the batch) and start the step again."
    )
    grace_seconds: float = doc(
        60.0, "Time to save a checkpoint when the run is told to stop; then it is killed.", gt=0
    )

    @model_validator(mode="after")
    def _nodes(self) -> LaunchConfig:
        if wrong := [name for name in self.forward if not name.isidentifier()]:
            raise ValueError(
                f"forward {wrong[0].partition('=')[0]!r}: give a variable's name; its value is "
                "taken from the environment, so that it appears on no command line"
            )
        if 0 < self.straggler_factor <= 1:
            raise ValueError(
                f"straggler_factor {self.straggler_factor} would name ranks that are as fast as "
                "the others: give a number over 1 (2: twice as slow), or 0 to name none"
            )
        if self.include and self.exclude:
            raise ValueError("include and exclude together: give one of them")
        if self.deployment_type == "single_gpu" and (self.num_gpus or 1) > 1:
            raise ValueError(
                f"deployment_type single_gpu with num_gpus {self.num_gpus}: one process only; "
                "use --deployment-type single_node"
            )
        return self


class HubConfig(Section):
    endpoint: str | None = doc(None, "Mirror of the hub; also HF_ENDPOINT.")
    offline: bool = doc(False, "Use only what is in the local cache.")


class CheckpointConfig(Section):
    """Checkpoints of an unfinished step; a finished one has its artifact and keeps none."""

    resume: Literal["auto", "always", "never"] = doc(
        "auto",
        "An unfinished step goes on from its newest checkpoint: `auto` with the same settings, "
        "`always` with other ones too; `never`: it starts again, its checkpoints are removed.",
    )
    save_every: NonNegative = doc(
        0, "Save every so many optimiser steps (step 3: iterations); 0: only by time."
    )
    save_minutes: float = doc(10.0, "Save every so many minutes; 0: only by steps.", ge=0)
    keep_last: Positive = doc(2, "Keep so many checkpoints.")
    check_every: NonNegative = doc(
        50,
        "Every so many optimiser steps (step 3: iterations), before each checkpoint and before "
        "publishing: weights are compared among ranks and with what was loaded, and a forward pass "
        "is repeated (docs/reliability.md). 0: never.",
    )


class TrackConfig(Section):
    trackers: list[str] | Literal["auto"] = doc(
        "auto",
        "Besides metrics.jsonl: accelerate's trackers by name; auto: tensorboard if installed.",
    )
    project: str = doc("rlhf", "Project name for trackers that have one.")
