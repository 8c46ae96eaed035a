"""An environment at work in a run: episodes from data rows, with the run's settings, and what went wrong in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from rljax import data, settings
from rljax.environments import Episodes, play
from rljax.policy import Policy


def of_rows(
    run: Any,
    now: Policy,
    rows: Sequence[data.Row],
    key: Array,
    *,
    seed: Sequence[int],
    width: int,
    mesh: Mesh,
    poll: Callable[[], None],
    say: Callable[[str], None],
    n: int = 1,
) -> tuple[Episodes, np.ndarray]:
    """(n episodes of each row, their rewards f32[b], NaN for one that failed); says how many failed, and why.

    seed: numbers that set these episodes apart from all others; those of `seed` and of its neighbours share none.
    width: tokens of a prompt.
    """
    process = jax.process_index()
    words = np.random.SeedSequence([part % 2**32 for part in (*seed, process)]).generate_state(1)
    episodes = play(
        now,
        run.environment,
        rows,
        jax.random.fold_in(key, process),
        max_new_tokens=run.turn_tokens or run.max_completion,
        max_prompt=width,
        max_length=width + run.max_completion,
        n=n,
        sampling=dataclasses.asdict(settings.sampling(run, now.stop_ids)),
        seed=int(words[0]),
        timeout=run.reward_timeout,
        poll=poll,
        mesh=mesh,
    )
    failed = [i for i, failure in enumerate(episodes.failures) if failure is not None]
    if failed:
        why = episodes.failures[failed[0]]
        say(f"{len(failed)} of {len(episodes.failures)} episodes failed; number {failed[0]}: {why}")
    total = np.where([failure is None for failure in episodes.failures], episodes.rewards.sum(1), np.nan)
    return episodes, total.astype(np.float32)
