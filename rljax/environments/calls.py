"""Calls to code that may hang or raise: each in a daemon thread of its own, with a time limit of its own."""

from __future__ import annotations

import os
import queue
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rljax.rewards.core import described

AT_ONCE = 128  # threads; a call that was given up no longer counts
TICK = 0.1  # seconds between two polls

Answers = queue.SimpleQueue[tuple[int, Any]]
_HERE = threading.local()  # .given_up, in the thread of a call: an Event


class Failure(NamedTuple):
    reason: str


class _Running(NamedTuple):
    start: float
    given_up: threading.Event


def call_all(
    calls: Sequence[Callable[[], Any]], *, timeout: float | None = None, poll: Callable[[], None] | None = None
) -> list[Any]:
    """What each call returns, or a Failure for one that raises or takes longer than `timeout` seconds.

    A thread cannot be stopped: one that hangs is left behind, and what it returns later is not looked at. Code that
    waits in small steps may ask `leave_if_given_up` in between.
    poll: called about ten times a second while waiting; it raises to stop.
    """
    outcomes: list[Any] = [None] * len(calls)
    answers: Answers = queue.SimpleQueue()
    started: dict[int, _Running] = {}
    waiting, polled = list(range(len(calls)))[::-1], time.monotonic()
    while waiting or started:
        while waiting and len(started) < AT_ONCE:
            index = waiting.pop()
            started[index] = _Running(time.monotonic(), threading.Event())
            _start(index, calls[index], answers, started[index].given_up)
        for index, outcome in _arrived(answers, _patience(started, timeout)):
            if started.pop(index, None) is not None:  # else it was given up before
                outcomes[index] = outcome
        now = time.monotonic()
        for index in [i for i, one in started.items() if timeout is not None and now - one.start >= timeout]:
            started.pop(index).given_up.set()
            outcomes[index] = Failure(f"no answer within {timeout:g} seconds")
        if poll is not None and now - polled >= TICK:
            polled = now
            poll()
    return outcomes


def leave_if_given_up() -> None:
    """Raise TimeoutError in a call that nobody waits for any more."""
    if hasattr(_HERE, "given_up") and _HERE.given_up.is_set():
        raise TimeoutError("the call was given up")


def _start(index: int, call: Callable[[], Any], answers: Answers, given_up: threading.Event) -> None:
    try:
        threading.Thread(target=_call, args=(index, call, answers, given_up), daemon=True).start()
    except RuntimeError as error:  # the system has no thread left
        answers.put((index, Failure(described(error))))


def _call(index: int, call: Callable[[], Any], answers: Answers, given_up: threading.Event) -> None:
    _HERE.given_up = given_up
    try:
        answers.put((index, call()))
    except BaseException as error:  # SystemExit too: whatever it is, it ends this call and nothing else
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{os.path.basename(frame.filename)}:{frame.lineno}"
        answers.put((index, Failure(f"{described(error)} ({place})")))


def _arrived(answers: Answers, patience: float) -> list[tuple[int, Any]]:
    """Everything that has arrived, after waiting for something to."""
    found = []
    try:
        found.append(answers.get(timeout=patience))
        while True:
            found.append(answers.get_nowait())
    except queue.Empty:
        return found


def _patience(started: dict[int, _Running], timeout: float | None) -> float:
    """Seconds to wait for the next answer: a tick, or less where a call is about to be late."""
    if timeout is None or not started:
        return TICK
    return min(TICK, max(0.0, min(one.start for one in started.values()) + timeout - time.monotonic()))
