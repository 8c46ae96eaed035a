"""What a model's logits say about tokens, without ever holding the logits of a whole batch.

The hidden states of the trained tokens are gathered, then unembedded a chunk of columns at a time; when there is more
than one chunk, each one's logits are rematerialised in the backward pass. A float32 `[b, t, v]` array is never alive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rljax import filters, ops, sharding
from rljax.errors import UserError
from rljax.filters import Sampling
from rljax.types import LanguageModel, Params, Tokens

CHUNK_ELEMENTS = 2**26  # logits alive at once on a device: 256 MiB in float32

PerToken = Callable[..., Any]  # (logits[b c v], ids[b c], *extras[b c]) -> pytree of [b c]; nothing is shifted any more


def token_logps(
    model: LanguageModel,
    params: Params,
    tokens: Tokens,
    *,
    temperature: float | Array = 1.0,
    sampling: Sampling | None = None,
    max_trained: int | None = None,
) -> Array:
    """f32[b t]: log-probability of every trained token given what precedes it; 0 at all other positions.

    Equals `ops.token_logps(model.unembed(params, hidden) / temperature, ids)` where `tokens.mask` holds.
    sampling: of the distribution that the sampler drew from under these settings, whose log-probabilities it returned;
      the tokens themselves are never cut (see `filters.filter_logits`, keep). Its temperature takes the place of
      `temperature`. Where it has a minimum length, a turn is a run of trained tokens without others between.
    """

    def logps(logits: Array, ids: Array) -> Array:
        return ops.aligned_logps(logits, ids)

    return _map(model, params, tokens, logps, temperature, sampling, max_trained)


def token_logps_and_entropy(
    model: LanguageModel,
    params: Params,
    tokens: Tokens,
    *,
    temperature: float | Array = 1.0,
    sampling: Sampling | None = None,
    max_trained: int | None = None,
) -> tuple[Array, Array]:
    """(f32[b t], f32[b t]): log-probability of every trained token, entropy of the distribution it was drawn from.

    The arguments are those of `token_logps`.
    """

    def both(logits: Array, ids: Array) -> tuple[Array, Array]:
        return ops.aligned_logps(logits, ids), ops.aligned_entropy(logits)

    return _map(model, params, tokens, both, temperature, sampling, max_trained)


def _map(
    model: LanguageModel,
    params: Params,
    tokens: Tokens,
    per_token: PerToken,
    temperature: float | Array,
    sampling: Sampling | None,
    max_trained: int | None,
) -> Any:
    """`map_logits` of the logits that are left after `sampling`, or of those divided by the temperature."""
    if sampling is not None:
        if not isinstance(temperature, int | float) or temperature != 1:
            raise UserError(
                f"temperature is {temperature}, but sampling has its own ({sampling.temperature}): give one of them"
            )
        if not filters.cuts(sampling):
            temperature = sampling.temperature
    if sampling is None or not filters.cuts(sampling):
        return map_logits(model, params, tokens, per_token, temperature=temperature, max_trained=max_trained)

    @jax.checkpoint  # the backward pass keeps the logits as they came, not what each filter left of them
    def filtered(logits: Array, ids: Array, place: Array | None = None) -> Any:
        return per_token(filters.distribution(logits, sampling, place=place, keep=ids), ids)

    extras = (turn_places(tokens.mask),) if filters.has_minimum(sampling) else ()
    return map_logits(model, params, tokens, filtered, extras=extras, max_trained=max_trained)


def turn_places(mask: Array) -> Array:
    """i32[b t] from bool[b t]: how many trained tokens stand before each trained one in its turn, a run of them.

    0 where the mask is False. Two turns with no token between them count as one.
    """
    column = jnp.broadcast_to(jnp.arange(mask.shape[1], dtype=jnp.int32), mask.shape)
    before = jax.lax.cummax(jnp.where(mask, -1, column), axis=1)  # the last untrained column so far
    return jnp.where(mask, column - before - 1, 0)


def map_logits(
    model: LanguageModel,
    params: Params,
    tokens: Tokens,
    per_token: PerToken,
    *,
    temperature: float | Array = 1.0,
    extras: tuple[Array, ...] = (),
    max_trained: int | None = None,
    chunk: int | None = None,
) -> Any:
    """Apply `per_token` to the logits that predict each trained token; results are [b t], 0 where the mask is False.

    extras: [b t] arrays that describe tokens; `per_token` gets their values for its tokens after the ids.

    max_trained: a static bound on the trained tokens of a row (completions have a maximum length); the rest of the row
      is not unembedded. Rows that break the bound lose their last tokens, so the data layer guarantees it.
    chunk: columns unembedded at once; None keeps `CHUNK_ELEMENTS` logits alive.
    """
    hidden = model.apply(params, tokens.ids, tokens.segments).hidden
    hidden, mask, positions, per = _trained_columns(hidden, tokens, extras, max_trained)
    rows, columns = mask.shape
    if chunk is None:
        chunk = max(
            1, CHUNK_ELEMENTS * sharding.ways_here((*sharding.ROWS, "tensor")) // (rows * model.config.vocab_size)
        )

    def unembed(hidden: Array, *per: Array) -> Any:
        return per_token(model.unembed(params, hidden) / temperature, *per)

    if chunk >= columns:
        values = unembed(hidden, *per)
    else:
        values = _in_chunks(jax.checkpoint(unembed), (hidden, *per), chunk)

    def place(value: Array) -> Array:
        out = jnp.zeros(tokens.ids.shape, value.dtype)
        return out.at[jnp.arange(rows)[:, None], positions].set(jnp.where(mask, value, 0))

    return jax.tree.map(place, values)


def _trained_columns(
    hidden: Array, tokens: Tokens, extras: tuple[Array, ...], max_trained: int | None
) -> tuple[Array, Array, Array, tuple[Array, ...]]:
    """(hidden, mask, positions, (ids, *extras)), each [b n …]: the state that predicts each token beside that token.

    This is where hidden states meet the tokens that they predict: the token at position p belongs to the state at
    p - 1.
    With a bound below the row's length the trained tokens come first, in order, and n is the bound.
    """
    rows, length = tokens.ids.shape
    source = jnp.broadcast_to(jnp.arange(length - 1), (rows, length - 1))
    per = tuple(x[:, 1:] for x in (tokens.ids, *extras))
    if max_trained is None or max_trained >= length - 1:
        return hidden[:, :-1], tokens.mask[:, 1:], source + 1, per
    source = jnp.argsort(~tokens.mask[:, 1:], axis=1, stable=True)[:, :max_trained]
    mask, *per = (jnp.take_along_axis(x, source, axis=1) for x in (tokens.mask[:, 1:], *per))
    return jnp.take_along_axis(hidden, source[:, :, None], axis=1), mask, source + 1, tuple(per)


def _in_chunks(fn: PerToken, arrays: tuple[Array, ...], chunk: int) -> Any:
    """Scan `fn` over column chunks of arrays [b n …], padded up to a whole number of chunks and cut back."""
    rows, columns = arrays[0].shape[:2]
    count = -(-columns // chunk)

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, count * chunk - columns), *((0, 0),) * (x.ndim - 2)))
        return x.reshape(rows, count, chunk, *x.shape[2:]).swapaxes(0, 1)

    _, values = jax.lax.scan(lambda carry, xs: (carry, fn(*xs)), None, tuple(map(split, arrays)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows, -1)[:, :columns], values)
