"""All three steps from one mirror of the hub: one real run, small enough for every test run."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlhf.store import RunDir, verify
from tests.hubclient import (
    ROOT,
    client_env,
    files_with,
    outside_addresses,
    pair_rows,
    processes,
    write_pairs_parquet,
    write_tiny_model,
)
from tests.hubstub import HubStub

TOKEN = "hf_planted_in_a_test"
SIGNATURE = "5ignature0fTheL1nk"
LINK = f"/bucket/more.jsonl?X-Amz-Date=20261122T000000Z&X-Amz-Signature={SIGNATURE}"
STEPS = ("step1_sft/main.py", "step2_reward/main.py", "step3_ppo/main.py")
SMALLEST = [
    "step1.train.batch_size=4",
    "step1.train.micro_batch_size=4",
    "step1.train.max_steps=1",
    "step1.max_prompt_length=40",
    "step1.max_length=64",
    "step2.train.batch_size=4",
    "step2.train.micro_batch_size=4",
    "step2.train.max_steps=1",
    "step3.rollout.prompts=4",
    "step3.rollout.batch_size=4",
    "step3.rollout.max_new_tokens=4",
    "step3.iterations=1",
    "step3.micro_batch_size=4",
    "step3.eval.prompts=4",
    "step3.eval.judge=tests.leaky_judge:score",
]


@dataclass
class Run:
    """The finished run, what it printed, and the hub that served it."""

    hub: HubStub
    tmp: Path
    output: str
    command: list[str]
    env: dict[str, str]

    @property
    def directory(self) -> RunDir:
        return RunDir(self.tmp / "out" / "run")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """`python train.py --hf-endpoint URL/` with model and data on a hub that wants a token."""
    tmp = tmp_path_factory.mktemp("hub")
    models = {"org/tiny": write_tiny_model(tmp / "repos" / "tiny")}
    datasets = {"org/pairs": write_pairs_parquet(tmp / "repos" / "pairs", train=40, test=8)}
    private = {"org/tiny": TOKEN, "org/pairs": TOKEN}
    env = client_env(tmp, "", HF_TOKEN=TOKEN)  # an empty HF_ENDPOINT, which the flag overrules
    del env["HF_HUB_DISABLE_XET"]  # the driver is to set it
    more = [json.dumps(row) for row in pair_rows(52)[48:]] + ['{"prompt": broken']
    link = {LINK: "\n".join(more).encode()}
    with HubStub(models, datasets, private, link) as hub:
        command: list[str | Path] = [sys.executable, ROOT / "train.py", "--output-dir", tmp / "out"]
        command += ["--hf-endpoint", f"{hub.url}/", "--data-path", "org/pairs", hub.url + LINK]
        command += ["--actor-model", "org/tiny", "--reward-model", "org/tiny", *SMALLEST]
        done = subprocess.run(
            command, env=env, cwd=tmp, capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        yield Run(hub, tmp, done.stdout + done.stderr, [str(part) for part in command], env)


def test_model_and_data_came_from_the_endpoint(run: Run) -> None:
    """C4: every file of the model was downloaded, with the token; nothing was asked of `//`."""
    assert run.hub.fetched("org/tiny") == set(run.hub.repos["models", "org/tiny"].files)
    assert run.hub.fetched("org/pairs") >= {
        "data/train-00000-of-00001.parquet",
        "data/test-00000-of-00001.parquet",
    }
    assert [request for request in run.hub.requests if request.path.startswith("//")] == []
    downloads = [r for r in run.hub.requests if "/resolve/" in r.path]
    assert all(request.authorized for request in downloads)


def test_every_process_of_every_step_had_the_endpoint(run: Run) -> None:
    """C4: set before any import, normalised, xet off; each step asked the stub itself."""
    address = run.hub.url.removeprefix("http://")
    for script in STEPS:
        ranks = [p for p in processes(run.tmp) if _runs(p.argv, script)]
        assert ranks, f"no process ran {script}"
        for process in ranks:
            assert (process.endpoint, process.disable_xet) == (run.hub.url, "1")
        assert any(address in process.connected for process in ranks)


def test_no_other_host_was_asked(run: Run) -> None:
    """C4: neither huggingface.co nor any other name outside of this machine, not even looked up."""
    assert outside_addresses(run.tmp) == set()
    assert "huggingface.co" not in run.output


def test_the_artifacts_exist(run: Run) -> None:
    """C4: each step's result verifies, and PPO's descends from the SFT and the reward model."""
    sft = verify(run.directory.artifact("sft"), "sft")
    reward = verify(run.directory.artifact("reward"), "reward")
    ppo = verify(run.directory.artifact("ppo"), "ppo")
    assert {parent.id for parent in ppo.parents.values()} == {sft.id, reward.id}
    assert {"actor/model.safetensors", "critic/model.safetensors"} <= ppo.files.keys()


def test_the_token_is_nowhere(run: Run) -> None:
    """C4, Y6, issue 5: neither the hub's token nor a link's signature is in the run's files, in the
    cache, in what the clients keep, on the console, or on the command line of any process that the
    driver started. The judge of this run says both aloud, in four ways."""
    for secret in (TOKEN, SIGNATURE):
        assert files_with(run.tmp / "out", secret) == []
        assert files_with(run.tmp / "rlhf", secret) == []
        assert files_with(run.tmp / "hf", secret) == []
        assert secret not in run.output
        started = [p.argv for p in processes(run.tmp) if not _runs(p.argv, "train.py")]
        assert started
        assert all(secret not in argument for argv in started for argument in argv)
    for way in ("printed:", "told as an error:", "past Python's streams:", "in two pieces:"):
        assert f"{way} " in run.output
        said = [line for line in run.output.splitlines() if way in line]
        assert all("<redacted>" in line for line in said), said
    console = (run.directory.logs(3) / "console.log").read_text()
    assert "in two pieces: <redacted>" in console


def test_the_signed_link_was_read(run: Run) -> None:
    """Issue 5: what is written down lacks the signature, and the steps have it all the same."""
    asked = [r for r in run.hub.requests if r.path.startswith("/bucket/")]
    assert {(r.path, r.status) for r in asked} == {(LINK, 200)}
    assert len(asked) >= 3, "each step reads it"
    assert not any(r.authorized for r in asked), "the hub's token is not for others"
    shown = f"{run.hub.url}/bucket/more.jsonl?<redacted>"
    resolved = json.loads(run.directory.resolved(1).read_text())
    assert resolved["config"]["data"]["path"] == ["org/pairs", shown]
    assert verify(run.directory.artifact("sft")).config["data"]["path"] == ["org/pairs", shown]
    assert f"bad: broken JSON: 1 ({shown}:5)" in run.output


def test_what_is_done_stays_done_with_a_newly_signed_link(run: Run) -> None:
    """A link that is signed again is the same setting: its signature is in no comparison."""
    again = f"{run.hub.url}/bucket/more.jsonl?X-Amz-Date=20261123T000000Z&X-Amz-Signature=other"
    run.hub.signed[again.removeprefix(run.hub.url)] = run.hub.signed[LINK]  # the store knows both
    command = [*run.command, "--dry-run"]
    command[command.index(run.hub.url + LINK)] = again
    done = subprocess.run(
        command, env=run.env, cwd=run.tmp, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("already done") == 3, done.stdout
    assert "Signature=other" not in done.stdout


def test_a_step_by_hand_says_what_it_lacks(run: Run) -> None:
    """command.sh has no secret: it says so, instead of asking for a link without a signature."""
    done = subprocess.run(
        [run.directory.command(1)], env=run.env, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "data.path" in done.stderr
    assert "has a secret in it that was not written down" in done.stderr
    assert "RLHF_HIDDEN_SETTINGS" in done.stderr


def _runs(argv: list[str], script: str) -> bool:
    return any(argument.endswith(script) for argument in argv)
