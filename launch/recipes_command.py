"""`rlhf recipes`: lists the recipes, describes one, copies one to start a recipe of one's own."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.options import RECIPES, Parser, find_recipe, normalize_flags
from rlhf.config.load import load_config, read_recipe, read_yaml
from rlhf.config.trees import flatten
from rlhf.errors import ConfigError, RequirementError
from rlhf.redact import printable


def main(argv: Sequence[str]) -> int:
    """0. Raises ConfigError for a recipe that does not exist or cannot be read, RequirementError
    where the copy cannot be written."""
    flags = parser().parse_args(normalize_flags(argv))
    if flags.copy and not flags.recipe:
        raise ConfigError("rlhf recipes --copy FILE: name the recipe that is copied, too")
    if not flags.recipe:
        known = [describe(path) for path in sorted(RECIPES.glob("*.yaml"))]
        lines = [f"{one['name']:22} {first_sentence(one['about'][0])}" for one in known]
        print(json.dumps(known, indent=2) if flags.json else "\n".join(lines))
        return 0
    path = find_recipe(flags.recipe, None)
    assert path is not None  # a name was given
    if flags.copy:
        return copy(path, Path(flags.copy).expanduser())
    found = describe(path)
    if flags.json:
        print(json.dumps(found, indent=2))
        return 0
    head = [f"recipe   {found['name']}: {path}"]
    head += [f"         {line}" for line in found["about"]]
    head += [f"starts   rlhf train --config {shlex.quote(flags.recipe)}", ""]
    print(printable("\n".join(head)))
    for name, value in found["settings"].items():
        print(printable(f"{name} = {json.dumps(value, ensure_ascii=False)}"))
    return 0


def parser() -> Parser:
    """The flags with their help."""
    made = Parser(
        prog="rlhf recipes",
        allow_abbrev=False,
        description="Lists the recipes; with a name, what it is for and the settings that differ "
        "from the defaults. Any recipe's settings can be changed on the command line.",
    )
    made.add_argument(
        "recipe", nargs="?", metavar="RECIPE", help="a recipe's name, or a file of your own"
    )
    made.add_argument("--copy", metavar="FILE", help="write it to a new file, to be changed")
    made.add_argument("--json", action="store_true", help="everything for machines")
    return made


def describe(path: Path) -> dict[str, Any]:
    """Name, file, what its first comment says, and its settings by dotted name.

    Raises ConfigError where it is no recipe.
    """
    load_config(path)
    settings = flatten(read_recipe(path)[0])
    return {
        "name": path.stem,
        "path": str(path),
        "about": about(path.read_text(encoding="utf-8")) or ["no comment says what it is for"],
        "settings": settings,
    }


def about(text: str) -> list[str]:
    """The comment that a recipe begins with, line by line; its first sentence is one line."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").removeprefix(" ").rstrip())
    paragraphs = "\n".join(lines).strip("\n").split("\n\n")
    first = " ".join(paragraphs[0].split())
    return [part for part in [first, *(x for p in paragraphs[1:] for x in p.split("\n"))] if part]


def first_sentence(text: str) -> str:
    return text.split(". ")[0].removesuffix(".")


def copy(path: Path, destination: Path) -> int:
    """Writes the recipe to a new file. Raises ConfigError, RequirementError."""
    if "extends" in read_yaml(path):
        raise ConfigError(
            f"--copy: {path} extends another recipe beside it; copy both, or write a recipe of "
            "your own with the settings that `rlhf recipes` shows"
        )
    try:
        with destination.open("x", encoding="utf-8") as stream:
            stream.write(path.read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise ConfigError(f"--copy {destination}: this file exists; name another one") from error
    except OSError as error:
        raise RequirementError(f"--copy {destination}: {error.strerror}") from error
    place = shlex.quote(str(destination))
    print(f"copied to {place}. Change it, then: rlhf train --config {place}")
    return 0
