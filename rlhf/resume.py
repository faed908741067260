"""A step's whole state, saved now and then, on a signal, and found again at the next start."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch

from rlhf.config.resolve import decisive
from rlhf.engine import checkpoint, comm
from rlhf.engine.ema import WeightEMA
from rlhf.engine.integrity import Integrity
from rlhf.engine.train import FrozenEngine, TrainEngine
from rlhf.errors import ArtifactError, ConfigError, RequirementError, UserError
from rlhf.harness import StepRun, Stopped, put_away
from rlhf.redact import redact_tree
from rlhf.store import checkpoints
from rlhf.store.files import disk_errors, remove
from rlhf.store.jsonio import jsonable

# At the end of training, save if starting again would cost more seconds than this.
WORTH_SAVING = 60.0


class Stateful(Protocol):
    """A part of a step with a state of its own."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, texts, lists and dicts of them."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Keeper:
    """Checkpoints of one step. All ranks make one and call its methods together.

    Args:
        engines: name -> engine whose weights and optimiser are state.
        parts: name -> other state of this rank (sampling, averages, KL controller).
        data_fingerprint: of the rows that are trained on.
        frozen: name -> engine that only reads; its weights are looked after.

    A checkpoint holds these, every rank's random generators and the loop's own state.
    """

    def __init__(
        self,
        run: StepRun,
        engines: Mapping[str, TrainEngine],
        parts: Mapping[str, Stateful] | None = None,
        *,
        data_fingerprint: str,
        frozen: Mapping[str, FrozenEngine] | None = None,
    ) -> None:
        self.run, self.engines, self.parts = run, dict(engines), dict(parts or {})
        self.settings = run.config.checkpoint
        self.place = run.directory.resume(run.resolved.step)
        self.data_fingerprint = data_fingerprint
        self.metrics_bytes: int | None = None
        """Where metrics.jsonl ended at the checkpoint that was restored; None: a fresh start."""
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        # What is written already is not lost when the step fails right after it.
        run.at_end.append(self._end)
        self._saved_at = time.monotonic()
        self._integrity = None
        if self.settings.check_every:
            averages = {n: p for n, p in self.parts.items() if isinstance(p, WeightEMA)}
            self._integrity = Integrity(
                self.engines, frozen or {}, lambda text: run.say(text), averages
            )

    def restore(self) -> dict[str, Any]:
        """The loop's state at the newest checkpoint that verifies; {} where there is none.

        Raises ConfigError (made with other settings), RequirementError (`always`, and none),
        ArtifactError (DeepSpeed cannot read it).
        """
        found = comm.broadcast_object(self._find() if self.run.rank == 0 else None)
        if found["error"]:
            raise (ConfigError if found["refused"] else RequirementError)(found["error"])
        self._saved_at = time.monotonic()
        scale = self.run.resolved.learning_rate_scale
        if found["path"] is None:
            if scale != 1.0:
                for engine in self.engines.values():
                    engine.set_hyperparameters(engine.hyperparameters(), scale)
            self.run.can_save = True
            return {}
        path = Path(found["path"])
        mine = self._read(path / f"rank{self.run.rank}.pt")
        for name, engine in self.engines.items():
            checkpoint.load_engine(engine, path / name, learning_rate_scale=scale)
        for name, part in self.parts.items():
            part.load_state_dict(mine["parts"][name])
        checkpoint.set_random_state(mine["random"])
        self.metrics_bytes = found["metrics_bytes"]
        for name, seconds in mine["phases"].items():
            self.run.phases[name] = self.run.phases.get(name, 0.0) + seconds
        self.run.say(
            f"step {self.run.resolved.step}: going on from {path.name} "
            f"({found['position']} done), saved {found['created']}"
        )
        self.run.can_save = True
        return dict(mine["state"])

    def after(
        self,
        position: int,
        state: dict[str, Any],
        *,
        metrics_bytes: int,
        last: bool = False,
    ) -> None:
        """Call after each optimiser step or iteration, all of its figures logged.

        Saves when it is time, at the end of a long training (`last`), and when the run is told to
        stop; then raises Stopped. Before that, and every `checkpoint.check_every`, it looks for
        weights that changed by themselves; raises Corrupted.
        """
        stop, due = self._agree(position, last)
        every = self.settings.check_every
        if self._integrity and (due or stop or last or position % every == 0):
            self._integrity.check(position)
        if due or stop:
            self._save(position, state, metrics_bytes)
        if stop:
            self._wait()
            self.run.say(
                f"step {self.run.resolved.step}: stopped by a signal after {position}; a "
                "checkpoint was saved, the same command goes on from it"
            )
            raise Stopped(stop)
        if last:
            self._wait()

    def _agree(self, position: int, last: bool) -> tuple[int, bool]:
        """(signal to stop for, is it time to save): the same on every rank."""
        every, waited = self.settings.save_every, time.monotonic() - self._saved_at
        by_time = self.settings.save_minutes and waited >= 60 * self.settings.save_minutes
        due = bool(by_time) or (last and waited > WORTH_SAVING)
        flags = torch.tensor([self.run.stop, due and self.run.rank == 0], dtype=torch.long)
        stop, due_now = comm.all_reduce(flags.to(comm.device()), "max").tolist()
        return stop, bool(due_now) or (every > 0 and position % every == 0)

    def _save(self, position: int, state: dict[str, Any], metrics_bytes: int) -> None:
        """Every rank writes its part; rank 0 then hashes and names the whole, in the background."""
        self._wait()
        run, step = self.run, self.run.resolved.step
        made = checkpoints.begin(self.place, position) if run.rank == 0 else None
        temporary = Path(comm.broadcast_object(str(made)))
        with _removed_if_failed(temporary), disk_errors(self.place):
            for name, engine in self.engines.items():
                checkpoint.save_engine(engine, temporary / name)
            mine = {
                "state": state,
                "phases": run.seconds_by_phase(),
                "random": checkpoint.random_state(),
                "parts": {name: part.state_dict() for name, part in self.parts.items()},
            }
            torch.save(mine, temporary / f"rank{run.rank}.pt")
        comm.barrier()
        if run.rank == 0:
            content = {
                "step": step,
                "position": position,
                "world_size": comm.world_size(),
                "engines": {name: checkpoint.shape(e) for name, e in self.engines.items()},
                "settings": redact_tree(decisive(jsonable(run.config), step)),
                "parents": run.parent_ids(),
                "data_fingerprint": self.data_fingerprint,
                "data_sources": run.resolved.data_sources,
                "metrics_bytes": metrics_bytes,
            }
            self._pending = self._writer.submit(self._finish, temporary, content)
        self._saved_at = time.monotonic()

    def _finish(self, temporary: Path, content: dict[str, Any]) -> None:
        checkpoints.finish(temporary, self.place, content)
        checkpoints.prune(self.place, self.settings.keep_last)

    def _wait(self) -> None:
        """Until the last checkpoint has its name; raises what went wrong."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()
        comm.barrier()

    def _end(self) -> None:
        """The step is over, well or not: what is being written is finished; raises what went wrong
        in that, which nobody has waited for."""
        self._writer.shutdown()
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _find(self) -> dict[str, Any]:
        """Rank 0's decision: which checkpoint to go on from, if any, or why not."""
        answer: dict[str, Any] = {"path": None, "error": "", "refused": False}
        try:
            if self.settings.resume == "never":
                remove(self.place)
            else:
                checkpoints.clean(self.place)
            found, skipped = checkpoints.newest_proven(self.place)
            for why in skipped:
                self.run.say(f"warning: passed over a checkpoint: {why}")
            if found is None and self.settings.resume == "always":
                raise RequirementError(
                    f"--resume always: {self.place} has no whole checkpoint; use --resume auto"
                )
            if found is None:
                put_away(self.run.step_dir)
                return answer
            path, record = found
            answer["error"] = self._refusal(path, record)
            answer["refused"] = bool(answer["error"])
            answer |= {
                "path": str(path),
                "position": record.position,
                "created": record.created,
                "metrics_bytes": record.metrics_bytes,
            }
        except UserError as error:
            answer["error"] = str(error)
        except OSError as error:
            answer["error"] = f"{self.place}: {error.strerror}"
        return answer

    def _refusal(self, path: Path, record: checkpoints.Checkpoint) -> str:
        step = self.run.resolved.step
        fatal, changed = checkpoints.differences(
            record,
            settings=redact_tree(decisive(jsonable(self.run.config), step)),
            parents=self.run.parent_ids(),
            world_size=comm.world_size(),
        )
        if record.step != step:
            fatal.append(f"it is one of step {record.step}")
        if record.data_fingerprint != self.data_fingerprint:
            fatal.append("the training data was other data")
        for name, engine in self.engines.items():
            ours, theirs = checkpoint.shape(engine), record.engines.get(name)
            if ours != theirs:
                fatal.append(f"the {name} was {theirs}, it is {ours} now")
        if self.settings.resume == "always":
            changed = []
        return checkpoints.refusal(path, fatal, changed)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            return dict(torch.load(path, weights_only=True, map_location="cpu"))
        except Exception as error:
            raise ArtifactError(
                f"{path}: cannot be read ({error}); to start the step again: --resume never"
            ) from error


@contextlib.contextmanager
def _removed_if_failed(temporary: Path) -> Iterator[None]:
    """A part of a checkpoint on a full disk would keep it full."""
    try:
        yield
    except ArtifactError:
        with contextlib.suppress(OSError):
            remove(temporary)
        raise
