"""`rlhf chat`: what is said is what training would have made of it, and output stays text."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from launch import chat
from rlhf.chat.scorer import Scorer
from rlhf.chat.session import Session
from rlhf.chat.speaker import Refused, Speaker, Stream, load_speaker, sampling_line
from rlhf.errors import RequirementError
from rlhf.store import RunDir, read_manifest
from tests.unit import model_help as help_
from tests.unit.chat_help import MEAN, NEW_TOKENS, STD, make_run, write_policy
from tests.unit.driver_help import make_artifact
from train import main

CHAT = [sys.executable, str(help_.ROOT / "train.py"), "chat"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return make_run(tmp_path_factory.mktemp("chat") / "output" / "one")


def talk(run: RunDir, *argv: str, typed: str) -> subprocess.CompletedProcess[bytes]:
    """Through a pipe, by the run's name."""
    return subprocess.run(
        [*CHAT, *argv],
        cwd=run.path.parents[1],
        input=typed.encode("utf-8", "surrogateescape"),
        capture_output=True,
        timeout=240,
    )


def speaker(place: Path, **changes) -> Speaker:
    options = {"trusted": False, "max_new_tokens": None, "temperature": None, **changes}
    return load_speaker("ppo", str(place), str(place), **options)


def greedy(place: Path, messages: list[dict[str, str]]) -> str:
    """What plain transformers answers, by the likeliest token."""
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForCausalLM.from_pretrained(place)
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    found = model.generate(
        **inputs, do_sample=False, tokenizer=tokenizer, max_new_tokens=NEW_TOKENS
    )
    ids = found[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_a_conversation_through_a_pipe(run: RunDir) -> None:
    """Two models, two turns, the reward model's opinion, a new conversation: real processes."""
    typed = "What is the sky?\nAnd Paris?\n/score\n/reset\nWhat is the sky?\n/quit\nnever read\n"
    done = talk(run, "one", "--compare", "--temperature", "0", typed=typed)
    assert (done.returncode, done.stderr) == (0, b"")
    out = done.stdout.decode()
    assert "never read" not in out
    places = {"sft": run.artifact("sft"), "ppo": run.artifact("actor")}
    for name, place in places.items():
        first = [{"role": "user", "content": "What is the sky?"}]
        answer = greedy(place, first).strip()
        second = [*first, {"role": "assistant", "content": answer}]
        again = greedy(place, [*second, {"role": "user", "content": "And Paris?"}]).strip()
        shown = [shown_as(text) for text in (answer, again, answer)]
        said = parts(out, f"{name}> ")
        assert said == shown, "the second answer knows the first turn; after /reset nothing does"
    assert out.count(" normalised, ") == 2
    assert "a new conversation" in out


def parts(out: str, label: str) -> list[str]:
    """What stands after each label, with its indented lines."""
    blocks = re.split(r"\n(?=\S)", out)
    found = [block.removeprefix(label) for block in blocks if block.startswith(label)]
    return [re.split(r"\n     (?=ppo: |sft: |\[|-?\d)", block)[0] for block in found]


def shown_as(text: str) -> str:
    from rlhf.redact import printable

    return printable(text).replace("\n", "\n     ") or "[nothing]"


def test_the_prompt_is_the_templates_and_typed_specials_are_text(run: RunDir) -> None:
    one = speaker(run.artifact("actor"))
    one.turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
    ]
    eos = one.tokenizer.eos_token
    text, ids, dropped = one.prompt("Which colour?")
    assert text == "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Which colour?\n\nAssistant:"
    messages = [*one.turns, {"role": "user", "content": "Which colour?"}]
    expected = one.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert ids == list(expected["input_ids"])
    assert dropped == 0
    text, ids, _ = one.prompt(f"a{eos}b")
    assert f"a{eos}b" in text
    assert one.tokenizer.eos_token_id not in ids


def test_a_long_conversation_forgets_its_oldest_turns_and_says_so(run: RunDir) -> None:
    one = speaker(run.artifact("actor"))
    for _ in range(4):
        one.turns += [
            {"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": "It is Paris, of course."},
        ]
    _, ids, dropped = one.prompt("Which colour is the sky?")
    assert dropped % 2 == 0
    assert 0 < dropped < 8
    assert len(ids) + NEW_TOKENS <= one.positions
    before = len(one.turns)
    answer = one.answer("Which colour is the sky?", lambda _: None)
    assert answer.dropped == dropped
    assert len(one.turns) == before - dropped + 2
    with pytest.raises(Refused, match=r"positions\. Type less"):
        one.prompt("What is the capital of France? " * 40)


def test_a_model_without_a_template_goes_on_with_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "output" / "plain", template=False)
    one = speaker(run.artifact("actor"))
    assert not one.has_template
    text, ids, _ = one.prompt("It is Paris")
    assert text == "It is Paris"
    assert ids == one.tokenizer("It is Paris", add_special_tokens=False).input_ids
    one.answer("It is Paris", lambda _: None)
    assert one.prompt("Blue")[0] == "Blue", "each message by itself"
    done = talk(run, "plain", "--seed", "1", typed="It is Paris\n/score\n")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"no chat template: it goes on with your text" in done.stdout


def test_the_score_is_the_reward_models_own_logit(run: RunDir) -> None:
    """Against transformers' own sequence classifier, at the last token, end token included."""
    one = speaker(run.artifact("actor"))
    torch.manual_seed(0)
    answer = one.answer("Which colour is the sky?", lambda _: None)
    opinion = Scorer(str(run.artifact("reward")), False).score(one, answer)
    model = AutoModelForSequenceClassification.from_pretrained(run.artifact("reward")).eval()
    ids = torch.tensor([answer.prompt_ids + answer.ids])
    with torch.no_grad():
        raw = float(model(ids).logits[0, 0])
    assert opinion.raw == pytest.approx(raw, rel=1e-5)
    assert opinion.normalised == pytest.approx((raw - MEAN) / STD, rel=1e-4)


def test_sampling_is_that_of_training(run: RunDir) -> None:
    """The SFT model saves none: it samples as its run's step 3 does."""
    words = f"temperature 1, all tokens, ends at '##', at most {NEW_TOKENS} new tokens"
    assert sampling_line(speaker(run.artifact("actor"))) == words
    (sft,) = chat.find(str(run.path), ["sft"])
    assert sampling_line(speaker(Path(sft.place), rollout=sft.rollout)) == words
    cold = speaker(run.artifact("actor"), temperature=0.0, max_new_tokens=3)
    assert sampling_line(cold) == "always the likeliest token, ends at '##', at most 3 new tokens"


def test_the_same_seed_gives_the_same_answers(run: RunDir) -> None:
    typed = "What is the sky?\n/reset\nWhat is the sky?\n"
    first, again = (talk(run, "one", "--seed", "4", typed=typed).stdout for _ in range(2))
    assert first == again
    one, other = parts(first.decode(), "ppo> ")
    assert one != other, "every message has random numbers of its own"


class Pieces:
    """A tokenizer for which ids are positions in a list of texts."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def decode(self, ids: list[int], **_: object) -> str:
        joined = b"".join(self.texts[i].encode("latin-1") for i in ids)
        return joined.decode("utf-8", "replace")


def streamed(stop: list[str], *texts: str) -> tuple[list[str], str]:
    shown: list[str] = []
    stream = Stream(Pieces(*texts), stop, shown.append)
    stream.put(torch.tensor([[0, 0]]))  # the prompt
    for number in range(len(texts)):
        stream.put(torch.tensor([number]))
    stream.end()
    return shown, stream.text


def test_text_is_shown_when_it_is_sure() -> None:
    """A character of two bytes waits for the second; a stop string and its beginnings are never
    shown; what only looked like one is."""
    assert streamed([], "a", "\xc3", "\xa9", "b") == (["a", "\xe9", "b"], "a\xe9b")
    assert streamed(["##"], "a", "#", "#", "b") == (["a"], "a")
    assert streamed(["##"], "a", "#", "b") == (["a", "#b"], "a#b")
    assert streamed(["##"], "a", "#") == (["a", "#"], "a#")
    assert streamed([], "a", "\xc3") == (["a", "\ufffd"], "a\ufffd"), "the last one stays half"


class Puppet:
    """Says what it is told to."""

    name, last = "ppo", None

    def __init__(self, *pieces: str) -> None:
        self.pieces, self.heard = pieces, []

    def answer(self, said, show):
        self.heard.append(said)
        for piece in self.pieces:
            show(piece)
        return type("Said", (), {"end": "cut at 9 tokens", "dropped": 2})()

    def reset(self) -> None:
        self.heard.append("reset")


def session(puppet: Puppet, *lines: str) -> Session:
    waiting = iter(lines)
    made = Session([puppet], lambda *_: None, lambda: None, lambda _: next(waiting, None))
    made.run()
    return made


def test_what_a_model_writes_steers_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    session(Puppet(" \x1b[2J\x1b]0;title\x07", "a\rb\u202e\nyou> forged"), "hello")
    out = capsys.readouterr().out
    assert out.splitlines() == [
        "ppo> \\x1b[2J\\x1b]0;title\\x07a\\rb\\u202e",
        "     you> forged",
        "     [cut at 9 tokens]",
        "     [2 earlier messages had no room and are forgotten]",
    ]


def test_messages_and_commands(capsys: pytest.CaptureFixture[str]) -> None:
    puppet = Puppet()
    made = session(
        puppet, "one\\", "two", "//etc", "", "/score", "/nothing", "bad \udcff", "/reset", " three "
    )
    assert puppet.heard == ["one\ntwo", "/etc", "reset", " three "]
    assert made.refusals == 3
    out = capsys.readouterr().out
    assert "nothing has been answered yet" in out
    assert "/nothing: no such command" in out
    assert "not UTF-8" in out
    assert out.count("[nothing]") == 3


class Terminal:
    """The program behind a pseudo-terminal."""

    def __init__(self, run: RunDir, *argv: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [*CHAT, *argv], cwd=run.path.parents[1], stdin=slave, stdout=slave, stderr=slave,
            start_new_session=True, preexec_fn=own_terminal, env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def until(self, text: str, seconds: float = 240) -> str:
        """All that was shown since the last call, up to `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} did not come: {self.seen!r}"
            if select.select([self.master], [], [], 0.5)[0]:
                self.seen += os.read(self.master, 65536).decode("utf-8", "replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self) -> int:
        code = self.process.wait(240)
        os.close(self.master)
        return code


def own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_on_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_ends(run: RunDir, tmp_path: Path) -> None:
    """An answer that would go on for thousands of tokens; Ctrl-C reaches the whole foreground
    group, the driver too."""
    tokenizer = help_.tokenizer()
    place = tmp_path / "endless"
    write_policy(
        place, seed=1, do_sample=True, max_new_tokens=100_000,
        suppress_tokens=[tokenizer.eos_token_id],
    )  # fmt: skip
    config = place / "config.json"
    config.write_text(
        re.sub(r'("max_position_embeddings": )\d+', r"\g<1>200000", config.read_text())
    )
    terminal = Terminal(run, str(place))
    terminal.until("you> ")
    terminal.type("Go on\r")
    terminal.until("model> ")
    time.sleep(1.5)
    terminal.type("\x03")
    terminal.until("[stopped]")
    terminal.until("you> ")
    terminal.type("/score\r")
    terminal.until("no reward model is known")
    terminal.until("you> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_ctrl_c_at_the_prompt_ends(run: RunDir) -> None:
    terminal = Terminal(run, "one")
    terminal.until("you>")
    terminal.type("\x03")
    assert terminal.end() == 128 + signal.SIGINT


def test_the_reader_may_go(run: RunDir) -> None:
    command = f'echo hello | "$@" chat {run.path} | true'
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command, "bash", *CHAT[:2]],
        capture_output=True,
        timeout=240,
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*argv, **_):
        raise AssertionError(f"started: {argv}")

    monkeypatch.setattr(chat.subprocess, "run", started)


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["{run}", "--model", "ema"], 3, "step3.ppo.ema_decay"),
        (["{run}/step2_reward"], 3, "'reward' artifact, which gives no answers"),
        (["{run}/step3_ppo/artifact/critic"], 3, "'critic' artifact, which gives no answers"),
        (["{run}/step1_sft", "--compare"], 2, "this is one model and no run"),
        (["{run}", "{run}"], 2, "is given twice"),
        (["./nowhere"], 3, "no such run, directory or file"),
        (["tiny:llama"], 2, "random weights"),
        (["{run}", "--compare", "--model", "sft"], 2, "give one of them"),
        (["{run}", "--temperature", "-1"], 2, "give 0 or more"),
        (["{run}", "--max-new-tokens", "0"], 2, "give 1 or more"),
        (["{run}", "--compair"], 2, "Did you mean --compare?"),
        (["{run}", "--reward-model", "{run}/step1_sft/artifact"], 3, "this is a 'sft' artifact"),
        ([], 2, "`rlhf chat --help`"),
    ],
)
def test_what_cannot_be_talked_to(
    run: RunDir, capsys: pytest.CaptureFixture[str], argv: list[str], code: int, said: str
) -> None:
    assert main(["chat", *(word.format(run=run.path) for word in argv)]) == code
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err


@pytest.mark.usefixtures("nothing_starts")
def test_a_hub_that_does_not_answer(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["chat", "some-owner/some-model"]) == 3
    err = capsys.readouterr().err
    assert "no run or directory of that name here; as a hub id: offline" in err


@pytest.mark.usefixtures("nothing_starts")
def test_a_damaged_artifact_and_a_run_that_died(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "one")
    weights = run.artifact("actor") / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert main(["chat", str(run.path)]) == 3
    assert "is corrupt" in capsys.readouterr().err

    died = make_run(tmp_path / "two", steps=(1,))
    logs = died.logs(3)
    logs.mkdir(parents=True)
    (logs / "rank0.failure.json").write_text(
        '{"rank": 0, "phase": "train", "type": "Diverged", "message": "the loss is nan"}'
    )
    died.pipeline.write_text('{"asked": ["--name", "two"], "steps": [{"step": 3}]}')
    assert main(["chat", str(died.path), "--compare"]) == 3
    err = capsys.readouterr().err
    assert "has no ppo model; step 3 PPO: died: rank 0 in train: Diverged: the loss is nan" in err
    assert "python train.py --name two" in err
    (found,) = chat.find(str(died.path), None)
    assert found.name == "sft"
    assert "died: rank 0 in train" in found.notes[0]


def test_the_reward_model_that_is_gone(run: RunDir, tmp_path: Path) -> None:
    """A line, as for any other message that cannot be followed; the conversation goes on, and the
    exit code tells a script."""
    moved = make_run(tmp_path / "output" / "moved", steps=(1, 3))
    done = talk(moved, "moved", typed="Hi\n/score\n\udcff\udcfe\nHi\n")
    assert done.returncode == 1
    assert b"no reward model is known" in done.stdout
    assert b"not UTF-8" in done.stdout
    assert b"Traceback" not in done.stdout + done.stderr
    assert done.stdout.count(b"ppo> ") == 2


def test_a_run_that_was_given_its_models(run: RunDir, tmp_path: Path) -> None:
    """Started with --from: SFT and reward model are the other run's, while they are the same."""
    config = read_manifest(run.artifact("ppo")).config
    parents = {name: str(run.artifact(name)) for name in ("sft", "reward")}
    make_artifact(tmp_path / "two", 3, config, parents)
    (sft,) = chat.find(str(tmp_path / "two"), ["sft"])
    assert (sft.place, sft.reward) == (parents["sft"], parents["reward"])
    assert sft.rollout["max_new_tokens"] == NEW_TOKENS
    (base,) = chat.find(str(tmp_path / "two"), ["base"])
    assert (base.place, base.tokenizer) == (help_.tiny(), parents["sft"])
    gone = {"sft": str(tmp_path / "gone"), "reward": str(tmp_path / "gone")}
    make_artifact(tmp_path / "three", 1, config)
    gone["sft"] = str(RunDir(tmp_path / "three").artifact("sft"))
    make_artifact(tmp_path / "four", 3, config, gone)
    make_artifact(tmp_path / "three", 1, config, weights=b"made again")
    with pytest.raises(RequirementError, match="which is not there any more"):
        chat.find(str(tmp_path / "four"), ["sft"])
