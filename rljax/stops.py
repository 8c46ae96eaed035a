"""Signals that ask a run to save and leave."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from rljax import distributed

__all__ = ["Stop", "graceful_stop"]

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


class Stop:
    """`requested`: the name of the signal that came, or None."""

    requested: str | None = None

    def __init__(self, agreement: Callable[[int, str | None], str | None]):
        self._agreement = agreement

    def agreed(self, step: int) -> str | None:
        """`requested`, alike on all processes after this step; each asks after every step."""
        found = self._agreement(step, self.requested)
        self.requested = found or self.requested
        return found


@contextlib.contextmanager
def graceful_stop() -> Iterator[Stop]:
    """Ctrl-C, SIGTERM (preemption), SIGHUP (the terminal was closed) and SIGQUIT set `stop.requested`, which the loop
    polls; a second one is a KeyboardInterrupt, but for SIGHUP, which a shell that ends sends twice. A SIGHUP that is
    ignored (nohup) stays ignored.

    The handlers of before come back at the end. Python handles signals in the main thread: elsewhere this does nothing.
    """
    with distributed.agreement() as agreement:
        yield from _graceful(Stop(agreement))


def _graceful(stop: Stop) -> Iterator[Stop]:
    def handle(number: int, _: Any) -> None:
        name = signal.Signals(number).name
        if stop.requested is not None and number == signal.SIGHUP:
            return
        if stop.requested is not None:
            raise KeyboardInterrupt(f"{name} after {stop.requested}")
        stop.requested = name
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            said = f"\n{name}: saving after this step, then leaving (once more: leaving at once, unsaved)\n"
            os.write(2, said.encode())

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in STOPS}
    if before[signal.SIGHUP] == signal.SIG_IGN:
        del before[signal.SIGHUP]
    try:
        for number in before:
            signal.signal(number, handle)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
