"""A reward over HTTP: what is sent, what comes back, and everything that goes wrong."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from rlhf.config.load import load_config, parse_overrides
from rlhf.config.rewards import RewardTerm
from rlhf.errors import ConfigError
from rlhf.rewards import Asked, RewardFailed, asked, check_terms, endpoint, resolve_reward
from rlhf.rewards.__main__ import problem_with

HOW = Asked("reward", 60.0, "timeout of the term in step3.rewards")


class Stub:
    """Answers by `plan`: a status, a body, or "slow"; empty: each query's length."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.plan: list[Any] = []
        self.over = threading.Event()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stub.asked.append(content)
                stub.headers.append(dict(self.headers))
                step = stub.plan.pop(0) if stub.plan else {}
                if step == "slow":
                    stub.over.wait(20)
                status = step if isinstance(step, int) else 200
                body = {"rewards": [float(len(query)) for query in content["query"]]}
                said = json.dumps(step if isinstance(step, (dict, list)) and step else body)
                if status != 200:
                    said = "the model is loading"
                self.send_response(status)
                self.end_headers()
                self.wfile.write(said.encode())

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/get_reward"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setattr(endpoint, "PAUSE_SECONDS", 0.01)
    one = Stub()
    yield one
    one.over.set()
    one.server.shutdown()
    one.server.server_close()


def points(url: str, answers: list[str], columns: Any = None, **options: Any) -> list[float]:
    function = resolve_reward(RewardTerm(use="http", options={"url": url, **options}))
    given = {"ended": [True] * len(answers), **(columns or {})}
    return asked(function, ["p:"] * len(answers), answers, given, HOW)


def test_what_is_sent_and_what_comes_back(stub: Stub) -> None:
    """OpenRLHF's keys, batched; the columns beside them."""
    found = points(stub.url, ["a", "bb", "ccc"], {"gold": [1, 2, 3]}, batch_size=2, labels="gold")
    assert found == [3, 4, 5]
    assert [len(one["query"]) for one in stub.asked] == [2, 1]
    assert stub.asked[0] == {
        "query": ["p:a", "p:bb"], "prompts": ["p:", "p:"], "answers": ["a", "bb"],
        "labels": [1, 2], "gold": [1, 2], "ended": [True, True],
    }  # fmt: skip


def test_a_url_alone_is_a_term(stub: Stub) -> None:
    (term,) = load_config(None, parse_overrides([f"step3.rewards={stub.url}"])).step3.rewards
    assert (term.use, term.options) == ("http", {"url": stub.url})
    assert resolve_reward(term)(["p"], ["a"], {}) == [2]


def test_a_token_from_the_environment(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_REWARD_TOKEN", "s3cret")
    points(stub.url, ["a"], token_env="MY_REWARD_TOKEN")
    assert stub.headers[0]["Authorization"] == "Bearer s3cret"
    monkeypatch.delenv("MY_REWARD_TOKEN")
    with pytest.raises(RewardFailed, match="no MY_REWARD_TOKEN"):
        points(stub.url, ["a"], token_env="MY_REWARD_TOKEN")


def test_retries_are_bounded(stub: Stub) -> None:
    """503 twice, then an answer; 503 for ever; 400 is not asked again."""
    stub.plan = [503, 503]
    assert points(stub.url, ["a"]) == [3]
    assert len(stub.asked) == 3
    stub.asked.clear()
    stub.plan = [503] * 9
    said = r"answered 503 .*'the model is loading' \(request 3 of 3\)\. It was given"
    with pytest.raises(RewardFailed, match=said):
        points(stub.url, ["a"], retries=2)
    assert len(stub.asked) == 3
    stub.asked.clear()
    stub.plan = [400]
    with pytest.raises(RewardFailed, match=r"answered 400 Bad Request: .*\(request 1 of 1\)"):
        points(stub.url, ["a"])
    assert len(stub.asked) == 1


def test_a_server_that_is_slow(stub: Stub) -> None:
    stub.plan = ["slow", "slow"]
    began = time.monotonic()
    with pytest.raises(RewardFailed, match=r"gave no answer: .*timed out"):
        points(stub.url, ["a"], seconds=0.2, retries=1)
    assert time.monotonic() - began < 15


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"reward": [1.0]}, "and must answer"),
        ([1.0], "and must answer"),
        ({"rewards": 1.0}, "and must answer"),
        ({"rewards": [1.0, 2.0]}, "gave 2 rewards for 1 queries"),
        ({"rewards": ["high"]}, "returned 'high', which is no finite number"),
        ({"rewards": [None]}, "returned None"),
    ],
)
def test_what_is_no_reward(stub: Stub, answer: Any, said: str) -> None:
    stub.plan = [answer]
    with pytest.raises(RewardFailed, match=said):
        points(stub.url, ["a"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "missing a required argument: 'url'"),
        ({"url": "localhost:5000"}, "is none: e.g. http"),
        ({"url": "http://host:port/"}, "is none: e.g. http"),
        ({"url": "http://u:secret@host/"}, "url"),
        ({"url": "http://h/", "batch_size": 0}, "batch_size 0: a whole number from 1 on"),
        ({"url": "http://h/", "retries": -1}, "retries -1"),
        ({"url": "http://h/", "seconds": 0}, "seconds 0: must be greater"),
        ({"url": "http://h/", "labels": "gold"}, "needs 'gold'"),
        ({"url": "http://h/", "retrys": 1}, "unexpected keyword argument 'retrys'"),
    ],
)
def test_settings_that_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        check_terms([RewardTerm(use="http", options=options)], [])
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_said_before_the_start(stub: Stub) -> None:
    """Its port is tried; nothing is asked."""
    assert problem_with({"terms": [{"use": "http", "options": {"url": stub.url}}]}) == ("", 0)
    assert stub.asked == []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/"
        problem, code = problem_with({"terms": [{"use": "http", "options": {"url": url}}]})
    assert code == 3
    assert "nothing answers at 127.0.0.1" in problem
