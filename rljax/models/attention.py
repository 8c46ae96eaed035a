"""Who sees whom, and the attention itself."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

MASKED = -1e30  # finite: a query that sees nothing gets the mean of all values instead of NaN


def visible(queries: Array, keys: Array, start: int | Array | None = 0) -> Array:
    """bool[b t s]: same document, not later. `queries` i32[b t] and `keys` i32[b s] are segments; 0 sees nothing.

    Query i stands in slot `start + i` of the keys; None: no key is later than any query, wherever it stands.
    """
    same = (queries[:, :, None] == keys[:, None, :]) & (queries[:, :, None] > 0)
    if start is None:
        return same
    slots = start + jnp.arange(queries.shape[1])
    return same & (slots[:, None] >= jnp.arange(keys.shape[1])[None, :])[None]


def count_positions(seen: Array) -> Array:
    """i32[b t] from bool[b t s]: the number of earlier tokens of the same document, wherever the pads are."""
    return jnp.maximum(seen.sum(-1, dtype=jnp.int32) - 1, 0)


def biases(windows: tuple[int, ...], seen: Array, queries: Array, keys: Array) -> Array:
    """What is added to the scores, f32[n b 1 t s]: 0 or MASKED, for each of n windows (0: no limit).

    `queries` i32[b t] and `keys` i32[b s] are positions; a window of w tokens includes the query itself.
    """
    distance = queries[:, :, None] - keys[:, None, :]
    masks = [seen & (distance < window) if window else seen for window in windows]
    return jnp.where(jnp.stack(masks)[:, :, None], 0.0, MASKED)


def attend(query: Array, key: Array, value: Array, bias: Array, *, scale: float, softcap: float | None) -> Array:
    """softmax(softcap(scale · q kᵀ) + bias) v: query [b h t k], key and value [b g s k], bias [b 1 t s] -> [b h t k].

    The h/g query heads that share a key head are laid along its rows, so that grouped attention is one plain batched
    product over [b g] and keys are never repeated: the fastest form both for training and for decoding.
    Scores and softmax are float32.
    """
    b, h, t, k = query.shape
    g = key.shape[1]
    precision = exact(query.dtype)
    scores = jnp.einsum(
        "bgqk,bgsk->bgqs",
        query.reshape(b, g, (h // g) * t, k),
        key,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    scores = scores.reshape(b, h, t, -1) * scale
    if softcap is not None:
        scores = jnp.tanh(scores / softcap) * softcap
    weights = jax.nn.softmax(scores + bias, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bgqs,bgsk->bgqk", weights.reshape(b, g, (h // g) * t, -1), value, precision=precision)
    return mixed.reshape(b, h, t, k)


def exact(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Float32 means float32, also where the hardware would rather multiply in TF32 or bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
