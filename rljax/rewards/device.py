"""Rewards that are JAX functions, as part of a compiled program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from rljax import ops
from rljax.errors import UserError
from rljax.rewards.answers import LARGEST
from rljax.rewards.core import Reward, Scores, deciding
from rljax.types import Tokens


def device_params(rewards: Sequence[Reward]) -> tuple[Any, ...]:
    """The weights of on-device rewards, for `judge_on_device`: an argument of the program that calls it."""
    return tuple(one.params for one in rewards)


def judge_on_device(
    rewards: Sequence[Reward], params: Sequence[Any], tokens: Tokens
) -> tuple[Array, Array | None, dict[str, Array]]:
    """(total f32[b], per_token f32[b t] | None, parts {name: f32[b]}) of on-device rewards. Pure and jittable.

    params: one entry a reward (see `device_params`), passed in so that weights are not compiled in as constants.
    As in `Scores`: total is the weighted sum, per-token rewards with their sum over tokens.mask; per_token is weighted,
    and 0 where the mask is False; parts are unweighted. NaN is not looked for here: it goes into the total, where the
    caller finds it (`sound`).
    """
    b, t = tokens.ids.shape
    total, per_token, parts = jnp.zeros((b,), jnp.float32), None, {}
    for one, weights in zip(rewards, params, strict=True):
        said = ops.as_float(one.fn(tokens) if weights is None else one.fn(weights, tokens))
        if said.shape == (b, t):
            said = jnp.where(tokens.mask, said, 0.0)
            per_token = one.weight * said + (0.0 if per_token is None else per_token)
            said = jnp.sum(said, axis=1)
        if said.shape != (b,):
            raise UserError(
                f"the on-device reward {one.name} returned an array of shape {said.shape} for tokens of shape "
                f"{(b, t)}: return {(b,)}, one number a row, or {(b, t)}, one a token"
            )
        total, parts[one.name] = total + one.weight * said, said
    return total, per_token, parts


def sound(values: Any) -> Any:
    """bool[…]: numbers that means and variances of a batch can be made of; numpy or jax arrays."""
    return abs(values) <= LARGEST  # False for NaN


def merge(
    host: Scores,
    total: np.ndarray,
    per_token: np.ndarray | None,
    parts: Mapping[str, np.ndarray],
    mask: np.ndarray,
    rewards: Sequence[Reward] = (),
) -> Scores:
    """Host rewards, and what `judge_on_device` said of the same rows, as one verdict.

    total f32[b], per_token f32[b t] and parts are the device's, fetched; mask bool[b t] is that of the tokens. A row to
    which no host reward applies has the device's alone. rewards: all of them, host's and device's: where only host
    rewards have a weight, those on the device are monitors, which make no row one that is trained.
    """
    total = np.asarray(total)
    monitors = bool(rewards) and not any(one.on_device for one in deciding(rewards))
    alone = np.full_like(total, np.nan) if monitors else total
    both = np.where(np.isnan(host.total), alone, host.total + total).astype(np.float32)
    each = host.per_token
    if per_token is not None:
        there = [np.asarray(row, np.float32)[real] for row, real in zip(per_token, mask, strict=True)]
        each = there if each is None else [a + b for a, b in zip(each, there, strict=True)]
    return Scores(both, each, {**host.parts, **{name: np.asarray(part) for name, part in parts.items()}})
