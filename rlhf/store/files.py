"""What the store needs from a file system: scanning, hashing, fsync, exchange, locks, errors."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from rlhf.errors import ArtifactError, RequirementError, UserError

CHUNK = 1 << 20
# torch.save's zip writer, when a write comes up short: its message has no cause
_TORCH_WRITER = ("inline_container.cc", "PytorchStreamWriter")
_NO_ROOM = 64 << 20
_REMEDIES = {
    errno.ENOSPC: "",  # room_remedy
    errno.EDQUOT: "your disk quota is used up: free some space, or choose another --output-dir",
    errno.EFBIG: "the file system or a limit (ulimit -f) refuses files of this size",
    errno.EROFS: "choose a writable --output-dir",
    errno.EACCES: "give yourself write permission, or choose another --output-dir",
    errno.EPERM: "give yourself write permission, or choose another --output-dir",
    errno.ENOTDIR: "a file is in the way: remove it, or choose another --output-dir or --name",
    errno.EEXIST: "a file is in the way: remove it, or choose another --output-dir or --name",
    errno.ENAMETOOLONG: "choose a shorter --output-dir or --name",
    errno.ELOOP: "it is a symbolic link, and a run writes nothing outside its directory through "
    "one: remove it",
    errno.EIO: "the disk reports an error, or a quota is used up: choose another --output-dir",
}


@contextlib.contextmanager
def disk_errors(path: Path, kind: type[UserError] = ArtifactError) -> Iterator[None]:
    """Turns what a disk can do to us while writing `path` into a `kind` that names the remedy.

    Libraries in other languages report a full disk as RuntimeError and the like: safetensors with
    the system's text in the message, torch with a line of its source alone. Both are recognised.
    Other errors pass.
    """
    try:
        yield
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else _code_in(str(error), path)
        if code not in _REMEDIES:
            raise
        where = getattr(error, "filename", None)
        at = f" (at {where})" if where and str(where) != str(path) else ""
        remedy = f"{room_remedy(path)}, or choose another --output-dir"
        raise kind(
            f"{path}: cannot be written: {os.strerror(code)}{at}; "
            f"{remedy if code == errno.ENOSPC else _REMEDIES[code]}. "
            "What was there before is intact"
        ) from error


def room_remedy(path: Path | str) -> str:
    """What to do about "No space left on device", which says the same of bytes and of inodes."""
    place = Path(path).absolute()
    with contextlib.suppress(OSError):
        existing = next(one for one in (place, *place.parents) if one.exists())
        found = os.statvfs(existing)
        if found.f_files and not found.f_favail and found.f_bavail:
            return "its file system has room but no inodes left: remove some files, of any size"
    return "free some space"


def open_own(path: Path | str, mode: str) -> IO[Any]:
    """`open(path, mode)` for a file that a run writes in its own directory: UTF-8 or unbuffered
    bytes. Raises OSError (ELOOP) where it is a symbolic link, whose target is somebody else's."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)

    if "b" in mode:
        return open(path, mode, buffering=0, opener=opener)
    return open(path, mode, encoding="utf-8", newline="", opener=opener)


def _code_in(message: str, path: Path) -> int | None:
    """What a disk did, from another language's message; None: it is about something else."""
    if os.strerror(errno.ENOSPC).lower() in message.lower():
        return errno.ENOSPC
    if not any(mark in message for mark in _TORCH_WRITER):
        return None
    existing = next(place for place in (path, *path.absolute().parents) if place.exists())
    return errno.ENOSPC if shutil.disk_usage(existing).free < _NO_ROOM else errno.EIO


def scan(directory: Path) -> dict[str, int]:
    """Relative POSIX path -> size, of every file below `directory`.

    Raises ArtifactError for symbolic links, devices, pipes and sockets: what they lead to is not
    in the directory and no hash vouches for it.
    """
    sizes: dict[str, int] = {}
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(directory / prefix) as entries:
            for entry in entries:
                relative = f"{prefix}{entry.name}"
                status = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(status.st_mode):
                    pending.append(relative + "/")
                elif stat.S_ISREG(status.st_mode):
                    sizes[relative] = status.st_size
                else:
                    what = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a file"
                    raise ArtifactError(
                        f"{directory}: {relative!r} is {what}; an artifact holds only regular "
                        "files: replace it by a copy of the file and publish again"
                    )
    return sizes


def open_regular(path: Path) -> int:
    """A descriptor for reading `path`; raises OSError if its last part is a symbolic link."""
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)


def sha256_of(path: Path) -> str:
    """sha256 (hex) of a file, read in pieces. Raises OSError."""
    with open(open_regular(path), "rb", buffering=0) as stream:
        if sys.version_info >= (3, 11):
            return hashlib.file_digest(stream, "sha256").hexdigest()
        return _digest_loop(stream)


def _digest_loop(stream) -> str:  # Python 3.10 has no hashlib.file_digest
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    while count := stream.readinto(buffer):
        digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def hash_files(directory: Path, relative: Iterable[str]) -> dict[str, str]:
    """Path -> sha256 for many files; a few at a time, since hashlib releases the GIL.

    Raises OSError for the first (in the given order) that cannot be read.
    """
    names = list(relative)
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        digests = pool.map(lambda name: sha256_of(directory / name), names)
        return dict(zip(names, digests, strict=True))


def fsync_tree(directory: Path) -> None:
    """Flushes every file and every directory below (and with) `directory` to the disk."""
    for folder, _, files in os.walk(directory):
        for name in files:
            descriptor = open_regular(Path(folder, name))
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_directory(Path(folder))


def fsync_directory(directory: Path) -> None:
    """Makes renames within `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Deletes a directory tree, a file, or a link (never what the link points to)."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def copy_or_link(source: Path, target: Path) -> None:
    """The same file under another name; a copy, where the file system has no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV):
            raise
        shutil.copyfile(source, target, follow_symlinks=False)


def exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step (Linux renameat2). False where system or disk cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_cwd, exchange_flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE: linux/fcntl.h, linux/fs.h
    if renameat2(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange_flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def private_directory(path: Path) -> Path:
    """`path`, made with mode 0700 if absent. What is read back from it must be what we wrote.

    Raises RequirementError: it cannot be made, another user owns it, or everybody may write there.
    """
    remedy = "choose a directory of your own with RLHF_CACHE (or data.cache_dir)"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.stat()
    except (OSError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        raise RequirementError(f"cache {path}: cannot be made ({problem}); {remedy}") from error
    if status.st_uid != os.geteuid():
        raise RequirementError(
            f"cache {path}: it belongs to another user (uid {status.st_uid}, this is "
            f"{os.geteuid()}), who could put things there that this run would trust; {remedy}"
        )
    if status.st_mode & stat.S_IWOTH:
        raise RequirementError(
            f"cache {path}: every user may write there (mode {stat.S_IMODE(status.st_mode):04o}), "
            f"and this run would trust what they put there: chmod o-w {path}, or {remedy}"
        )
    return path


def cache_root() -> Path:
    """`$RLHF_CACHE` or `~/.cache/rlhf`, where only its owner may write. Raises RequirementError."""
    root = Path(os.environ.get("RLHF_CACHE") or "~/.cache/rlhf").expanduser().absolute()
    return private_directory(root)


@contextlib.contextmanager
def exclusive(directory: Path, wait: bool = False) -> Iterator[None]:
    """Holds `directory`'s lock; the system frees it when the process dies, however it dies.

    Raises ArtifactError if another process holds it; with `wait`, waits for that one's end.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ArtifactError(
                    f"{directory}: another process is publishing here now; one run directory "
                    "takes one run at a time: wait for it, or choose another --name"
                ) from error
            # NFS cannot lock a directory (EBADF, ENOLCK): there the user keeps runs apart.
            if error.errno not in (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP):
                raise
        yield
    finally:
        os.close(descriptor)
