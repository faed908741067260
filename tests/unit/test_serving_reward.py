"""`rlhf serve-reward`: the scores are the model's, the shape OpenRLHF's, bad requests are told."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf.config.rewards import RewardTerm
from rlhf.errors import ArtifactError, RequirementError
from rlhf.rewards import resolve_reward
from rlhf.serving.reward import BadRequest, open_server, rows_of
from rlhf.serving.scorer import Scorer, Unreadable, find_model
from tests.unit import model_help as help_
from tests.unit.test_steps_main import root

__all__ = ["root"]  # a fixture
ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ["\n\nHuman: Which colour has thing 3?\n\nAssistant:", "\n\nHuman: Hi\n\nAssistant:"]
ANSWERS = [" It is blue, I am glad that you ask.", " No."]


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch) -> None:
    help_.world_of_one(monkeypatch)


def place_of(root: Path) -> str:
    return str(root / "run" / "step2_reward" / "artifact")


def by_transformers(place: str, ended: bool = True) -> list[float]:
    """One text at a time, as the README reads a reward model."""
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForSequenceClassification.from_pretrained(place).eval()
    found = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        text = prompt + answer + (tokenizer.eos_token if ended else "")
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            hidden = model.model(ids).last_hidden_state[0, -1]
            found.append(float(model.score(hidden)))
    return found


def test_scores_are_the_models(root: Path) -> None:
    """Raw as transformers computes them, padded rows and single ones; normalised by hand."""
    place = place_of(root)
    raw = Scorer(place, batch_size=2, normalised=False)
    expected = by_transformers(place)
    assert raw.scores(PROMPTS, ANSWERS, [True, True]) == pytest.approx(expected, abs=1e-4)
    assert raw.scores(PROMPTS[1:], ANSWERS[1:], [True]) == pytest.approx(expected[1:], abs=1e-4)
    cut = raw.scores(PROMPTS, ANSWERS, [False, False])
    assert cut == pytest.approx(by_transformers(place, ended=False), abs=1e-4)
    assert cut != pytest.approx(expected, abs=1e-4)
    config = json.loads((Path(place) / "config.json").read_text())
    mean, std = config["rlhf_score_mean"], config["rlhf_score_std"]
    scaled = Scorer(place, batch_size=1, normalised=True).scores(PROMPTS, ANSWERS, [True, True])
    assert scaled == pytest.approx([(score - mean) / std for score in expected], abs=1e-3)


def test_a_text_that_is_too_long(root: Path) -> None:
    scorer = Scorer(place_of(root), batch_size=2, normalised=True)
    with pytest.raises(Unreadable, match=r"query 1 has \d+ tokens, the model \d+ positions"):
        scorer.scores(["a", "a" * 100_000], ["b", "b"], [True, True])


def test_what_can_be_served(root: Path, tmp_path: Path) -> None:
    (tmp_path / "pipeline.json").write_text("{}")
    with pytest.raises(RequirementError, match="this run has no reward model"):
        find_model(str(tmp_path))
    with pytest.raises(ArtifactError, match="'sft' artifact"):
        find_model(str(root / "run" / "step1_sft" / "artifact"))
    assert find_model(place_of(root)) == place_of(root)
    assert find_model("owner/name") == "owner/name"


def test_requests() -> None:
    query = ["a:b", "c:d"]
    assert rows_of({"query": query}) == (["", ""], query, [True, True])
    given = {"query": query, "prompts": ["a:", "c:"], "ended": [False, True], "labels": [1, 2]}
    assert rows_of(given) == (["a:", "c:"], ["b", "d"], [False, True])
    for wrong, said in (
        ([], "must be a list of texts"),
        ({"query": "a"}, "must be a list of texts"),
        ({"query": ["a", 1]}, "must be a list of texts"),
        ({"query": query, "prompts": ["a:"]}, "as many texts"),
        ({"query": query, "prompts": ["a:", "x"]}, "query 1 does not begin with its prompt"),
        ({"query": query, "ended": [1, 0]}, "as many booleans"),
    ):
        with pytest.raises(BadRequest, match=said):
            rows_of(wrong)


@pytest.fixture
def served() -> Iterator[str]:
    def scores(prompts: list[str], answers: list[str], ended: list[bool]) -> list[float]:
        if "boom" in answers:
            raise ValueError("boom")
        return [len(answer) + 0.5 * end for answer, end in zip(answers, ended, strict=True)]

    with open_server("127.0.0.1", 0, "stub", scores) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def post(url: str, body: bytes) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=20) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_shape_is_openrlhfs(served: str) -> None:
    body = json.dumps({"query": ["ab", "abc"], "prompts": ["a", "a"], "labels": [None, None]})
    assert post(f"{served}/get_reward", body.encode()) == (200, {"rewards": [1.5, 2.5]})
    with urllib.request.urlopen(f"{served}/health", timeout=20) as answer:
        assert json.load(answer) == {"model": "stub"}
    assert post(f"{served}/score", b"{}")[0] == 404
    assert post(f"{served}/get_reward", b"{")[0] == 400
    code, told = post(f"{served}/get_reward", b'{"query": 1}')
    assert (code, "list of texts" in told["error"]) == (400, True)
    code, told = post(f"{served}/get_reward", b'{"query": ["boom"]}')
    assert (code, told["error"]) == (500, "ValueError: boom")
    assert post(f"{served}/get_reward", body.encode())[0] == 200, "the server is still there"


def test_our_own_term_asks_it(served: str) -> None:
    """With `ended`, which OpenRLHF's do not know."""
    term = resolve_reward(RewardTerm.model_validate(f"{served}/get_reward"))
    assert term(["a", "b"], ["x", "yy"], {"ended": [True, False]}) == [1.5, 2.0]


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RequirementError, match="choose another --port"):
            open_server("127.0.0.1", taken.getsockname()[1], "x", lambda p, a, e: [])


def test_the_command(root: Path) -> None:
    """From train.py to a score, and its end by a signal."""
    command = [sys.executable, str(ROOT / "train.py"), "serve-reward", place_of(root)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [*command, "--port", "0", "--raw"], env=env, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split(": ")[-1].strip()
        assert url.startswith("http://127.0.0.1:")
        query = [p + a for p, a in zip(PROMPTS, ANSWERS, strict=True)]
        code, found = post(url, json.dumps({"query": query, "prompts": PROMPTS}).encode())
        assert code == 200
        assert found["rewards"] == pytest.approx(by_transformers(place_of(root)), abs=1e-4)
    finally:
        server.terminate()
        assert server.wait(60) != 0
    missing = subprocess.run(
        [*command[:3], "no/such/model/here"], env={**env, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert missing.returncode == 3
    assert missing.stderr.startswith("error: ")
