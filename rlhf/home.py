"""A user without a home directory (a container's number without a passwd entry). Imports nothing
of ours but errors; to be called before any library asks for `~`."""

from __future__ import annotations

import os
import pwd
from collections.abc import MutableMapping

from rlhf.errors import RequirementError


def ensure_home(environ: MutableMapping[str, str]) -> None:
    """Libraries keep caches below the home directory and ask for the user's name: where the system
    knows neither, RLHF_CACHE serves as home, for this process and those that it starts.

    Raises RequirementError if there is no RLHF_CACHE either.
    """
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        environ.setdefault("USER", f"uid{os.getuid()}")
        if environ.get("HOME"):
            return
        cache = environ.get("RLHF_CACHE")
        if not cache:
            raise RequirementError(
                f"user {os.getuid()} has no home directory (no HOME, no passwd entry): set "
                "RLHF_CACHE to a directory that this user can write to; all caches go there"
            ) from None
        environ["HOME"] = os.path.abspath(cache)
