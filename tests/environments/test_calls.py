"""Calls that hang, raise, or are many: each ends alone."""

import sys
import threading
import time

import pytest

from rljax.environments import calls
from rljax.environments.calls import Failure, call_all


def test_results_keep_their_order():
    order, events = [], [threading.Event() for _ in range(4)]
    events[3].set()

    def late(i):  # each waits for the next, so they must run at the same time
        assert events[i + 1].wait(30)
        order.append(i)
        events[i].set()
        return i * i

    assert call_all([lambda i=i: late(i) for i in range(3)]) == [0, 1, 4]
    assert order == [2, 1, 0]
    assert call_all([]) == []


def test_what_raises_or_hangs_ends_alone():
    release = threading.Event()
    before = time.monotonic()
    found = call_all([lambda: 1 / 0, lambda: release.wait(30), sys.exit, lambda: "fine"], timeout=0.2)
    release.set()
    assert time.monotonic() - before < 5
    assert found[3] == "fine"
    assert found[0].reason.startswith("ZeroDivisionError: division by zero (test_calls.py:")
    assert found[1] == Failure("no answer within 0.2 seconds")
    assert found[2].reason.startswith("SystemExit")


def test_time_counts_from_the_start_of_each_call(monkeypatch):
    """With one thread at a time the last of five calls starts after 0.5 seconds, and is not late for that."""
    monkeypatch.setattr(calls, "AT_ONCE", 1)
    assert call_all([lambda: time.sleep(0.1) or "done"] * 5, timeout=0.4) == ["done"] * 5


def test_a_hanging_call_leaves_its_place(monkeypatch):
    monkeypatch.setattr(calls, "AT_ONCE", 2)
    release = threading.Event()
    found = call_all([release.wait, release.wait, *[lambda: 7] * 5], timeout=0.2)
    release.set()
    assert found[2:] == [7] * 5
    assert all(isinstance(one, Failure) for one in found[:2])


def test_poll_is_called_while_waiting_and_may_stop_it():
    release, polled = threading.Event(), []

    def poll():
        polled.append(time.monotonic())
        if len(polled) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_all([release.wait], poll=poll)
    release.set()
    assert 0.05 < polled[1] - polled[0] < 1


class Speechless(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def test_an_exception_that_cannot_say_what_it_is_ends_alone():
    def fails():
        raise Speechless

    found = call_all([fails, lambda: 7], timeout=5)
    assert found[0].reason.startswith("Speechless (its message cannot be shown) (test_calls.py:")
    assert found[1] == 7


def test_without_a_thread_a_call_fails_alone(monkeypatch):
    class Full(threading.Thread):
        def start(self):
            if self._args[0] == 1:  # pyright: ignore[reportAttributeAccessIssue]
                raise RuntimeError("can't start new thread")
            super().start()

    monkeypatch.setattr(calls.threading, "Thread", Full)
    assert call_all([lambda: 3] * 3) == [3, Failure("RuntimeError: can't start new thread"), 3]


def test_a_call_can_see_that_it_was_given_up():
    left = threading.Event()

    def patient():
        try:
            while True:
                calls.leave_if_given_up()
                time.sleep(0.01)
        finally:
            left.set()

    calls.leave_if_given_up()  # outside of a call there is nothing to leave
    assert call_all([patient], timeout=0.1) == [Failure("no answer within 0.1 seconds")]
    assert left.wait(5)
