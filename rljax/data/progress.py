"""A progress bar for passes over the data that take longer than one would wait without asking."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
PATIENCE = 2.0  # seconds before anything is shown
EVERY = 30.0  # seconds between two lines where there is no terminal


def track(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """Yield `items`; from two seconds on, show how far they are and how long the rest takes (on stderr)."""
    start, bar, said = time.monotonic(), None, 0.0
    try:
        for done, item in enumerate(items):
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done)
                said = _line(bar, label, done, total, start, said)
            elif time.monotonic() - start > PATIENCE:
                bar, said = _bar(label, total), time.monotonic()
            yield item
    finally:
        if bar is not None:
            bar.stop()


def _line(bar: Any, label: str, done: int, total: int, start: float, said: float) -> float:
    """In a log file, how far it is, every now and then. When that was said last."""
    now = time.monotonic()
    if bar.console.is_terminal or now - said < EVERY or not done:
        return said
    left = (now - start) / done * (total - done)
    bar.console.print(f"{label}: {done:,} of {total:,}, {left:.0f} s left")
    return now


def _bar(label: str, total: int):
    """A started bar on a terminal; one plain line in a log file."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    bar.add_task(label, total=total)
    if console.is_terminal:
        bar.start()
    else:
        console.print(f"{label}: {total:,} …")
    return bar
