"""The rewards of a run at work: host rewards in the background, JAX rewards on the devices, one verdict of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rljax import hosts, policy, rewards
from rljax.prompts import Prompts
from rljax.types import Tokens


class Leaving(Exception):
    """A signal came while the run waited for rewards."""


class Judges(NamedTuple):
    """All that it takes to judge a batch."""

    host: tuple[rewards.Reward, ...]
    device: tuple[rewards.Reward, ...]
    on_device: Callable[[Any, Tokens], Any]  # jitted `judge_on_device` of the device's rewards
    tokenizer: Any
    mesh: Mesh
    timeout: float | None  # seconds
    poll: Callable[[], None]  # raises to stop waiting
    say: Callable[[str], None]


def make(
    asked: Sequence[rewards.Reward],
    *,
    tokenizer: Any,
    mesh: Mesh,
    timeout: float | None,
    stop: Any,
    say: Callable[[str], None],
) -> Judges:
    """stop: what `tracking.graceful_stop` gives: once it is requested, nobody waits any longer."""
    device = tuple(one for one in asked if one.on_device)

    def poll() -> None:
        if stop.requested is not None and jax.process_count() == 1:  # of several processes none may leave alone
            raise Leaving

    return Judges(
        host=tuple(one for one in asked if not one.on_device),
        device=device,
        on_device=jax.jit(lambda params, tokens: rewards.judge_on_device(device, params, tokens)),
        tokenizer=tokenizer,
        mesh=mesh,
        timeout=timeout,
        poll=poll,
        say=say,
    )


def start(
    judges: Judges, source: Prompts, indices: Sequence[int] | np.ndarray, tokens: Tokens, part: hosts.Share
) -> Callable[[], rewards.Scores]:
    """Set all rewards to work on completions, and return what waits for them: scores of the rows that are here.

    part: which rows are here, and which of them this process judges. indices: the data row of each row that is here.
    tokens: of a batch, global arrays; or in numpy, those that all processes have.
    RewardError from the second for a reward that fails, that is not done in time, or that gives a NaN; of several
    processes all raise it, as a `hosts.AgreedError`.
    """
    said = judges.on_device(rewards.device_params(judges.device), tokens) if judges.device else None
    here: Tokens = hosts.local(tokens, judges.mesh)
    mine = np.searchsorted(part.here, part.mine)
    own = jax.tree.map(lambda x: np.asarray(x)[mine], here)
    host = _start_host(judges, source, np.asarray(indices)[mine], own) if judges.host and len(mine) else None

    def answer() -> rewards.Scores:
        if host is None:
            return _no_scores(judges, len(mine))
        return host.result(timeout=judges.timeout, poll=judges.poll, say=judges.say)

    def wait() -> rewards.Scores:
        mask = np.asarray(here.mask)
        scores = _no_scores(judges, len(mask))
        if judges.host:
            scores = _of_all(part, hosts.together(answer), own.mask, mask)
        if said is None:
            return scores
        known = isinstance(tokens.ids, np.ndarray)
        total, per_token, parts = hosts.whole(said) if known else hosts.local(said, judges.mesh)
        hosts.together(lambda: refuse_nan(parts, here, judges.tokenizer))
        return rewards.merge(scores, total, per_token, parts, mask, (*judges.host, *judges.device))

    return wait


def _no_scores(judges: Judges, rows: int) -> rewards.Scores:
    nothing = np.full(rows, np.nan, np.float32)
    return rewards.Scores(nothing, None, {one.name: nothing for one in judges.host})


def _of_all(part: hosts.Share, scores: rewards.Scores, judged: np.ndarray, mask: np.ndarray) -> rewards.Scores:
    """Scores of the rows that this process judges (masks `judged`) -> of all its rows (masks `mask`)."""
    if part.apart:
        return scores
    total, parts = hosts.exchange(part, (scores.total, scores.parts))
    (some,) = hosts.most(scores.per_token is not None)
    if not some:
        return rewards.Scores(total, None, parts)
    dense = hosts.exchange(part, on_tokens(scores.per_token, judged))
    return rewards.Scores(total, [row[where] for row, where in zip(dense, mask, strict=True)], parts)


def on_tokens(per_token: Sequence[np.ndarray] | None, mask: np.ndarray) -> np.ndarray:
    """f32[b t]: rewards of single tokens where their tokens stand, 0 elsewhere and where there are none."""
    found = np.zeros(mask.shape, np.float32)
    for i, said in enumerate(per_token or ()):
        found[i, mask[i]] = said
    return found


def _start_host(
    judges: Judges, source: Prompts, indices: Sequence[int] | np.ndarray, tokens: Tokens
) -> rewards.Judgement:
    some = [source.rows[int(i)] for i in indices]
    return rewards.start(
        judges.host,
        [row["prompt"] for row in some],
        policy.decode(judges.tokenizer, tokens),
        fields={name: [row.get(name) for row in some] for name in source.fields},
        prompt_ids=[source.ids(int(i)) for i in indices],
        completion_ids=[row[where] for row, where in zip(np.asarray(tokens.ids), np.asarray(tokens.mask), strict=True)],
    )


def refuse_nan(parts: Mapping[str, np.ndarray], tokens: Tokens, tokenizer: Any, when: str = "") -> None:
    """RewardError where a JAX reward gave something that is not a finite number. All on the host."""
    for name, values in parts.items():
        for row in np.flatnonzero(~np.isfinite(values))[:1]:
            ids, mask = np.asarray(tokens.ids)[row], np.asarray(tokens.mask)[row]
            before = (np.asarray(tokens.segments)[row] > 0) & (np.cumsum(mask) == 0)
            raise rewards.RewardError(
                f"the reward {name} failed in row {row}{when}: it returned {values[row]}. Row {row}: prompt "
                f"{tokenizer.decode(ids[before])!r}, completion {tokenizer.decode(ids[mask])!r}"
            )
