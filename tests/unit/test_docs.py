"""The documentation says what is true: commands, flags, settings, links, tables (C9, STYLE)."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import chat, compare, evaluation, plan_command, recipes_command, show
from launch.commands import COMMANDS
from launch.options import RECIPES, parse_options, parser
from rlhf.certify import main as certify
from rlhf.config.keys import lookup, sections
from rlhf.config.load import load_config, parse_overrides, with_values
from rlhf.config.schema import RunConfig
from rlhf.config.step_args import find_key, split_options
from rlhf.errors import ConfigError
from rlhf.serving import reward as serve_reward
from rlhf.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    and path.relative_to(ROOT).parts[0] not in ("output", "build", "dist")
)
DECISIONS = ROOT / "docs" / "decisions"
COMING_FROM = ROOT / "docs" / "coming-from.md"
STEP_SCRIPTS = {f"{stage.folder}/main.py": stage for stage in STAGES.values()}
_TOP = r"(?:step[123]|data|launch|hub|checkpoint|track)"

# The flags of DeepSpeed-Chat's scripts at DeepSpeedExamples 83757d9c, by the headings of our page.
DEEPSPEED_CHAT = {
    "The driver": """--step --actor-model --reward-model --actor-zero-stage --reward-zero-stage
        --output-dir --deployment-type""",
    "Chat": "path max_new_tokens",
    "Steps 1 and 2, and DPO": """data_path data_split data_output_path model_name_or_path
        per_device_train_batch_size per_device_eval_batch_size max_seq_len weight_decay
        num_train_epochs gradient_accumulation_steps lr_scheduler_type num_warmup_steps output_dir
        seed local_rank gradient_checkpointing dropout offload dtype zero_stage lora_dim
        lora_module_name only_optimize_lora lora_learning_rate compute_fp32_loss enable_tensorboard
        tensorboard_path add_eot_token deepspeed deepspeed_config deepscale deepscale_config
        learning_rate sft_only_data_path eot_token print_loss num_padding_at_beginning
        eval_interval eval_iters beta label_smoothing offload_reference_model""",
    "Step 3": """data_path data_split data_output_path unsupervised_dataset_name
        unsupervised_dataset_config_name unsup_coef actor_model_name_or_path
        critic_model_name_or_path num_padding_at_beginning per_device_generation_batch_size
        per_device_training_batch_size generation_batches ppo_epochs max_prompt_seq_len
        max_answer_seq_len actor_learning_rate critic_learning_rate actor_weight_decay
        critic_weight_decay num_train_epochs lr_scheduler_type gradient_accumulation_steps
        num_warmup_steps output_dir seed preprocessing_num_workers local_rank enable_hybrid_engine
        unpin_actor_parameters release_inference_cache inference_tp_size tp_gather_partition_size
        offload dtype offload_reference_model offload_reward_model actor_zero_stage
        critic_zero_stage actor_gradient_checkpointing critic_gradient_checkpointing actor_dropout
        critic_dropout actor_lora_dim critic_lora_dim actor_lora_module_name
        critic_lora_module_name only_optimize_lora actor_lora_learning_rate
        critic_lora_learning_rate enable_ema enable_mixed_precision_lora compute_fp32_loss
        enable_tensorboard tensorboard_path add_eot_token align_overflow print_answers
        print_answers_interval enable_test_mode test_stop_step deepspeed deepspeed_config deepscale
        deepscale_config""",
    "Evaluation scripts": """model_name_or_path_baseline model_name_or_path_finetune
        model_name_or_path num_beams num_beam_groups top_k penalty_alpha num_return_sequences
        max_new_tokens language""",
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced code blocks of these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [body for language, body in found if language in languages]


def prose(page: Path) -> str:
    """The page without its fenced code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def commands(page: Path) -> Iterator[list[str]]:
    """Each command of the shell blocks and of inline code, as a list of arguments."""
    lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
    lines += [code for code in inline_code(prose(page)) if code.startswith(("python ", "pip "))]
    for line in lines:
        for command in re.sub(r"\s>\s.*", "", line).split(" && "):
            if words := shlex.split(command, comments=True):
                yield words


def rows(text: str) -> Iterator[list[str]]:
    """The body rows of all tables, as cells."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        for line in table.splitlines()[2:]:
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip().strip("|"))]


def flags() -> set[str]:
    parsers = (
        parser(),
        plan_command.parser(),
        certify.parser(),
        chat.parser(),
        show.parser(),
        compare.parser(),
        recipes_command.parser(),
        serve_reward.parser(),
    )
    return {flag for one in parsers for flag in one._option_string_actions}


EVERY_COMMAND = [(page, command) for page in PAGES for command in commands(page)]


def test_there_is_something_to_check() -> None:
    assert {"README.md", "CHANGELOG.md", "docs/design.md"} <= {name(page) for page in PAGES}
    started = {command[0] for _, command in EVERY_COMMAND}
    assert {"python", "pip", "pytest", "deepspeed"} <= started
    assert len(EVERY_COMMAND) > 30


@pytest.mark.parametrize(
    ("page", "command"),
    [pytest.param(p, c, id=f"{name(p)}: {shlex.join(c)[:70]}") for p, c in EVERY_COMMAND],
)
def test_commands_exist(page: Path, command: list[str]) -> None:
    """Every documented command is one: flags, settings, recipes, modules and extras exist."""
    words = command[2:] if command[:2] == ["python", "-m"] else command
    if words[:2] == ["python", "train.py"]:
        check_driver(words[2:])
    elif words[0] == "rlhf":
        check_driver(words[1:])
    elif command[:2] == ["python", "-m"]:
        check_module(*words)
    elif words[0] == "deepspeed":
        check_step_script(words)
    elif words[:2] == ["pip", "install"]:
        check_pip(words[2:])
    elif words[0].endswith(".sh"):
        assert os.access(ROOT / words[0], os.X_OK), f"{name(page)}: {words[0]}"
    else:
        assert words[0] in ("pytest", "pre-commit"), f"{name(page)}: what is {words[0]}?"


def check_driver(argv: list[str]) -> None:
    if argv[:1] == ["train"]:
        argv = argv[1:]
    if argv[:1] == ["plan"]:
        plan_command.parse(argv[1:])
        return
    if argv[:1] == ["chat"]:
        chat.parse(argv[1:])
        return
    own = {"certify": certify, "compare": compare, "recipes": recipes_command, "show": show}
    if argv and argv[0] in own:
        own[argv[0]].parser().parse_args(argv[1:])
        return
    if argv[:1] == ["serve-reward"]:
        serve_reward.parser().parse_args(argv[1:])
        return
    if argv[:1] == ["evaluate"]:
        _, asked = evaluation.parse_flags(argv[1:])
        with_values(RunConfig(), asked)
        return
    if argv and not argv[0].startswith("-") and argv[0] in COMMANDS:
        argv = argv[2:] if argv[0] == "example" else argv[1:]
    if "--from" in argv:  # a run that is not here: the rest of the line is looked at
        at = argv.index("--from")
        assert {"--step", "--name"} <= set(argv), argv
        argv = [*argv[:at], *argv[at + 2 :]]
    if "--help" not in argv:
        # Raises ConfigError for a flag, setting, value or recipe that does not exist.
        parse_options(argv, environ={})


def check_module(module: str, *arguments: str) -> None:
    assert importlib.util.find_spec(module) is not None, module
    source = Path(importlib.util.find_spec(module).origin or "").read_text()  # type: ignore[union-attr]
    for flag in [argument for argument in arguments if argument.startswith("--")]:
        assert f'"{flag}"' in source, f"python -m {module} has no {flag}"


def check_step_script(words: list[str]) -> None:
    script = next(word for word in words if word in STEP_SCRIPTS)
    parents = {need.kind for stage in STAGES.values() for need in stage.needs}
    assert (ROOT / script).is_file()
    options, bare = split_options(words[words.index(script) + 1 :])
    assert not bare
    given = dict(options)
    for option, values in options:
        if option == "config":
            recipe = ROOT / values[0]
            assert recipe.suffix == ".json" or recipe.is_file(), values
        elif option not in parents:
            key = find_key(option, STEP_SCRIPTS[script])
            load_config(None, parse_overrides([f"{key.name}={values[0]}"]))
    if given["config"][0].endswith(".yaml"):  # a recipe knows no parents
        assert {need.kind for need in STEP_SCRIPTS[script].needs} <= given.keys()


def check_pip(arguments: list[str]) -> None:
    # Not tomllib: Python 3.10 has none.
    text = (ROOT / "pyproject.toml").read_text()
    section = text.split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", section, re.M))
    for argument in arguments:
        if match := re.fullmatch(r"\.\[([\w,]+)\]", argument):
            assert set(match[1].split(",")) <= extras, argument


def test_the_readme_starts_with_the_two_commands() -> None:
    first = "\n".join(blocks(ROOT / "README.md", "sh")[:2]).splitlines()
    assert first[0] == "pip install -e . && python train.py"
    assert first[2] == "pip install -e '.[test]' && pytest"


def test_python_examples_parse_and_import_what_exists() -> None:
    examples = [block for page in PAGES for block in blocks(page, "python")]
    assert examples
    for example in examples:
        for node in ast.walk(ast.parse(example)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names), example


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_named_settings_and_flags_exist(page: Path) -> None:
    """Dotted names in code are settings; `--names` are the driver's flags (or theirs, on the left
    of a table in coming-from.md)."""
    text = prose(page)
    if page == COMING_FROM:
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.M)
    for code in inline_code(text):
        for dotted in re.findall(rf"(?<![\w./-])({_TOP}(?:\.\w+)+)(?![\w/(])", code):
            if dotted.endswith((".py", ".md", ".json")):
                continue
            assert lookup(dotted) or dotted in sections(), f"{name(page)}: {dotted}"
        if code.startswith("--") and " " not in code:
            known = flags() | {"--no-deps"}
            assert code.split("=")[0] in known, f"{name(page)}: {code}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link resolves, its #anchor too."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{name(page)} -> {target}"
        assert found.is_relative_to(ROOT), f"{name(page)} -> {target}: outside the project"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.M)
            made = {
                re.sub(r"[^\w\- ]", "", head).strip().lower().replace(" ", "-") for head in heads
            }
            assert anchor in made, f"{name(page)} -> {target}"


def named_files(text: str) -> Iterator[str]:
    tops = r"(?:rlhf|launch|step1_sft|step2_reward|step3_ppo|tests)"
    for code in inline_code(text):
        if re.fullmatch(rf"{tops}/[\w./]*", code):
            yield code


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_named_files_exist(page: Path) -> None:
    planned = {"rlhf/plan"}  # said to be missing where it is named
    for file in named_files(prose(page)):
        template = file.rsplit("/", 1)[-1] == "x.py"
        assert file in planned or template or (ROOT / file).exists(), f"{name(page)}: {file}"


def test_the_tree_in_the_design_page_is_the_tree() -> None:
    """Every file and folder that the drawing in docs/design.md names exists."""
    tree = blocks(ROOT / "docs" / "design.md", "")[0]
    folder, seen = "", 0
    for line in tree.splitlines():
        parts = re.split(r"\s{2,}", line.strip())[0].split()
        inner = line.startswith("  ")
        if not inner:
            folder = parts[0] if parts[0].endswith("/") else ""
        for part in parts:
            if not re.fullmatch(r"[\w./*]+", part) or not ("." in part or part.endswith("/")):
                continue
            assert list(ROOT.glob((folder if inner else "") + part.rstrip("/"))), line
            seen += 1
    assert seen > 25


# coming-from.md


def check_home(cells: list[str]) -> None:
    there, here, note = cells
    assert there, cells
    if here in ("not yet", "not needed"):
        assert note, f"{there}: {here}, and no reason"
        return
    homes = inline_code(here)
    assert homes, f"{there}: no home in {here!r}"
    assert not re.sub(r"`[^`]*`|[,\s]", "", here), f"{there}: words beside the homes: {here!r}"
    for home in homes:
        assert home in flags() or lookup(home) is not None, f"{there}: {home} does not exist"


def test_coming_from_names_homes_that_exist() -> None:
    """C9: each row's home is a setting, a flag, or not yet / not needed with the reason."""
    table = list(rows(COMING_FROM.read_text(encoding="utf-8")))
    assert len(table) > 150
    for cells in table:
        assert len(cells) == 3, cells
        check_home(cells)


@pytest.mark.parametrize(
    "cells",
    [
        ["`lora_dim`", "`step1.model.lora.rnak`", ""],
        ["`lora_dim`", "`--lora-dim`", ""],
        ["`lora_dim`", "not yet", ""],
        ["`lora_dim`", "somewhere", ""],
        ["`lora_dim`", "", "a note"],
    ],
)
def test_a_wrong_home_is_seen(cells: list[str]) -> None:
    with pytest.raises(AssertionError):
        check_home(cells)


@pytest.mark.parametrize("heading", DEEPSPEED_CHAT)
def test_every_deepspeed_chat_flag_has_a_row(heading: str) -> None:
    """C9: any DeepSpeed-Chat step or driver flag has a documented home, once per script."""
    text = COMING_FROM.read_text(encoding="utf-8")
    part = re.split(r"^#{2,3} ", text.split(f"### {heading}\n", 1)[1], flags=re.M)[0]
    found = [flag for cells in rows(part) for flag in inline_code(cells[0])]
    assert sorted(found) == sorted(DEEPSPEED_CHAT[heading].split())


# decisions, recipes, the three READMEs' numbers, checks


def test_decisions_are_indexed_and_have_their_parts() -> None:
    files = sorted(path for path in DECISIONS.glob("*.md") if path.name != "README.md")
    assert [int(path.name[:4]) for path in files] == list(range(1, len(files) + 1))
    index = list(rows((DECISIONS / "README.md").read_text()))
    titles = {}
    for path in files:
        text = path.read_text()
        number, _, title = text.splitlines()[0].removeprefix("# ").partition(" ")
        titles[f"[{number}]({path.name})"] = title
        assert path.name.startswith(number), path.name
        heads = re.findall(r"^## (.+)$", text, re.M)
        assert heads == ["Context", "Choice", "Cost"], path.name
        assert len(text.splitlines()) <= 60, f"{path.name} is more than a page"
    assert dict(index) == titles


def test_pages_named_in_the_code_exist() -> None:
    files = [*ROOT.glob("*.py"), *(ROOT / "rlhf").rglob("*.py"), *ROOT.glob("step*/*.py")]
    named = {
        page
        for path in [*files, *RECIPES.glob("*.yaml")]
        for page in re.findall(r"docs/[\w./-]+\.md", path.read_text(encoding="utf-8"))
    }
    assert len(named) >= 2
    assert [page for page in sorted(named) if not (ROOT / page).is_file()] == []


def test_statements_are_numbered_and_those_that_code_names_exist() -> None:
    numbers = [int(cells[0]) for cells in rows((ROOT / "docs" / "algorithm.md").read_text())]
    assert numbers == list(range(1, 40))
    for path in [*(ROOT / "rlhf").rglob("*.py"), *ROOT.glob("step*/*.py")]:
        for found in re.findall(r"ALGORITHM\.md (\d+)", path.read_text(encoding="utf-8")):
            assert int(found) in numbers, name(path)


def test_recipes_are_listed() -> None:
    text = (RECIPES / "README.md").read_text()
    listed = {cells[0] for cells in rows(text)}
    assert listed == {f"[{path.name}]({path.name})" for path in RECIPES.glob("*.yaml")}


def test_recipe_examples_are_recipes(tmp_path: Path) -> None:
    for recipe in RECIPES.glob("*.yaml"):
        (tmp_path / recipe.name).write_text(recipe.read_text())
        load_config(recipe)
    examples = blocks(RECIPES / "README.md", "yaml")
    assert examples
    for example in examples:
        (tmp_path / "example.yaml").write_text(example)
        load_config(tmp_path / "example.yaml")


def test_the_acts_of_step_3_are_those_of_the_code() -> None:
    """STYLE 3: the numbered comments of main.py are the headings of README.md."""
    code = (ROOT / "step3_ppo" / "main.py").read_text()
    comments = [line.strip()[2:] for line in code.splitlines() if line.strip().startswith("# ")]
    acts = [act for line in comments for act in re.findall(r"(\d\. [^.]+)\.", line)]
    text = (ROOT / "step3_ppo" / "README.md").read_text()
    assert acts == re.findall(r"^## (\d\. .+)$", text, re.M)
    assert [act[0] for act in acts] == list("12345")


def test_hooks_and_ci_run_the_same_checks() -> None:
    hooks: Any = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    found = [hook for repo in hooks["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in hooks["repos"]} == {"local"}
    assert {hook["language"] for hook in found} == {"system"}
    script = (ROOT / ".ci" / "run").read_text()
    for hook in found:
        assert re.search(rf'^phase "[^"]+" {re.escape(hook["entry"])}$', script, re.M), hook[
            "entry"
        ]
    assert "set -euo pipefail" in script
    for command in ("pip install --quiet -e '.[test]'", "OMP_NUM_THREADS=1 pytest\n"):
        assert command in script
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_an_unknown_flag_in_a_command_is_seen() -> None:
    with pytest.raises(ConfigError):
        check_driver(["--actor-modle", "1.3b"])
    with pytest.raises(ConfigError):
        check_driver(["step3.ppo.klcoef=1"])
