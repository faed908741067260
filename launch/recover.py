"""A step is launched until its result is proven, or until starting it again makes no sense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from launch import execute, failure
from launch.gate import RECOVERY
from launch.plan import StepPlan
from launch.supervise import Outcome
from rlhf.config.load import flatten, with_values
from rlhf.config.resolve import rows_per_step
from rlhf.errors import StepFailed, UserError
from rlhf.store import Manifest, RunDir, write_json_atomic
from rlhf.store.checkpoints import newest
from rlhf.store.files import disk_errors, remove

ROLLBACK_SCALE = 0.5


def run_step(
    run: RunDir, item: StepPlan, env: dict[str, str], lock: int | None = None
) -> tuple[Manifest, Outcome]:
    """Launches a step and proves its result; starts it again where the settings say so.

    `lock`: held until none of its processes is left.

    Raises what `execute.launch` and `execute.prove_result` raise when nothing is left to try.
    """
    launched = item.resolved.config.launch
    restarts, item = launched.max_restarts, _prepared(run, item)
    while True:
        before, kills = execute.stamp(run, item.stage), oom_kills()
        outcome = execute.launch(run, item, env, lock)
        try:
            return execute.prove_result(run, item, before, outcome), outcome
        except UserError as error:
            if item.stage.evaluates:
                done, _ = execute.published_since(run, item.stage, before)
                if done:  # what failed is its evaluation: launch/evaluation.py
                    return done, outcome
            records = failure.read_records(run.logs(item.stage))
            memory = failure.is_memory(outcome, records, killed_counts=oom_kills() > kills)
            if any(record.exit_code in (2, 3) for record in records):
                raise
            done, _ = execute.published_since(run, item.stage, before)
            if done and (restarts > 0 or (memory and launched.auto_batch)):
                # What failed came after it: starting again would find the step done.
                print(f"\n{error}\n\n{item.stage}: its artifact had been published and "
                      "verifies, so it is done and not started again", flush=True)  # fmt: skip
                return done, outcome
            if any(record.type == "Diverged" for record in records):
                item, why = _rolled_back(run, item, error)
            elif memory and launched.auto_batch:
                item, why = _smaller(item, error)
            elif restarts > 0:
                restarts -= 1
                why = f"starting it again; --max-restarts leaves {restarts} more"
            else:
                raise _with_checkpoint(run, item, error) from error
            item = _again(run, item)
            print(f"\n{error}\n\n{item.stage}: {why}; {_from(run, item)}", flush=True)


def oom_kills() -> int:
    """How many processes the kernel has killed for want of memory since the machine started."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _prepared(run: RunDir, item: StepPlan) -> StepPlan:
    """`never` (and --force) are done here, once: a restart goes on from what was saved since."""
    if item.fresh:
        if not item.spec.leads:  # another node's driver does it
            return _with_settings(item, {"checkpoint.resume": "auto"}, 1.0)
        with disk_errors(run.resume(item.stage)):
            remove(run.resume(item.stage))
        return _with_settings(item, {"checkpoint.resume": "auto"}, 1.0)
    return item


def _again(run: RunDir, item: StepPlan) -> StepPlan:
    """`always` would refuse where nothing is saved yet."""
    if newest(run.resume(item.stage)) is None:
        return _with_settings(item, {"checkpoint.resume": "auto"})
    return item


def _rolled_back(run: RunDir, item: StepPlan, error: UserError) -> tuple[StepPlan, str]:
    """Once: back to the last checkpoint with half the learning rate."""
    if item.resolved.learning_rate_scale != 1.0:
        raise StepFailed(
            f"{error}\n{item.stage} has diverged again after going back to a checkpoint with "
            f"its learning rates times {item.resolved.learning_rate_scale}: it is not tried a "
            "third time. Look at metrics.jsonl before the end, and at the rows in diverged/"
        ) from error
    write_json_atomic(
        run.resume(item.stage) / RECOVERY,
        {"learning_rate_scale": ROLLBACK_SCALE, "why": str(error)},
    )
    scaled = _with_settings(item, {}, ROLLBACK_SCALE)
    return scaled, f"it diverged; going back, once, with learning rates times {ROLLBACK_SCALE}"


def _smaller(item: StepPlan, error: UserError) -> tuple[StepPlan, str]:
    """Half the micro-batch, by rows and by tokens; the optimiser's batch, so the result, stays."""
    rows, resolved = item.stage.micro_batch, item.resolved
    flat = flatten(resolved.config.model_dump())
    # More than a rank's share is never read at once: halving that would change nothing.
    share = -(-rows_per_step(resolved.config, item.stage) // resolved.world_size)
    flat[rows] = min(int(flat[rows]), share)
    changes = {
        key: int(flat[key]) // 2
        for key in (rows, rows.replace("micro_batch_size", "micro_batch_tokens"))
        if flat.get(key)
    }
    if changes[rows] == 0:
        raise StepFailed(f"{error}\n--auto-batch: {rows} is 1 already") from error
    told = ", ".join(f"{key} {flat[key]} -> {value}" for key, value in changes.items())
    return _with_settings(
        item, changes
    ), f"out of memory; --auto-batch sets {told} (the batch stays)"


def _with_settings(
    item: StepPlan, changes: Mapping[str, object], scale: float | None = None
) -> StepPlan:
    resolved = item.resolved.model_copy(
        update={"config": with_values(item.resolved.config, changes)}
    )
    if scale is not None:
        resolved = resolved.model_copy(update={"learning_rate_scale": scale})
    return replace(item, resolved=resolved, fresh=False)


def _from(run: RunDir, item: StepPlan) -> str:
    found = newest(run.resume(item.stage))
    return f"from checkpoint {found[0].name}" if found else "from its beginning (nothing was saved)"


def _with_checkpoint(run: RunDir, item: StepPlan, error: UserError) -> UserError:
    """A failure, with what is not lost."""
    found = newest(run.resume(item.stage))
    if found is None or not isinstance(error, StepFailed):
        return error
    return StepFailed(f"{error}\nSaved: {found[0]}; the same command goes on from there")
