"""Rotary positions: the angle of every position, and how models stretch them for long contexts."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from rljax.models.config import ModelConfig, Rope


def frequencies(rope: Rope, dim: int, length: int) -> np.ndarray:
    """Radians per position of each rotated pair: f32[dim/2]. `length` is the number of slots in a row.

    default     θ^(−2i/dim)                                       RoFormer, 2104.09864
    linear      default / factor                                  Position interpolation, 2306.15595
    llama3      slow waves / factor, fast ones kept, a ramp between them      Llama 3.1's reference code
    yarn        the same idea with the ramp over dimensions                   YaRN, 2309.00071
    longrope    default / a factor per dimension: the long ones where a row has more than `original_max_positions`
                slots, else the short ones                                    LongRoPE, 2402.13753

    The choice of longrope's factors is made from the shape of the row (of the cache, when there is one), so a row
    gets the same ones from its first token to its last: `transformers` switches in the middle of a generation. In a
    run it is made once, from its longest row (`ModelConfig.longest_row`), so that sampler and trainer have the same.
    """
    inverse = rope.theta ** (-np.arange(0, dim, 2) / dim)
    match rope.kind:
        case "linear":
            inverse = inverse / rope.factor
        case "llama3":
            inverse = _llama3(rope, inverse)
        case "yarn":
            inverse = _yarn(rope, inverse, dim)
        case "longrope":
            long = length > rope.original_max_positions
            inverse = inverse / np.asarray(rope.long_factor if long else rope.short_factor)
    return inverse.astype(np.float32)


def _llama3(rope: Rope, inverse: np.ndarray) -> np.ndarray:
    turns = rope.original_max_positions * inverse / (2 * math.pi)  # in the original context
    keep = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
    return inverse * (keep + (1 - keep) / rope.factor)


def _yarn(rope: Rope, inverse: np.ndarray, dim: int) -> np.ndarray:
    def pair_with(turns: float) -> float:
        """Which pair (a real number) makes this many turns in the original context."""
        return dim * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    return inverse * ((1 - ramp) + ramp / rope.factor)


def tables(config: ModelConfig, positions: Array, length: int) -> tuple[Array, Array]:
    """Cosines and sines f32[n b 1 t r/2] for positions i32[b t], one table for each of the model's n ropes."""
    dim = config.rotary_dim or config.head_dim
    inverse = np.stack([frequencies(rope, dim, config.longest_row or length) for rope in config.ropes])
    factor = np.asarray([rope.attention_factor for rope in config.ropes], np.float32)[:, None, None, None, None]
    angles = positions.astype(jnp.float32)[None, :, None, :, None] * inverse[:, None, None, None, :]
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotate the first r dimensions of x[b h t k], pairing dimension i with i + r/2 ("rotate half"), in float32."""
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
