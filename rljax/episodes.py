"""An environment at work in a run: episodes from data rows, with the run's settings, and what went wrong in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import Array
from jax.sharding import Mesh

from rljax import data, decoding, hosts, settings
from rljax.data.rows import shown
from rljax.environments import play
from rljax.policy import Policy
from rljax.types import Rollout


class Played(NamedTuple):
    """Episodes, and what came of them."""

    rollout: Rollout
    rewards: np.ndarray  # f32[b t]; of tokens
    total: np.ndarray  # f32[b]; NaN for one that failed
    failure: str | None = None  # how the first of them failed, where all did


def of_rows(
    run: Any,
    now: Policy,
    rows: data.Rows,
    indices: Sequence[int] | np.ndarray,
    key: Array,
    *,
    seed: Sequence[int],
    width: int,
    mesh: Mesh,
    poll: Callable[[], None],
    say: Callable[[str], None],
    said: set[str],
    n: int = 1,
) -> Played:
    """n episodes of each of these rows; says how many failed, and why. Of several processes each plays a part, and all
    get everything.

    seed: numbers that set these episodes apart from all others; those of `seed` and of its neighbours share none.
    width: tokens of a prompt. said: what need not be said again.
    """
    part = hosts.share_of_known(len(indices))
    words = np.random.SeedSequence([part % 2**32 for part in seed]).generate_state(1)
    episodes = play(
        now,
        run.environment,
        [rows[int(indices[i])] for i in part.mine],
        key,
        max_new_tokens=run.max_completion if run.turn_tokens is None else run.turn_tokens,
        max_prompt=width,
        max_length=width + run.max_completion,
        n=n,
        sampling=dataclasses.asdict(settings.sampling(run, now.stop_ids, now.absent)),
        seed=int(words[0]),
        timeout=run.reward_timeout,
        poll=poll,
        mesh=mesh,
        numbers=part.mine,
    )
    _say_of_specials(now, episodes.rollout, say, said)
    failed = np.asarray([failure is not None for failure in episodes.failures], bool)
    total = np.where(failed, np.nan, episodes.rewards.sum(1)).astype(np.float32)
    each = hosts.grouped(part, n)
    rollout, rewards, total = hosts.exchange(each, (episodes.rollout, episodes.rewards, total))
    why = [
        f"number {each.mine[i]}: {failure}. Its row: {shown(rows[int(indices[each.mine[i] // n])], 200)}"
        for i, failure in enumerate(episodes.failures)
        if failure is not None
    ]
    reason = hosts.first_failure(why[0] if why else None)
    if reason is None:
        return Played(rollout, rewards, total)
    failure = f"{np.isnan(total).sum()} of {len(total)} episodes failed; {reason[1]}"
    say(failure)
    return Played(rollout, rewards, total, failure if np.isnan(total).all() else None)


def _say_of_specials(now: Policy, rollout: Rollout, say: Callable[[str], None], said: set[str]) -> None:
    """Say once that the text of actions is without special tokens which the policy writes."""
    if "special tokens" in said:
        return
    written = np.unique(np.asarray(rollout.tokens.ids)[np.asarray(rollout.tokens.mask)])
    found = decoding.specials(now.tokenizer, written[~np.isin(written, now.stop_ids)])
    if found:
        said.add("special tokens")
        say(
            f"actions hold the special tokens {', '.join(found[:5])}, which the text that the environment gets is "
            "without: its attribute raw has them"
        )
