"""A progress bar for passes over the data that take longer than one would wait without asking."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
PATIENCE = 2.0  # seconds before anything is shown
EVERY = 30.0  # seconds between two lines where there is no terminal
AGAIN = 0.1  # between two looks of a bar


def track(items: Iterable[T], label: str, total: int) -> Iterator[T]:
    """Yield `items`; from two seconds on, show how far they are and how long the rest takes (on stderr): a bar on a
    terminal, and in a log file a line every now and then.
    """
    start, bar, terminal, said = time.monotonic(), None, False, 0.0
    try:
        for done, item in enumerate(items):
            now = time.monotonic()
            if bar is None and now - start > PATIENCE:
                bar, said = _bar(label, total), now
                terminal = bar.console.is_terminal  # which is slow to ask
            elif bar is not None and now - said >= (AGAIN if terminal else EVERY):
                said = now
                bar.update(bar.task_ids[0], completed=done)
                if not terminal:
                    left = (now - start) / done * (total - done)
                    bar.console.print(f"{label}: {done:,} of {total:,}, {left:.0f} s left")
            yield item
    finally:
        if bar is not None:
            bar.stop()


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
