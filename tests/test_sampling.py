"""The sampler: greedy equals the uncached model, its log-probabilities equal the trainer's, rows stand alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import logprobs, sampling
from rljax.types import Tokens
from tests import tiny

GENERATE = functools.partial(sampling.generate, tiny.model(), max_new_tokens=6)


def prompts(rows: int = 4, width: int = 5, *, side: str = "left") -> Tokens:
    """Prompts of 2 to `width` tokens, padded on one side."""
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 61, (rows, width)).astype(np.int32)
    length = np.arange(rows)[:, None] % (width - 1) + 2
    column = np.arange(width)[None]
    real = column >= width - length if side == "left" else column < length
    return Tokens(
        ids=jnp.asarray(ids), segments=jnp.asarray(real.astype(np.int32)), mask=jnp.zeros((rows, width), bool)
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_equals_the_uncached_model(side):
    """Every greedy token is the argmax of a full forward pass over everything before it."""
    rollout = GENERATE(tiny.params(), prompts(side=side), jax.random.key(0), temperature=0.0)
    tokens = rollout.tokens
    logits = tiny.model().unembed(tiny.params(), tiny.model().apply(tiny.params(), tokens.ids, tokens.segments).hidden)
    for row in range(4):
        real = np.flatnonzero(tokens.segments[row])
        for at, previous in zip(real[1:], real[:-1], strict=True):
            if tokens.mask[row, at]:
                assert int(tokens.ids[row, at]) == int(jnp.argmax(logits[row, previous]))
    assert float(jnp.abs(rollout.logps).max()) == 0.0  # a certain choice has log-probability 0
    assert int(tokens.mask.sum()) == 24


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_are_those_that_the_trainer_computes(temperature):
    """TRAPS 20, 22: also at T ≠ 1; left-padded so that the trained tokens follow their predecessors."""
    rollout = GENERATE(tiny.params(), prompts(), jax.random.key(1), temperature=temperature)
    trained = logprobs.token_logps(tiny.model(), tiny.params(), rollout.tokens, temperature=temperature)
    np.testing.assert_allclose(rollout.logps, trained, atol=1e-5)


def test_a_row_does_not_depend_on_its_companions():
    whole = GENERATE(tiny.params(), prompts(), jax.random.key(2))
    empty = jax.tree.map(lambda x: x.at[1:].set(jnp.zeros((), x.dtype)), prompts())
    alone = GENERATE(tiny.params(), empty, jax.random.key(2))
    np.testing.assert_array_equal(whole.tokens.ids[0], alone.tokens.ids[0])
    assert not alone.tokens.mask[1:].any()
    assert not alone.finished[1:].any()


def test_stop_tokens_end_rows_and_are_trained_once():
    free = GENERATE(tiny.params(), prompts(), jax.random.key(4))
    stops = (int(free.tokens.ids[0, 5]), int(free.tokens.ids[1, 7]))  # row 0 stops at once, row 1 at its third
    rollout = GENERATE(tiny.params(), prompts(), jax.random.key(4), stop_ids=stops)
    new = np.asarray(rollout.tokens.ids)[:, 5:], np.asarray(rollout.tokens.mask)[:, 5:]
    assert bool(rollout.finished[0])
    assert bool(rollout.finished[1])
    assert new[1][0].tolist() == [True] + [False] * 5
    for ids, mask in zip(*new, strict=True):
        stopped = np.isin(ids, stops) & mask
        assert stopped.sum() <= 1
        if stopped.any():
            assert not mask[np.argmax(stopped) + 1 :].any()
    assert not (np.asarray(rollout.tokens.segments)[:, 5:] > 0)[~new[1]].any()


def test_one_new_token_and_a_refused_budget():
    rollout = sampling.generate(tiny.model(), tiny.params(), prompts(), jax.random.key(0), max_new_tokens=1)
    assert rollout.tokens.ids.shape == (4, 6)
    assert int(rollout.tokens.mask.sum()) == 4
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        sampling.generate(tiny.model(), tiny.params(), prompts(), jax.random.key(0), max_new_tokens=0)


def test_filters_by_hand():
    """p = (.5, .3, .15, .05): top-k and top-p keep the likeliest and renormalise; the first to reach top_p is kept."""
    logits = jnp.log(jnp.asarray([[0.15, 0.5, 0.05, 0.3]]))
    kept = lambda **kwargs: jax.nn.softmax(sampling.filter_logits(logits, **kwargs))[0].tolist()  # noqa: E731
    assert kept(top_k=2) == pytest.approx([0, 0.625, 0, 0.375])
    assert kept(top_p=0.75) == pytest.approx([0, 0.625, 0, 0.375])
    assert kept(top_p=0.5) == pytest.approx([0, 1, 0, 0])
    assert kept(top_p=0.0) == pytest.approx([0, 1, 0, 0])
    assert kept(top_p=1.0) == pytest.approx([0.15, 0.5, 0.05, 0.3])
    assert kept(temperature=0.5) == pytest.approx(np.square([0.15, 0.5, 0.05, 0.3]) / 0.365)
    assert kept(temperature=0.0) == pytest.approx([0, 1, 0, 0])
    assert kept(top_k=100) == pytest.approx([0.15, 0.5, 0.05, 0.3])


def test_samples_follow_the_distribution():
    """Frequencies of the first token over many rows match the model's probabilities."""
    one = jax.tree.map(lambda x: jnp.repeat(x[:1], 4000, axis=0), prompts())
    rollout = sampling.generate(tiny.model(), tiny.params(), one, jax.random.key(5), max_new_tokens=1)
    tokens = jax.tree.map(lambda x: x[:1], prompts())
    hidden = tiny.model().apply(tiny.params(), tokens.ids, tokens.segments).hidden[:, -1]
    p = jax.nn.softmax(tiny.model().unembed(tiny.params(), hidden))[0]
    found = np.bincount(np.asarray(rollout.tokens.ids[:, -1]), minlength=61) / 4000
    np.testing.assert_allclose(found, p, atol=0.03)
