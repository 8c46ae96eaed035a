"""read: JSON lines, JSON, Parquet, TFDS and Hugging Face data sets as Rows."""

from __future__ import annotations

import collections
import difflib
import gzip
import json
import mmap
import os
import pathlib
import re
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rljax import extras
from rljax.data.rows import Row, Rows, concatenate, in_memory, shown
from rljax.errors import UserError

GROUP_CACHE_BYTES = 2**30  # of decoded Parquet row groups kept in memory, per file
SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval", "held_out")


def read(source: str | os.PathLike[str] | Sequence[Mapping[str, Any]], *, split: str = "train") -> Rows:
    """Open a data set. Nothing but its index is read yet.

    source:
      - "x.jsonl", "x.jsonl.gz": one JSON object a line;   "x.json": a list of objects;   "x.parquet"
      - a folder of such files: all of them in the order of their names, or those whose names begin with the split
        ("train-00000-of-00002.parquet")
      - "tfds:NAME[/CONFIG][:VERSION]", "tfds:/path/to/builder/dir": prepared as array_record (or parquet), read
        without TensorFlow
      - "hf:OWNER/NAME[:CONFIG]": the Hugging Face hub or a local copy, with the extra `datasets`
      - a list of mappings
    split: of a TFDS or Hugging Face data set ("train", "test", "train[:10%]") or of a folder; a single file has none.
    """
    if isinstance(source, Rows):
        return source
    if isinstance(source, Sequence) and not isinstance(source, str):
        return _not_empty(in_memory(source), "the list of rows")
    text = os.fspath(source)
    if text.startswith("tfds:"):
        return _not_empty(_tfds(text[5:], split), f"{text} ({split})")
    if text.startswith("hf:"):
        return _not_empty(_hugging_face(text[3:], split), f"{text} ({split})")
    path = pathlib.Path(text).expanduser()
    if (path / "dataset_info.json").is_file() and (path / "features.json").is_file():
        return _not_empty(_tfds(str(path), split), f"{text} ({split})")
    if path.is_dir():
        return _folder(path, split)
    if split != "train":
        raise UserError(f"{path.name} is one file and has no split {split!r}: name the file of that split instead")
    return _file(path)


def files(source: str | os.PathLike[str], split: str = "train") -> list[pathlib.Path] | None:
    """The files that `read` reads; None of a source that is no file and no folder of files."""
    text = os.fspath(source)
    path = pathlib.Path(text).expanduser()
    if text.startswith(("tfds:", "hf:")) or (path / "dataset_info.json").is_file():
        return None
    if path.is_dir():
        return _chosen(path, split)
    return [path] if path.is_file() else None


def _file(path: pathlib.Path) -> Rows:
    reader = _reader(path)
    if not path.is_file():
        raise UserError(_missing(path))
    if reader is None:
        raise UserError(
            f"{path.name}: unknown kind of file; rljax reads .jsonl, .jsonl.gz, .json and .parquet files, folders of "
            "them, tfds:NAME and hf:OWNER/NAME"
        )
    return _not_empty(reader(path), path.name)


def _reader(path: pathlib.Path) -> Callable[[pathlib.Path], Rows] | None:
    readers = {".jsonl": _jsonl, ".jsonl.gz": _jsonl, ".json": _json, ".parquet": _parquet}
    return next((reader for ending, reader in readers.items() if path.name.endswith(ending)), None)


def _not_empty(rows: Rows, name: str) -> Rows:
    if not len(rows):
        raise UserError(f"{name} is empty: a data set needs at least one row")
    return rows


def _missing(path: pathlib.Path) -> str:
    """Why there is nothing at `path`, and what was probably meant."""
    folder = path.parent
    if not folder.is_dir():
        return f"{path}: there is no folder {folder}" + (
            f"; for a Hugging Face data set write 'hf:{path}'" if len(path.parts) == 2 and not path.suffix else ""
        )
    near = difflib.get_close_matches(path.name, os.listdir(folder), n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; the folder {folder} holds nothing of a similar name"
    return f"{path}: no such file{hint}"


def _folder(path: pathlib.Path, split: str) -> Rows:
    return concatenate([_file(file) for file in _chosen(path, split)])


def _chosen(path: pathlib.Path, split: str) -> list[pathlib.Path]:
    """The files of a folder that make a split."""
    files = sorted(file for file in path.iterdir() if file.is_file() and _reader(file))
    if not files:
        raise UserError(f"{path}: no .jsonl, .jsonl.gz, .json or .parquet file in this folder")
    named = {file: re.split(r"[-._]", file.name)[0] for file in files}
    chosen = [file for file, name in named.items() if split in (name, re.split(r"[-.]", file.name)[0])]  # train_sft
    if not chosen and split == "train" and not any(name in SPLITS for name in named.values()):
        chosen = files  # nothing here is named after a split: the folder is one
    if not chosen:
        raise UserError(
            f"{path}: no file of the split {split!r}; there are {', '.join(file.name for file in files[:8])}"
        )
    return chosen


# --- JSON -------------------------------------------------------------------------------------------------------------


def _jsonl(path: pathlib.Path) -> Rows:
    """Lines found by their byte offsets; the file is mapped, not read (a .gz is unpacked into memory)."""
    data = _bytes(path)
    starts, ends, numbers = _lines(data)

    def where(i: int) -> str:
        return f"{path.name}:{numbers[i]}"

    def parse(i: int) -> Row:
        line = data[int(starts[i]) : int(ends[i])]
        try:
            row = json.loads(line.decode("utf-8-sig" if numbers[i] == 1 else "utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{where(i)}: not valid JSON at column {error.colno}: {error.msg}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{where(i)}: not UTF-8 at byte {error.start + 1} of the line: {error.reason}") from error
        if not isinstance(row, dict):
            raise UserError(f"{where(i)}: a row must be a JSON object with named fields; this is {shown(row)}")
        return row

    return Rows(parse, len(starts), where)


def _bytes(path: pathlib.Path) -> bytes | mmap.mmap:
    if path.name.endswith(".gz"):
        try:
            return gzip.decompress(path.read_bytes())
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path.name}: not a whole gzip file ({error}); download it again") from error
    if not path.stat().st_size:
        return b""
    with path.open("rb") as file:  # the mapping outlives the open file
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _lines(data: bytes | mmap.mmap) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, end and number (from 1) of every line that is not blank, i64 each."""
    found: list[tuple[int, int, int]] = []
    start, number, size = 0, 0, len(data)
    while start < size:
        number += 1
        end = data.find(b"\n", start)
        end = size if end < 0 else end
        if end - start > 64 or data[start:end].strip():
            found.append((start, end, number))
        start = end + 1
    starts, ends, numbers = np.asarray(found, np.int64).reshape(-1, 3).T
    return starts, ends, numbers


def _json(path: pathlib.Path) -> Rows:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path.name}:{error.lineno}: not valid JSON at column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name}: not UTF-8 at byte {error.start + 1}: {error.reason}") from error
    if not isinstance(rows, list):
        raise UserError(f"{path.name}: must be a list of objects; this is {shown(rows)} (JSON lines are named .jsonl)")
    return in_memory(rows, where=lambda i: f"{path.name}[{i}]")


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _parquet(path: pathlib.Path) -> Rows:
    """Row groups are decoded when a row of theirs is read, and up to 1 GiB of them is kept."""
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path, memory_map=True)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path.name}: not a readable Parquet file ({error})") from error
    meta = file.metadata
    starts = np.cumsum([0] + [meta.row_group(g).num_rows for g in range(meta.num_row_groups)])
    lock, groups = threading.Lock(), collections.OrderedDict()

    def group(g: int) -> Any:
        with lock:
            if g not in groups:
                groups[g] = file.read_row_group(g)
                while len(groups) > 1 and sum(table.nbytes for table in groups.values()) > GROUP_CACHE_BYTES:
                    groups.popitem(last=False)
            groups.move_to_end(g)
            return groups[g]

    def parse(i: int) -> Row:
        g = int(np.searchsorted(starts, i, side="right")) - 1
        return _row(group(g).slice(i - int(starts[g]), 1).to_pylist()[0], f"{path.name}[{i}]")

    return Rows(parse, int(starts[-1]), lambda i: f"{path.name}[{i}]")


# --- TFDS and Hugging Face --------------------------------------------------------------------------------------------


def _tfds(name: str, split: str) -> Rows:
    import tensorflow_datasets as tfds

    try:
        if (folder := pathlib.Path(name).expanduser()).is_dir():
            source: Any = tfds.builder_from_directory(str(folder)).as_data_source(split=split)  # pyright: ignore[reportCallIssue]
            label = f"tfds:{folder.name}"
        else:
            data_dir = os.environ.get("TFDS_DATA_DIR")
            source = tfds.data_source(name, split=split, data_dir=data_dir, download=False)
            label = f"tfds:{name}"
    except (ValueError, OSError, RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"tfds:{name} (split {split!r}): {reason} TFDS data sets are read from a folder of prepared array_record "
            "files (TFDS_DATA_DIR, or ~/tensorflow_datasets). Prepare one, in an environment that has TensorFlow, with "
            f"`tfds build {name} --file_format=array_record`, or name its folder: tfds:/path/to/NAME/VERSION"
        ) from error
    where = f"{label} {split}[{{}}]".format
    return Rows(lambda i: _row(source[i], where(i)), len(source), where)


def _hugging_face(name: str, split: str) -> Rows:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"hf:{name} needs the package datasets: {extras.install('datasets')}") from error
    repository, _, config = name.partition(":")
    try:
        source: Any = datasets.load_dataset(repository, config or None, split=split)
    except (ValueError, OSError) as error:  # unknown name, configuration or split; no network
        raise UserError(f"hf:{name} (split {split!r}): {error}") from error
    where = f"hf:{name} {split}[{{}}]".format
    return Rows(lambda i: _row(source[i], where(i)), len(source), where)


def _row(row: Mapping[str, Any], where: str) -> Row:
    return {name: _plain(value, where) for name, value in row.items()}


def _plain(value: Any, where: str) -> Any:
    """Python values: bytes become text, numpy scalars numbers, and columns of messages lists of messages."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: a text is not UTF-8 at byte {error.start + 1}: {error.reason}") from error
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item, where) for item in value]
    if isinstance(value, Mapping):
        fields = _row(value, where)
        if {"role", "content"} <= fields.keys() and all(isinstance(column, list) for column in fields.values()):
            return [dict(zip(fields, message, strict=True)) for message in zip(*fields.values(), strict=True)]
        return fields
    return value
