"""Scalar heads: values at every token, scores at the last."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rljax.models import ModelConfig, build, reward_model, scalar_head
from rljax.types import Tokens

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=16,
)


def tokens(ids, segments):
    segments = jnp.asarray(segments)
    return Tokens(ids=jnp.asarray(ids), segments=segments, mask=segments > 0)


def test_head_is_linear_in_float32():
    head = scalar_head(3)
    params = {"kernel": jnp.array([1.0, 2.0, 3.0]), "bias": jnp.array(0.5)}
    got = head.apply(params, jnp.array([[1, 0, 0], [1, 1, 1]], jnp.bfloat16))
    assert got.dtype == jnp.float32
    assert got.tolist() == [1.5, 6.5]


def test_initial_head():
    params = scalar_head(4095).init(jax.random.key(0))
    assert params["kernel"].shape == (4095,)
    assert params["bias"].shape == ()
    assert params["bias"] == 0
    np.testing.assert_allclose(params["kernel"].std(), 1 / 64, rtol=0.05)


def test_scores_are_the_values_at_the_last_token():
    """Right, left and middle pads, a packed row, a row of pads; pad ids do not matter."""
    model = reward_model(build(CONFIG))
    params = model.init(jax.random.key(0))
    params["head"]["bias"] = jnp.array(2.0)
    segments = [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 0, 1, 1, 0], [1, 1, 2, 2, 2], [0, 0, 0, 0, 0]]
    ids = [[5, 6, 7, 9, 9], [9, 9, 5, 6, 7], [5, 9, 6, 7, 9], [3, 4, 5, 6, 7], [5, 6, 7, 8, 9]]
    batch = tokens(ids, segments)
    scorer = jax.jit(model.scores)
    values, scores = jax.jit(model.values)(params, batch), scorer(params, batch)
    assert values.shape == (5, 5)
    np.testing.assert_allclose(scores[:4], [values[0, 2], values[1, 4], values[2, 3], values[3, 4]], atol=1e-6)
    np.testing.assert_allclose(scores[:4], scores[0], atol=1e-5)  # the same document 5 6 7 in each
    assert scores[4] == 0
    assert not values[batch.segments == 0].any()
    other = tokens(jnp.where(batch.segments > 0, batch.ids, 0), segments)
    np.testing.assert_array_equal(scorer(params, other), scores)


def test_gradient_is_finite_for_empty_rows():
    model = reward_model(build(dataclasses.replace(CONFIG, compute_dtype="bfloat16")))
    params = model.init(jax.random.key(0))
    batch = tokens(jnp.ones((2, 3), jnp.int32), [[1, 1, 0], [0, 0, 0]])
    gradient = jax.jit(jax.grad(lambda p: model.scores(p, batch).sum()))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert gradient["head"]["bias"] == 1
