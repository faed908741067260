"""The driver's command line: `python train.py [flags] [key=value ...]`."""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from launch.commands import overview
from launch.spec import PROJECT_ROOT
from rlhf.config.keys import Key, leaves, nearest, parse_value
from rlhf.config.load import load_config, parse_overrides
from rlhf.config.names import absolute_if_local, expand_size, refuse_credentials, refuse_long
from rlhf.config.resolve import refuse_unread, without_unneeded
from rlhf.config.schema import RunConfig
from rlhf.errors import ConfigError
from rlhf.stages import STAGES, Stage, chosen, pipeline_of
from rlhf.store import RunDir, library_versions

if TYPE_CHECKING:
    from launch.from_run import Source

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
    "--actor-zero-stage": (
        "step1.engine.zero_stage",
        "dpo.engine.zero_stage",
        "step3.actor.engine.zero_stage",
    ),
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

    stages: list[Stage]
    """What is asked for, of `pipeline`."""
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
    without_reward_model: bool = False
    """No reward needs one, and nothing was said about stages: its stage is left out."""
    source: Source | None = None
    """The run whose settings and models this one starts from."""

    @property
    def steps(self) -> list[int]:
        return [stage.number for stage in self.stages]

    @property
    def pipeline(self) -> list[Stage]:
        """All stages of the run."""
        return pipeline_of(self.config.pipeline)

    @property
    def models(self) -> dict[str, str]:
        """Flag -> the model that it names."""
        given = {"--actor-model": self.actor_model, "--reward-model": self.reward_model}
        return {flag: model for flag, model in given.items() if model}

    @property
    def run(self) -> RunDir:
        return RunDir(Path(self.config.output_dir).expanduser().absolute() / self.config.name)

    def command(self, *stages: Stage) -> str:
        """The same command line for other stages, to name in a remedy."""
        kept: list[str] = []
        of_step = False
        for token in normalize_flags(self.argv):
            is_flag = token.startswith("--")
            of_step = token.startswith("--step") if is_flag else of_step and token.isdigit()
            if not of_step and token not in _NOT_REPEATED:
                kept.append(token)
        return shlex.join(
            ["python", "train.py", "--step", *(str(one.number) for one in stages), *kept]
        )


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"unrecognized arguments: (\S+)", message)
        hint = ""
        if wrong:
            close = nearest(wrong[1].split("=")[0], self._option_string_actions)
            hint = f" Did you mean {close[0]}?" if close else ""
        command = self.prog if self.prog.startswith("rlhf ") else f"python {self.prog}"
        raise ConfigError(f"{message}.{hint} `{command} --help` lists the flags")


class _Version(argparse.Action):
    """Prints this release and the libraries that shape an artifact."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        ours, others = library_versions(), []
        own = ours.pop("rlhf-pipeline", "(not installed)")
        others = [f"{name} {version}" for name, version in ours.items()]
        print(f"rlhf-pipeline {own} ({', '.join(others)})")
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """The flags with their help; `_` and `-` are the same in their names."""
    made = Parser(
        prog="train.py",
        usage="rlhf [train] [flags] [key=value ...]     (python train.py is the same)\n"
        "       rlhf VERB ...                         (rlhf VERB --help)",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Supervised fine-tuning, reward model and PPO, in one command. Without flags:\n"
        f"the embedded default, on CPU in a few minutes.\n\n{overview()}",
        epilog=_EPILOG,
    )
    add = made.add_argument_group("what is run").add_argument
    numbers = ", ".join(f"{stage.number} {stage.title}" for stage in STAGES.values())
    add("--step", type=int, nargs="+", metavar="N",
        help=f"{numbers}; default: the recipe's pipeline, without the reward model where no reward "
        "(step3.rewards) is one")  # fmt: skip
    add("--config", metavar="FILE", help="recipe (YAML), or a name that `rlhf recipes` lists")
    add("--from", dest="source", metavar="RUN",
        help="start from another run: its settings are the recipe, and its models serve where "
        "--step leaves a step out. Needs --step and --name")  # fmt: skip
    add("--actor-model", metavar="MODEL",
        help="base of step 1; without step 1, the SFT model of the later steps. "
        "A bare size means facebook/opt-SIZE")  # fmt: skip
    add("--reward-model", metavar="MODEL",
        help="base of step 2; without step 2, the reward model of step 3")  # fmt: skip
    add("--seeds", type=int, nargs="+", metavar="N",
        help="one run for each seed (NAME-seedN), then one verdict over all of them")  # fmt: skip
    add("--force", action="store_true", help="run steps again that are already done")
    asked = made.add_argument_group("what is shown, instead of a run")
    add = asked.add_argument
    add("--dry-run", action="store_true", help="print the plan and the command lines, then stop")
    add("--json", action="store_true", help="with --dry-run: the plan as JSON")
    add("--print-config", action="store_true", help="print every setting as YAML, then stop")
    add("--json-schema", action="store_true", help="print a recipe's JSON schema, then stop")
    add("--version", action=_Version, nargs=0, help="print the release, then stop")
    for title, prefixes in _GROUPS.items():
        group = made.add_argument_group(title)
        add_settings(group, [flag for flag in SETTINGS if _group_of(flag) == prefixes])
    return made


_EPILOG = """\
Any setting can be given as key=value, e.g. step3.ppo.kl_coef=0.02; --print-config
shows them all, with the recipe's values, which may differ from the defaults above.
In formats, templates and stop strings \\n is a line break and \\\\ a backslash; in
paths and names a backslash stays.

Exit codes: 0 done, 1 a step failed, 2 bad usage or configuration, 3 a requirement
is missing, 129 hung up, 130 interrupted, 143 terminated."""
# title -> what the settings of its flags begin with; the first group has all others
_GROUPS: dict[str, tuple[str, ...]] = {
    "the run": (),
    "stopping and resuming": ("checkpoint.", "launch.max_restarts", "launch.auto_batch"),
    "processes and machines": ("launch.",),
}


def _group_of(flag: str) -> tuple[str, ...]:
    own = (start for start in _GROUPS.values() if start and SETTINGS[flag][0].startswith(start))
    return next(own, ())


def add_settings(made: argparse._ActionsContainer, flags: Iterable[str]) -> None:
    """Flags of SETTINGS, each with its setting's own words, choices and default as help."""
    for flag in flags:
        leaf = leaves()[SETTINGS[flag][0]]
        text = f"{leaf.doc} {_facts(leaf)}".strip().replace("%", "%%")
        if leaf.is_flag:
            made.add_argument(flag, action="store_const", const="true", help=text)
            continue
        nargs = "+" if flag in _LISTS else None
        made.add_argument(flag, nargs=nargs, metavar=flag.rsplit("-", 1)[-1].upper(), help=text)


def _facts(leaf: Key) -> str:
    """`[one of a, b; default a]`, as far as there is something to say."""
    choices = [kind for kind in leaf.types if isinstance(kind, str)]  # a Literal's values
    told = [f"one of {', '.join(choices)}"] if len(choices) > 1 else []
    if leaf.default not in (None, "", [], False):
        shown = leaf.default if not isinstance(leaf.default, list) else ", ".join(leaf.default)
        told.append(f"default {shown}")
    return f"[{'; '.join(told)}]" if told else ""


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
    values, origins = flag_values(flags)
    asked = {**from_environment(environ, values), **parse_overrides(overrides)}
    actor, reward = (model_name(name) for name in (flags.actor_model, flags.reward_model))
    source = None
    if flags.source is not None:
        source = _source(flags, named="name" in values or "name" in asked)
        asked = {"output_dir": str(source.run.path.parent), **source.settings, **asked}
        origins = {**dict.fromkeys(source.settings.keys() - asked.keys(), "--from"), **origins}
        actor = actor or source.models.get("sft")
        reward = reward or source.models.get("reward")
    recipe = None if source else find_recipe(flags.config, flags.actor_model)
    config = load_config(recipe, asked, values, origins)
    if source is not None:
        _refuse_itself(config, source)
    pipeline = pipeline_of(config.pipeline)
    stages = chosen(pipeline, flags.step) if flags.step else without_unneeded(config, pipeline)
    if reward:
        refuse_unread(reward, config, stages)
    return Options(
        stages=stages,
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
        without_reward_model=not flags.step and len(stages) < len(pipeline),
        argv=list(argv),
        source=source,
    )


def _source(flags: argparse.Namespace, *, named: bool) -> Source:
    """The other run of --from. Raises ConfigError, RequirementError."""
    from launch import from_run  # which needs what this file defines

    if not flags.print_config:
        from_run.refuse_what_contradicts(
            flags.source, config=flags.config, steps=flags.step, named=named
        )
    roles = from_run.needed(flags.step or [])
    if flags.actor_model:
        roles = [role for role in roles if role != "sft"]
    if flags.reward_model:
        roles = [role for role in roles if role != "reward"]
    return from_run.read_source(flags.source, roles)


def _refuse_itself(config: RunConfig, source: Source) -> None:
    place = Path(config.output_dir).expanduser().absolute() / config.name
    if place.resolve() == source.run.path.resolve():
        raise ConfigError(f"--from {source.run.path}: give the new run another --name than its own")


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


_TAKES_ONE = {*SETTINGS, "--config", "--from", "--actor-model", "--reward-model"}
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


def from_environment(environ: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the hub's own variables, where no flag says otherwise."""
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
    name = refuse_long(expand_size(name), "a model")
    return absolute_if_local(refuse_credentials(name, "a model"))


def find_recipe(given: str | None, actor_model: str | None) -> Path | None:
    """The recipe's file. Without --config the embedded default, whose settings suit its own tiny
    model only: for another --actor-model the schema's defaults (None). Raises ConfigError.
    """
    if given is None:
        return None if actor_model and not actor_model.startswith("tiny:") else DEFAULT_RECIPE
    refuse_long(given, "--config")
    places = [Path(given).expanduser(), PROJECT_ROOT / given, RECIPES / f"{given}.yaml"]
    for place in places:
        if place.is_file():
            return place.absolute()
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    raise ConfigError(f"--config {given}: no such file. Recipes by name: {', '.join(names)}")
