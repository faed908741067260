"""Issue 11: broken config.json, tokenizer and weight files are refused before anything is built,
in one line that names file, key, value and rule: by the driver's checks and by the steps' loaders.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from launch import checklist
from launch.checks import Check
from launch.model_checks import check_models
from launch.options import parse_options
from launch.plan import make_plan
from launch.spec import PROJECT_ROOT
from rlhf.config.schema import EngineConfig, ModelConfig
from rlhf.errors import RequirementError
from rlhf.families import TINY_FAMILIES
from rlhf.models import load_causal, load_scalar, load_tokenizer
from rlhf.plan.files import model_faults
from rlhf.plan.files.config import parameters
from tests.unit import model_help as help_

Spoil = Callable[[Path], object]


def sets(**changes: Any) -> Spoil:
    return in_file("config.json", **changes)


def in_file(name: str, **changes: Any) -> Spoil:
    def spoil(place: Path) -> None:
        content = json.loads((place / name).read_text())
        (place / name).write_text(json.dumps({**content, **changes}))

    return spoil


def writes(name: str, text: str | bytes) -> Spoil:
    raw = text.encode() if isinstance(text, str) else text
    return lambda place: (place / name).write_bytes(raw)


def cuts(name: str, share: float) -> Spoil:
    def spoil(place: Path) -> None:
        content = (place / name).read_bytes()
        (place / name).write_bytes(content[: int(len(content) * share)])

    return spoil


def token_id(number: int) -> Spoil:
    def spoil(place: Path) -> None:
        content = json.loads((place / "tokenizer.json").read_text())
        vocab = content["model"]["vocab"]
        vocab["zzz"] = number
        del vocab[next(iter(vocab))]
        (place / "tokenizer.json").write_text(json.dumps(content))

    return spoil


def twice(place: Path) -> None:
    text = (place / "config.json").read_text().rstrip()
    (place / "config.json").write_text(text[:-1] + ', "hidden_size": 64}')


CONFIG: dict[str, tuple[Spoil, str]] = {
    "absent": (lambda place: (place / "config.json").unlink(), "config.json: no such file"),
    "empty": (writes("config.json", " \n"), "config.json is empty (needed: a JSON object)"),
    "not JSON": (writes("config.json", "{hidden_size: 3}"), "config.json is not readable as JSON"),
    "cut off": (cuts("config.json", 0.5), "config.json is not readable as JSON"),
    "not UTF-8": (writes("config.json", b'{"a": "\xff"}'), "config.json is not readable as JSON"),
    "a list": (writes("config.json", "[1]"), "config.json holds a list (needed: a JSON object)"),
    "text": (writes("config.json", '"llama"'), "config.json holds text (needed: a JSON object)"),
    "null": (writes("config.json", "null"), "config.json holds null (needed: a JSON object)"),
    "deep": (writes("config.json", '{"a":' * 10**5), "config.json nests too deep"),
    "a key twice": (twice, 'config.json: "hidden_size" is given twice: 32, 64'),
    "size 0": (sets(hidden_size=0), "hidden_size is 0 (needed: a whole number from 1 to 10^9)"),
    "no heads": (sets(num_attention_heads=0), "num_attention_heads is 0 (needed: a whole"),
    "no vocabulary": (sets(vocab_size=0), "vocab_size is 0 (needed: a whole number"),
    "negative": (sets(intermediate_size=-48), "intermediate_size is -48 (needed: "),
    "size as text": (sets(hidden_size="32"), 'hidden_size is "32" (needed: whole numbers'),
    "true as a size": (sets(num_hidden_layers=True), "num_hidden_layers is true (needed: "),
    "a list for a size": (sets(hidden_size=[32]), "hidden_size is a list of 1 (needed: a whole"),
    "NaN": (sets(hidden_size=float("nan")), "config.json: hidden_size is NaN (needed: a number)"),
    "infinite": (sets(rms_norm_eps=float("inf")), "rms_norm_eps is Infinity (needed: a number"),
    "too large": (sets(vocab_size=10**12), "vocab_size is 1000000000000 (needed: whole numbers"),
    "heads": (sets(num_attention_heads=5, head_dim=None, num_key_value_heads=5),
              "5 attention heads do not divide the hidden size 32"),
    "key-value heads": (sets(num_key_value_heads=3),
                        "num_key_value_heads is 3, which does not divide 4 heads"),
    "a million layers": (sets(num_hidden_layers=10**6),
                         "num_hidden_layers is 1000000 (needed: a whole number from 1 to 10,000)"),
    "a million layers of another family": (
        sets(model_type="stablelm", num_hidden_layers=10**6), "num_hidden_layers is 1000000"),
    "no family": (sets(model_type=""), "names no model_type"),
    "a number for a family": (sets(model_type=7), "model_type is 7 (needed: the name of a family"),
    "an unknown family": (sets(model_type="mambo"), "no causal language model of family 'mambo'"),
    "an activation": (sets(hidden_act="silly"), 'hidden_act is "silly" (needed: one of '),
    "an activation that is none": (sets(hidden_act=3), "hidden_act is 3 (needed: text"),
    "rotary positions": (sets(rope_scaling={"rope_type": "wild"}),
                         'rope_scaling has the type "wild" (needed: one of default, '),
    "dropout": (sets(attention_dropout="much"), 'attention_dropout is "much" (needed: a number'),
    "a dtype": (sets(dtype="float7"), 'dtype is "float7" (needed: one of float32, '),
    "quantised": (sets(quantization_config={"quant_method": "gptq"}), "quantised (gptq in config"),
    "a special token": (sets(eos_token_id=10**6), "eos_token_id is 1000000 (needed: ids from 0 to"),
    "one of several": (sets(eos_token_id=[1, -7]), "eos_token_id is -7 (needed: ids from 0 to"),
    "code": (sets(model_type="evil", auto_map={"AutoConfig": "m.C"}), "trust_remote_code=true"),
    "code for a known family": (
        sets(architectures=["Evil"], auto_map={"AutoModelForCausalLM": "m.Evil"}),
        'architectures names "Evil", whose code auto_map names'),
    "auto_map": (sets(auto_map=["m.C"]), "auto_map is a list of 1 (needed: a JSON object)"),
}  # fmt: skip

TOKENIZER: dict[str, tuple[Spoil, str]] = {
    "empty": (writes("tokenizer.json", ""), "tokenizer.json is empty"),
    "cut off": (cuts("tokenizer.json", 0.7), "tokenizer.json is not readable as JSON"),
    "a list": (writes("tokenizer.json", "[]"), "tokenizer.json holds a list"),
    "no model": (in_file("tokenizer.json", model=None), "tokenizer.json: model.vocab is null"),
    "another model": (in_file("tokenizer.json", model={"type": "X", "vocab": {}}),
                      'tokenizer.json: model.type is "X" (needed: one of BPE, '),
    "added tokens": (in_file("tokenizer.json", added_tokens=[{"id": "3", "content": "x"}]),
                     "tokenizer.json: added_tokens is a list of 1 (needed: a list of objects"),
    "an added token far away": (
        in_file("tokenizer.json", added_tokens=[{"id": 10**8, "content": "<x>"}]),
        'the id of the added token "<x>" is 100000000 (needed: ids below'),
    "an id without a row": (token_id(10**6), 'the id of "zzz" is 1000000 (needed: ids below'),
    "a negative id": (token_id(-1), 'tokenizer.json: the id of "zzz" is -1'),
    "a small vocabulary": (sets(vocab_size=200), "its embeddings have 200 rows"),
    "settings that are no object": (writes("tokenizer_config.json", "7"), "holds a number"),
    "settings cut off": (cuts("tokenizer_config.json", 0.5), "tokenizer_config.json is not read"),
    "a token that is a number": (in_file("tokenizer_config.json", eos_token=7),
                                 "tokenizer_config.json: eos_token is 7 (needed: text, or an"),
    "a template that is a number": (in_file("tokenizer_config.json", chat_template=7),
                                    "tokenizer_config.json: chat_template is 7 (needed: text"),
    "a template's bytes": (writes("chat_template.jinja", b"\xff\xfe"), "jinja is not readable"),
}  # fmt: skip


def index_of(file: str) -> Spoil:
    """The weights move to where `file` says, and an index names that place."""

    def spoil(place: Path) -> None:
        target = Path(os.path.normpath(place / file))
        target.parent.mkdir(parents=True, exist_ok=True)
        (place / "model.safetensors").rename(target)
        index = {"metadata": {}, "weight_map": {"model.norm.weight": file}}
        (place / "model.safetensors.index.json").write_text(json.dumps(index))

    return spoil


def link_out(place: Path) -> None:
    (place / "shard.safetensors").symlink_to(place.parent / "elsewhere.safetensors")
    (place / "model.safetensors").rename(place.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": {"w": "shard.safetensors"}}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))


def absent_shard(place: Path) -> None:
    index_of("a.safetensors")(place)
    (place / "a.safetensors").unlink()


def bad_header(place: Path) -> None:
    content = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(content[:8] + b"[" + content[9:])


WEIGHTS: dict[str, tuple[Spoil, str]] = {
    "absent": (lambda place: (place / "model.safetensors").unlink(), "no weights in the directory"),
    "an absolute path": (index_of("/tmp/rlhf-no-such/x.safetensors"), "an absolute path (needed: "),
    "above": (index_of("../x.safetensors"), "which leads out of the directory (needed: files"),
    "above and back": (index_of("a/../../x.safetensors"), "which leads out of the directory"),
    "a link": (link_out, "shard.safetensors\", a link to "),
    "a shard that is absent": (absent_shard, '"a.safetensors" is not there (needed: every file'),
    "cut off": (cuts("model.safetensors", 0.6), "its header describes"),
    "only the start": (cuts("model.safetensors", 0.001), "is no safetensors file, or is cut off"),
    "empty": (writes("model.safetensors", ""), "model.safetensors is empty"),
    "a pointer": (writes("model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
                  "model.safetensors is a Git LFS pointer"),
    "a header that is none": (bad_header, "model.safetensors: its header cannot be read"),
    "a larger config": (sets(intermediate_size=10**6, vocab_size=10**6),
                        "config.json describes"),
    "an index that is none": (
        lambda place: [(place / "model.safetensors").unlink(),
                       writes("model.safetensors.index.json", '{"weight_map": []}')(place)],
        "model.safetensors.index.json: weight_map is a list of 0"),
}  # fmt: skip
ALL = {
    f"{kind}: {name}": (kind, *row)
    for kind, table in (("config", CONFIG), ("tokenizer", TOKENIZER), ("weights", WEIGHTS))
    for name, row in table.items()
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(help_.tiny(), tmp_path / "model"))


def checks(directory: Path) -> list[Check]:
    argv = ["--step", "1", "--actor-model", str(directory)]
    argv += ["step1.max_length=64", "step1.max_prompt_length=32"]
    return check_models(make_plan(parse_options(argv, {})))


def test_a_whole_model_passes(model: Path) -> None:
    assert [check.state for check in checks(model)] == ["ok"]
    assert model_faults(model, "tokenizer") == model_faults(model, "weights") == []


@pytest.mark.parametrize("fault", ALL)
def test_the_checks_name_it_in_one_line(model: Path, fault: str) -> None:
    _, spoil, said = ALL[fault]
    spoil(model)
    found = [check for check in checks(model) if check.state == "FAIL"]
    assert len(found) == 1, [check.line() for check in found]
    assert said in found[0].line()
    assert "\n" not in found[0].line()
    assert len(found[0].line()) < 700
    assert found[0].exit_code == 3


@pytest.mark.parametrize("fault", ALL)
def test_no_loader_builds_anything(
    model: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Also where the files came with a hub's id, after the driver's checks: the steps ask again."""
    kind, spoil, said = ALL[fault]
    spoil(model)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a module was built")

    monkeypatch.setattr(torch.nn.Module, "__init__", never)
    arguments: dict[str, Any] = {"engine": EngineConfig(), "dtype": "float32", "pad_token_id": 0}
    loads: list[Callable[[], object]] = [
        lambda: load_causal(str(model), ModelConfig(), vocab_size=300, dropout=False, **arguments),
        lambda: load_scalar(str(model), ModelConfig(), vocab_size=300, new_head=True, **arguments),
    ]
    if kind == "tokenizer":
        loads = [lambda: load_tokenizer(str(model), template=None)]
    if fault == "config: an unknown family":
        said = "cannot be loaded"  # the table of families is the driver's
    if fault in ("config: absent", "config: code", "tokenizer: a small vocabulary"):
        return  # a library's own words; or a fault of two files together
    for load in loads:
        with pytest.raises(RequirementError) as caught:
            load()
        assert said in str(caught.value)


def test_nothing_large_is_loaded_and_the_exit_code_is_3(model: Path, tmp_path: Path) -> None:
    CONFIG["a million layers"][0](model)
    code = (
        "import sys, train\n"
        "code = train.main(sys.argv[1:])\n"
        "print({'torch', 'transformers', 'deepspeed'} & set(sys.modules))\n"
        "sys.exit(code)"
    )
    argv = ["--step", "1", "--actor-model", str(model), "--output-dir", str(tmp_path / "out")]
    argv += ["step1.max_length=64", "step1.max_prompt_length=32"]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False,
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(PROJECT_ROOT)},
    )  # fmt: skip
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "set()"
    assert "Traceback" not in done.stdout + done.stderr
    assert "num_hidden_layers is 1000000 (needed: a whole number from 1 to 10,000)" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_models_of_all_families_pass(family: str) -> None:
    """No false alarm; and the size of config.json is that of the weights."""
    place = Path(help_.tiny(family))
    assert model_faults(place, "tokenizer") == model_faults(place, "weights") == []
    assert parameters(json.loads((place / "config.json").read_text())) > 1000


def test_a_link_inside_the_hubs_cache_passes(model: Path, tmp_path: Path) -> None:
    """A snapshot's files are links to the blobs beside it; nothing else above it may be named."""
    snapshot = tmp_path / "models--a--b/snapshots/abc"
    blobs = tmp_path / "models--a--b/blobs"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir()
    model.rename(snapshot)
    index_of("a.safetensors")(snapshot)
    (snapshot / "a.safetensors").rename(blobs / "123")
    (snapshot / "a.safetensors").symlink_to("../../blobs/123")
    assert model_faults(snapshot, "weights") == []
    (snapshot / "a.safetensors").unlink()
    assert model_faults(snapshot, "weights") == []  # it has not come yet
    (blobs / "123").rename(tmp_path / "outside")
    (snapshot / "a.safetensors").symlink_to(tmp_path / "outside")
    assert "a link to" in model_faults(snapshot, "weights")[0].line()


def test_trusted_code_is_its_own_judge(model: Path) -> None:
    sets(model_type="evil", auto_map={"AutoConfig": "m.C"}, hidden_size=0)(model)
    assert model_faults(model, "weights", own_code=True) == []


def test_the_dry_run_and_doctor_say_the_same(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checklist, "loopback_reduce", lambda placement: Check("x", "ok", "x"))
    CONFIG["NaN"][0](model)
    argv = ["--step", "1", "--actor-model", str(model)]
    argv += ["step1.max_length=64", "step1.max_prompt_length=32"]
    told = []
    for way in ([*argv, "--dry-run"], ["doctor", *argv]):
        assert train.main(way) == 3
        out, err = capsys.readouterr()
        told.append([one.strip() for one in (out + err).splitlines() if "FAIL" in one])
    assert len(set(map(tuple, map(set, told)))) == 1
    assert any("hidden_size is NaN (needed: a number)" in line for line in told[0])
