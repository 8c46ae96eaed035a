"""Which rows make which batch: a pure function of (seed, step), the same on any number of hosts."""

from __future__ import annotations

import dataclasses
import functools
import queue
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

import numpy as np

from rljax.errors import UserError

T = TypeVar("T")


@functools.lru_cache(maxsize=16)
def _endless(n: int, seed: int) -> Any:
    """0..n-1 shuffled anew for every epoch, for ever, with random access (position p lies in epoch p // n)."""
    import grain

    # Grain shuffles epoch e with seed + e, so neighbouring seeds would share their epochs: spread the seeds out first.
    spread = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return grain.MapDataset.range(n).shuffle(seed=spread).repeat()


def shuffled(n: int, *, seed: int, places: Iterable[int]) -> np.ndarray:
    """Some positions of the endless shuffled sequence over n rows, i64; n make an epoch."""
    order = _endless(n, seed)
    return np.asarray([order[int(place)] for place in places], np.int64)


def indices(n: int, *, batch: int, seed: int, step: int, here: np.ndarray | None = None) -> np.ndarray:
    """The rows of the batch of `step`, i64[batch]; of its places `here` only, i64[len(here)].

    The batch of a step is positions step·batch … (step+1)·batch of an endless sequence that visits all n rows once per
    epoch, in another order each epoch; a batch may span two epochs. A process asks for the places that its devices hold
    (`hosts.share`), so what all of them read is the batch that a single process would read.
    """
    _check(n, batch)
    return shuffled(n, seed=seed, places=step * batch + (np.arange(batch) if here is None else here))


def eval_batches(n: int, batch: int, here: np.ndarray | None = None) -> list[np.ndarray]:
    """Rows 0..n-1 once, in order: i64[batch] each, filled up with -1; of each batch the places `here` only.

    -1 stands for no row: `memoized` and the collations turn it into a row that is all padding (segments 0, mask 0), so
    that every evaluation batch has the same shape.
    """
    _check(n, batch)
    places = np.arange(batch) if here is None else here
    rows = np.arange(0, n, batch)[:, None] + places[None, :]
    return list(np.where(rows < n, rows, -1).astype(np.int64))


def _check(n: int, batch: int) -> None:
    if n < 1 or batch < 1:
        raise UserError(f"a batch of {batch} of {n} rows: both must be at least 1")


@dataclasses.dataclass(frozen=True)
class Batches:
    """step -> make(indices): the batch of that step, or this process's part of it.

    A pure function of (seed, step), so any step can be asked for first, again, or in a resumed run.
    """

    make: Callable[[np.ndarray], Any]  # row indices i64[k] -> pytree of numpy arrays
    n: int  # rows
    batch: int  # global: over all processes
    seed: int
    here: np.ndarray | None = None  # the places of the batch that are read; None: all of them

    def __call__(self, step: int) -> Any:
        return self.make(indices(self.n, batch=self.batch, seed=self.seed, step=step, here=self.here))


def prefetch(function: Callable[[int], T], start: int, stop: int, ahead: int = 2) -> Generator[tuple[int, T]]:
    """Yield (step, function(step)) for start..stop, computed in a thread up to `ahead` steps before they are asked for.

    An exception of `function` is raised here, at its step. Leaving the loop early (break, an exception, Ctrl-C) stops
    the thread; the interpreter never waits for it.
    """
    if ahead < 1:
        raise UserError(f"prefetch: ahead={ahead} must be at least 1")
    ready: queue.Queue[tuple[int, Any, BaseException | None]] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()
    worker = threading.Thread(
        target=_work, args=(function, start, stop, ready, stopped), name="rljax-prefetch", daemon=True
    )
    worker.start()
    try:
        for _ in range(start, stop):
            step, value, error = ready.get()
            if error is not None:
                raise error
            yield step, value
    finally:
        stopped.set()
        while not ready.empty():  # a worker that waits for room sees the event
            ready.get_nowait()
        worker.join(timeout=1.0)


def _work(
    function: Callable[[int], Any],
    start: int,
    stop: int,
    ready: queue.Queue[tuple[int, Any, BaseException | None]],
    stopped: threading.Event,
) -> None:
    for step in range(start, stop):
        if stopped.is_set():
            return
        try:
            item = (step, function(step), None)
        except BaseException as error:
            item = (step, None, error)
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                break
            except queue.Full:
                continue
        if item[2] is not None:
            return
