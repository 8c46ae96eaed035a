"""`epochs` of a run on a data set: passes over the rows that it trains on, as steps, before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
from typing import TypeVar

from rljax import data, program, ranges
from rljax.errors import UserError
from rljax.identity import base_kind
from rljax.ranges import Positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Passing(program.Run):
    """What every run shares whose batches come from a data set, which it may pass several times."""

    epochs: Positive | None = None  # passes over the rows to train on, instead of `steps`; 0.5: a half of them


R = TypeVar("R", bound=Passing)


def in_steps(run: R) -> R:
    """The run with the steps that its `epochs` take, rounded up, and without `epochs`: the two ways to say it are one
    experiment. UserError where the rows cannot be counted before a model is loaded.
    """
    if run.epochs is None:
        return run
    ranges.check(run)
    unknown = {
        "data is a function, which makes its rows when the policy is loaded": callable(run.data),
        "packing puts several texts into a row": bool(getattr(run, "packing", False)),
        'overlong="drop" leaves rows out when they are read': run.overlong == "drop",
    }
    for why, here in unknown.items():
        if here:
            raise UserError(f"epochs={run.epochs:g} cannot be counted: {why}. Give steps instead")
    assert not callable(run.data)
    rows = program.split_rows(run, data.read(run.data, split=run.split))[0][0]
    return dataclasses.replace(run, steps=max(1, math.ceil(run.epochs * _examples(run, rows) / run.batch)), epochs=None)


def _examples(run: Passing, rows: data.Rows) -> int:
    """Pairs make two examples each where completions are learned from one by one."""
    apart = base_kind(type(run)).__name__ == "Unpaired" and "chosen" in rows[0]
    return len(rows) * (2 if apart else 1)
