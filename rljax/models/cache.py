"""The KV cache: keys and values of earlier tokens, written in place while a row grows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

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
    capacity: int = dataclasses.field(metadata={"static": True})  # how long rows may get: some ropes depend on it


def init_cache(
    config: ModelConfig, batch: int, length: int, dtype: str | None = None, *, capacity: int | None = None
) -> Cache:
    """An empty cache of `length` slots per row, in the compute dtype unless another is given.

    Writing past the end is not detected (the index is a traced value): give it prompt + new tokens. One that is
    lengthened later says up to how many slots: `capacity`.
    """
    shape = (batch, config.num_kv_heads, length, config.head_dim)
    layers = range(config.num_layers)
    return Cache(
        keys=tuple(jnp.zeros(shape, dtype or config.compute_dtype) for _ in layers),
        values=tuple(jnp.zeros(shape, dtype or config.compute_dtype) for _ in layers),
        segments=jnp.zeros((batch, length), jnp.int32),
        positions=jnp.zeros((batch, length), jnp.int32),
        index=jnp.zeros((), jnp.int32),
        capacity=length if capacity is None else capacity,
    )


def write(buffer: Array, new: Array, index: Array | int, axis: int) -> Array:
    """Put `new` into slots index, index + 1, … of a buffer."""
    return lax.dynamic_update_slice_in_dim(buffer, new.astype(buffer.dtype), index, axis)


def repeat_cache(cache: Cache, n: int) -> Cache:
    """Every row n times in a row (0 0 1 1 …): read a prompt once, sample it n times."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, n, axis=0) if leaf.ndim else leaf, cache)


def lengthen(cache: Cache) -> Cache:
    """The same rows with empty slots after those that there are, up to the capacity."""
    return _of_slots(cache, lambda x, axis: _pad(x, axis, cache.capacity))


def insert(cache: Cache, rows: Array, new: Cache) -> Cache:
    """Put the rows of a freshly filled cache in place of rows i32[r] of another, used as a ring.

    The last token of a new row gets the slot before `cache.index`, where the ring goes on: all rows are written at one
    index, however old they are. A row of the ring that has no more than `capacity` tokens in all overwrites none of
    them. From then on `index` has to be kept below the capacity (modulo), and tokens are written one at a time.
    """
    width = new.segments.shape[1]
    placed = _of_slots(new, lambda x, axis: jnp.roll(_pad(x, axis, cache.capacity), cache.index - width, axis))
    put = lambda old, leaf: old.at[rows].set(leaf, unique_indices=True) if old.ndim else old  # noqa: E731
    return jax.tree.map(put, cache, placed)


def _of_slots(cache: Cache, fn: Callable[[Array, int], Array]) -> Cache:
    """`fn` of every buffer and the axis of its slots."""
    return jax.tree.map(lambda leaf: fn(leaf, 2 if leaf.ndim == 4 else 1) if leaf.ndim else leaf, cache)


def _pad(x: Array, axis: int, length: int) -> Array:
    return jnp.pad(x, [(0, length - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])
