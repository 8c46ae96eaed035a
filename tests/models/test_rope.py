"""Rotary positions against numbers computed by hand."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models import ModelConfig, Rope
from rljax.models.rope import frequencies, rotate, tables

BASE = Rope(theta=10_000.0)  # with dim 8: 1, 0.1, 0.01, 0.001 radians per position


def scaled(**change):
    return frequencies(dataclasses.replace(BASE, **change), dim=8, length=100)


def test_default_and_linear():
    np.testing.assert_allclose(scaled(), [1, 0.1, 0.01, 0.001], rtol=1e-6)
    np.testing.assert_allclose(scaled(kind="linear", factor=4.0), [0.25, 0.025, 0.0025, 0.00025], rtol=1e-6)


def test_llama3():
    """In 2000π positions the pairs turn 1000, 100, 10 and 1 times. From 4 turns on: kept; below 1: divided by 8."""
    original = round(2000 * np.pi)
    got = scaled(kind="llama3", factor=8.0, original_max_positions=original, low_freq_factor=1.0, high_freq_factor=4.0)
    np.testing.assert_allclose(got, [1, 0.1, 0.01, 0.001 / 8], rtol=1e-3)
    # between 1 and 19 turns, 10 turns are in the middle: half kept, half divided
    got = scaled(kind="llama3", factor=8.0, original_max_positions=original, low_freq_factor=1.0, high_freq_factor=19.0)
    np.testing.assert_allclose(got[2], 0.01 * (0.5 + 0.5 / 8), rtol=1e-4)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn(truncate):
    """The pair (a real number) that turns n times in 2000π positions is 8 · ln(1000/n) / (2 · ln 10⁴) = log₁₀(1000/n).

    The correction range of 10 and 1 turns is thus 2 … 3, and of 32 and 1 turns 1.495 … 3, truncated 1 … 3.
    """
    original = 2000 * np.pi
    got = scaled(kind="yarn", factor=4.0, original_max_positions=original, beta_fast=10.0, truncate=False)
    np.testing.assert_allclose(got, [1, 0.1, 0.01, 0.001 / 4], rtol=1e-5)
    got = scaled(kind="yarn", factor=4.0, original_max_positions=original - 1e-6, truncate=truncate)
    low = 1.0 if truncate else np.log10(1000 / 32)
    ramp = (2 - low) / (3 - low)
    np.testing.assert_allclose(got, [1, 0.1, 0.01 * (1 - ramp + ramp / 4), 0.001 / 4], rtol=1e-5)


def test_longrope_chooses_by_the_length_of_the_row():
    rope = Rope(kind="longrope", original_max_positions=16, short_factor=(1.0, 2.0), long_factor=(4.0, 8.0))
    np.testing.assert_allclose(frequencies(rope, 4, length=16), [1, 0.01 / 2], rtol=1e-6)
    np.testing.assert_allclose(frequencies(rope, 4, length=17), [1 / 4, 0.01 / 8], rtol=1e-6)


def test_rotate_half():
    """Dimension i is paired with i + r/2, and what is beyond r stays as it is."""
    quarter = jnp.full((1, 1, 1, 2), np.pi / 2, jnp.float32).at[..., 1].set(0)
    x = jnp.arange(1.0, 7.0).reshape(1, 1, 1, 6)
    got = rotate(x, jnp.cos(quarter), jnp.sin(quarter))
    np.testing.assert_allclose(got[0, 0, 0], [-3, 2, 1, 4, 5, 6], atol=1e-6)


def test_tables_hold_every_rope():
    config = ModelConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        rotary_dim=4,
        max_positions=8,
        ropes=(
            Rope(theta=100.0),
            Rope(theta=100.0, kind="yarn", factor=1.0, original_max_positions=8, attention_factor=2.0),
        ),
    )
    cos, sin = tables(config, jnp.array([[0, 3]]), length=2)
    assert cos.shape == sin.shape == (2, 1, 1, 2, 2)
    np.testing.assert_allclose(cos[0, 0, 0], [[1, 1], [np.cos(3), np.cos(0.3)]], rtol=1e-6)
    np.testing.assert_allclose(sin[1, 0, 0], [[0, 0], [2 * np.sin(3), 2 * np.sin(0.3)]], rtol=1e-6)


def test_scores_depend_on_distance_only():
    random = np.random.default_rng(0)
    query, key = (jnp.asarray(random.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def turned(x, position):
        angles = position * frequencies(BASE, 8, 1)[None, None, None]
        return rotate(x, jnp.cos(angles), jnp.sin(angles))

    scores = [float((turned(query, 5 + shift) * turned(key, 2 + shift)).sum()) for shift in (0, 1, 50)]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-4)
