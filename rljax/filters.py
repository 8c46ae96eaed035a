"""Which tokens may be drawn: temperature, top-k, top-p, min-p and a minimum length, as one transform of the logits.

The sampler draws from it and the trainer recomputes log-probabilities under it: one function, so that they agree.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TypeGuard

import jax
import jax.numpy as jnp
from jax import Array, lax

from rljax.errors import UserError
from rljax.ops import as_float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn, as static numbers: hashable, so that `jit` can be specialised to it.

    The fields are keyword arguments of `sampling.generate`: `generate(..., **dataclasses.asdict(sampling))`.
    temperature: logits are divided by it; 0 is greedy. top_k: how many of the likeliest tokens remain. top_p: the
      smallest set of likeliest tokens whose probability reaches it remains (Holtzman et al. 2020, arXiv:1904.09751).
      min_p: tokens less likely than this fraction of the likeliest one go (Nguyen et al. 2024, arXiv:2407.01082).
    min_new_tokens: none of `stop_ids` is drawn before so many tokens of a turn have been.
    absent: ranges (first, behind the last) of ids that no token has, as rows that only pad an embedding: never drawn.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    min_new_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    absent: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        check(**dataclasses.asdict(self))


def check(
    *,
    temperature: float | Array,
    top_k: int | None,
    top_p: float | Array | None,
    min_p: float | Array | None,
    min_new_tokens: int,
    stop_ids: tuple[int, ...],
    absent: tuple[tuple[int, int], ...] = (),
) -> None:
    """Raise UserError for a setting that no distribution has; traced numbers pass."""
    if _known(temperature) and not 0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature}: logits are divided by it, so give 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}: at least 1 token must be left to draw; None keeps all")
    if _known(top_p) and not 0 < top_p <= 1:
        raise UserError(
            f"top_p is {top_p}, the probability that the tokens which may be drawn reach together: give a number above "
            "0 and at most 1 (top_k=1 leaves the likeliest token alone), or None to cut nothing"
        )
    if _known(min_p) and not 0 <= min_p <= 1:
        raise UserError(f"min_p is {min_p}, and it is a probability: give 0 to 1, or None to cut nothing")
    if min_new_tokens < 0:
        raise UserError(f"min_new_tokens is {min_new_tokens}: give 0 or more")
    if any(not 0 <= first < end for first, end in absent):
        raise UserError(f"absent is {absent}: give ranges (first, behind the last) of ids")
    if any(token < 0 for token in stop_ids):
        raise UserError(f"stop_ids are {stop_ids}, and token ids are 0 or more: leave the negative ones out")


def cuts(sampling: Sampling) -> bool:
    """Whether anything but a temperature is applied: else log-probabilities are those of logits / temperature."""
    s = sampling
    return s.temperature == 0 or (s.top_k, s.top_p, s.min_p) != (None, None, None) or has_minimum(s) or bool(s.absent)


def has_minimum(sampling: Sampling) -> bool:
    """Whether a token's place in its turn decides what may be drawn there."""
    return sampling.min_new_tokens > 0 and bool(sampling.stop_ids)


def distribution(logits: Array, sampling: Sampling, *, place: Array | None = None, keep: Array | None = None) -> Array:
    """`filter_logits` of logits [… v] under these settings.

    place: i32[…], how many tokens of its turn precede the one that is drawn; needed where there is a minimum length.
    """
    s, forbidden = sampling, without_token(sampling.absent, logits.shape[-1])
    if has_minimum(s):
        if place is None:
            raise UserError(
                f"min_new_tokens={s.min_new_tokens} depends on the place of a token in its turn: give place"
            )
        early = forbid(place < s.min_new_tokens, s.stop_ids, logits.shape[-1])
        forbidden = early if forbidden is None else early | lax.expand_dims(forbidden, range(early.ndim - 1))
    elif forbidden is not None:
        forbidden = lax.expand_dims(forbidden, range(logits.ndim - 1))
    return filter_logits(
        logits, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, min_p=s.min_p, forbidden=forbidden, keep=keep
    )


def forbid(early: Array, stop_ids: tuple[int, ...], vocab: int) -> Array:
    """bool[… v]: the stop tokens, where `early` (bool[…]) holds."""
    stops = jnp.zeros(vocab, bool).at[jnp.asarray(stop_ids, jnp.int32)].set(True)
    return early[..., None] & lax.expand_dims(stops, range(early.ndim))


def without_token(absent: tuple[tuple[int, int], ...], vocab: int) -> Array | None:
    """bool[v]: the ids that no token has; None where every id has one."""
    ids = jnp.arange(vocab)
    parts = [(ids >= first) & (ids < end) for first, end in absent]
    return functools.reduce(jnp.logical_or, parts) if parts else None


def filter_logits(
    logits: Array,
    *,
    temperature: float | Array = 1.0,
    top_k: int | None = None,
    top_p: float | Array | None = None,
    min_p: float | Array | None = None,
    forbidden: Array | None = None,
    keep: Array | None = None,
) -> Array:
    """Logits [… v] of the distribution that tokens are drawn from, float32 at least; what is cut is -inf.

    In this order: `forbidden` (bool[… v]) goes; division by the temperature, where 0 leaves the likeliest token alone;
    top-k; top-p of what is left; min-p. Ties at a border stay all. `Sampling` says what each number means.

    keep: ids i32[…] that are never cut. A trainer passes the tokens that were drawn: under newer weights, or by
      another rounding, one of them can fall below a border, where its log-probability would be -inf and the ratio of
      policies worth nothing. Kept, it is finite, and unchanged wherever the token was not cut anyway.
    """
    logits = as_float(logits)
    greedy = temperature == 0
    divisor = (1.0 if greedy else temperature) if _known(temperature) else jnp.where(greedy, 1.0, temperature)
    scaled = logits / divisor
    left = scaled if forbidden is None else jnp.where(forbidden, -jnp.inf, scaled)
    left = cut(left, top_k=top_k, top_p=top_p, min_p=min_p)
    if not _known(temperature) or greedy:
        best = _is(jnp.argmax(left, axis=-1), left)
        left = jnp.where(best if _known(temperature) else best | ~greedy, left, -jnp.inf)
    return left if keep is None else jnp.where(_is(keep, left), scaled, left)


def cut(
    logits: Array, *, top_k: int | None = None, top_p: float | Array | None = None, min_p: float | Array | None = None
) -> Array:
    """The part of `filter_logits` that follows the temperature."""
    if top_k is not None and top_k < logits.shape[-1]:
        logits = jnp.where(_likeliest(logits, jnp.ones_like(logits), top_k), logits, -jnp.inf)
    if top_p is not None and not (_known(top_p) and top_p >= 1):
        x = lax.stop_gradient(logits)
        logits = jnp.where(_likeliest(x, jax.nn.softmax(x, axis=-1), top_p), logits, -jnp.inf)
    if min_p is not None:
        border = jnp.max(lax.stop_gradient(logits), axis=-1, keepdims=True) + jnp.log(min_p)
        logits = jnp.where(logits >= border, logits, -jnp.inf)
    return logits


def _likeliest(logits: Array, weights: Array, target: float | Array) -> Array:
    """bool[… v]: the smallest set of largest logits whose weights sum to the target; never empty, with ties at its end.

    The border is found by halving the range of floats 32 times, a sum each: sorting a vocabulary takes many times
    longer, and sums are all that a vocabulary split over devices has to exchange.
    """
    order = _ordered(lax.stop_gradient(logits))

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # what is at least `low` reaches the target, what is above `high` does not
        middle = (low | high) - ((low ^ high) >> 1)  # their mean, rounded up; a sum could overflow
        reached = jnp.sum(jnp.where(order >= middle, weights, 0.0), axis=-1, keepdims=True) >= target
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle - 1)

    high = jnp.max(order, axis=-1, keepdims=True)
    low = jnp.full_like(high, jnp.iinfo(order.dtype).min)
    low, _ = lax.fori_loop(0, jnp.iinfo(order.dtype).bits, halve, (low, high))
    return order >= low


def _ordered(x: Array) -> Array:
    """Floats as integers of the same size and in the same order."""
    bits = lax.bitcast_convert_type(x, jnp.int64 if x.dtype == jnp.float64 else jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)


def _is(ids: Array, logits: Array) -> Array:
    """bool[… v]: the one token of ids […]."""
    return ids[..., None] == lax.broadcasted_iota(ids.dtype, logits.shape, logits.ndim - 1)


def _known(value: float | Array | None) -> TypeGuard[float | int]:
    """A number now, as opposed to one that is traced (or None)."""
    return isinstance(value, int | float)
