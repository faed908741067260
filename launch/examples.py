"""`rlhf example kubernetes|lsf` with train.py's flags: prints a job for another scheduler.

Both start train.py by hand on each node (--node-rank); resources and variables are those of the
LaunchSpec that the same flags give here.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from launch.options import parse_options
from launch.plan import Plan, make_plan
from rlhf.errors import ConfigError

# Set from the job's own machine, or by each driver itself.
_NOT_IN_JOB = (
    "PYTHONPATH",
    "DS_ACCELERATOR",
    "OMP_NUM_THREADS",
    "GLIBC_TUNABLES",
    "RLHF_COLLECTIVE_TIMEOUT",
)
_BY_HAND = ("--deployment-type", "multi_node", "--launcher", "torchrun")


def main(argv: Sequence[str]) -> int:
    """Prints the job. Raises ConfigError for another scheduler or without --num-nodes."""
    if not argv or argv[0] not in EXAMPLES:
        raise ConfigError(
            f"rlhf example {' '.join(argv[:1])}: name one of {', '.join(EXAMPLES)}, then the flags "
            "of train.py, e.g. `rlhf example kubernetes --num-nodes 2 --num-gpus 8`"
        )
    print(EXAMPLES[argv[0]](list(argv[1:])), end="")
    return 0


def planned(flags: Sequence[str]) -> Plan:
    """The plan of the last node's driver: looks at no port of this machine."""
    options = parse_options(flags)
    nodes = options.config.launch.num_nodes
    if not nodes:
        raise ConfigError("rlhf example: give --num-nodes, how many nodes the job is to have")
    by_hand = [*_BY_HAND, "--node-rank", str(nodes - 1), "--master-addr", "first-node"]
    if nodes == 1:
        by_hand += ["--master-port", "29500"]
    return make_plan(parse_options([*flags, *by_hand]))


def driver(flags: Sequence[str], rank: str, address: str, port: str) -> str:
    """The shell command for one node; rank, address and port are shell expressions."""
    words = ["python", "train.py", *flags, *_BY_HAND]
    return (
        f'exec {shlex.join(words)} --node-rank "{rank}" --master-addr "{address}" '
        f'--master-port "{port}"'
    )


def variables(plan: Plan) -> dict[str, str]:
    """What of the LaunchSpec's variables belongs into a job's description: no secrets are in it."""
    spec = plan.steps[0].spec
    return {name: value for name, value in spec.env.items() if name not in _NOT_IN_JOB}


def kubernetes(flags: list[str]) -> str:
    """A PyTorchJob (Kubeflow training operator): one pod on each node."""
    plan = planned(flags)
    placement = plan.placement
    env: list[dict[str, Any]] = [{"name": k, "value": v} for k, v in variables(plan).items()]
    for name in plan.config.launch.forward:
        secret = {"secretKeyRef": {"name": "rlhf", "key": name}}
        env.append({"name": name, "valueFrom": secret})
    container: dict[str, Any] = {
        "name": "pytorch",
        "image": "registry.example/rlhf:latest",
        "command": ["sh", "-c", driver(flags, "$RANK", "$MASTER_ADDR", "$MASTER_PORT")],
        "env": env,
        "volumeMounts": [
            {"name": "output", "mountPath": os.path.abspath(plan.config.output_dir)},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if placement.accelerator == "cuda":
        container["resources"] = {"limits": {"nvidia.com/gpu": placement.per_node}}
    pod = {
        "restartPolicy": "Never",
        "containers": [container],
        "volumes": [
            {"name": "output", "persistentVolumeClaim": {"claimName": "rlhf-output"}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
        ],
    }

    def replicas(count: int) -> dict[str, Any]:
        return {"replicas": count, "restartPolicy": "Never", "template": {"spec": pod}}

    specs = {"Master": replicas(1)}
    if len(placement.hosts) > 1:
        specs["Worker"] = replicas(len(placement.hosts) - 1)
    job = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": f"rlhf-{plan.config.name}".replace("_", "-").lower()},
        "spec": {"pytorchReplicaSpecs": specs},
    }
    head = [
        f"# rlhf example kubernetes {shlex.join(flags)}",
        "# Put in your image, and a claim (rlhf-output) that all pods can write (ReadWriteMany).",
    ]
    if plan.config.launch.forward:
        head.append("# kubectl create secret generic rlhf --from-literal=NAME=value")
    return "\n".join(head) + "\n" + yaml.dump(job, Dumper=_Plain, sort_keys=False, width=1000)


class _Plain(yaml.SafeDumper):
    """Without anchors: people edit this."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


LSF = """\
#!/bin/bash
# rlhf example lsf {flags}
# Submit with: bsub < this file
#BSUB -J rlhf-{name}
#BSUB -n {world}
#BSUB -R "span[ptile={per_node}]"
{gpus}#BSUB -o {output}/lsf-%J.out
set -u
{exports}
# One line for each slot, the hosts in order: every host once.
mapfile -t hosts < <(awk '!seen[$1]++ {{print $1}}' "$LSB_DJOB_HOSTFILE")
export MASTER_ADDR="${{hosts[0]}}" MASTER_PORT=$((20000 + LSB_JOBID % 20000))
export PROJECT="${{PROJECT:-$PWD}}"  # where train.py is, on every host
started=()
for node in "${{!hosts[@]}}"; do
  export NODE="$node"
  blaunch "${{hosts[node]}}" sh -c 'cd "$PROJECT" && {command}' &
  started+=($!)
done
# The first driver that fails ends the others; its exit code is the job's.
code=0
for _ in "${{started[@]}}"; do
  wait -n || {{ code=$?; kill "${{started[@]}}" 2>/dev/null; break; }}
done
wait
exit "$code"
"""


def lsf(flags: list[str]) -> str:
    """A batch script for LSF: blaunch starts one driver on each host; no ssh."""
    plan = planned(flags)
    placement = plan.placement
    command = driver(flags, "$NODE", "$MASTER_ADDR", "$MASTER_PORT")
    if "'" in command:
        raise ConfigError("rlhf example lsf: a flag's value with spaces or quotes: use a recipe")
    if plan.config.launch.forward:
        names = ", ".join(plan.config.launch.forward)
        raise ConfigError(f"--forward {names}: LSF passes the submitting shell's variables itself")
    gpus = f'#BSUB -gpu "num={placement.per_node}"\n' if placement.accelerator == "cuda" else ""
    return LSF.format(
        flags=shlex.join(flags),
        name=plan.config.name,
        world=placement.world_size,
        per_node=placement.per_node,
        gpus=gpus,
        output=os.path.abspath(plan.config.output_dir),
        exports="\n".join(f"export {k}={shlex.quote(v)}" for k, v in variables(plan).items()),
        command=command,
    )


EXAMPLES: dict[str, Callable[[list[str]], str]] = {"kubernetes": kubernetes, "lsf": lsf}
