"""Fakes for the driver's tests: step scripts that take no time, started without deepspeed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rlhf import stages
from rlhf.store import RunDir, jsonable, publish

# A step that behaves as $FAKE says, for the step in $FAKE_STEP only (default: all). Of modes with
# commas between them, each start takes the next; `attempts.jsonl` has what each was told.
SCRIPT = """
import json, os, sys, time, pathlib
sys.path.insert(0, {root!r})
resolved = json.loads(pathlib.Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
step, run = resolved["step"], pathlib.Path(resolved["run_dir"])
mode = os.environ.get("FAKE", "ok")
if os.environ.get("FAKE_STEP", str(step)) != str(step):
    mode = "ok"
with (run / "attempts.jsonl").open("a+") as attempts:
    attempts.write(json.dumps(resolved) + "\\n")
    attempts.seek(0)
    modes = mode.split(",")
    mine = [line for line in attempts if json.loads(line)["step"] == step]
    mode = modes[min(len(mine), len(modes)) - 1]
logs = run / {dirs!r}[step] / "logs"
evaluates = sys.argv[0].endswith("evaluation.py")
print("" if evaluates else f"this is step {{step}} as {{mode}}", flush=True)

def record(**fields):
    base = {{"rank": 0, "phase": "train", "type": "RuntimeError", "message": "it broke",
            "remedy": "", "traceback": "", "exit_code": 1}}
    (logs / "rank0.failure.json").write_text(json.dumps({{**base, **fields}}))

def make():
    from tests.unit.driver_help import make_artifact, make_evaluation
    make_artifact(
        run, step, resolved["config"], resolved["parents"], resolved.get("data_sources")
    )
    if step == 3 and os.environ.get("FAKE_EVALUATION", "ok") == "ok":
        make_evaluation(run, "reward 1.0 -> 2.0\\n")

(logs / "rank0.done.json").unlink(missing_ok=True)
if evaluates:
    from tests.unit.driver_help import make_evaluation
    judge = resolved["config"]["step3"]["eval"]["judge"]
    print("this is the evaluation, judge", judge, flush=True)
    if judge == "bad:judge":
        record(phase="evaluate", type="JudgeFailed", message="judge 'bad:judge' raised",
               remedy="judge 'bad:judge' raised")
        sys.exit(1)
    make_evaluation(run, "verdict of " + str(judge) + "\\n")
    (logs / "rank0.done.json").write_text(json.dumps({{"rank": 0, "host": "here"}}))
    sys.exit(0)
if mode in ("ok", "crash_after"):
    make()
    (logs / "rank0.done.json").write_text(json.dumps({{"rank": 0, "host": "here"}}))
elif mode == "no_marker":
    make()
elif mode == "record_after":
    make()
    record()
if mode == "fail":
    record()
    print("Traceback: it broke", file=sys.stderr)
elif mode == "requirement":
    record(exit_code=3, type="DataError", message="rows.jsonl: no rows; give --data-path")
elif mode == "diverge":
    record(type="Diverged", message="the training loss is nan")
elif mode == "save_and_fail":
    from tests.unit.driver_help import make_checkpoint
    make_checkpoint(run, step, resolved)
    record()
elif mode == "memory":
    record(type="OutOfMemoryError", message="CUDA out of memory.")
elif mode == "sleep":
    (run / "asleep").write_text(str(os.getpid()) + "\\n")
    time.sleep(600)
failed = ("fail", "memory", "crash_after", "diverge", "save_and_fail")
sys.exit(mode in failed or (3 if mode == "requirement" else 0))
"""


def make_checkpoint(run: Path, step: int, resolved: dict[str, Any], position: int = 7) -> Path:
    """A checkpoint as the step would save it, but for what the ranks write."""
    from rlhf.config.resolve import decisive
    from rlhf.store import MANIFEST, checkpoints, read_manifest

    parents: dict[str, str] = {}
    for name, place in resolved["parents"].items():
        ours = (Path(place) / MANIFEST).is_file()
        parents[name] = read_manifest(place).id if ours else place
    resume = RunDir(run).resume(step)
    temporary = checkpoints.begin(resume, position)
    (temporary / "rank0.pt").write_bytes(b"state")
    return checkpoints.finish(
        temporary,
        resume,
        {
            "step": step,
            "position": position,
            "world_size": resolved["world_size"],
            "engines": {},
            "settings": decisive(resolved["config"], stages.get(step)),
            "parents": parents,
            "data_fingerprint": "d" * 64,
            "data_sources": resolved.get("data_sources"),
        },
    )


def make_artifact(
    run: Path,
    step: int,
    config: Any,
    parents: dict[str, str] | None = None,
    sources: Any = None,
    weights: bytes = b"weights",
) -> str:
    """Publishes a small artifact as the step would; returns its id."""
    from rlhf.store import MANIFEST, read_manifest

    records = {}
    for name, path in (parents or {}).items():
        known = (Path(path) / MANIFEST).is_file()
        records[name] = {"path": path, "id": read_manifest(path).id if known else None}
    manifest = publish(
        RunDir(run).step_dir(step),
        lambda directory: (directory / "model.safetensors").write_bytes(weights) and None,
        kind=stages.get(step).makes,
        step=step,
        parents=records,
        data_fingerprint="d" * 64,
        tokenizer_fingerprint="t" * 64,
        config=jsonable(config),
        metrics={"accuracy": 0.75},
        data_sources=sources,
    )
    return manifest.id


def make_evaluation(run: Path, text: str, verdict: dict[str, Any] | None = None) -> None:
    """Publishes an evaluation of step 3's artifact, with this verdict."""
    from rlhf.store import read_manifest, write_json_atomic

    policy = read_manifest(RunDir(run).artifact("ppo"))

    def write(directory: Path) -> None:
        (directory / "verdict.txt").write_text(text)
        write_json_atomic(directory / "verdict.json", verdict or {})

    publish(
        RunDir(run).step_dir(3),
        write,
        name="evaluation",
        kind="evaluation",
        step=3,
        parents={"ppo": {"path": str(RunDir(run).artifact("ppo")), "id": policy.id}},
        data_fingerprint="d" * 64,
        tokenizer_fingerprint="t" * 64,
        config={
            "policy": policy.content_id,
            "eval": policy.config.get("step3", {}).get("eval", {}),
        },
        metrics={},
    )


SOURCES = [{"name": "sample:courtesy", "fingerprint": "f" * 64, "rows": 100}]


def data_as_it_is(
    monkeypatch: Any, sources: list[dict[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """The driver finds this data instead of asking a process of its own; returns the list, which a
    test may change."""
    import launch.checklist
    import train
    from launch.looking import Looked

    found = [dict(one) for one in sources or SOURCES]

    def look(plan: Any, *, download: bool = False) -> Looked:
        return Looked(sources=[dict(one) for one in found])

    monkeypatch.setattr(launch.checklist, "look", look)
    monkeypatch.setattr(train, "look_at_data", look)
    return found


def write_model(directory: Path, **changes: Any) -> Path:
    """A model's files as far as a glance tells: a tiny Llama's configuration, empty weights."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "intermediate_size": 8, "vocab_size": 4, "max_position_embeddings": 512, **changes,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    header = b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    weights = len(header).to_bytes(8, "little") + header + bytes(4)
    (directory / "model.safetensors").write_bytes(weights)
    (directory / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0, "b": 1}}}')
    return directory


def folders() -> dict[int, str]:
    """Number of a stage -> its folder; of the default pipeline where several have that number."""
    return {stage.number: stages.get(stage.number).folder for stage in stages.STAGES.values()}


def write_scripts(root: Path, project: Path) -> None:
    """Fake step scripts below `root`, in the project's layout."""
    dirs = folders()
    for folder in dirs.values():
        (root / folder).mkdir(parents=True, exist_ok=True)
        text = SCRIPT.format(root=str(project), dirs=dirs)
        (root / folder / "main.py").write_text(text)
    (root / stages.PPO.folder / "evaluation.py").write_text(text)


def plain(script: Path, args: list[str], placement: Any) -> list[str]:
    """A launcher that starts one plain process."""
    return [sys.executable, str(script), *args]


def read(path: Path) -> Any:
    return json.loads(path.read_text())
