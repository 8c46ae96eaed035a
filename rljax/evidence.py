"""What one step did to single tokens, so that a doubt about a number can be settled by looking.

`rows_of` makes records of the first rows of a step (kept in a run's evidence.jsonl), `show` prints them:

    rljax inspect runs/ppo_tiny --step 20
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rljax import decoding
from rljax.errors import UserError
from rljax.failures import visible
from rljax.iteration import Trace
from rljax.manifest import as_written
from rljax.objectives import clipped_tokens
from rljax.tracking import read_rows
from rljax.types import PolicyBatch

COLUMNS: dict[str, str] = {
    "logp": "log-probability when it was sampled",
    "ref_logp": "log-probability under the reference",
    "reward": "of the token: the score on the last one, less the KL penalty where the reward holds it",
    "value": "what the critic expected before it",
    "return": "what the critic is fitted to",
    "advantage": "as the loss sees it, after whitening",
    "ratio": "π / π_old after this step's updates",
    "clipped": "whether the surrogate is flat there, so that one more update would leave the token alone",
}


def rows_of(
    trace: Trace, after: jax.Array | None, tokenizer: Any, count: int, loss: Callable[..., Any] | None
) -> list[dict[str, Any]]:
    """Records of the first `count` rows. after: f32[b t], the log-probabilities of their tokens after the updates.

    A row that no reward applies to is shown with its tokens, none of them trained.
    """
    rollout, verdict, notes, batch = jax.device_get(trace)
    clipped = None if loss is None else clipped_tokens(loss)
    found = []
    for i in range(min(count, len(verdict.total))):
        real, mask = rollout.tokens.segments[i] > 0, rollout.tokens.mask[i]
        columns = {"logp": rollout.logps[i]}
        rewards = batch.rewards if isinstance(batch, PolicyBatch) else verdict.per_token
        for name, array in (("ref_logp", notes.ref_logps), ("reward", rewards), ("value", notes.values)):
            columns |= {name: array[i]} if array is not None else {}
        if isinstance(batch, PolicyBatch):
            columns |= {"advantage": batch.advantages[i]}
            columns |= {"return": batch.returns[i]} if batch.returns is not None else {}
            if after is not None:
                now, old = np.asarray(after)[i], batch.old_logps[i]
                columns["ratio"] = np.exp(np.where(mask, now - old, 0.0))
                if clipped is not None:
                    flat = clipped(now[None], old[None], batch.advantages[i][None], mask[None])
                    columns["clipped"] = np.asarray(flat)[0]
        total, written = float(verdict.total[i]), real & (np.cumsum(mask) > 0)
        before = rollout.tokens.ids[i][real & (np.cumsum(mask) == 0)]
        untrained = np.isnan(total) or (verdict.greedy is not None and np.isnan(verdict.greedy.total[i]))
        found.append(
            {
                "row": i,
                "prompt": decoding.decode(tokenizer, before, special=True),
                "score": None if np.isnan(total) else total,
                "rewards": {k: None if np.isnan(v[i]) else float(v[i]) for k, v in verdict.parts.items()},
                "finished": bool(rollout.finished[i]),
                "tokens": decoding.pieces(tokenizer, before, rollout.tokens.ids[i][written]),
                "mask": (mask & (not untrained))[written].tolist(),
                **{k: _numbers(v[written]) for k, v in columns.items()},
            }
        )
    return found


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(f"{v:.6g}") if np.isfinite(v) else None for v in values]


def show(run: str | pathlib.Path, step: int | None, console: Console, *, row: int | None = None) -> None:
    """Print the evidence of a step (the last one that has some, if none is named)."""
    with as_written(run):
        _show(run, step, console, row=row)


def _show(run: str | pathlib.Path, step: int | None, console: Console, *, row: int | None) -> None:
    records = read_rows(pathlib.Path(run) / "evidence.jsonl")
    steps = sorted({record["step"] for record in records})
    if not steps:
        raise UserError(f"{run} has no evidence: it is no online run, or its first evaluation is still to come")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise UserError(
            f"there is no evidence of step {step}, only of {', '.join(map(str, steps))}: it is kept at evaluations, so "
            "set --eval-every and --evidence"
        )
    here = [record for record in records if record["step"] == step]
    if row is not None and row not in (rows := [record["row"] for record in here]):
        raise UserError(f"there is no evidence of row {row}, only of {', '.join(map(str, rows))}: set --evidence")
    for record in here:
        if row in (None, record["row"]):
            console.print(_heading(record))
            console.print(_table(record))
    console.print(Text("\n".join(f"{name}: {text}" for name, text in COLUMNS.items() if name in records[0])))


def _heading(record: Mapping[str, Any]) -> Text:
    parts = ", ".join(f"{name} {_cell(value)}" for name, value in record["rewards"].items())
    end = "ended by itself" if record["finished"] else "cut off"
    head = f"step {record['step']}, row {record['row']}: score {_cell(record['score'])} ({parts}), {end}"
    return Text.assemble((visible(head), "bold"), "\n", (visible(record["prompt"]), "dim"))


def _table(record: Mapping[str, Sequence[Any]]) -> Table:
    names = [name for name in COLUMNS if name in record]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("token", "trained", *names):
        word = name == "token"  # where there is not room for all, numbers stay whole
        table.add_column(name, justify="left" if word else "right", no_wrap=not word, overflow="fold")
    for i, (token, trained) in enumerate(zip(record["tokens"], record["mask"], strict=True)):
        cells = [_cell(record[name][i]) if trained else "" for name in names]
        table.add_row(Text(repr(token)), "✓" if trained else "", *cells, style=None if trained else "dim")
    return table


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
