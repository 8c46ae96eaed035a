"""What a user must know of the rows of a run: tried, counted, and put into sentences."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from rljax.data import chat
from rljax.data.batches import memoized
from rljax.data.examples import Comparison, Example, Unpaired
from rljax.data.forms import repeats
from rljax.data.progress import track
from rljax.data.rows import Row, Rows
from rljax.errors import UserError

Overlong = Literal["cut", "drop", "refuse"]
NAMED = 3  # rows of a kind that are named by file and line


class Survey(NamedTuple):
    rows: Rows  # those that are left
    get: Callable[[int], Any]  # the example of one of them; None for -1
    lines: list[str]  # what was found, in words


def survey(
    rows: Rows,
    example: Callable[[Row], Any],
    *,
    name: str,
    overlong: Overlong = "cut",
    positions: int | None = None,
    tokenizer: Any = None,
) -> Survey:
    """Make the example of every row, so that what a template or tokenizer refuses surfaces now, and say what was found.

    name: of the rows in sentences ("training"). overlong: what becomes of rows that are longer than the limits of
    `example`: they are cut, left out, or an error. positions: those that the model was made for, if that is a limit.
    """
    found: dict[str, list[int]] = {}
    facts, get = _Facts(tokenizer, positions), memoized(rows, example)
    for i in track(range(len(rows)), f"trying {name} rows", len(rows)):
        for kind in facts.of(rows[i], get(i)):
            found.setdefault(kind, []).append(i)
    lines, long = [], sorted({i for kind in LIMITS for i in found.get(kind, [])})
    if long and overlong == "refuse":
        raise UserError(
            f"{len(long)} of {len(rows)} {name} rows are longer than max_prompt or max_completion "
            f"({_places(rows, long)}) and overlong='refuse': raise the limits, or take overlong='drop' or 'cut'"
        )
    kept, kept_get = rows, get
    if long and overlong == "drop":
        left = np.setdiff1d(np.arange(len(rows)), long)
        if not len(left):
            raise UserError(
                f"all {len(rows)} {name} rows are longer than max_prompt or max_completion: raise the limits"
            )
        kept = rows.select(left)
        kept_get = lambda i: None if i < 0 else get(int(left[i]))  # noqa: E731
        lines.append(f"{len(long)} of {len(rows)} {name} rows are left out, too long ({_places(rows, long)})")
        found = {kind: sorted(set(at) - set(long)) for kind, at in found.items()}
    for kind, text in SENTENCES.items():
        if at := found.get(kind):
            lines.append(f"{len(at)} of {len(rows)} {name} rows {text} ({_places(rows, at)})")
    return Survey(kept, kept_get, lines + facts.signal(name, len(kept), found))


LIMITS = ("prompt", "end")
SENTENCES = {
    "prompt": "have a prompt longer than max_prompt: it loses its beginning",
    "end": "are longer than their limit: they lose their end",
    "untrained": "train no token",
    "alike": "are pairs of one and the same completion: they have no gradient",
    "cut alike": "are pairs that are alike once they are cut: they have no gradient",
    "empty": "have an empty completion: only its end is trained",
    "repeats": "repeat the prompt at the beginning of every completion: it is taken once",
    "echoes": "begin their completion with the whole prompt: if it is repeated there, leave it out",
    "special": "spell special tokens in their texts: they are read as those tokens",
    "positions": "need more positions than the model was made for (max_position_embeddings)",
}


class _Facts:
    """The kinds of a row, and what all rows have in common."""

    def __init__(self, tokenizer: Any, positions: int | None):
        self.positions, self.labels = positions, [0, 0]
        pattern = None if tokenizer is None else chat.special_pattern(tokenizer)
        self.special: re.Pattern[str] | None = pattern

    def of(self, row: Row, item: Any) -> Iterator[str]:
        examples = _examples(item)
        yield from (kind for side, kind in enumerate(LIMITS) if any(one.lost[side] for one in examples))
        if isinstance(item, Unpaired):
            self.labels[bool(item.desirable)] += 1
        trains = not all(one.prompt == len(one.ids) and not one.lost[1] for one in examples)  # else prompts alone
        if trains and any(not one.mask.any() for one in examples):
            yield "untrained"
        if len(examples) > 1:
            yield from self.alike(examples)
        if any(one.prompt and one.mask.sum() == 1 == len(one.ids) - one.prompt and not one.lost[1] for one in examples):
            yield "empty"
        yield from self.texts(row)
        if self.positions is not None and any(len(one.ids) > self.positions for one in examples):
            yield "positions"

    def alike(self, examples: tuple[Example, ...]) -> Iterator[str]:
        first = examples[0]
        if all(np.array_equal(first.ids, one.ids) for one in examples[1:]):
            yield "cut alike" if any(one.lost[1] for one in examples) else "alike"

    def texts(self, row: Row) -> Iterator[str]:
        prompt, completion = row.get("prompt"), row.get("completion")
        several: Any
        if isinstance(prompt, str):
            both = [row.get("chosen"), row.get("rejected")]
            several = row.get("completions") if isinstance(row.get("completions"), list) else both
            if several and all(isinstance(text, str) for text in several) and repeats(prompt, several):
                yield "repeats"
            if isinstance(completion, str) and repeats(prompt, [completion]):
                yield "echoes"
        if self.special is not None and any(self.special.search(text) for text in _texts(row)):
            yield "special"

    def signal(self, name: str, rows: int, found: Mapping[str, list[int]]) -> list[str]:
        """What leaves nothing to learn, of the rows as a whole."""
        lines = []
        if len(found.get("alike", ())) + len(found.get("cut alike", ())) >= rows:
            lines.append(f"all {name} pairs are of one and the same completion: there is nothing to learn from them")
        bad, good = self.labels
        if (bad == 0) != (good == 0):
            only = "desirable" if good else "undesirable"
            lines.append(f"all {name} completions are {only}: a loss of both kinds has nothing to tell them from")
        return lines


def _examples(item: Any) -> tuple[Example, ...]:
    match item:
        case Example():
            return (item,)
        case Unpaired():
            return (item.example,)
        case Comparison():
            return item.examples
    return tuple(item)


def _texts(row: Row) -> Iterator[str]:
    """What the model reads of a row: its texts and the contents of its messages."""
    for field in ("text", "prompt", "completion", "chosen", "rejected", "completions", "messages"):
        value = row.get(field)
        for part in value if isinstance(value, (list, tuple)) else [value]:
            text = part.get("content") if isinstance(part, Mapping) else part
            if isinstance(text, str):
                yield text


def _places(rows: Rows, at: list[int]) -> str:
    return ", ".join(rows.where(i) for i in at[:NAMED]) + (", …" if len(at) > NAMED else "")
