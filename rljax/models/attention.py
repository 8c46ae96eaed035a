"""Who sees whom, and the attention itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

MASKED = -1e30  # finite: a query that sees nothing gets the mean of all values instead of NaN


class Sight(NamedTuple):
    """Who sees whom in rows of tokens. Query i stands in column s − t + i of the keys, but for a cache's."""

    queries: Array  # i32[b t]; segments
    keys: Array  # i32[b s]; segments
    bias: Array | None  # f32[windows b 1 t s], see `biases`; None where a kernel needs none, see `kernels`


Attend = Callable[[Array, Array, Array, Sight], Array]  # (query [b h t k], key [b g s k], value, sight) -> [b h t k]


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


def attend_in_blocks(
    blocks: int, query: Array, key: Array, value: Array, bias: Array, *, scale: float, softcap: float | None
) -> Array:
    """`attend` for queries that see no column later than their own, where query i stands in column s − t + i.

    They are cut into so many blocks, and none looks at the columns after its last: of t scores for each of t queries,
    n blocks compute (n + 1) / 2n.
    """
    t, s = query.shape[2], key.shape[2]

    def block(start: int, stop: int) -> Array:
        last = s - t + stop
        rows, seen = slice(start, stop), (slice(None), slice(None), slice(last))
        return attend(query[:, :, rows], key[seen], value[seen], bias[:, :, rows, :last], scale=scale, softcap=softcap)

    bounds = [t * i // blocks for i in range(blocks + 1)]
    return jnp.concatenate([block(*ends) for ends in itertools.pairwise(bounds)], axis=2)


def attend_shared(attend: Attend, query: Array, key: Array, value: Array, sights: tuple[Sight, Sight]) -> Array:
    """Attention in rows of a prompt and n completions, [b · p+n·m ·]: each completion sees the prompt and itself.

    sights: of the prompts, with queries [b p], and of the completions, with queries [b·n m] and keys [b·n p+m].
    """
    (rows, prompt), (many, _) = sights[0].queries.shape, sights[1].queries.shape
    n = many // rows

    def beginning(x: Array) -> Array:
        return x[:, :, :prompt]

    def completions(x: Array) -> Array:
        """[b h p+n·m k] -> [b·n h m k]"""
        b, h, _, k = x.shape
        return jnp.swapaxes(x[:, :, prompt:].reshape(b, h, n, -1, k), 1, 2).reshape(b * n, h, -1, k)

    def whole(x: Array) -> Array:
        """[b g p+n·m k] -> [b·n g p+m k]"""
        return jnp.concatenate([jnp.repeat(beginning(x), n, axis=0), completions(x)], axis=2)

    first = attend(beginning(query), beginning(key), beginning(value), sights[0])
    rest = attend(completions(query), whole(key), whole(value), sights[1])
    b, h, _, k = query.shape
    rest = jnp.swapaxes(rest.reshape(b, n, h, -1, k), 1, 2).reshape(b, h, -1, k)
    return jnp.concatenate([first, rest], axis=2)


def exact(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Float32 means float32, also where the hardware would rather multiply in TF32 or bfloat16."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
