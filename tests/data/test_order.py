"""Batches are pure functions of (seed, step) and do not depend on how many hosts read them."""

import itertools
import threading
import time

import numpy as np
import pytest

from rljax import data


def batch(step, *, n=10, size=4, seed=0, here=None):
    return data.indices(n, batch=size, seed=seed, step=step, here=here).tolist()


def test_every_epoch_visits_every_row_once_in_another_order():
    stream = list(itertools.chain.from_iterable(batch(step) for step in range(15)))  # six epochs; batches span epochs
    epochs = [stream[e * 10 : (e + 1) * 10] for e in range(6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_a_batch_does_not_depend_on_what_was_read_before():
    forwards = {step: batch(step) for step in range(20)}
    backwards = {step: batch(step) for step in reversed(range(20))}
    assert forwards == backwards
    assert batch(1_000_003) == batch(1_000_003)


def test_neighbouring_seeds_share_no_epoch():
    epochs = [tuple(batch(e, n=50, size=50, seed=seed)) for seed in (0, 1, 2, 2**40) for e in range(5)]
    assert len(set(epochs)) == 20
    with pytest.raises(ValueError, match="non-negative"):
        batch(0, seed=-1)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_read_shares_of_one_batch(processes):
    for step in (0, 2, 17):
        places = np.split(np.arange(8), processes)
        shares = [batch(step, size=8, here=here) for here in places]
        assert all(len(share) == 8 // processes for share in shares)
        assert list(itertools.chain.from_iterable(shares)) == batch(step, size=8)
        apart = batch(step, size=8, here=np.asarray([1, 2, 7]))  # a mesh may give a process any of the places
        assert apart == [batch(step, size=8)[place] for place in (1, 2, 7)]


def test_small_data_sets():
    assert batch(5, n=1, size=3) == [0, 0, 0]
    assert sorted(batch(0, n=3, size=6)) == [0, 0, 1, 1, 2, 2]


def test_refusals():
    with pytest.raises(ValueError, match="at least 1"):
        batch(0, n=0)


def test_batches():
    here = np.asarray([2, 3])
    batches = data.Batches(lambda rows: {"rows": rows}, 10, batch=4, seed=0, here=here)
    assert batches(7)["rows"].tolist() == batch(7)[2:] == batch(7, here=here)
    assert data.Batches(list, 10, batch=4, seed=0)(7) == batch(7)  # without places, all of them


def test_eval_batches_cover_everything_once_in_one_shape():
    assert [part.tolist() for part in data.eval_batches(5, 4)] == [[0, 1, 2, 3], [4, -1, -1, -1]]
    assert len(data.eval_batches(8, 4)) == 2
    shares = [data.eval_batches(5, 4, here) for here in np.split(np.arange(4), 2)]
    assert [[part.tolist() for part in share] for share in shares] == [[[0, 1], [4, -1]], [[2, 3], [-1, -1]]]


# --- prefetch ---------------------------------------------------------------------------------------------------------


def workers():
    return [thread for thread in threading.enumerate() if thread.name == "rljax-prefetch" and thread.is_alive()]


def test_prefetch_gives_the_steps_in_order():
    assert list(data.prefetch(lambda step: step * step, 3, 7)) == [(3, 9), (4, 16), (5, 25), (6, 36)]
    assert list(data.prefetch(lambda step: step, 3, 3)) == []
    assert not workers()


def test_prefetch_runs_ahead_but_not_far():
    made = []
    stream = data.prefetch(lambda step: made.append(step), 0, 100, ahead=2)
    next(stream)
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.15)
    assert made == [0, 1, 2, 3]  # the one taken, two ready, one waiting for room
    stream.close()
    assert not workers()


def test_prefetch_raises_at_the_step():
    def bad(step):
        if step == 2:
            raise ValueError("pairs.jsonl:3: bad row")
        return step

    seen = []
    with pytest.raises(ValueError, match="jsonl:3: bad row"):
        seen.extend(step for step, _ in data.prefetch(bad, 0, 9))
    with pytest.raises(ValueError, match="ahead"):
        next(data.prefetch(bad, 0, 9, ahead=0))
    assert not workers()


def test_prefetch_stops_when_the_loop_is_left():
    def loop():
        for step, _ in data.prefetch(np.zeros, 1, 10**9):
            if step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop()
    assert not workers()
