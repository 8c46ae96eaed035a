"""Which rows make which batch: a pure function of (seed, step), the same on any number of hosts."""

from __future__ import annotations

import dataclasses
import functools
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


@functools.lru_cache(maxsize=16)
def _endless(n: int, seed: int) -> Any:
    """0..n-1 shuffled anew for every epoch, for ever, with random access (position p lies in epoch p // n)."""
    import grain

    # Grain shuffles epoch e with seed + e, so neighbouring seeds would share their epochs: spread the seeds out first.
    spread = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return grain.MapDataset.range(n).shuffle(seed=spread).repeat()


def shuffled(n: int, *, seed: int, start: int, stop: int) -> np.ndarray:
    """Positions start..stop of the endless shuffled sequence over n rows, i64[stop - start]; n make an epoch."""
    order = _endless(n, seed)
    return np.asarray([order[p] for p in range(start, stop)], np.int64)


def indices(
    n: int,
    *,
    batch: int,
    seed: int,
    step: int,
    process_index: int | None = None,
    process_count: int | None = None,
) -> np.ndarray:
    """The rows of this process's share of the batch of `step`, i64[batch / process_count].

    The global batch of a step is positions step·batch … (step+1)·batch of an endless sequence that visits all n rows
    once per epoch, in another order each epoch; a batch may span two epochs. Process p reads the p-th contiguous
    share, so the shares of all processes in their order are the batch that a single process would read.
    """
    share, offset = _share(n, batch, process_index, process_count)
    start = step * batch + offset
    return shuffled(n, seed=seed, start=start, stop=start + share)


def eval_batches(
    n: int, batch: int, *, process_index: int | None = None, process_count: int | None = None
) -> list[np.ndarray]:
    """Rows 0..n-1 once, in order: this process's share i64[batch / process_count] of each batch, filled up with -1.

    -1 stands for no row: `memoized` and the collations turn it into a row that is all padding (segments 0, mask 0), so
    that every evaluation batch has the same shape.
    """
    share, offset = _share(n, batch, process_index, process_count)
    starts = np.arange(0, n, batch)[:, None] + offset + np.arange(share)[None, :]
    return list(np.where(starts < n, starts, -1).astype(np.int64))


def _share(n: int, batch: int, process_index: int | None, process_count: int | None) -> tuple[int, int]:
    """(rows per process, first row of this process) of a global batch."""
    if process_index is None or process_count is None:
        import jax

        process_index = jax.process_index() if process_index is None else process_index
        process_count = jax.process_count() if process_count is None else process_count
    if n < 1 or batch < 1:
        raise ValueError(f"a batch of {batch} of {n} rows: both must be at least 1")
    if batch % process_count:
        raise ValueError(
            f"batch={batch} does not divide over {process_count} processes; give a multiple of {process_count}"
        )
    share = batch // process_count
    return share, share * process_index


@dataclasses.dataclass(frozen=True)
class Batches:
    """step -> make(indices): this process's part of the batch of that step.

    A pure function of (seed, step), so any step can be asked for first, again, or in a resumed run.
    """

    make: Callable[[np.ndarray], Any]  # row indices i64[local batch] -> pytree of numpy arrays
    n: int  # rows
    batch: int  # global: over all processes
    seed: int
    process_index: int | None = None  # None: jax.process_index()
    process_count: int | None = None  # None: jax.process_count()

    def __call__(self, step: int) -> Any:
        where: dict[str, Any] = {"process_index": self.process_index, "process_count": self.process_count}
        return self.make(indices(self.n, batch=self.batch, seed=self.seed, step=step, **where))


def prefetch(function: Callable[[int], T], start: int, stop: int, ahead: int = 2) -> Iterator[tuple[int, T]]:
    """Yield (step, function(step)) for start..stop, computed in a thread up to `ahead` steps before they are asked for.

    An exception of `function` is raised here, at its step. Leaving the loop early (break, an exception, Ctrl-C) stops
    the thread; the interpreter never waits for it.
    """
    if ahead < 1:
        raise ValueError(f"prefetch: ahead={ahead} must be at least 1")
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
