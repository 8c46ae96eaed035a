"""The KV cache: keys and values of earlier tokens, written in place while a row grows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from rljax.models.config import ModelConfig
from rljax.types import pytree


@pytree
class Cache:
    """One pair of buffers per layer, so that a compiled loop updates each of them in place."""

    keys: tuple[Array, ...]  # per layer [b g s k]: s slots, rotated already
    values: tuple[Array, ...]  # per layer [b g s k]
    segments: Array  # i32[b s]; 0 is an empty slot or a pad
    positions: Array  # i32[b s]
    index: Array  # i32[]; the next slot


def init_cache(config: ModelConfig, batch: int, length: int, dtype: str | None = None) -> Cache:
    """An empty cache of `length` slots per row, in the compute dtype unless another is given.

    Writing past the end is not detected (the index is a traced value): give it prompt + new tokens.
    """
    shape = (batch, config.num_kv_heads, length, config.head_dim)
    layers = range(config.num_layers)
    return Cache(
        keys=tuple(jnp.zeros(shape, dtype or config.compute_dtype) for _ in layers),
        values=tuple(jnp.zeros(shape, dtype or config.compute_dtype) for _ in layers),
        segments=jnp.zeros((batch, length), jnp.int32),
        positions=jnp.zeros((batch, length), jnp.int32),
        index=jnp.zeros((), jnp.int32),
    )


def write(buffer: Array, new: Array, index: Array | int, axis: int) -> Array:
    """Put `new` into slots index, index + 1, … of a buffer."""
    return lax.dynamic_update_slice_in_dim(buffer, new.astype(buffer.dtype), index, axis)


def repeat_cache(cache: Cache, n: int) -> Cache:
    """Every row n times in a row (0 0 1 1 …): read a prompt once, sample it n times."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, n, axis=0) if leaf.ndim else leaf, cache)
