"""Preflight: hub, names, disk, packages, in seconds and before torch (C4, exit code 3)."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from launch import hub, preflight
from launch.hub import check_hub, is_cached, needed, problem
from launch.options import parse_options
from launch.plan import make_plan
from rlhf.config import load_config
from rlhf.config.load import parse_overrides
from rlhf.config.names import is_hub_dataset, is_hub_model, normalize_endpoint
from rlhf.errors import ConfigError, RequirementError
from rlhf.stages import PPO, REWARD, SFT


class _Hub(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(type(self).status)
        self.end_headers()

    def log_message(self, *args) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[tuple[str, type[_Hub]]]:
    handler = type("Handler", (_Hub,), {})
    served = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{served.server_port}", handler
    served.shutdown()
    thread.join()
    served.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in (
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
    ):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


def put_into_cache(cache: Path, kind: str, name: str) -> None:
    folder = cache / f"{kind}--{name.replace('/', '--')}" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").touch()


CLOSED = "http://127.0.0.1:9"  # the discard port: nothing listens


def test_what_needs_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    models = ["gpt2", "org/m", "tiny:llama", "package:x", "x/y.gguf", "here", "/abs/x", "org/m"]
    data = ["org/d", "sample:courtesy", "s3://b/x", "rows.jsonl", "here", "a/b/c"]
    assert needed(models, data) == [("models", "gpt2"), ("models", "org/m"), ("datasets", "org/d")]
    assert not is_hub_model("here")
    assert not is_hub_dataset("memory://x")


def test_a_hub_that_answers(server) -> None:
    """C4: any answer will do; one that says it is broken will not."""
    url, handler = server
    assert problem(url) is None
    handler.status = 404
    assert problem(url) is None
    handler.status = 503
    assert problem(url) == "it answers HTTP 503"
    assert check_hub(["tiny:llama"], ["sample:courtesy"], url, False) == (False, [])


def test_an_unreachable_hub_is_told_in_seconds() -> None:
    """C4: not after 28 s, and with what to do."""
    began = time.monotonic()
    _, checks = check_hub(["org/m"], ["org/d"], CLOSED, False)
    assert time.monotonic() - began < 10
    assert [check.what for check in checks] == ["hub: org/m", "hub: org/d"]
    for check in checks:
        for word in (CLOSED, "--hf-endpoint", "local directory", "refused"):
            assert word in check.line()


def test_a_model_that_the_hub_does_not_have(server) -> None:
    """A wrong name: 404 (or 401, where it does not tell) is said before anything is fetched."""
    url, handler = server
    handler.status = 404
    _, (check,) = check_hub(["org/m"], [], url, False)
    assert (check.state, check.exit_code) == ("FAIL", 3)
    assert "it answers HTTP 404" in check.found


def test_a_hub_that_never_answers_is_given_up_on() -> None:
    """C4: the connection stands, and nothing comes (a firewall that swallows)."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        found = problem(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.5)
    assert found is not None
    assert time.monotonic() - began < 5


def test_what_is_downloaded_needs_no_hub(cache: Path) -> None:
    put_into_cache(cache, "models", "org/m")
    assert is_cached("models", "org/m")
    assert not is_cached("datasets", "org/m")
    offline, (check,) = check_hub(["org/m"], [], CLOSED, False)
    assert offline
    assert check.state == "warn"
    assert "using the downloaded org/m" in check.found
    offline, (check,) = check_hub(["org/m"], [], CLOSED, True)
    assert (offline, check.state) == (True, "ok")
    _, (_, lacking) = check_hub(["org/m"], ["org/d"], CLOSED, True)
    assert (lacking.what, lacking.state) == ("hub: org/d", "FAIL")
    assert "offline, and it has not been downloaded" in lacking.found


def test_cache_directory_follows_the_clients_rules() -> None:
    home = Path.home()
    assert hub.cache_directory({}) == home / ".cache/huggingface/hub"
    assert hub.cache_directory({"HF_HOME": "/h"}) == Path("/h/hub")
    assert hub.cache_directory({"XDG_CACHE_HOME": "/x"}) == Path("/x/huggingface/hub")
    assert hub.cache_directory({"HF_HUB_CACHE": "/c", "HF_HOME": "/h"}) == Path("/c")


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        (" https://m.example// ", "https://m.example"),
        ("http://127.0.0.1:8080/", "http://127.0.0.1:8080"),
        ("https://m.example/path/", "https://m.example/path"),
        ("", None),
        ("  ", None),
        (None, None),
    ],
)
def test_endpoints(text: str | None, normal: str | None) -> None:
    """C4."""
    assert normalize_endpoint(text) == normal


@pytest.mark.parametrize("text", ["m.example", "ftp://m", "https://", "https://a b", "/path"])
def test_bad_endpoints(text: str) -> None:
    """C4."""
    with pytest.raises(ConfigError, match="http:// or https://"):
        normalize_endpoint(text)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 3: told before the training, not after it. Checkpoints only warn: a short run
    writes none."""
    place = tmp_path / "out" / "run"
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert preflight.disk_check(place, 1.6e9, 1.7e9).state == "ok"
    warning = preflight.disk_check(place, 1.6e9, 5e9)
    assert warning.state == "warn"
    assert "2.0 GB free (needed: 5.3 GB with the checkpoints that it may write)" in warning.line()
    failed = preflight.disk_check(place, 4e9, 4e9)
    assert failed.state == "FAIL"
    assert "2.0 GB free (needed: about 4.3 GB)" in failed.line()


def test_the_disk_that_a_run_needs(tmp_path: Path) -> None:
    """Of the steps to run, from the planner; of what it does not know, from the files here."""
    flags = ["--output-dir", str(tmp_path), "--name", "r", "--keep-last", "1"]
    plan = make_plan(parse_options([*flags, "--actor-model", "facebook/opt-125m"], {}))
    one, two, three = (item.needs.disk for item in plan.steps if item.needs)
    total = one.artifact + two.artifact + three.artifact
    assert preflight.planned_artifacts(plan) == total
    assert preflight.planned_disk(plan) == total + 2 * three.checkpoint
    weights = tmp_path / "strange"
    weights.mkdir()
    (weights / "config.json").write_text('{"model_type": "mamba"}')
    with (weights / "model.safetensors").open("wb") as stream:
        stream.truncate(10**9)
    plan = make_plan(parse_options([*flags, "--actor-model", str(weights)], {}))
    assert preflight.planned_artifacts(plan) == preflight.planned_disk(plan) == 4 * 10**9


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    def version(name: str) -> str:
        if name in ("gguf", "vaderSentiment"):
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(metadata, "version", version)
    config = load_config(None, parse_overrides(["step3.eval.judge=vader"]))
    preflight.check_packages(config, [SFT, REWARD], ["gpt2"])
    with pytest.raises(RequirementError, match="gguf is not installed: pip install gguf"):
        preflight.check_packages(config, [SFT], ["m.gguf"])
    with pytest.raises(RequirementError, match="pip install vaderSentiment"):
        preflight.check_packages(config, [PPO], [])
    with pytest.raises(
        RequirementError, match=r"gguf is not .*; the package vaderSentiment is not"
    ):
        preflight.check_packages(config, [PPO], ["package:llm"])


def test_offload_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    plain = load_config(None, {})
    preflight.check_compiler(plain, [SFT, REWARD, PPO])
    config = load_config(
        None, {"step3.critic.engine.offload": "cpu", "step3.critic.engine.zero_stage": 2}
    )
    preflight.check_compiler(config, [SFT, REWARD])
    with pytest.raises(RequirementError, match="install g\\+\\+"):
        preflight.check_compiler(config, [PPO])
