"""Issue 5, security: nothing that is read can run code, steer a terminal, or leave its directory.

Each canary would make a directory; that the canary itself works is checked too.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rlhf.config.load import load_config, read_yaml
from rlhf.config.schema import EngineConfig, ModelConfig
from rlhf.config.step_args import step_config
from rlhf.data import cache
from rlhf.errors import ConfigError, RequirementError, UserError
from rlhf.evaluation.answers import AnswerRecord
from rlhf.evaluation.verdict import build_verdict, render
from rlhf.models import load_causal, load_scalar, load_tokenizer, materialise
from rlhf.redact import printable
from rlhf.rewards import Judge, RewardFunction
from rlhf.store import cache_root, private_directory
from tests.hubclient import client_env, run_python, write_tiny_model
from tests.hubstub import HubStub
from tests.unit.data_help import gpt2_like, pair, run
from tests.unit.test_architecture import FILES, ROOT, imports

CODE = """
import os
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers import PreTrainedTokenizerFast
os.makedirs({mark!r}, exist_ok=True)
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
class EvilScalar(LlamaForSequenceClassification):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


class Evil:
    """Its pickle makes a directory when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.makedirs, (str(self.mark),)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "it_ran"
    assert not (tmp_path / "it_ran").exists(), "code that was read did run"


def test_the_canary_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran")))
    assert (tmp_path / "ran").is_dir()


# --- models


def evil_model(directory: Path, mark: Path, model_type: str) -> str:
    """A tiny Llama whose config.json and tokenizer_config.json name Python files beside them."""
    write_tiny_model(directory)
    (directory / "evil.py").write_text(CODE.format(mark=str(mark)))
    config = json.loads((directory / "config.json").read_text())
    config["model_type"] = model_type
    config["auto_map"] = {
        "AutoConfig": "evil.EvilConfig",
        "AutoModelForCausalLM": "evil.EvilModel",
        "AutoModelForSequenceClassification": "evil.EvilScalar",
    }
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": [None, "evil.EvilTokenizer"]}
    tokenizer["tokenizer_class"] = "EvilTokenizer" if model_type == "evil" else "LlamaTokenizerFast"
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return str(directory)


def load(name: str, loader: Callable[..., Any], trust: bool = False, **extra: Any) -> Any:
    settings = ModelConfig(trust_remote_code=trust)
    engine = EngineConfig()
    sizes: dict[str, Any] = {"pad_token_id": 0, "vocab_size": 300, "dropout": False}
    return loader(name, settings, engine=engine, dtype="float32", **sizes, **extra)


@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_code_of_a_model_directory_is_not_run(tmp_path: Path, mark: Path, model_type: str) -> None:
    """`trust_remote_code` is off: a known architecture loads with transformers' own class, an
    unknown one is refused; neither runs the files beside it."""
    name = evil_model(tmp_path / "model", mark, model_type)
    for call in (
        lambda: load(name, load_causal),
        lambda: load(name, load_scalar, new_head=True),
        lambda: load_tokenizer(name, template=None),
    ):
        message = None
        try:
            call()
        except RequirementError as error:
            message = str(error)
        assert message is None or (model_type == "evil" and "cannot be loaded" in message)


def test_code_of_a_model_directory_runs_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same directory with the explicit setting: so the canary above was a real one."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    name = evil_model(tmp_path / "model", tmp_path / "ran", "evil")
    load(name, load_causal, trust=True)
    assert (tmp_path / "ran").is_dir()


def test_an_attention_kernel_named_by_a_config_is_not_fetched(tmp_path: Path, mark: Path) -> None:
    """config.json may name a hub repository with compiled kernels: nothing is loaded from there."""
    name = str(write_tiny_model(tmp_path / "model"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for key in ("attn_implementation", "_attn_implementation"):
        changed = {**config, key: "evil/kernels"}
        (tmp_path / "model" / "config.json").write_text(json.dumps(changed))
        for loader, extra in ((load_causal, {}), (load_scalar, {"new_head": True})):
            with pytest.raises(
                RequirementError, match=r"names 'evil/kernels'.*attn_implementation"
            ):
                load(name, loader, **extra)
    chosen = ModelConfig(attn_implementation="eager")
    sizes: dict[str, Any] = {"pad_token_id": 0, "vocab_size": 300, "dropout": False}
    load_causal(name, chosen, engine=EngineConfig(), dtype="float32", **sizes)


def test_a_pickle_among_a_checkpoints_files_is_refused(tmp_path: Path, mark: Path) -> None:
    """DeepSpeed's own reader would run it."""
    from rlhf.engine.checkpoint import SafeCheckpointEngine

    torch.save({"module": Evil(mark)}, tmp_path / "state.pt")
    with pytest.raises(pickle.UnpicklingError, match=r"makedirs|weights_only|Weights only"):
        SafeCheckpointEngine().load(str(tmp_path / "state.pt"))


@pytest.mark.parametrize("file", ["../../x.gguf", "/etc/x.gguf", "a/../../x.gguf"])
def test_a_gguf_outside_of_its_package(tmp_path: Path, file: str) -> None:
    with pytest.raises(RequirementError, match="inside the package"):
        materialise(f"package:json/{file}", made_in=tmp_path, texts=lambda: [], seed=1)


# --- data and caches


def table_with_pickled_type(mark: Path) -> pa.Table:
    """What pyarrow < 14.0.1 unpickled while it opened the file (CVE-2023-47248)."""
    rows = [pair(i) for i in range(8)]
    plain = pa.Table.from_pylist(rows)
    hostile = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Evil(mark)),
    }
    fields = [field.with_metadata(hostile) for field in plain.schema]
    return pa.table(plain.columns, schema=pa.schema(fields))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.feather"])
def test_a_pickled_type_in_a_data_file_is_not_run(tmp_path: Path, mark: Path, name: str) -> None:
    table = table_with_pickled_type(mark)
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(table, path)
    else:
        opener = pa.ipc.new_stream if name == "a.arrow" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as sink, opener(sink, table.schema) as writer:
            writer.write_table(table)
    # parquet keeps arrow's schema in base64
    assert b"makedirs" in path.read_bytes() or name == "a.parquet"
    data = run(path, gpt2_like(), tmp_path / "c", split=(0, 1, 0), eval_fraction=0)
    assert data.report.kept == 8


def test_a_pickled_type_in_a_cache_file_is_not_run(tmp_path: Path, mark: Path) -> None:
    """Planted with the right hash beside it, as who may write there could."""
    table = table_with_pickled_type(mark)
    cache.store(tmp_path, "key", table.to_pydict(), table.schema, {})
    assert b"makedirs" in (tmp_path / "key.arrow").read_bytes()
    found = cache.load(tmp_path, "key")
    assert found is not None
    assert found[0][0]["prompt"] == pair(0)["prompt"]


@pytest.mark.parametrize("suffix", ["pkl", "pickle", "pt", "bin", "npy", "npz", "py", "joblib"])
def test_formats_that_can_hold_code_are_no_data(tmp_path: Path, mark: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(pickle.dumps([Evil(mark)]))
    with pytest.raises(UserError, match="must end in one of"):
        run(path, gpt2_like(), tmp_path / "c")


HUB = """
import json, sys
from rlhf.config.schema import DataConfig
from rlhf.data.sources import open_data_sets
from rlhf.errors import DataError
try:
    for one in open_data_sets(DataConfig(path=["org/evil"])):
        for part in one.parts:
            list(part.rows())
    print(json.dumps("read"))
except DataError as error:
    print(json.dumps(str(error)))
"""


def test_a_hub_data_set_of_code_is_refused(tmp_path: Path, mark: Path) -> None:
    """A loading script and a pickle: `datasets` runs neither, and what it says reaches the user."""
    repo = tmp_path / "repo"
    repo.mkdir()
    (repo / "evil.py").write_text(f"import os; os.makedirs({str(mark)!r})")
    (repo / "train.pkl").write_bytes(pickle.dumps([Evil(mark)]))
    with HubStub(datasets={"org/evil": repo}) as hub:
        done = run_python(HUB, client_env(tmp_path, hub.url))
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]).startswith("org/evil: cannot be read")


def test_caches_are_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made for their owner alone, whatever the umask; what others can write to is refused."""
    before = os.umask(0)
    try:
        monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "new" / "cache"))
        for place in (cache_root(), cache.data_root(None), cache.data_root(str(tmp_path / "own"))):
            assert stat.S_IMODE(place.stat().st_mode) == 0o700
        place = cache.data_root(None)
        cache.store(place, "k", {"x": [1]}, pa.schema({"x": pa.int32()}), {})
        assert {stat.S_IMODE(f.stat().st_mode) for f in place.iterdir()} == {0o600}
    finally:
        os.umask(before)
    place.chmod(0o777)
    with pytest.raises(RequirementError, match=r"every user may write there \(mode 0777\).*chmod"):
        cache.data_root(None)
    place.chmod(0o1777)
    with pytest.raises(RequirementError, match="every user may write there"):
        private_directory(place)
    with pytest.raises(RequirementError, match="cannot be made"):
        private_directory(Path("/dev/null/x"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_cache_of_another_user_is_refused(tmp_path: Path) -> None:
    place = private_directory(tmp_path / "c")
    os.chown(place, 65534, -1)
    with pytest.raises(RequirementError, match=r"another user \(uid 65534"):
        private_directory(place)


# --- settings


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.makedirs [{mark}]",
        "name: !!python/object/apply:os.makedirs [{mark}]",
        "data:\n  path: [!!python/object/new:os.makedirs [{mark}]]",
        "step1: !!python/object/apply:subprocess.check_output [[mkdir, {mark}]]",
        "seed: !!python/name:os.makedirs",
        "seed: !!python/module:os",
        "? !!python/object/apply:os.makedirs [{mark}]\n: 1",
    ],
)
def test_a_recipe_cannot_make_objects(tmp_path: Path, mark: Path, text: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(text.format(mark=mark))
    with pytest.raises(ConfigError, match=r"r\.yaml:\d"):
        read_yaml(recipe)
    with pytest.raises(ConfigError):
        step_config(["--config", str(recipe)], 1)


def test_an_override_cannot_make_objects(mark: Path) -> None:
    from rlhf.config.load import parse_overrides

    with pytest.raises(ConfigError, match="not a value that can be read"):
        parse_overrides([f"seed=!!python/object/apply:os.makedirs [{mark}]"])
    load_config(None, parse_overrides([f"data.path=!!python/object/apply:os.makedirs [{mark}]"]))


@pytest.mark.parametrize("name", [".", "..", "../x", "a/b", "/tmp/x", "", ".hidden", "a\n"])
def test_a_runs_name_cannot_leave_the_output_directory(name: str) -> None:
    with pytest.raises(ConfigError):
        load_config(None, {"name": name})


# --- terminals


HOSTILE = "\x1b]0;owned\x07\x1b[2J\x1b[31mred\x9b31m\u202etxt.exe\r\x08\x00"
UNICODE = "naïve 日本 🙂"


def test_a_models_words_cannot_steer_a_terminal() -> None:
    """Samples in the verdict: escape sequences and direction marks are shown, not sent."""
    records = [
        AnswerRecord(HOSTILE, answer, [1, 2], True, 0.0, 0.0, 1.0) for answer in (HOSTILE, UNICODE)
    ]
    verdict = build_verdict(
        {"sft": records[:1], "ppo": records[1:]},
        held_out=None,
        sft={},
        reward={},
        judge=Judge(f"judge {HOSTILE}", RewardFunction("hostile", lambda *rows: []), good=bool),
        samples=1,
    )
    text = render(verdict)
    assert all(char.isprintable() or char == "\n" for char in text)
    assert "\\x1b[31mred" in text
    assert UNICODE in text


def test_printable() -> None:
    assert printable("a\tb\nç 日本 🙂") == "a\tb\nç 日本 🙂"
    assert printable("\x1b[2J\r\u202e\x9b") == "\\x1b[2J\\r\\u202e\\x9b"


# --- our own code


CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput",
    "subprocess.getstatusoutput", "asyncio.create_subprocess_shell", "yaml.unsafe_load",
    "yaml.full_load", "yaml.load_all", "numpy.load", "np.load", "shutil.unpack_archive",
    "tempfile.mktemp", "marshal.loads", "marshal.load", "shelve.open", "pandas.read_pickle",
    "pd.read_pickle", "joblib.load",
}  # fmt: skip
MODULES = ("tarfile", "zipfile", "shelve", "marshal", "joblib")
READS_ONE_MEMBER = ("gpu_kit.py", "zipfile")  # a wheel's METADATA; nothing is unpacked


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def forbidden(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
        safe_yaml = keywords.get("Loader") in ("_Loader", "yaml.SafeLoader")
        if (
            name in CALLS
            or (name == "torch.load" and keywords.get("weights_only") != "True")
            or (name == "yaml.load" and not safe_yaml)
            or keywords.get("allow_pickle", "False") != "False"
            or keywords.get("trust_remote_code") == "True"
        ):
            found.append(f"{node.lineno}: {ast.unparse(node)[:80]}")
    return found


def test_our_code_calls_nothing_that_runs_what_it_reads() -> None:
    """No shell, no eval, no unpickling, no unpacking of archives, no trust by default."""
    paths = [*FILES, *sorted((ROOT / "benchmarks").glob("*.py"))]
    assert len(paths) > 90
    wrong = [
        f"{path.relative_to(ROOT)}:{line}" for path in paths for line in forbidden(path.read_text())
    ]
    assert wrong == []
    names = [(path, name) for path in paths for _, name in imports(path)]
    found = [(p.name, n) for p, n in names if n.split(".")[0] in MODULES]
    assert [one for one in found if one != READS_ONE_MEMBER] == []


@pytest.mark.parametrize(
    "line",
    [
        "eval(x)", "torch.load(p)", "torch.load(p, weights_only=False)", "yaml.load(s)",
        "yaml.load(s, Loader=yaml.Loader)", "np.load(p, allow_pickle=True)", "os.system('x')",
        "f(trust_remote_code=True)",
    ],
)  # fmt: skip
def test_the_reader_sees_each(line: str) -> None:
    assert forbidden(line) != []
    assert forbidden("torch.load(p, weights_only=True); yaml.load(s, Loader=_Loader)") == []
