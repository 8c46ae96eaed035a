"""read: JSON lines, JSON, Parquet, TFDS and Hugging Face data sets as Rows."""

from __future__ import annotations

import array
import collections
import difflib
import functools
import gzip
import json
import mmap
import os
import pathlib
import re
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rljax import extras
from rljax.data.rows import Row, Rows, concatenate, in_memory, shown
from rljax.errors import UserError

FILES = 64  # of JSON lines that are open at a time
GROUP_CACHE_BYTES = 2**30  # of decoded Parquet row groups kept in memory, per file
CHUNK = 2**20  # bytes that are looked through at a time
IN_MEMORY = 2**26  # bytes of an unpacked .gz; a larger one is unpacked into a file
MESSAGES = ("messages", "prompt", "chosen", "rejected", "completion", "tool_calls", "tools")
LONGEST_LINE = 2**28  # bytes of JSON in one row
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
    """Lines found by their byte offsets and read when they are asked for (a .gz is unpacked first)."""
    if path.name.endswith(".gz"):
        data = _unpacked(path)
        chunks, read = (data[at : at + CHUNK] for at in range(0, len(data), CHUNK)), data.__getitem__
        starts, ends, numbers = _lines(chunks)
    else:
        with path.open("rb") as file:
            starts, ends, numbers = _lines(iter(lambda: file.read(CHUNK), b""))
            read = _reads(path, os.fstat(file.fileno()))

    def where(i: int) -> str:
        return f"{path.name}:{numbers[i]}"

    def parse(i: int) -> Row:
        if ends[i] - starts[i] > LONGEST_LINE:
            raise UserError(f"{where(i)}: a line of {ends[i] - starts[i]:,} bytes: a row must fit in {LONGEST_LINE:,}")
        start, end = int(starts[i]), int(ends[i])
        if len(line := read(slice(start, end))) < end - start:
            raise UserError(_changed(where(i), path))
        try:
            row = json.loads(line.decode("utf-8-sig" if numbers[i] == 1 else "utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{where(i)}: not valid JSON at column {error.colno}: {error.msg}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{where(i)}: not UTF-8 at byte {error.start + 1} of the line: {error.reason}") from error
        except (RecursionError, ValueError) as error:  # an integer of thousands of digits
            raise UserError(f"{where(i)}: {_too_much(error)}") from error
        if not isinstance(row, dict):
            raise UserError(f"{where(i)}: a row must be a JSON object with named fields; this is {shown(row)}")
        return row

    return Rows(parse, len(starts), where)


def _too_much(error: Exception) -> str:
    return "a value is nested too deeply to be read" if isinstance(error, RecursionError) else str(error)


class _File:
    """An open file, closed when nobody has it any more."""

    def __init__(self, path: pathlib.Path):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self):
        if hasattr(self, "number"):
            os.close(self.number)


@functools.lru_cache(maxsize=FILES)
def _opened(path: pathlib.Path, device: int, inode: int) -> _File:
    """A file that was looked at before; it may have been replaced since."""
    file = _File(path)
    now = os.fstat(file.number)
    if (now.st_dev, now.st_ino) != (device, inode):
        raise UserError(_changed(path.name, path))
    return file


def _reads(path: pathlib.Path, then: os.stat_result) -> Callable[[slice], bytes]:
    """Reads pieces of a file. Mapped into memory, one that becomes shorter would end the process."""

    def read(piece: slice) -> bytes:
        try:
            file = _opened(path, then.st_dev, then.st_ino)  # held while it is read: it is closed with its last name
            return os.pread(file.number, piece.stop - piece.start, piece.start)
        except OSError as error:
            raise UserError(f"{_changed(path.name, path)} ({error})") from error

    return read


def _changed(where: str, path: pathlib.Path) -> str:
    return f"{where}: {path} is not what it was when it was opened: put it back as it was, and run again"


def _unpacked(path: pathlib.Path) -> bytes | mmap.mmap:
    """What a .gz holds: in memory, or from `IN_MEMORY` bytes on in a temporary file without a name, mapped."""
    with tempfile.SpooledTemporaryFile(max_size=IN_MEMORY) as out:
        try:
            with gzip.open(path) as file:
                while chunk := file.read(2**20):
                    out.write(chunk)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise UserError(f"{path.name}: not a whole gzip file ({error}); download it again") from error
        except OSError as error:
            raise UserError(
                f"{path.name}: cannot be unpacked into {tempfile.gettempdir()} ({error.strerror or error}): set TMPDIR "
                "to a folder with room for it, or unpack it yourself"
            ) from error
        if out.tell() < IN_MEMORY:
            out.seek(0)
            return out.read()
        out.rollover()
        out.flush()
        return mmap.mmap(out.fileno(), 0, access=mmap.ACCESS_READ)


def _lines(chunks: Iterable[bytes]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, end and number (from 1) of every line that is not blank, i64 each."""
    found, blank = array.array("q"), True
    start, number, at = 0, 0, 0
    for chunk in chunks:
        begin = 0
        while (end := chunk.find(b"\n", begin)) >= 0:
            blank, number = blank and not chunk[begin:end].strip(), number + 1
            if not blank:
                found.extend((start, at + end, number))
            start, begin, blank = at + end + 1, end + 1, True
        blank, at = blank and not chunk[begin:].strip(), at + len(chunk)
    if not blank:
        found.extend((start, at, number + 1))
    starts, ends, numbers = np.frombuffer(found, np.int64).reshape(-1, 3).T
    return starts, ends, numbers


def _json(path: pathlib.Path) -> Rows:
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path.name}:{error.lineno}: not valid JSON at column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name}: not UTF-8 at byte {error.start + 1}: {error.reason}") from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path.name}: {_too_much(error)}") from error
    if not isinstance(rows, list):
        raise UserError(f"{path.name}: must be a list of objects; this is {shown(rows)} (JSON lines are named .jsonl)")
    return in_memory(rows, where=lambda i: f"{path.name}[{i}]")


# --- Parquet ----------------------------------------------------------------------------------------------------------


def _parquet(path: pathlib.Path) -> Rows:
    """Row groups are decoded when a row of theirs is read, and up to 1 GiB of them is kept."""
    import pyarrow
    import pyarrow.parquet

    try:
        meta = pyarrow.parquet.read_metadata(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path.name}: not a readable Parquet file ({error})") from error
    starts = np.cumsum([0] + [meta.row_group(g).num_rows for g in range(meta.num_row_groups)])
    lock, groups = threading.Lock(), collections.OrderedDict()

    def group(g: int) -> Any:
        with lock:
            if g not in groups:
                groups[g] = _row_group(path, meta, g)
                while len(groups) > 1 and sum(table.nbytes for table in groups.values()) > GROUP_CACHE_BYTES:
                    groups.popitem(last=False)
            groups.move_to_end(g)
            return groups[g]

    def parse(i: int) -> Row:
        g = int(np.searchsorted(starts, i, side="right")) - 1
        table = group(g).slice(i - int(starts[g]), 1)
        try:
            row = {name: _scalar(table.column(k)) for k, name in enumerate(table.column_names)}
        except (pyarrow.ArrowException, ValueError, OSError) as error:
            raise UserError(
                f"{path.name}[{i}]: cannot be read ({error}): the file is damaged, fetch it again"
            ) from error
        return _row(row, f"{path.name}[{i}]")

    return Rows(parse, int(starts[-1]), lambda i: f"{path.name}[{i}]")


def _row_group(path: pathlib.Path, meta: Any, number: int) -> Any:
    """Read, not mapped: a mapped file that becomes shorter would end the process."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, metadata=meta) as file:
            return file.read_row_group(number)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{path.name}: row group {number} cannot be read ({error}): the file is damaged, or {path} is not what it "
            "was when it was opened: fetch it again"
        ) from error


def _scalar(column: Any) -> Any:
    """The one value of a column, maps as dicts. A time that Python cannot hold is its number."""
    import pyarrow

    try:
        return column.to_pylist(maps_as_pydicts="lossy")[0]
    except (ValueError, OverflowError, UnicodeDecodeError):
        kinds = pyarrow.types
        if kinds.is_temporal(column.type):
            return column.cast(pyarrow.int64()).to_pylist()[0]
        if kinds.is_string(column.type) or kinds.is_large_string(column.type):
            return column.cast(pyarrow.large_binary()).to_pylist()[0]
        raise


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
    return {name: _turned(name, _plain(value, where)) for name, value in row.items()}


def _plain(value: Any, where: str) -> Any:
    """Python values: bytes that are text become text, numpy scalars numbers."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value  # an image, say: whoever needs a text here says so
    if isinstance(value, np.ndarray) and value.dtype != object:
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item, where) for item in value]
    if isinstance(value, Mapping):
        return {name: _plain(item, where) for name, item in value.items()}
    return value


def _turned(name: str, value: Any) -> Any:
    """Messages that are stored as columns ({"role": […], "content": […]}), and what is inside of them, as rows."""
    if isinstance(value, Mapping):
        of_messages = name in MESSAGES or "role" in value
        if of_messages and (size := _columns(value)) is not None:
            return [_turned("", _at(value, i)) for i in range(size)]
        return {key: _turned(key, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_turned(name if name in MESSAGES else "", item) for item in value]
    return value


def _columns(value: Any) -> int | None:
    """How many rows columns of one length hold; None for anything else."""
    if isinstance(value, Mapping):
        sizes = {_columns(column) for column in value.values()}
        return sizes.pop() if len(sizes) == 1 else None
    return len(value) if isinstance(value, (list, np.ndarray)) else None


def _at(value: Any, i: int) -> Any:
    if isinstance(value, Mapping):
        return {name: _at(column, i) for name, column in value.items()}
    return value[i].item() if isinstance(value, np.ndarray) and value.ndim == 1 else value[i]
