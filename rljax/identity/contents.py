"""What is in files: hashes of a model's weights, config and tokenizer, of a run's checkpoints, of a data set's rows.

A file is hashed once: the cache folder keeps its hash under path, size, time of the last change and inode.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Iterable
from typing import Any

from rljax import data
from rljax.data.progress import track
from rljax.errors import UserError
from rljax.identity.values import digest
from rljax.models import resolve
from rljax.models.tokenizer_files import TOKENIZER_FILES

RECENT = 2.0  # seconds: a file that changed so shortly ago may change again within one tick of its clock
_SAYS_NOTHING = ("_name_or_path", "transformers_version")  # keys of config.json


def model(name: str) -> dict[str, str]:
    """{"weights", "config", "tokenizer", "origin"}: hashes of what a folder, a GGUF file or a name holds, and where it
    is from if that is not what the name says. {"run"} of a folder of a run.
    """
    path = pathlib.Path(name).expanduser()
    if (path / "experiment.json").is_file():
        return {"run": _run(path)}
    path = resolve.resolve(name)
    origin = resolve.origin(path)
    said = {"origin": origin} if origin else {}
    if path.is_file():
        return {"weights": file(path)[:16], **said}
    configs = {file: _config(path / file) for file in ("config.json", "generation_config.json")}
    found = {
        "weights": files(sorted(path.glob("*.safetensors"))),
        "config": digest(configs),
        "tokenizer": files([path / name for name in TOKENIZER_FILES if (path / name).is_file()]),
    }
    return found | said


def _config(path: pathlib.Path) -> Any:
    """A file of settings, whatever its formatting."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {k: v for k, v in config.items() if k not in _SAYS_NOTHING} if isinstance(config, dict) else config


def _run(folder: pathlib.Path) -> str:
    """Of the checkpoints of a run, by the checksums of their leaves."""
    found = {}
    for record in sorted((folder / "checkpoints").glob("*/rljax/metadata")):
        with contextlib.suppress(OSError, ValueError):
            found[record.parent.parent.name] = json.loads(record.read_text()).get("leaves")
    return digest(found)


def rows(source: Any, split: str = "train") -> dict[str, Any]:
    """{"rows", "sha256"} of a data set: the same for the same rows in the same order, wherever they are, however they
    are written, and in whatever order a row has its fields.
    """
    paths = data.files(source, split) if isinstance(source, str | os.PathLike) else None
    if paths is None:
        return _counted(data.read(source, split=split))
    kept = resolve.cache_folder() / "hashes" / f"rows-{files(paths)}.json"
    found = _read(kept)
    if found is None:
        found = _counted(data.read(source, split=split))
        _write(kept, found)
    return found


def _counted(read: data.Rows) -> dict[str, Any]:
    try:
        sha = data.fingerprint(track((read[i] for i in range(len(read))), "hashing rows", len(read)))
    except UserError as error:
        if "cannot hash" not in str(error):
            raise
        sha = data.fingerprint(repr(read[i]) for i in range(len(read)))  # times, decimals
    return {"rows": len(read), "sha256": sha[:16]}


# --- files ------------------------------------------------------------------------------------------------------------


def files(paths: Iterable[pathlib.Path]) -> str:
    """A hash of the names and contents of some files, which are read side by side."""
    paths = list(paths)
    with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:
        hashes = list(pool.map(file, paths))
    return digest([[path.name, sha] for path, sha in zip(paths, hashes, strict=True)])


def file(path: pathlib.Path) -> str:
    """sha256 of a file's content."""
    path = path.resolve()
    before = path.stat()
    stamp = [str(path), before.st_size, before.st_mtime_ns, before.st_ino]
    kept = resolve.cache_folder() / "hashes" / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
    known = _read(kept)
    if known is not None and known.get("stamp") == stamp:
        return known["sha256"]
    with path.open("rb") as stream:
        sha = hashlib.file_digest(stream, "sha256").hexdigest()
    if time.time() - before.st_mtime > RECENT:
        _write(kept, {"stamp": stamp, "sha256": sha})
    return sha


def _read(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write(path: pathlib.Path, value: Any) -> None:
    """Whole or not at all; a cache that cannot be written is done without."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as stream:
            stream.write(json.dumps(value))
        os.replace(draft, path)
