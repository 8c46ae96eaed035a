"""What a host reward returned, as arrays of finite numbers; or the row in which it is something else."""

from __future__ import annotations

import decimal
import itertools
import numbers
from collections.abc import Iterable, Mapping, Sequence, Set, Sized
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rljax.errors import UserError

LARGEST = 1e18  # of a reward: float32 holds its square, and sums of some hundred squares, as a variance has them
TOO_LARGE = f"and beyond {LARGEST:g} means and variances of a batch overflow in float32: scale rewards down"
NONE_HINT = "return None for a row to which the reward does not apply"


class Answer(NamedTuple):
    """One reward's view of a batch, unweighted."""

    sums: np.ndarray  # f32[b]; NaN where it does not apply
    per_token: list[np.ndarray | None] | None  # f32[len(completion)] a row, None where it does not apply


class Wrong(UserError):
    """What is wrong with an answer, and in which row."""

    def __init__(self, what: str, row: int | None = None):
        super().__init__(what)
        self.what, self.row = what, row


def parse(raw: Any, lengths: Sequence[int]) -> Answer:
    """b numbers, or b sequences of `lengths[i]` numbers each, None for any row; everything else raises Wrong."""
    items, rows = _items(raw, len(lengths)), len(lengths)
    if len(items) != rows:
        raise Wrong(
            f"it returned {len(items)} values for {rows} completions: return one for each, in their order "
            f"({NONE_HINT})",
            min(len(items), rows - 1) if rows else None,
        )
    nested = [item is not None and _is_sequence(item) for item in items]
    if not any(nested):
        return Answer(
            np.asarray([np.nan if x is None else _number(x, i) for i, x in enumerate(items)], np.float32), None
        )
    tokens: list[np.ndarray | None] = []
    for i, item in enumerate(items):
        if item is not None and not nested[i]:
            raise Wrong("it returned a number here and sequences elsewhere: return numbers, or per-token numbers", i)
        tokens.append(None if item is None else _tokens(item, i, lengths[i]))
    sums = [np.nan if x is None else np.sum(x, dtype=np.float64) for x in tokens]
    for i, total in enumerate(sums):
        if abs(total) > LARGEST:
            raise Wrong(f"its per-token numbers sum up to {total:g}, {TOO_LARGE}", i)
    return Answer(np.asarray(sums, np.float32), tokens)


def _items(raw: Any, rows: int) -> list[Any]:
    if hasattr(raw, "__array__") and not isinstance(raw, Sequence):  # numpy, jax, torch, pandas
        raw = np.asarray(raw)
        raw = list(raw) if raw.ndim else raw.item()
    if isinstance(raw, str | bytes | Mapping | Set) or not isinstance(raw, Iterable):
        raise Wrong(f"it returned {_shown(raw)}: return a list of {rows} numbers, one for each completion")
    return _listed(raw, rows)


def _listed(values: Iterable[Any], wanted: int) -> list[Any]:
    """All of them, or one too many of what may never end."""
    return list(values if isinstance(values, Sized) else itertools.islice(values, wanted + 1))


def _is_sequence(item: Any) -> bool:
    if hasattr(item, "__array__") and not isinstance(item, Sequence):
        return np.ndim(item) > 0
    return isinstance(item, Iterable) and not isinstance(item, str | bytes | Mapping | Set)


def _tokens(item: Any, row: int, length: int) -> np.ndarray:
    values = list(np.asarray(item)) if hasattr(item, "__array__") else _listed(item, length)
    if len(values) != length:
        raise Wrong(
            f"it returned {len(values)} per-token numbers for a completion of {length} tokens: return one for each "
            "token of completion_ids, or a single number for the row",
            row,
        )
    return np.asarray([_number(x, row) for x in values], np.float32)


def _number(x: Any, row: int) -> float:
    """x as a float that float32 holds."""
    if hasattr(x, "__array__"):
        array = np.asarray(x)
        real = array.ndim == 0 and (array.dtype == bool or jnp.issubdtype(array.dtype, jnp.number))
        real = real and not jnp.issubdtype(array.dtype, jnp.complexfloating)
    else:
        real = isinstance(x, numbers.Real | decimal.Decimal)
    if not real:
        raise Wrong(f"it returned {_shown(x)} where a number belongs ({NONE_HINT})", row)
    try:
        value = float(x)
        narrow = abs(value) <= float(np.finfo(np.float32).max)
    except (OverflowError, ValueError):  # more than a float holds; Decimal("sNaN")
        value, narrow = float("inf"), False
    if not narrow:
        raise Wrong(f"it returned {value}, which is no finite number in float32; mend the reward, or {NONE_HINT}", row)
    if abs(value) > LARGEST:
        raise Wrong(f"it returned {value:g}, {TOO_LARGE}", row)
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:60] + '…'}"
