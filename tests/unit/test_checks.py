"""The one list of checks: every fault told alike by the dry run, by doctor and by the run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import train
from launch import checklist
from launch.checklist import CHECKS
from launch.checks import BAD_SETTING, MISSING, Check, problem
from launch.looking import look_at_data
from launch.model_checks import check_models
from launch.options import parse_options
from launch.plan import make_plan
from launch.spec import PROJECT_ROOT
from rlhf.plan.classes import CAUSAL, SEQUENCE, families_with
from tests.unit.driver_help import write_model

WAYS = {"dry-run": ["--dry-run"], "doctor": ["doctor"], "run": []}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(checklist, "loopback_reduce", lambda placement: Check("x", "ok", "x"))


def failures(capsys: pytest.CaptureFixture[str], way: str, *argv: str) -> tuple[int, list[str]]:
    """(exit code, the failed checks' lines) of a command that must not start anything."""
    code = train.main([*WAYS[way][: way == "doctor"], *argv, *WAYS[way][way == "doctor" :]])
    out, err = capsys.readouterr()
    assert "DeepSpeed starts" not in out
    assert "Traceback" not in out + err
    said = out if way == "doctor" else err
    return code, [line.strip() for line in said.splitlines() if line.strip().startswith("FAIL")]


def rows(path: Path, *columns: str, count: int = 3) -> str:
    lines = [{name: f"{name} {number}" for name in columns} for number in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


# name -> (arguments, exit code, what the only failed lines say)
FAULTS: dict[str, tuple[Callable[[Path], list[str]], int, list[str]]] = {
    "no such file": (
        lambda tmp: ["--data-path", "nowhere.jsonl"], 3,
        ["'nowhere.jsonl': no such file or directory"],
    ),
    "no such sample": (
        lambda tmp: ["--data-path", "sample:cortesy"], 3, ["the samples are courtesy"],
    ),
    "another column": (
        lambda tmp: ["--step", "1", "--data-path", rows(tmp / "r.jsonl", "prompt", "answr")], 3,
        ["the columns are prompt, answr -> say which column it is: data.columns."],
    ),
    "a mapping that is wrong": (
        lambda tmp: ["--step", "1", "--data-path", rows(tmp / "r.jsonl", "prompt", "response"),
                     "data.columns.response=answer"], 2,
        ["has no column 'answer'; it has prompt, response"],
    ),
    "a column of ours misspelt": (
        lambda tmp: ["data.columns.chosn=x"], 2, ["Did you mean data.columns.chosen?"],
    ),
    "no such tiny family": (lambda tmp: ["--actor-model", "tiny:lama"], 2, ["Did you mean tiny:l"]),
    "no such directory": (lambda tmp: ["--actor-model", "./no"], 3, ["model ./no: no such file"]),
    "no such package": (
        lambda tmp: ["--actor-model", "package:no-such-thing"], 3, ["no_such_thing"],
    ),
    "a Windows path": (lambda tmp: ["--actor-model", "C:\\m\\x"], 3, ["a Windows path"]),
    "a kind of model that is none": (
        lambda tmp: ["--actor-model", "ollama:llama3"], 2, ["'ollama' is no kind of model"],
    ),
    "not on this machine": (
        lambda tmp: ["--actor-model", "org/model"], 3, ["hub: org/model: offline"],
    ),
    "too few positions": (
        lambda tmp: ["--step", "1", "--actor-model", str(write_model(
            tmp / "m", max_position_embeddings=128)), "step1.max_length=512"], 2,
        ["rows of up to 512 tokens (step1.max_length) for the base of step 1 (needed: at most its "
         "128 positions) -> lower step1.max_length to 128"],
    ),
    "too few positions for the rollout": (
        lambda tmp: ["step3.rollout.max_new_tokens=500"], 2,
        ["rows of up to 564 tokens (step3.rollout.max_prompt_length + step3.rollout.max_new_tok"],
    ),
    "a judge that does not exist": (
        lambda tmp: ["step3.eval.judge=no_such_module:f"], 2, ["no module 'no_such_module'"],
    ),
    "a judge that cannot be imported": (
        lambda tmp: [str((tmp / "broken_judge.py").write_text("raise OSError('no')"))[:0]
                     + "step3.eval.judge=broken_judge:f"], 2, ["raises OSError: no"],
    ),
    "a judge without the function": (
        lambda tmp: ["step3.eval.judge=json:no_such"], 2, ["json has no 'no_such'"],
    ),
    "vllm is not installed": (
        lambda tmp: ["step3.rollout.engine=vllm"], 3, ["the package vllm is not installed"],
    ),
    "no such tracker": (lambda tmp: ["track.trackers=[wandbb]"], 2, ["did you mean 'wandb'?"]),
    "a tracker that is not installed": (
        lambda tmp: ["track.trackers=[wandb]"], 3, ["pip install wandb"],
    ),
    "several at once": (
        lambda tmp: ["--data-path", "nowhere.jsonl", "--actor-model", "tiny:lama",
                     "step3.eval.judge=no_such_module:f"], 2,
        ["Did you mean tiny:llama?", "'nowhere.jsonl': no such", "no module 'no_such_module'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_every_way_says_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Issue 10, 5: one list, one exit code, all problems together, nothing started or written."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    arguments, wanted, parts = FAULTS[fault]
    if fault == "vllm is not installed":
        pytest.importorskip("torch")
    argv = arguments(tmp_path)
    told = {way: failures(capsys, way, *argv) for way in WAYS}
    assert told["dry-run"] == told["doctor"] == told["run"]
    code, lines = told["run"]
    assert code == wanted, lines
    assert len(lines) >= len(parts)
    for part in parts:
        assert any(part in line for line in lines), (part, lines)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "mambo"}, "transformers has no causal language model of family 'mambo'"),
        ({"model_type": ""}, "names no model_type"),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            "its weights are quantised (gptq in config.json)",
        ),
        ({"vocab_size": 1}, "its tokenizer has 2 tokens, its embeddings have 1 rows"),
    ],
)
def test_models_that_cannot_be_used(tmp_path: Path, changes: dict, said: str) -> None:
    (check, *_) = models(write_model(tmp_path / "m", **changes))
    assert check.state == "FAIL"
    assert said in check.line()


def test_a_model_that_can_be_used(tmp_path: Path) -> None:
    (check,) = models(write_model(tmp_path / "m"))
    assert check.state == "ok", check.line()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda m: (m / "model.safetensors").unlink(), "no weights in the directory"),
        (lambda m: (m / "tokenizer.json").unlink(), "no tokenizer in the directory"),
        (lambda m: (m / "tokenizer.json").write_text("[]"), "tokenizer.json holds a list"),
        (
            lambda m: (m / "model.safetensors").write_text("version https://git-lfs.github.com"),
            "model.safetensors is a Git LFS pointer",
        ),
        (lambda m: (m / "config.json").write_text("{"), "not readable as JSON"),
        (
            lambda m: (m / "config.json").rename(m / "adapter_config.json"),
            "an adapter (adapter_config.json), no whole model",
        ),
    ],
)
def test_directories_that_are_no_whole_model(tmp_path: Path, spoil: Callable, said: str) -> None:
    directory = write_model(tmp_path / "m")
    spoil(directory)
    (check, *_) = models(directory)
    assert check.state == "FAIL"
    assert said in check.line()


def models(directory: Path) -> list[Check]:
    argv = ["--step", "1", "--actor-model", str(directory), "step1.max_length=300"]
    return check_models(make_plan(parse_options(argv, {})))


def test_a_reward_model_needs_its_class(tmp_path: Path) -> None:
    """xglm writes text and has no sequence-classification class: fine for step 1, not for 2."""
    argv = ["--actor-model", str(write_model(tmp_path / "m", model_type="xglm"))]
    assert all(c.state == "ok" for c in check_models(make_plan(parse_options(
        ["--step", "1", *argv, "step1.max_length=300"], {}))))  # fmt: skip
    found = check_models(make_plan(parse_options([*argv, "step1.max_length=300"], {})))
    said = "no sequence classification model of family 'xglm', which the base of step 2 needs"
    assert any(said in check.line() for check in found)


def test_deepspeeds_kernels_are_for_opt_alone() -> None:
    """Elsewhere they end the process without a word (docs/gpu.md): said before anything starts."""
    asked = ["step3.rollout.engine=hybrid", "step3.rollout.hybrid_kernels=true"]

    def found(model: str, *settings: str) -> list[Check]:
        options = parse_options(["--actor-model", model, "--reward-model", "tiny:opt", *settings])
        return [c for c in check_models(make_plan(options)) if c.state == "FAIL"]

    assert not found("tiny:opt", *asked)
    assert not found("tiny:llama")
    (check,) = found("tiny:llama", *asked)
    assert check.exit_code == BAD_SETTING
    assert "kernels fail for the family 'llama'" in check.line()
    assert "leave out step3.rollout.hybrid_kernels" in check.line()


def test_the_tables_are_transformers_own() -> None:
    from transformers.models.auto import modeling_auto

    assert families_with(CAUSAL) == frozenset(getattr(modeling_auto, CAUSAL))
    assert families_with(SEQUENCE) == frozenset(getattr(modeling_auto, SEQUENCE))


def test_a_wrong_setting_counts_before_something_missing() -> None:
    missing = Check("a", "FAIL", "x", exit_code=MISSING)
    wrong = Check("b", "FAIL", "y", exit_code=BAD_SETTING)
    assert problem([Check("c", "ok", "z")]) is None
    for checks, code in (([missing], 3), ([missing, wrong], 2), ([wrong], 2)):
        error = problem([*checks, Check("c", "warn", "z")])
        assert error is not None
        assert error.exit_code == code
        assert f"{len(checks)} of {len(checks) + 1} checks failed" in str(error)
        assert all(check.line() in str(error) for check in checks)


def test_the_page_has_the_list() -> None:
    """docs/checks.md: a row for each check, in the order in which they are asked."""
    page = (PROJECT_ROOT / "docs" / "checks.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([a-z ]+)` \|", page, re.M) == [item.name for item in CHECKS]


def test_the_look_at_the_data_needs_no_torch(tmp_path: Path) -> None:
    path = rows(tmp_path / "r.jsonl", "prompt", "chosen", "rejected", count=40)
    (tmp_path / "resolved.json").write_text(
        json.dumps({"step": 2, "config": {"data": {"path": [path]}}})
    )
    code = (
        "import sys; from rlhf.data import preview; preview.main(sys.argv[1:]);"
        "print({'torch', 'transformers', 'datasets'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "resolved.json"], capture_output=True, text=True, check=False,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(PROJECT_ROOT)},
    )  # fmt: skip
    assert done.stderr.strip() == "set()"
    answer = json.loads(done.stdout)
    assert answer["exit_code"] == 0
    assert answer["sources"][0]["rows"] == 40
    assert any("chosen 0" in line for line in answer["stages"][0]["lines"])


def test_the_contents_fingerprint(tmp_path: Path) -> None:
    """Another content under the same name has another one; another name with it has the same."""
    path = rows(tmp_path / "r.jsonl", "prompt", "chosen", "rejected")
    plan = make_plan(parse_options(["--data-path", path], {}))
    (first,) = look_at_data(plan).sources or []
    os.utime(path, (1, 1))
    assert look_at_data(plan).sources == [first]
    with open(path, "a") as stream:
        stream.write('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    (second,) = look_at_data(plan).sources or []
    assert (first["rows"], second["rows"]) == (3, 4)
    assert first["fingerprint"] != second["fingerprint"]
