"""Held-out rows by their prompts: no row that is evaluated shares its prompt with one that is trained on."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rljax.data.forms import preference_row
from rljax.data.order import shuffled
from rljax.data.progress import track
from rljax.data.rows import Row, Rows
from rljax.errors import UserError


def prompt_key(row: Row) -> str:
    """The prompt of a row, whatever its form, as near-duplicates share it: letters and digits alone, in lower case.

    The prompt of a text is all of it, that of messages what comes before the first answer. A row without any of the
    fields of `forms` is known by its field "question", or by all that it holds.
    """
    if row.get("messages") is not None:
        return _normal(_before_answer(row["messages"]))
    if row.get("prompt") is not None:
        return _normal(row["prompt"])
    if row.get("chosen") is not None:
        return _normal(preference_row(row)["prompt"])
    for field in ("text", "question"):
        if row.get(field) is not None:
            return _normal(row[field])
    return _normal(dict(row))


def _before_answer(messages: Any) -> Any:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        return messages
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in messages]
    return messages[: roles.index("assistant")] if "assistant" in roles else messages


def _normal(value: Any) -> str:
    text = unicodedata.normalize("NFKC", " ".join(_texts(value))).casefold()
    return re.sub(r"[\W_]+", " ", text).strip() or text


def _texts(value: Any) -> list[str]:
    """The texts and numbers of nested values, in their order."""
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in _texts(item)]
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else [str(value)]


def split_prompts(
    rows: Rows, *, count: int, seed: int = 0, key: Callable[[Row], str] = prompt_key
) -> tuple[Rows, Rows] | None:
    """(train, held out) with no prompt in both, each in the order of `rows`; the same for the same seed.

    About `count` rows are held out, and at least one: whole groups of rows of one prompt, in a shuffled order, as long
    as they fit. None where all rows have the same prompt.
    """
    if not 0 < count < len(rows):
        raise UserError(f"split_prompts: cannot hold out {count} of {len(rows)} rows: both parts need at least one")
    groups: dict[str, list[int]] = {}
    for i in track(range(len(rows)), "reading prompts", len(rows)):
        groups.setdefault(rows.apply(key, i), []).append(i)
    if len(groups) == 1:
        return None
    members = list(groups.values())
    order = [members[int(g)] for g in shuffled(len(members), seed=seed, places=range(len(members)))]
    held: list[int] = []
    for group in order:
        if len(held) + len(group) <= count:
            held += group
    held = held or min(order, key=len)
    kept = np.setdiff1d(np.arange(len(rows)), held)
    return rows.select(kept), rows.select(np.sort(held))


def shared_prompts(train: Rows, held_out: Rows, key: Callable[[Row], str] = prompt_key) -> list[int]:
    """Which held-out rows have a prompt that is trained on too."""
    seen = {train.apply(key, i) for i in track(range(len(train)), "reading prompts", len(train))}
    return [i for i in range(len(held_out)) if held_out.apply(key, i) in seen]
