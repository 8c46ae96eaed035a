"""Attention in blocks of queries: the same results and gradients for less work, where columns are in order."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import sharding
from rljax.models import ModelConfig, attention, build, init_cache, kernels

SMALL = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=128,
)
GEMMA = dataclasses.replace(SMALL, windows=(9, 0), attention_softcap=2.0)
HOW = {"scale": 0.4, "softcap": None}


def rows(t: int, s: int, *, window: int = 0, seed: int = 0):
    """Queries of the last t of s columns, with packed documents and pads between, and how much each output counts."""
    rng = np.random.default_rng(seed)
    query, key, value, out = (rng.normal(size=(2, n, c, 8)) for n, c in ((4, t), (2, s), (2, s), (4, t)))
    segments = jnp.asarray(np.sort(rng.integers(1, 4, size=(2, s)), axis=1) * (rng.random((2, s)) > 0.1))
    queries = segments[:, s - t :]
    seen = attention.visible(queries, segments, s - t)
    at = attention.count_positions(attention.visible(segments, segments))
    bias = attention.biases((window,), seen, at[:, s - t :], at)[0]
    counts = jnp.asarray(out) * (queries > 0)[:, None, :, None]  # no token sees what a pad gets
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (query, key, value, bias, counts))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("t", "s", "window", "softcap", "blocks"),
    [(12, 12, 0, None, 3), (11, 11, 4, None, 4), (10, 17, 0, 2.0, 4), (3, 8, 0, None, 2), (7, 7, 0, None, 7)],
)
def test_blocks_change_nothing(t, s, window, softcap, blocks):
    query, key, value, bias, counts = rows(t, s, window=window)
    how = {"scale": 0.4, "softcap": softcap}

    def total(attend, *args):
        return jnp.sum(attend(*args, bias, **how) * counts)

    cut = functools.partial(attention.attend_in_blocks, blocks)
    args = query, key, value
    got, expected = (jax.value_and_grad(functools.partial(total, f), (0, 1, 2))(*args) for f in (cut, attention.attend))
    chex.assert_trees_all_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_block_does_not_read_later_columns():
    """NaN in a value comes through a weight of zero, too: it reaches its own block and later ones only."""
    query, key, value, bias, _ = rows(8, 8)
    value = value.at[:, :, 5].set(jnp.nan)
    got = attention.attend_in_blocks(4, query, key, value, bias, **HOW)
    assert [bool(jnp.isnan(got[:, :, i]).any()) for i in range(8)] == [False] * 4 + [True] * 4


def test_one_block_is_plain_attention():
    *args, _ = rows(6, 6)
    chex.assert_trees_all_equal(attention.attend_in_blocks(1, *args, **HOW), attention.attend(*args, **HOW))


def test_how_many_blocks():
    assert [kernels.blocks(queries) for queries in (1, 128, 255, 256, 400, 4096)] == [1, 1, 1, 2, 3, 4]
    context = sharding.make_mesh(context=2)
    with jax.set_mesh(context):  # each device has part of the queries: they are not cut again
        assert kernels.blocks(4096) == 1


@pytest.mark.slow
@pytest.mark.parametrize("config", [SMALL, GEMMA], ids=["llama", "gemma"])
def test_a_model_is_the_same_in_blocks_and_saves_work(config, monkeypatch):
    """Packed rows of 256 tokens: hidden states and gradients."""
    model = build(config)
    params = model.init(jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (2, 256), 0, config.vocab_size)
    segments = jnp.broadcast_to(1 + (jnp.arange(256) > 140), ids.shape).at[:, -5:].set(0)

    def measured():
        def loss(params):
            hidden = model.apply(params, ids, segments).hidden
            return jnp.where((segments > 0)[..., None], jnp.sin(hidden), 0).sum()

        compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        return compiled(params), compiled.cost_analysis()["flops"]

    got, flops = measured()
    monkeypatch.setattr(kernels, "blocks", lambda queries: 1)
    expected, plain = measured()
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-4)
    assert flops < 0.9 * plain


def test_a_cache_is_not_cut(monkeypatch):
    """Its slots do not end with the last query, so that there is less to save: a prompt of six in a cache of twelve."""
    model = build(SMALL)
    params = model.init(jax.random.key(0))
    monkeypatch.setattr(kernels, "blocks", lambda queries: pytest.fail(f"{queries} queries are cut"))
    ids = jnp.arange(6)[None]
    assert model.apply(params, ids, jnp.ones_like(ids), cache=init_cache(SMALL, 1, 12)).cache is not None
    with pytest.raises(pytest.fail.Exception, match="6 queries"):
        model.apply(params, ids, jnp.ones_like(ids))
