"""Rows: a data set as a sequence of mappings with random access, each of which knows where it came from."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import decimal
import gzip
import hashlib
import json
import operator
import os
import pathlib
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex, overload

import numpy as np

from rljax.data.progress import track
from rljax.errors import UserError

Row = Mapping[str, Any]
NAMED = (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, uuid.UUID)  # whose text says what they are


class Rows(Sequence[Row]):
    """A data set: `len`, `rows[i]`, slices, `select`, `map`, and `where(i)`, which names row i in messages.

    Nothing is read before it is asked for, and nothing read is kept, so that a data set need not fit in memory.
    Reading is safe from several threads. A row that cannot be read raises a UserError that says where it is and what
    is wrong.
    """

    def __init__(self, read: Callable[[int], Row], size: int, where: Callable[[int], str]):
        self._read, self._size, self._where = read, size, where

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: SupportsIndex) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Row | Rows:
        if isinstance(index, slice):
            return self.select(range(*index.indices(self._size)))
        return self._read(self._position(index))

    def __iter__(self) -> Iterator[Row]:
        return map(self._read, range(self._size))

    def __repr__(self) -> str:
        return f"Rows({self._size} rows{', from ' + self.where(0) if self._size else ''})"

    def where(self, index: SupportsIndex) -> str:
        """The place of a row in its source, as "pairs.jsonl:12"."""
        return self._where(self._position(index))

    def select(self, indices: Sequence[int] | np.ndarray) -> Rows:
        """The rows at `indices`, in that order."""
        chosen = np.asarray([self._position(i) for i in indices], np.int64)
        read, where = self._read, self._where
        return Rows(lambda i: read(int(chosen[i])), len(chosen), lambda i: where(int(chosen[i])))

    def map(self, function: Callable[[Row], Row]) -> Rows:
        """Each row through `function`, when it is read: to rename fields, or to make prompts of them."""
        return Rows(lambda i: self.apply(function, i), self._size, self._where)

    def apply(self, function: Callable[[Row], Any], index: SupportsIndex) -> Any:
        """function(rows[index]), with the row's place put before the message of a UserError, KeyError or TypeError."""
        row = self[index]
        try:
            return function(row)
        except KeyError as error:
            found = ", ".join(map(repr, row)) or "no fields"
            raise UserError(f"{self.where(index)}: field {error} is missing (this row has {found})") from error
        except (ValueError, TypeError, OverflowError) as error:
            raise UserError(f"{self.where(index)}: {error}") from error
        except RecursionError as error:
            raise UserError(f"{self.where(index)}: a value is nested too deeply to be read") from error

    def _position(self, index: SupportsIndex) -> int:
        position = operator.index(index)
        if not -self._size <= position < self._size:
            raise IndexError(f"row {position} of {self._size}")
        return position % self._size


def in_memory(source: Sequence[Any], where: Callable[[int], str] = "rows[{}]".format) -> Rows:
    """Rows that are already there: a list of mappings."""

    def read(i: int) -> Row:
        if not isinstance(row := source[i], Mapping):
            raise UserError(f"{where(i)}: a row must be an object with named fields; this is {shown(row)}")
        return row

    return Rows(read, len(source), where)


def shown(value: Any, limit: int = 60) -> str:
    """A value as messages show it: its type, and its beginning."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; nesting without end
        text = "too large to show"
    return f"{type(value).__name__} {text if len(text) <= limit else text[:limit] + '…'}"


def check(rows: Rows, form: Callable[[Row], Any]) -> None:
    """Read every row once and put it through `form` (see forms.py), so that mistakes surface before training starts.

    Raises the UserError of the first bad row, which names its file, line and field.
    """
    for i in track(range(len(rows)), "checking rows", len(rows)):
        rows.apply(form, i)


def concatenate(parts: Sequence[Rows]) -> Rows:
    """One data set after the other."""
    starts = np.cumsum([0, *map(len, parts)])

    def find(i: int) -> tuple[Rows, int]:
        part = int(np.searchsorted(starts, i, side="right")) - 1
        return parts[part], i - int(starts[part])

    def read(i: int) -> Row:
        part, position = find(i)
        return part[position]

    def where(i: int) -> str:
        part, position = find(i)
        return part.where(position)

    return Rows(read, int(starts[-1]), where)


def split(rows: Rows, *, fraction: float | None = None, count: int | None = None, seed: int = 0) -> tuple[Rows, Rows]:
    """(train, held out): disjoint, together all rows, each in the order of `rows`; the same for the same seed.

    `count` rows are held out, or a `fraction` of them (rounded, and at least one). Both parts keep at least one row.
    """
    from rljax.data.order import shuffled

    n = len(rows)
    if (fraction is None) == (count is None):
        raise UserError(f"split takes either fraction or count; got fraction={fraction}, count={count}")
    if fraction is not None and not 0 < fraction < 1:
        raise UserError(f"split: fraction={fraction} must lie strictly between 0 and 1")
    held = max(1, round(n * fraction)) if fraction is not None else count or 0
    if not 0 < held < n:
        raise UserError(f"split: cannot hold out {held} of {n} rows: both parts need at least one; give another count")
    order = shuffled(n, seed=seed, places=range(n))
    return rows.select(np.sort(order[held:])), rows.select(np.sort(order[:held]))


def fingerprint(items: Iterable[Any]) -> str:
    """sha256 of the content: of rows (any nesting of JSON values, arrays and bytes), or of tokenised examples.

    Equal content gives equal fingerprints on every machine and in every process; the order of rows counts, that of a
    row's fields does not.
    """
    total = hashlib.sha256()
    for item in items:
        _digest(total, item)
    return total.hexdigest()


def _digest(total: Any, value: Any) -> None:
    """Feed one value, with its type and length, so that no two different nestings give the same bytes."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        total.update(b"{%d:" % len(value))
        for key in sorted(value):
            _digest(total, key)
            _digest(total, value[key])
    elif isinstance(value, np.ndarray):
        total.update(f"a{value.dtype.str}{value.shape}:".encode())
        total.update(np.ascontiguousarray(value).tobytes())
    elif hasattr(value, "__dataclass_fields__"):
        fields = [field for field in dataclasses.fields(value) if field.metadata.get("content", True)]
        _digest(total, {field.name: getattr(value, field.name) for field in fields})
    elif isinstance(value, (list, tuple)):
        total.update(b"[%d:" % len(value))
        for item in value:
            _digest(total, item)
    elif isinstance(value, (str, bytes)):
        data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        total.update(b"%s%d:" % (b"s" if isinstance(value, str) else b"b", len(data)) + data)
    elif value is None or isinstance(value, (bool, int, float)):
        total.update(f"{type(value).__name__}{value!r}:".encode())
    elif isinstance(value, NAMED):
        total.update(f"{type(value).__name__}{value}:".encode())
    else:
        raise UserError(f"fingerprint: cannot hash {shown(value)}; rows hold text, numbers, lists, mappings and arrays")


def write_jsonl(path: str | os.PathLike[str], rows: Iterable[Row]) -> pathlib.Path:
    """Write rows as JSON lines (gzip for a name ending in .gz), whole or not at all: `path` never holds a torn file."""
    path = pathlib.Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            with (
                gzip.GzipFile("", "wb", fileobj=file, mtime=0)
                if path.suffix == ".gz"
                else contextlib.nullcontext(file) as out
            ):
                for row in rows:
                    out.write(_line(row))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp gives 0600, which would keep a colleague from reading it
        os.replace(name, path)
    except BaseException:
        pathlib.Path(name).unlink(missing_ok=True)
        raise
    return path


def _line(row: Row) -> bytes:
    if not isinstance(row, Mapping):
        raise UserError(f"write_jsonl: a row must be an object with named fields; this is {shown(row)}")
    try:
        return json.dumps(dict(row), ensure_ascii=False, default=_plain).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can only hold escaped
        return json.dumps(dict(row), default=_plain).encode() + b"\n"
    except (RecursionError, TypeError) as error:
        raise UserError(f"write_jsonl: cannot write {shown(row)} as JSON: {error}") from error


def _plain(value: Any) -> Any:
    """numpy as JSON, and times and decimals as their texts."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, NAMED):
        return str(value)
    raise UserError(f"write_jsonl: cannot write {shown(value)} as JSON")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
