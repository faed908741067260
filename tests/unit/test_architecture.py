"""The shape of the code: imports point down only, files and functions stay readable (DESIGN)."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("step1_sft", "step2_reward", "step2_dpo", "step3_ppo")
OURS = ("train", "launch", "rlhf", *STEPS)
FILES = sorted(
    path
    for top in OURS
    for path in (ROOT / f"{top}.py", *(ROOT / top).rglob("*.py"))
    if path.exists()
)
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80

# file or folder -> what of ours it may import (itself always)
MAY_IMPORT = {
    "train.py": ("launch", "rlhf.config", "rlhf.store", "rlhf.errors", "rlhf.redact", "rlhf.home"),
    "rlhf/stages.py": ("rlhf.errors",),
    "launch": (
        "rlhf.config",
        "rlhf.store",
        "rlhf.plan",
        "rlhf.families",
        "rlhf.stages",
        "rlhf.errors",
        "rlhf.redact",
        "rlhf.secrets",
        "rlhf.lifeline",
        "rlhf.evaluation.reward_model",  # is it good enough for step 3; it imports nothing of ours
        "rlhf.evaluation.answers",  # of two runs, compared; imports nothing heavy
        "rlhf.evaluation.compare",
        "rlhf.evaluation.intervals",
        "rlhf.evaluation.published",
        "rlhf.track.forward",  # which trackers there are; it imports nothing heavy
        "rlhf.track.metrics",  # reads metrics.jsonl; it imports nothing heavy
    ),
    "rlhf/errors.py": (),
    "rlhf/secrets.py": (),
    "rlhf/evaluation/reward_model.py": (),
    "rlhf/redact.py": ("rlhf.secrets",),
    "rlhf/lifeline.py": (),
    "rlhf/text.py": (),
    "rlhf/home.py": ("rlhf.errors",),
    "rlhf/config": ("rlhf.stages", "rlhf.errors", "rlhf.redact"),
    "rlhf/store": ("rlhf.config", "rlhf.stages", "rlhf.errors"),
    "rlhf/families": ("rlhf.errors",),
    "rlhf/plan": ("rlhf.config", "rlhf.families", "rlhf.stages", "rlhf.errors"),
    "rlhf/rewards": ("rlhf.config", "rlhf.data.courtesy_judge", "rlhf.errors"),
    "rlhf/serving": ("rlhf.config", "rlhf.data", "rlhf.models", "rlhf.store", "rlhf.errors"),
    "rlhf/algo": (),
    **{step: ("rlhf", step) for step in STEPS},
}
LIGHT = (
    "train.py",
    "launch",
    "rlhf/stages.py",
    "rlhf/config",
    "rlhf/store",
    "rlhf/families",
    "rlhf/plan",
)
ENGINE_OWNERS = ("rlhf/engine", "rlhf/rollout")
CERTIFICATE = "rlhf/certify"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of everything a file imports, at any depth of it."""
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, f"{stem}.{alias.name}"


def below(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def belongs(path: Path, place: str) -> bool:
    relative = path.relative_to(ROOT).as_posix()
    return relative == place or relative.startswith(place + "/")


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 30
    names = [name for path in FILES for _, name in imports(path)]
    assert any(below(name, ("deepspeed",)) for name in names)
    assert any(below(name, ("rlhf.store",)) for name in names)


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_imports_point_down(place: str) -> None:
    """DESIGN: train -> launch -> rlhf.config, rlhf.store; a step imports no other, nor launch."""
    own = (place.removesuffix(".py").replace("/", "."),)
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in FILES
        if belongs(path, place)
        for line, name in imports(path)
        if below(name, OURS) and not below(name, (*MAY_IMPORT[place], *own))
    ]
    assert wrong == []


def test_the_library_knows_no_step_and_no_launcher() -> None:
    """But for the certificate: a program of its own, which runs the steps' code and which nobody
    imports."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in FILES
        if belongs(path, "rlhf")
        for line, name in imports(path)
        if below(name, ("launch", "train", *(() if belongs(path, CERTIFICATE) else STEPS)))
        or (below(name, ("rlhf.certify",)) and not belongs(path, CERTIFICATE))
    ]
    assert wrong == []


def test_deepspeed_has_one_owner() -> None:
    """DESIGN decision 3; rollout engines implement DeepSpeed's interface (decision 4)."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in FILES
        if not any(belongs(path, owner) for owner in ENGINE_OWNERS)
        for line, name in imports(path)
        if below(name, ("deepspeed",))
    ]
    assert wrong == []


def test_no_file_knows_a_stage_by_its_number() -> None:
    """But for its row in rlhf/stages.py: no comparison of a step with a number, no table keyed by
    all of them."""
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in FILES
        if not belongs(path, "rlhf/stages.py")
        for line, text in stage_numbers(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert wrong == []


def stage_numbers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, code) of what looks like a decision by a stage's number."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            named = any(ast.unparse(side).split(".")[-1] in ("step", "steps") for side in sides)
            numbers = [n for side in sides for n in ast.walk(side) if isinstance(n, ast.Constant)]
            if named and any(n.value in (1, 2, 3) and n.value is not True for n in numbers):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Dict):
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            if keys == [1, 2, 3] and all(type(key) is int for key in keys):
                yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("if item.step == 3: pass", 1),
        ("if 3 in options.steps: pass", 1),
        ("if step < 3: pass", 1),
        ("if stage.generates and step == total: pass", 0),
        ('x = {1: "sft", 2: "reward", 3: "ppo"}', 1),
        ("if steps > 0: pass", 0),
    ],
)
def test_decisions_by_number_are_seen(code: str, count: int) -> None:
    assert len(list(stage_numbers(ast.parse(code)))) == count


def test_the_maths_imports_torch_only() -> None:
    """DESIGN: rlhf/algo takes tensors and floats, never config, engine or rank."""
    allowed = (*sys.stdlib_module_names, "torch", "rlhf.algo")
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in FILES
        if belongs(path, "rlhf/algo")
        for line, name in imports(path)
        if not below(name, allowed) or below(name, ("torch.distributed",))
    ]
    assert wrong == []


def test_the_light_folders_import_nothing_heavy() -> None:
    """The driver's side runs without torch: also inside functions."""
    heavy = ("torch", "transformers", "datasets", "numpy", "deepspeed", "accelerate", "peft")
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in FILES
        if any(
            belongs(path, p)
            for p in (
                "train.py",
                "launch",
                "rlhf/config",
                "rlhf/store",
                "rlhf/families",
                "rlhf/plan",
            )
        )
        for line, name in imports(path)
        if below(name, heavy)
    ]
    assert wrong == []


def test_files_and_functions_stay_short() -> None:
    """At most 400 lines a file; 80 a function, unless the line above it says why."""
    wrong = []
    for path in FILES:
        lines = path.read_text(encoding="utf-8").splitlines()
        where = path.relative_to(ROOT)
        if len(lines) > MAX_FILE_LINES:
            wrong.append(f"{where}: {len(lines)} lines")
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                excused = lines[node.lineno - 2].lstrip().startswith("# long:")
                if length > MAX_FUNCTION_LINES and not excused:
                    wrong.append(f"{where}:{node.lineno}: {node.name} has {length} lines")
    assert wrong == []


def test_no_shell_strings_and_no_pickle() -> None:
    """DESIGN decision 1: a list of arguments, never a shell string; safe formats only."""
    wrong = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "shell":
                wrong.append(f"{path.relative_to(ROOT)}:{node.value.lineno}: shell=")
        for line, name in imports(path):
            if name == "pickle.UnpicklingError":  # to report what torch refused to read
                continue
            if below(name, ("pickle", "dill", "cloudpickle", "os.system")):
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {name}")
    assert wrong == []


def test_the_rules_would_catch_a_violation(tmp_path: Path) -> None:
    """The reader sees relative imports, names from packages, and imports inside functions."""
    path = ROOT / "rlhf" / "algo" / "__init__.py"
    assert module_of(path) == "rlhf.algo"
    source = tmp_path / "x.py"
    source.write_text("def f():\n    from rlhf import engine\n    import deepspeed.comm as c\n")
    names = []
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    assert names == ["rlhf.engine", "deepspeed.comm"]
    assert below("deepspeed.comm", ("deepspeed",))
    assert not below("deepspeed_x", ("deepspeed",))
