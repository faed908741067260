"""Which files of a directory are read, and what is said of those that are not.

Symlinks are followed, as in a snapshot of the hub's cache. Left out are hidden files and folders
(an editor's checkpoints, `.cache/`) and the caches that `datasets` writes beside saved data.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from rlhf.errors import DataError

HIDDEN = "hidden files or files in hidden folders"
CACHES = "caches that `datasets` wrote beside its data"
NOT_REGULAR = "not regular files"
_NAMED = 5
_HASHED = re.compile(r"cache-[0-9a-f]{16}(_\d+_of_\d+)?\.arrow")
_SAVED = {"state.json", "dataset_info.json"}  # what `datasets` writes beside its arrow files


def listed(fs: Any, root: str) -> list[str]:
    """All that lies in a directory and below, sorted; no directories. DataError: a broken link."""
    if isinstance(fs, LocalFileSystem):
        return sorted(_walk(root, root, (os.path.realpath(root),)))
    found = fs.find(root, detail=True)
    return sorted(name for name, info in found.items() if info["type"] in ("file", "link"))


def _walk(folder: str, root: str, above: tuple[str, ...]) -> Iterator[str]:
    """`above`: the real places of the folders on the way here; a link back to one is a circle."""
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            place = os.path.realpath(path)
            if place not in above:
                yield from _walk(path, root, (*above, place))
        elif os.path.exists(path) or _hidden(os.path.relpath(path, root)):
            yield path
        else:
            refuse_broken_link(path)


def refuse_broken_link(path: str) -> None:
    """Raise DataError if a path is a link to what is not there."""
    if os.path.islink(path) and not os.path.exists(path):
        raise DataError(
            f"{path}: a broken link: {os.readlink(path)!r} does not exist; bring the file that it "
            "points to, or delete the link"
        )


def why_left_out(fs: Any, name: str, prefix: str, others: set[str]) -> str | None:
    """Why a file is not read, or None. `others`: the paths of all files of the directory."""
    folder, _, base = name.rpartition("/")
    if _hidden(name.removeprefix(prefix)):
        return HIDDEN
    saved = any(f"{folder}/{one}" in others for one in _SAVED)
    if _HASHED.fullmatch(base) or (saved and re.fullmatch(r"cache-.*\.arrow", base)):
        return CACHES
    if isinstance(fs, LocalFileSystem) and not os.path.isfile(name):
        return NOT_REGULAR
    return None


def _hidden(relative: str) -> bool:
    return any(name.startswith(".") for name in relative.split("/"))


def left_out_note(shown: str, why: str, names: Sequence[str]) -> str:
    """One line that says how many files are not read, why, and the first of them."""
    more = ", ..." if len(names) > _NAMED else ""
    return f"{shown}: {len(names)} not read, {why}: {', '.join(names[:_NAMED])}{more}"
