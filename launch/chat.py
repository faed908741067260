"""`rlhf chat`: finds and proves what is talked to, then starts rlhf/chat/main.py: torch is loaded
there."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launch.devices import visible_gpus
from launch.environment import hub_environment
from launch.finished import finished
from launch.gate import prove
from launch.hub import check_hub
from launch.options import (
    Parser,
    add_settings,
    from_environment,
    normalize_flags,
)
from launch.runs import FINISHED, goes_on, is_run, model_place, name_of, states
from launch.spec import PROJECT_ROOT
from rlhf.config.load import load_config
from rlhf.config.names import expand_size, is_hub_model, is_path_like
from rlhf.config.schema import RunConfig
from rlhf.config.trees import flatten
from rlhf.errors import ArtifactError, ConfigError, RequirementError
from rlhf.redact import redact
from rlhf.stages import PPO, SFT
from rlhf.store import MANIFEST, Manifest, RunDir

SCRIPT = PROJECT_ROOT / "rlhf" / "chat" / "main.py"
MODELS = ("base", "sft", "ppo", "ema")
_ARTIFACT = {"sft": "sft", "ppo": "actor", "ema": "actor_ema"}
_STAGE = {"base": SFT, "sft": SFT, "ppo": PPO, "ema": PPO}


@dataclass(frozen=True)
class Found:
    """A model to talk to."""

    name: str
    place: str
    """A directory, hub id, `.gguf` file or `package:NAME`."""
    tokenizer: str = ""
    """Where its tokenizer and template are, if not with the model."""
    reward: str = ""
    """The reward model that it was trained with; "" if none is known."""
    rollout: dict[str, Any] = field(default_factory=dict)
    """How its run samples, for a model that does not say so itself."""
    notes: list[str] = field(default_factory=list)
    trusted: bool = False
    """Its run allows the model's own code (trust_remote_code)."""


def main(argv: Sequence[str]) -> int:
    """The exit code of rlhf/chat/main.py. Raises ConfigError, RequirementError, ArtifactError
    before torch is loaded."""
    flags = parse(argv)
    found = find_all(flags)
    if flags.reward_model:
        prove_model(flags.reward_model, ("reward",))
    given = {"hub.endpoint": flags.hf_endpoint} if flags.hf_endpoint else {}
    config = load_config(
        None, from_environment(os.environ, given), given, {"hub.endpoint": "--hf-endpoint"}
    )
    offline, checks = check_hub(
        [one.place for one in found], [], config.hub.endpoint, config.hub.offline
    )
    for check in checks:
        if check.state == "FAIL":
            name = check.what.removeprefix("hub: ")
            raise RequirementError(
                f"rlhf chat {name}: there is no run or directory of that name here; as a hub id: "
                f"{check.found}. Check the name; --hf-endpoint gives a mirror, HF_TOKEN a gated one"
            )
    env = environment(config, offline)
    command = [sys.executable, str(SCRIPT), *arguments(flags, found)]
    return _attended(command, env)


def parser() -> Parser:
    """The flags with their help."""
    made = Parser(
        prog="rlhf chat",
        allow_abbrev=False,
        description="Talks to what a run has made, in the terminal or through a pipe: with the "
        "chat template that is saved with the model, sampling as in training. /score asks the "
        "reward model about the last answer, /reset starts a new conversation, /quit ends.",
    )
    add = made.add_argument
    add("target", nargs="+", metavar="RUN|MODEL",
        help="a run's directory or its name below output/, an artifact, a Hugging Face directory, "
        "a .gguf file or a hub id; several are compared")  # fmt: skip
    add("--compare", action="store_true", help="the SFT and the PPO model answer each message")
    add("--model", nargs="+", choices=MODELS, metavar="NAME",
        help=f"of the run: {', '.join(MODELS)}; default: the last one made")  # fmt: skip
    add("--reward-model", metavar="MODEL",
        help="what /score asks; default: the reward model of the run")  # fmt: skip
    add("--max-new-tokens", type=int, metavar="N", help="default: as in training")
    add("--temperature", type=float, metavar="T", help="default: as in training; 0: no sampling")
    add("--seed", type=int, metavar="N", help="the same answers again; default: others each time")
    add_settings(made, ["--hf-endpoint"])
    return made


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Raises ConfigError."""
    flags = parser().parse_args(normalize_flags(argv))
    if flags.compare and flags.model:
        raise ConfigError("--compare is --model sft ppo: give one of them")
    if flags.max_new_tokens is not None and flags.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens {flags.max_new_tokens}: give 1 or more")
    if flags.temperature is not None and not 0 <= flags.temperature < float("inf"):
        raise ConfigError(f"--temperature {flags.temperature}: give 0 or more, e.g. 0.7")
    return flags


def find_all(flags: argparse.Namespace) -> list[Found]:
    """Every model that is talked to, proven, each with a name of its own."""
    found: list[Found] = []
    for target in flags.target:
        models = ["sft", "ppo"] if flags.compare else flags.model
        some = find(target, models)
        if len(flags.target) > 1:
            place = Path(target).name or target
            some = [replace(one, name=f"{place} {one.name}") for one in some]
        found += some
    names = [one.name for one in found]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"rlhf chat: {repeated[0]} is given twice")
    return found


def find(target: str, models: Sequence[str] | None) -> list[Found]:
    """What one argument names. Raises RequirementError, ArtifactError, ConfigError."""
    path = Path(target).expanduser().absolute()
    by_name = Path("output").absolute() / target
    path = by_name if by_name.exists() and not path.exists() else path
    if is_run(path):
        return of_run(RunDir(path), models)
    if models:
        raise ConfigError(
            f"rlhf chat {target}: this is one model and no run, so --compare and --model have "
            "nothing to choose from. Give the run's directory, or several models to compare"
        )
    if (path / "artifact" / MANIFEST).is_file():  # a step's directory
        path = path / "artifact"
    if path.is_dir():
        return [of_directory(path)]
    name = expand_size(target)
    if path.is_file() or name.startswith("package:"):
        return [Found("model", str(path) if path.is_file() else name)]
    if name.startswith("tiny:"):
        raise ConfigError(f"rlhf chat {target}: these are random weights; train them first")
    if is_path_like(target) or not is_hub_model(name):
        raise RequirementError(
            f"rlhf chat {target}: no such run, directory or file. Runs are looked for here and in "
            f"{by_name.parent}"
        )
    return [Found("model", name, notes=[f"no run or directory {target} here: a hub id"])]


def of_run(run: RunDir, models: Sequence[str] | None) -> list[Found]:
    """Models of a run; without `models` the last one that was published."""
    notes: list[str] = []
    if not models:
        last = "ppo" if run.artifact("ppo").is_dir() else "sft"
        models = [last]
        for one in states(run):
            if (
                one.state != FINISHED
                and one.manifest is None
                and one.stage.number > _STAGE[last].number
            ):
                notes.append(
                    f"{name_of(one.stage)}: {one.line()}; this is the {last.upper()} model"
                )
    return [of_run_model(run, name, notes) for name in dict.fromkeys(models)]


def of_run_model(run: RunDir, name: str, notes: Sequence[str] = ()) -> Found:
    """One of a run's models, its artifact verified."""
    if name in ("base", "sft"):
        return _before_ppo(run, name, notes)
    if not run.artifact("ppo").is_dir():
        raise RequirementError(_nothing_there(run, name))
    manifest = prove(run.artifact("ppo"), "ppo", quick=False)
    place = run.artifact(_ARTIFACT[name])
    if not place.is_dir():
        raise RequirementError(
            f"{run.path}: no average of the weights was kept (step3.ppo.ema_decay): "
            "choose --model sft or ppo"
        )
    return Found(name, str(place), "", reward_of(run), {}, list(notes), _trusts(manifest))


def _before_ppo(run: RunDir, name: str, notes: Sequence[str]) -> Found:
    """The SFT model, made by the run or given to it, or what that was made from."""
    place = model_place(run, "sft")
    if place is None:
        raise RequirementError(_nothing_there(run, name))
    manifest = None
    if (Path(place) / MANIFEST).is_file():
        manifest = prove(Path(place), None, quick=False)
    rollout = rollout_of(finished(run, PPO) or manifest)
    trusted = manifest is not None and _trusts(manifest)
    if name == "sft":
        return Found("sft", place, "", reward_of(run), rollout, list(notes), trusted)
    base = manifest.metrics.get("base") if manifest is not None else None
    if not base:
        raise RequirementError(f"{place}: the SFT model does not say what it started from")
    # Base models may have no template of their own: the SFT model's, as in the evaluation.
    return Found("base", str(base), place, reward_of(run), rollout, list(notes), trusted)


def rollout_of(manifest: Manifest | None) -> dict[str, Any]:
    """How step 3 samples, or would: base and SFT models do not say it themselves."""
    if manifest is None:
        return {}
    flat = flatten(manifest.config)
    keys = {name: f"step3.rollout.{name}" for name in ("temperature", "max_new_tokens", "stop")}
    return {name: flat[key] for name, key in keys.items() if flat.get(key) is not None}


def _nothing_there(run: RunDir, name: str) -> str:
    stage = _STAGE[name]
    state = next((one for one in states(run) if one.stage == stage), None)
    told = f": {state.line()}" if state else ": it was not asked for"
    command = goes_on(run)
    remedy = f". Go on with:\n  {command}" if command else ""
    return f"{run.path} has no {name} model; {name_of(stage)}{told}{remedy}"


def reward_of(run: RunDir) -> str:
    """The reward model of a run: the one that PPO was trained with, else the run's own."""
    try:
        return model_place(run, "reward") or ""
    except RequirementError:  # not there any more: /score says that none is known
        return ""


def of_directory(path: Path) -> Found:
    """An artifact, a part of one, or any Hugging Face directory."""
    whole = next((one for one in (path, *path.parents) if (one / MANIFEST).is_file()), None)
    if whole is None:
        if not (path / "config.json").is_file():
            raise RequirementError(
                f"rlhf chat {path}: no run and no model in this directory (no config.json)"
            )
        return Found("model", str(path))
    manifest = prove(whole, None, quick=False)
    if manifest.kind == "ppo" and path == whole:
        path = whole / "actor"
    elif manifest.kind not in ("sft", "ppo", "base") or path.name == "critic":
        what = "critic" if path.name == "critic" else manifest.kind
        raise ArtifactError(
            f"rlhf chat {path}: this is {'the' if what == 'critic' else 'a'} {what!r} artifact, "
            "which gives no answers: give an 'sft' or 'ppo' artifact, or the run's directory"
        )
    parent = manifest.parents.get("reward")
    name = {"actor": "ppo", "actor_ema": "ema"}.get(path.name, manifest.kind)
    reward = parent.path if parent else ""
    rollout = rollout_of(manifest) if manifest.kind == "sft" else {}
    return Found(name, str(path), reward=reward, rollout=rollout, trusted=_trusts(manifest))


def prove_model(place: str, kinds: Sequence[str]) -> None:
    """Verifies an artifact of ours. Raises ArtifactError for another kind; passes over others."""
    path = Path(place).expanduser()
    if (path / MANIFEST).is_file():
        manifest = prove(path, None, quick=False)
        if manifest.kind not in kinds:
            raise ArtifactError(
                f"--reward-model {place}: this is a {manifest.kind!r} artifact, one of "
                f"{' or '.join(kinds)} is needed"
            )
    elif not path.is_dir() and is_path_like(place):
        raise RequirementError(f"--reward-model {place}: no such directory")


def _trusts(manifest: Manifest) -> bool:
    return any(
        bool(value)
        for key, value in flatten(manifest.config).items()
        if key.endswith("model.trust_remote_code")
    )


def arguments(flags: argparse.Namespace, found: Sequence[Found]) -> list[str]:
    """The command line of rlhf/chat/main.py."""
    words: list[str] = []
    for one in found:
        words += ["--speaker", one.name, one.place, one.tokenizer or one.place]
        words += ["--rollout", one.name, json.dumps(one.rollout)] if one.rollout else []
        words += ["--trust-remote-code", one.name] if one.trusted else []
        for note in one.notes:
            words += ["--note", redact(note)]
    reward = flags.reward_model or next((one.reward for one in found if one.reward), "")
    words += ["--reward", str(Path(reward).expanduser())] if reward else []
    for name in ("max_new_tokens", "temperature", "seed"):
        value = getattr(flags, name)
        words += [f"--{name.replace('_', '-')}", str(value)] if value is not None else []
    return words


def environment(config: RunConfig, offline: bool) -> dict[str, str]:
    """Variables of the process that talks."""
    more, unset = hub_environment(config, os.environ)
    env = {name: value for name, value in os.environ.items() if name not in unset} | more
    env["TOKENIZERS_PARALLELISM"] = "false"
    if offline:
        env["HF_HUB_OFFLINE"] = "1"
    if not visible_gpus():
        env["DS_ACCELERATOR"] = "cpu"  # else deepspeed warns that it found no GPU
    given = env.get("PYTHONPATH")
    env["PYTHONPATH"] = os.pathsep.join([str(PROJECT_ROOT), *([given] if given else [])])
    return env


def _attended(command: Sequence[str], env: Mapping[str, str]) -> int:
    """Runs it in this terminal. Ctrl-C is the conversation's: it stops an answer."""
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        code = subprocess.run(command, env=env, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, before)
    return code if code >= 0 else 128 - code
