"""A folder is written beside its place and put there in one piece: nobody ever sees half a model, or none."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping

from rljax.errors import UserError

MARK = {"format": "pt", "writer": "rljax"}  # metadata of the safetensors files that we write
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
NAME_BYTES = 100  # of the folder's name in that of the draft beside it: file systems take 255
HOUR = 3600.0


def check_target(path: pathlib.Path, own: Collection[str], *, reads: Mapping[str, str | os.PathLike[str]] = {}) -> None:
    """UserError unless `path` is new, empty or an earlier export of ours.

    own: file names that an export may have, beside model*.safetensors. reads: {"model": folder, …}, what the run reads:
    none of these is ever written to, whoever wrote it.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; save writes a folder.")
    for name, folder in reads.items():
        if _same(path, folder):
            raise UserError(
                f"{path} is what this run reads as its {name}: an export there would overwrite it. Choose another"
            )
    files = list(path.iterdir()) if path.exists() else []
    weights = [file for file in files if file.name.startswith("model") and file.suffix == ".safetensors"]
    foreign = sorted(file.name for file in files if file not in weights and file.name not in own)
    if foreign:
        raise UserError(
            f"{path} is not empty and holds {foreign[0]!r}, which is no part of a saved model; save to a new "
            "folder (a folder that holds nothing but an earlier export is replaced)."
        )
    if files and not (weights and all(map(_is_ours, weights))):
        raise UserError(
            f"{path} holds a model that no export of this program wrote, perhaps the only copy: save to a new folder, "
            "or delete that one yourself (a folder that holds nothing but an earlier export is replaced)."
        )


def _same(one: pathlib.Path, other: str | os.PathLike[str]) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _is_ours(file: pathlib.Path) -> bool:
    """Whether a safetensors file says that we wrote it; its header alone is read."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            head = json.loads(stream.read(min(size, 100_000_000)))
        return head.get("__metadata__", {}).get("writer") == MARK["writer"]
    except (OSError, ValueError, AttributeError):
        return False


def replace_folder(path: pathlib.Path, fill: Callable[[pathlib.Path], None]) -> None:
    """Fill a folder beside `path`, then exchange the two: whatever happens, `path` is one whole model or the other.

    What a process that was killed has left beside `path` is removed; of one that still writes it is not.
    """
    path = pathlib.Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    _clean(path)
    draft = pathlib.Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
    draft.chmod(0o755)
    try:
        with _held(draft / "lock"):
            new = draft / "new"
            new.mkdir()
            fill(new)
            _put(new, path, draft / "old")
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _put(new: pathlib.Path, path: pathlib.Path, old: pathlib.Path) -> None:
    if not path.exists():
        new.rename(path)
    elif not _exchange(new, path):
        path.rename(old)  # killed here, the next call finds `new` whole and puts it in its place
        new.rename(path)


def _exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Both at once, where kernel and file system can."""
    libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    if libc is None or not hasattr(libc, "renameat2"):
        return False
    paths = [os.fsencode(path) for path in (one, other)]
    if libc.renameat2(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _prefix(path: pathlib.Path) -> str:
    return f".{os.fsencode(path.name)[:NAME_BYTES].decode(errors='ignore')}."


def _clean(path: pathlib.Path) -> None:
    """Remove the drafts of `path` that nobody writes any more; put in its place what was whole and on its way there."""
    for draft in sorted(path.parent.glob(".*")):
        random = draft.name.removeprefix(_prefix(path))
        if draft.name == random or len(random) != 8 or draft.is_symlink() or not draft.is_dir():
            continue
        inside = {file.name for file in draft.iterdir()}
        if not inside <= {"lock", "new", "old"} or _is_held(draft, inside):
            continue
        if "old" in inside and not path.exists():
            (draft / ("new" if "new" in inside else "old")).rename(path)
        shutil.rmtree(draft, ignore_errors=True)


def _is_held(draft: pathlib.Path, inside: Collection[str]) -> bool:
    """Whether a process still writes there. One without a lock is from an earlier version, or has begun just now."""
    if "lock" not in inside:
        return time.time() - draft.stat().st_mtime < HOUR
    try:
        with _held(draft / "lock"):
            return False
    except OSError:
        return True


@contextlib.contextmanager
def _held(path: pathlib.Path) -> Iterator[None]:
    """Lock a file, or raise OSError; the system lets go of it when this process dies."""
    try:
        import fcntl
    except ImportError:  # no such lock on Windows
        yield
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno != errno.ENOTSUP and error.errno != errno.ENOLCK:  # a file system without locks
                raise
        yield
