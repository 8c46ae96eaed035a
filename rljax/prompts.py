"""A data set as batches of prompts: which rows make which batch, and their tokens in one width."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rljax import data, policy
from rljax.types import Tokens

NAMES = ("training", "held-out")
FIRST = 20_000  # rows that are looked at before the run; of a larger data set it would take too long


class Prompts(NamedTuple):
    """Rows with a prompt each; batches of them are functions of their number."""

    rows: data.Rows
    ids: Callable[[int], np.ndarray]  # of row i
    width: int  # of all batches
    batch: Callable[[int], np.ndarray]  # number of a batch -> its row indices, or those of this process's places in it
    fields: tuple[str, ...]  # names, beside the prompt; a row may lack some of them


def prompts(run: Any, tokenizer: Any, rows: data.Rows, here: np.ndarray | None = None) -> Prompts:
    """All prompts have to fit in one width, so that everything compiles once: that of the longest, up to max_prompt.

    here: the places of every batch that are read; None: all of them.
    """
    read = data.memoized(rows, functools.partial(data.prompt_example, tokenizer=tokenizer, max_prompt=run.max_prompt))

    def ids(index: int) -> np.ndarray:
        example = read(index)
        return np.zeros(0, np.int32) if example is None else example.ids

    counted = range(len(rows)) if len(rows) <= FIRST and run.environment is None else ()
    longest = max((len(ids(i)) for i in counted), default=run.max_prompt)
    width = -(-longest // policy.BUCKET) * policy.BUCKET
    indices = functools.partial(data.indices, len(rows), batch=run.batch, seed=run.seed, here=here)
    return Prompts(rows, ids, width, lambda number: indices(step=number), fields(rows))


def tried(run: Any, start: policy.Policy, rows: tuple[data.Rows, data.Rows]) -> tuple[data.Rows, data.Rows, list[str]]:
    """(rows to train on, rows held out), without those that are left out, and what is to be said of them. An
    environment makes prompts of its own of its rows, which are not looked at here.
    """
    if run.environment is not None:
        return *rows, []
    example = functools.partial(data.prompt_example, tokenizer=start.tokenizer, max_prompt=run.max_prompt)
    positions = start.model.config.max_positions - run.max_completion
    told: dict[str, Any] = {"overlong": run.overlong, "tokenizer": start.tokenizer, "positions": positions}
    found = [data.survey(part, example, name=name, **told) for name, part in zip(NAMES, rows, strict=True)]
    return found[0].rows, found[1].rows, [line for survey in found for line in survey.lines]


def prompt_tokens(source: Prompts, indices: Sequence[int] | np.ndarray) -> Tokens:
    """The prompts of some rows, left-padded, [rows width]."""
    return policy.left_pad([source.ids(int(i)) for i in indices], rows=len(indices), width=source.width)


def fields(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The names of the data's fields beside the prompt: all that occur in its first 20 000 rows."""
    return tuple(dict.fromkeys(name for row in itertools.islice(rows, FIRST) for name in row if name != "prompt"))
