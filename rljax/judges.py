"""The rewards of a run at work: host rewards in the background, JAX rewards on the devices, one verdict of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from rljax import policy, rewards, sharding
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
    judges: Judges, source: Prompts, indices: Sequence[int] | np.ndarray, tokens: Tokens
) -> Callable[[], rewards.Scores]:
    """Set all rewards to work on completions, and return what waits for them: scores of this process's rows.

    indices: the data row of each of this process's rows. tokens: global arrays (or this process's, of one process).
    RewardError from the second for a reward that fails, that is not done in time, or that gives a NaN.
    """
    said = judges.on_device(rewards.device_params(judges.device), tokens) if judges.device else None
    here: Tokens = local(tokens, judges.mesh)
    mask = np.asarray(here.mask)
    host = _start_host(judges, source, indices, here) if judges.host else None

    def wait() -> rewards.Scores:
        nothing = rewards.Scores(np.full(len(mask), np.nan, np.float32), None, {})
        scores = nothing
        if host is not None:
            scores = host.result(timeout=judges.timeout, poll=judges.poll, say=judges.say)
        if said is None:
            return scores
        total, per_token, parts = local(said, judges.mesh)
        refuse_nan(parts, here, judges.tokenizer)
        return rewards.merge(scores, total, per_token, parts, mask, (*judges.host, *judges.device))

    return wait


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


def local(tree: Any, mesh: Mesh) -> Any:
    """This process's rows of global arrays, as numpy."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(
        lambda x: np.asarray(multihost_utils.global_array_to_host_local_array(x, mesh, P(sharding.ROWS))), tree
    )
