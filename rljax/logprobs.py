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

from rljax import ops
from rljax.types import LanguageModel, Params, Tokens

CHUNK_ELEMENTS = 2**26  # logits alive at once, all devices together: 256 MiB in float32

PerToken = Callable[[Array, Array], Any]  # (logits[b c v], ids[b c]) -> pytree of [b c]; nothing is shifted any more


def token_logps(
    model: LanguageModel,
    params: Params,
    tokens: Tokens,
    *,
    temperature: float = 1.0,
    max_trained: int | None = None,
) -> Array:
    """f32[b t]: log-probability of every trained token given what precedes it; 0 at all other positions.

    Equals `ops.token_logps(model.unembed(params, hidden) / temperature, ids)` where `tokens.mask` holds.
    """
    return map_logits(model, params, tokens, ops.aligned_logps, temperature=temperature, max_trained=max_trained)


def token_logps_and_entropy(
    model: LanguageModel,
    params: Params,
    tokens: Tokens,
    *,
    temperature: float = 1.0,
    max_trained: int | None = None,
) -> tuple[Array, Array]:
    """(f32[b t], f32[b t]): log-probability of every trained token, entropy of the distribution it was drawn from."""

    def both(logits: Array, ids: Array) -> tuple[Array, Array]:
        return ops.aligned_logps(logits, ids), ops.aligned_entropy(logits)

    return map_logits(model, params, tokens, both, temperature=temperature, max_trained=max_trained)


def map_logits(
    model: LanguageModel,
    params: Params,
    tokens: Tokens,
    per_token: PerToken,
    *,
    temperature: float = 1.0,
    max_trained: int | None = None,
    chunk: int | None = None,
) -> Any:
    """Apply `per_token` to the logits that predict each trained token; results are [b t], 0 where the mask is False.

    max_trained: a static bound on the trained tokens of a row (completions have a maximum length); the rest of the row
      is not unembedded. Rows that break the bound lose their last tokens, so the data layer guarantees it.
    chunk: columns unembedded at once; None keeps `CHUNK_ELEMENTS` logits alive.
    """
    hidden = model.apply(params, tokens.ids, tokens.segments).hidden
    hidden, ids, mask, positions = _trained_columns(hidden, tokens, max_trained)
    rows, columns = ids.shape
    if chunk is None:
        chunk = max(1, CHUNK_ELEMENTS // (rows * model.config.vocab_size))

    def unembed(hidden: Array, ids: Array) -> Any:
        return per_token(model.unembed(params, hidden) / temperature, ids)

    if chunk >= columns:
        values = unembed(hidden, ids)
    else:
        values = _in_chunks(jax.checkpoint(unembed), hidden, ids, chunk)

    def place(value: Array) -> Array:
        out = jnp.zeros(tokens.ids.shape, value.dtype)
        return out.at[jnp.arange(rows)[:, None], positions].set(jnp.where(mask, value, 0))

    return jax.tree.map(place, values)


def _trained_columns(hidden: Array, tokens: Tokens, max_trained: int | None) -> tuple[Array, Array, Array, Array]:
    """(hidden, ids, mask, positions), each [b n …]: the state that predicts each token beside that token.

    This is where hidden states meet the tokens that they predict: the token at position p belongs to the state at p -
      1.
    With a bound below the row's length the trained tokens come first, in order, and n is the bound.
    """
    rows, length = tokens.ids.shape
    source = jnp.broadcast_to(jnp.arange(length - 1), (rows, length - 1))
    if max_trained is None or max_trained >= length - 1:
        return hidden[:, :-1], tokens.ids[:, 1:], tokens.mask[:, 1:], source + 1
    source = jnp.argsort(~tokens.mask[:, 1:], axis=1, stable=True)[:, :max_trained]
    ids, mask = (jnp.take_along_axis(x[:, 1:], source, axis=1) for x in (tokens.ids, tokens.mask))
    return jnp.take_along_axis(hidden, source[:, :, None], axis=1), ids, mask, source + 1


def _in_chunks(fn: PerToken, hidden: Array, ids: Array, chunk: int) -> Any:
    """Scan `fn` over column chunks; the columns are padded up to a whole number of chunks and cut back."""
    rows, columns = ids.shape
    count = -(-columns // chunk)
    pad = count * chunk - columns
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(rows, count, chunk, -1).swapaxes(0, 1)
    ids = jnp.pad(ids, ((0, 0), (0, pad))).reshape(rows, count, chunk).swapaxes(0, 1)
    _, values = jax.lax.scan(lambda carry, xs: (carry, fn(*xs)), None, (hidden, ids))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows, -1)[:, :columns], values)
