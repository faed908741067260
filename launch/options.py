"""The driver's command line: `python train.py [flags] [key=value ...]`."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from launch.spec import PROJECT_ROOT
from rlhf.config.keys import leaves, nearest, parse_value
from rlhf.config.load import load_config, parse_overrides
from rlhf.config.names import absolute_if_local, expand_size, refuse_credentials
from rlhf.config.rewards import described
from rlhf.config.schema import RunConfig
from rlhf.errors import ConfigError
from rlhf.store import RunDir

RECIPES = PROJECT_ROOT / "launch" / "recipes"
DEFAULT_RECIPE = RECIPES / "tiny_cpu.yaml"

# flag -> the settings that it sets
SETTINGS: dict[str, tuple[str, ...]] = {
    "--deployment-type": ("launch.deployment_type",),
    "--launcher": ("launch.launcher",),
    "--node-launcher": ("launch.node_launcher",),
    "--launcher-args": ("launch.launcher_args",),
    "--accelerate-config": ("launch.accelerate_config",),
    "--accelerator": ("launch.accelerator",),
    "--num-gpus": ("launch.num_gpus",),
    "--master-port": ("launch.master_port",),
    "--hostfile": ("launch.hostfile",),
    "--num-nodes": ("launch.num_nodes",),
    "--node-rank": ("launch.node_rank",),
    "--master-addr": ("launch.master_addr",),
    "--include": ("launch.include",),
    "--exclude": ("launch.exclude",),
    "--forward": ("launch.forward",),
    "--preflight": ("launch.preflight",),
    "--actor-zero-stage": ("step1.engine.zero_stage", "step3.actor.engine.zero_stage"),
    "--reward-zero-stage": ("step2.engine.zero_stage", "step3.critic.engine.zero_stage"),
    "--hf-endpoint": ("hub.endpoint",),
    "--data-path": ("data.path",),
    "--output-dir": ("output_dir",),
    "--name": ("name",),
    "--seed": ("seed",),
    "--resume": ("checkpoint.resume",),
    "--save-every": ("checkpoint.save_every",),
    "--save-minutes": ("checkpoint.save_minutes",),
    "--keep-last": ("checkpoint.keep_last",),
    "--max-restarts": ("launch.max_restarts",),
    "--auto-batch": ("launch.auto_batch",),
}
_LISTS = ("--data-path", "--forward")  # flags that take several values
_NOT_REPEATED = ("--dry-run", "--json", "--force", "--print-config", "--json-schema")
_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.[\w-]+)*=")


@dataclass(frozen=True)
class Options:
    """What was asked, with the configuration that follows from it."""

    steps: list[int]
    config: RunConfig
    recipe: Path | None
    actor_model: str | None
    reward_model: str | None
    dry_run: bool
    as_json: bool
    print_config: bool
    json_schema: bool
    force: bool
    seeds: list[int] = field(default_factory=list)
    argv: list[str] = field(default_factory=list)
    without_step_2: bool = False
    """Nothing was said about steps, and no reward needs a reward model."""

    @property
    def run(self) -> RunDir:
        return RunDir(Path(self.config.output_dir).expanduser().absolute() / self.config.name)

    def command(self, *steps: int) -> str:
        """The same command line for other steps, to name in a remedy."""
        kept: list[str] = []
        of_step = False
        for token in normalize_flags(self.argv):
            is_flag = token.startswith("--")
            of_step = token.startswith("--step") if is_flag else of_step and token.isdigit()
            if not of_step and token not in _NOT_REPEATED:
                kept.append(token)
        return shlex.join(["python", "train.py", "--step", *map(str, steps), *kept])


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"unrecognized arguments: (\S+)", message)
        hint = ""
        if wrong:
            close = nearest(wrong[1].split("=")[0], self._option_string_actions)
            hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{message}.{hint} `python train.py --help` lists the flags")


def parser() -> argparse.ArgumentParser:
    """The flags with their help; `_` and `-` are the same in their names."""
    made = Parser(
        prog="train.py",
        allow_abbrev=False,
        description="Supervised fine-tuning, reward model and PPO, in one command. Without flags: "
        "the embedded default, on CPU in a few minutes.",
        epilog="Any setting can be given as key=value, e.g. step3.ppo.kl_coef=0.02; "
        "--print-config shows them all. In formats, templates and stop strings \\n is a line break "
        "and \\\\ a backslash; in paths and names a backslash stays. "
        "Exit codes: 0 done, 1 a step failed, 2 bad usage or configuration, 3 a requirement is "
        "missing, 129 hung up, 130 interrupted, 143 terminated.",
    )
    add = made.add_argument
    add("--step", type=int, nargs="+", choices=(1, 2, 3), metavar="N",
        help="1 SFT, 2 reward model, 3 PPO; default: all three, without 2 where no reward "
        "(step3.rewards) is the model")  # fmt: skip
    add("--config", metavar="FILE", help="recipe (YAML), or the name of one in launch/recipes")
    add("--actor-model", metavar="MODEL",
        help="base of step 1; without step 1, the SFT model of the later steps. "
        "A bare size means facebook/opt-SIZE")  # fmt: skip
    add("--reward-model", metavar="MODEL",
        help="base of step 2; without step 2, the reward model of step 3")  # fmt: skip
    add("--seeds", type=int, nargs="+", metavar="N",
        help="one run for each seed (NAME-seedN), then one verdict over all of them")  # fmt: skip
    add_settings(made, SETTINGS)
    add("--dry-run", action="store_true", help="print the plan and the command lines, then stop")
    add("--json", action="store_true", help="with --dry-run: the plan as JSON")
    add("--print-config", action="store_true", help="print every setting as YAML, then stop")
    add("--json-schema", action="store_true", help="print a recipe's JSON schema, then stop")
    add("--force", action="store_true", help="run steps again that are already done")
    return made


def add_settings(made: argparse.ArgumentParser, flags: Iterable[str]) -> None:
    """Flags of SETTINGS, each with its setting's own words as help."""
    for flag in flags:
        leaf = leaves()[SETTINGS[flag][0]]
        text = leaf.doc.replace("%", "%%")
        if leaf.is_flag:
            made.add_argument(flag, action="store_const", const="true", help=text)
            continue
        nargs = "+" if flag in _LISTS else None
        made.add_argument(flag, nargs=nargs, metavar=flag.rsplit("-", 1)[-1].upper(), help=text)


def normalize_flags(argv: Sequence[str]) -> list[str]:
    """`--a_b=c` as `--a-b=c`; names with a dot are settings and become `key=value`."""
    tokens: list[str] = []
    pending = list(argv)
    while pending:
        token = pending.pop(0)
        name, equals, value = token.partition("=")
        if not token.startswith("--") or len(token) == 2:
            tokens.append(token)
        elif "." in name:
            if not equals:
                if not pending or pending[0].startswith("--"):
                    raise ConfigError(f"{token}: a value is missing, e.g. {token[2:]}=VALUE")
                value = pending.pop(0)
            tokens.append(f"{name[2:].replace('-', '_')}={value}")
        else:
            tokens.append(name.replace("_", "-") + equals + value)
    return tokens


def parse_options(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> Options:
    """Raises ConfigError; argparse itself ends the program for `--help`."""
    environ = os.environ if environ is None else environ
    tokens, overrides = split_overrides(normalize_flags(argv))
    flags = parser().parse_args(tokens)
    if flags.json and not flags.dry_run:
        raise ConfigError("--json prints the plan for machines: use it with --dry-run")
    if flags.seeds:
        refuse_seeds(flags, overrides)
    recipe = find_recipe(flags.config, flags.actor_model)
    values, origins = flag_values(flags)
    asked = {**_from_environment(environ, values), **parse_overrides(overrides)}
    actor, reward = (model_name(name) for name in (flags.actor_model, flags.reward_model))
    config = load_config(recipe, asked, values, origins)
    needed = [1, 2, 3] if config.step3.uses_reward_model else [1, 3]
    steps = sorted(set(flags.step or needed))
    if reward and 2 not in steps and not config.step3.uses_reward_model:
        raise ConfigError(
            f"--reward-model {reward}: nothing would read it: step3.rewards is "
            f"{described(config.step3.rewards)}. Add the term `model` to it, or leave the flag out"
        )
    return Options(
        steps=steps,
        config=config,
        recipe=recipe,
        actor_model=actor,
        reward_model=reward,
        dry_run=flags.dry_run,
        as_json=flags.json,
        print_config=flags.print_config,
        json_schema=flags.json_schema,
        force=flags.force,
        seeds=flags.seeds or [],
        without_step_2=not flags.step and 2 not in steps,
        argv=list(argv),
    )


def refuse_seeds(flags: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Raises ConfigError where --seeds cannot be done as asked."""
    if flags.seed is not None or any(text.startswith("seed=") for text in overrides):
        raise ConfigError("--seeds makes a run for each seed, --seed one run: give one of them")
    if repeated := sorted({seed for seed in flags.seeds if flags.seeds.count(seed) > 1}):
        raise ConfigError(f"--seeds: {repeated[0]} is given twice, and would be the same run")
    if flags.print_config or flags.json_schema:
        what = "--print-config" if flags.print_config else "--json-schema"
        raise ConfigError(f"{what} shows the settings of one run: give --seed instead of --seeds")


def split_overrides(tokens: Sequence[str]) -> tuple[list[str], list[str]]:
    """(flags with their values, `key=value` texts)."""
    flags: list[str] = []
    overrides: list[str] = []
    for token in tokens:
        is_value = bool(flags) and flags[-1] in _TAKES_ONE and "=" not in flags[-1]
        (overrides if _OVERRIDE.match(token) and not is_value else flags).append(token)
    return flags, overrides


_TAKES_ONE = {*SETTINGS, "--config", "--actor-model", "--reward-model"}
_TAKES_ONE -= {*_LISTS, "--auto-batch"}


def flag_values(flags: argparse.Namespace) -> tuple[dict[str, Any], dict[str, str]]:
    """(dotted key -> value, dotted key -> flag) of the flags that set settings."""
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for flag, keys in SETTINGS.items():
        given = getattr(flags, flag[2:].replace("-", "_"), None)
        if given is None:
            continue
        for key in keys:
            values[key] = given if isinstance(given, list) else parse_value(given, leaves()[key])
            origins[key] = flag
    if values.get("step3.actor.engine.zero_stage") == 3:
        # Where the policy must be sharded to fit, so must its reference.
        values["step3.reference_engine.zero_stage"] = 3
        origins["step3.reference_engine.zero_stage"] = "--actor-zero-stage"
    return values, origins


def _from_environment(environ: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if environ.get("HF_ENDPOINT", "").strip() and "hub.endpoint" not in values:
        found["hub.endpoint"] = environ["HF_ENDPOINT"]
    if environ.get("HF_HUB_OFFLINE", "").strip().upper() in ("1", "ON", "YES", "TRUE"):
        found["hub.offline"] = True
    return found


def model_name(name: str | None) -> str | None:
    """A model as given on the command line, in its one form."""
    if name is None:
        return None
    return absolute_if_local(refuse_credentials(expand_size(name), "a model"))


def find_recipe(given: str | None, actor_model: str | None) -> Path | None:
    """The recipe's file. Without --config the embedded default, whose settings suit its own tiny
    model only: for another --actor-model the schema's defaults (None). Raises ConfigError.
    """
    if given is None:
        return None if actor_model and not actor_model.startswith("tiny:") else DEFAULT_RECIPE
    places = [Path(given).expanduser(), PROJECT_ROOT / given, RECIPES / f"{given}.yaml"]
    for place in places:
        if place.is_file():
            return place.absolute()
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    raise ConfigError(f"--config {given}: no such file. Recipes by name: {', '.join(names)}")
