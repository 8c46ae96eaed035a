"""Examples to batches of fixed shape: padding, packing, and one collation per kind of data. All arrays are numpy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from rljax.data.examples import Comparison, Example
from rljax.data.progress import track
from rljax.data.rows import Row, Rows
from rljax.errors import UserError
from rljax.types import ComparisonBatch, Tokens

T = TypeVar("T")
Packed = tuple[Example, ...]  # the documents of one row


def tokenize(rows: Rows, example: Callable[[Row], T]) -> list[T]:
    """example(row) for every row, now (packing needs all lengths); a bad row raises with its place."""
    return [rows.apply(example, i) for i in track(range(len(rows)), "tokenising", len(rows))]


def memoized(rows: Rows, example: Callable[[Row], T], *, capacity: int = 100_000) -> Callable[[int], T | None]:
    """index -> example(row), keeping the last `capacity` results; -1 (see `eval_batches`) gives None: an empty row."""

    @functools.lru_cache(maxsize=capacity)
    def get(index: int) -> T:
        return rows.apply(example, index)

    return lambda index: None if index < 0 else get(int(index))


def pad(examples: Sequence[Example | Packed | None], length: int, *, prompt: int | None = None) -> Tokens:
    """Rows of `length` tokens, filled up with segments 0 -> Tokens [b length].

    A row is an example (segment 1), the examples of a packed row (segments 1, 2, …), or None (all padding).
    prompt: so many columns are for the prompts of single examples, which end in the last of them; what is filled up is
      then at both ends. None: all rows begin in column 0.
    """
    ids = np.zeros((len(examples), length), np.int32)
    segments = np.zeros((len(examples), length), np.int32)
    mask = np.zeros((len(examples), length), bool)
    for row, item in enumerate(examples):
        at = 0 if prompt is None else _start(item, prompt)
        for segment, example in enumerate(_documents(item), start=1):
            end = at + len(example.ids)
            if end > length:
                raise UserError(
                    f"pad: {end} tokens do not fit in rows of length={length}; cut the examples, or give a longer "
                    "length"
                )
            ids[row, at:end], mask[row, at:end], segments[row, at:end] = example.ids, example.mask, segment
            at = end
    return _tokens(ids, segments, mask)


def _start(item: Example | Packed | None, prompt: int) -> int:
    """The column of an example whose prompt ends before column `prompt`."""
    if item is None:
        return 0
    if not isinstance(item, Example) or item.prompt > prompt:
        what = f"a prompt of {item.prompt} tokens" if isinstance(item, Example) else "a packed row"
        raise UserError(f"pad: {what} does not fit in prompt={prompt} columns; cut prompts, or give more columns")
    return prompt - item.prompt


def _documents(item: Example | Packed | None) -> Packed:
    if item is None:
        return ()
    return (item,) if isinstance(item, Example) else item


def _tokens(ids: np.ndarray, segments: np.ndarray, mask: np.ndarray) -> Tokens:
    arrays: dict[str, Any] = {"ids": ids, "segments": segments, "mask": mask}
    return Tokens(**arrays)


def pack(examples: Sequence[Example], length: int, *, window: int = 1000, truncate: bool = True) -> list[Packed]:
    """Rows of several documents each, of at most `length` tokens: as few as first-fit-decreasing finds, for `pad`.

    Documents are taken `window` at a time (in their order) and sorted by length within the window, so rows mix
    neighbours only and the work is bounded. Deterministic: ties keep their order. Documents without a trained token
    are left out. truncate: a longer document keeps its first `length` tokens; False raises.
    """
    too_long = next((i for i, example in enumerate(examples) if len(example.ids) > length), None)
    if too_long is not None and not truncate:
        raise UserError(
            f"pack: document {too_long} has {len(examples[too_long].ids)} tokens and rows hold length={length}; "
            "raise the length, or allow documents to be cut with truncate=True"
        )
    cut = [Example(e.ids[:length], e.mask[:length], min(e.prompt, length)) for e in examples]
    rows: list[Packed] = []
    for start in range(0, len(cut), window):
        rows += _first_fit([e for e in cut[start : start + window] if e.mask.any()], length)
    if not rows:
        raise UserError(f"pack: none of the {len(examples)} documents has a trained token within {length} tokens")
    return rows


def _first_fit(examples: Sequence[Example], length: int) -> list[Packed]:
    rows: list[list[Example]] = []
    room = np.zeros(len(examples), np.int64)  # tokens left in each row
    for example in sorted(examples, key=lambda e: -len(e.ids)):
        fits = np.flatnonzero(room[: len(rows)] >= len(example.ids))
        if len(fits):
            row = int(fits[0])
            rows[row].append(example)
        else:
            row = len(rows)
            rows.append([example])
            room[row] = length
        room[row] -= len(example.ids)
    return [tuple(row) for row in rows]


def collate_supervised(examples: Sequence[Example | Packed | None], length: int) -> Tokens:
    """Examples or packed rows -> Tokens [b length]."""
    return pad(examples, length)


def collate_preference(
    pairs: Sequence[tuple[Example, Example] | None], length: int, *, prompt: int | None = None
) -> tuple[Tokens, Tokens]:
    """(chosen, rejected) pairs -> (chosen, rejected), Tokens [b length] each. prompt: see `pad`."""
    chosen, rejected = (
        pad([None if pair is None else pair[side] for pair in pairs], length, prompt=prompt) for side in (0, 1)
    )
    return chosen, rejected


def collate_comparison(examples: Sequence[Comparison | None], length: int, k: int = 2) -> ComparisonBatch:
    """k completions of each prompt -> ComparisonBatch with Tokens [b k length]."""
    rows: list[Example | None] = []
    for item in examples:
        if item is not None and len(item.examples) != k:
            raise UserError(
                f"a row has {len(item.examples)} completions and the batch k={k}; every row must have the same number"
            )
        rows += [None] * k if item is None else item.examples
    flat = pad(rows, length)
    shape = (len(examples), k, length)
    arrays: dict[str, Any] = {
        "best": np.asarray([0 if item is None else item.best for item in examples], np.int32),
        "margin": np.asarray([0 if item is None else item.margin for item in examples], np.float32),
    }
    tokens = _tokens(*(np.asarray(x).reshape(shape) for x in (flat.ids, flat.segments, flat.mask)))
    return ComparisonBatch(tokens=tokens, **arrays)
