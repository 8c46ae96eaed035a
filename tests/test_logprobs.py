"""Log-probabilities in chunks and only where trained: equal to the plain formula, in value, gradient and memory."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import filters, logprobs, ops
from rljax.filters import Sampling
from rljax.types import Tokens
from tests import tiny


def plain(params, tokens, temperature=1.0):
    hidden = tiny.model().apply(params, tokens.ids, tokens.segments).hidden
    logits = tiny.model().unembed(params, hidden) / temperature
    return jnp.where(tokens.mask, ops.token_logps(logits, tokens.ids), 0.0)


def chunked(params, tokens, **kwargs):
    return logprobs.map_logits(tiny.model(), params, tokens, ops.aligned_logps, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [None, 1, 4, 5, 100])
@pytest.mark.parametrize("max_trained", [None, 11])
def test_equals_the_plain_formula(chunk, max_trained):
    """With a table, in which a token's row is its hidden state: attention is behind both."""
    tokens, model, params = tiny.tokens(empty=(2,)), tiny.bigram(), tiny.bigram_params()

    def written_out(params):
        logps = jnp.where(tokens.mask, ops.token_logps(params["table"][tokens.ids], tokens.ids), 0.0)
        return jnp.sum(jnp.sin(logps)), logps

    def in_chunks(params):
        how = {"chunk": chunk, "max_trained": max_trained}
        logps = logprobs.map_logits(model, params, tokens, ops.aligned_logps, **how)
        return jnp.sum(jnp.sin(logps)), logps

    got, expected = (jax.jit(jax.value_and_grad(f, has_aux=True))(params) for f in (in_chunks, written_out))
    chex.assert_trees_all_close(got, expected, atol=2e-5)


@pytest.mark.slow
def test_compaction_keeps_scattered_trained_tokens():
    """Tool tokens between sampled ones: the trained tokens of a row need not be next to each other."""
    tokens = tiny.tokens(rows=4, length=10)
    mask = np.zeros((4, 10), bool)
    mask[0, [1, 4, 9]] = mask[1, [2, 3]] = mask[3, [9]] = True
    segments = jnp.ones((4, 10), jnp.int32)
    tokens = Tokens(ids=tokens.ids, segments=segments, mask=jnp.asarray(mask))
    got = chunked(tiny.params(), tokens, max_trained=3, chunk=2)
    np.testing.assert_allclose(got, plain(tiny.params(), tokens), atol=1e-5)


@pytest.mark.slow
def test_temperature_divides_logits():
    tokens = tiny.tokens()
    got = logprobs.token_logps(tiny.model(), tiny.params(), tokens, temperature=0.7)
    np.testing.assert_allclose(got, plain(tiny.params(), tokens, 0.7), atol=1e-5)


def test_entropy_in_the_same_pass():
    tokens = tiny.tokens()
    logps, entropy = logprobs.token_logps_and_entropy(tiny.model(), tiny.params(), tokens)
    hidden = tiny.model().apply(tiny.params(), tokens.ids, tokens.segments).hidden
    expected = jnp.where(tokens.mask, ops.entropy(tiny.model().unembed(tiny.params(), hidden)), 0.0)
    np.testing.assert_allclose(entropy, expected, atol=1e-5)
    np.testing.assert_allclose(logps, plain(tiny.params(), tokens), atol=1e-5)


@pytest.mark.slow
def test_padding_contents_and_companions_do_not_matter():
    tokens = tiny.tokens(rows=4)
    expected = chunked(tiny.params(), tokens)
    garbage = Tokens(ids=jnp.where(tokens.segments > 0, tokens.ids, 60), segments=tokens.segments, mask=tokens.mask)
    np.testing.assert_array_equal(chunked(tiny.params(), garbage), expected)
    alone = jax.tree.map(lambda x: x[2:3], tokens)
    np.testing.assert_allclose(chunked(tiny.params(), alone), expected[2:3], atol=1e-5)
    left = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (5, 0))), tokens)
    np.testing.assert_allclose(chunked(tiny.params(), left)[:, 5:], expected, atol=1e-5)


def test_no_float32_logits_of_the_whole_batch():
    """Neither the forward nor the backward pass holds an array of all positions by the vocabulary."""
    tokens = tiny.tokens(rows=8, length=12)
    loss = lambda p: jnp.sum(chunked(p, tokens, chunk=3))  # noqa: E731
    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(tiny.params()))
    assert "f32[8,3,61]" in jaxpr
    assert "8,12,61]" not in jaxpr
    assert "8,11,61]" not in jaxpr
    assert "4,8,3,61]" not in jaxpr  # chunks stacked for the backward pass would be the same array again


EVERYTHING = Sampling(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05, min_new_tokens=2, stop_ids=(3, 5, 8))


def filtered(params, tokens, sampling):
    """(log-probability, entropy) of the filtered distribution, from the logits of all positions at once."""
    logits = tiny.model().unembed(params, tiny.model().apply(params, tokens.ids, tokens.segments).hidden)[:, :-1]
    place, ids = logprobs.turn_places(tokens.mask)[:, 1:], tokens.ids[:, 1:]
    left = filters.distribution(logits, sampling, place=place, keep=ids)
    both = ops.aligned_logps(left, ids), ops.aligned_entropy(left)
    return [jnp.where(tokens.mask, jnp.pad(x, ((0, 0), (1, 0))), 0.0) for x in both]


@pytest.mark.slow
@pytest.mark.parametrize("max_trained", [None, 11])
def test_of_the_distribution_that_was_sampled_from(max_trained):
    tokens = tiny.tokens(empty=(2,))
    fn = jax.jit(
        lambda p: logprobs.token_logps_and_entropy(
            tiny.model(), p, tokens, sampling=EVERYTHING, max_trained=max_trained
        )
    )
    logps, entropy = fn(tiny.params())
    expected = filtered(tiny.params(), tokens, EVERYTHING)
    np.testing.assert_allclose(logps, expected[0], atol=1e-5)
    np.testing.assert_allclose(entropy, expected[1], atol=1e-5)
    assert float(jnp.abs(logps - plain(tiny.params(), tokens, 0.7)).max()) > 0.1  # the filters did something


@pytest.mark.slow
def test_random_tokens_would_be_cut_and_have_finite_gradients():
    """Tokens that the sampler cannot have drawn: kept, so neither value nor gradient is anything but a number."""
    tokens = tiny.tokens(empty=(2,))
    loss = lambda p: jnp.sum(logprobs.token_logps(tiny.model(), p, tokens, sampling=EVERYTHING))  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(loss))(tiny.params())
    expected, slope = jax.jit(jax.value_and_grad(lambda p: jnp.sum(filtered(p, tokens, EVERYTHING)[0])))(tiny.params())
    assert np.isfinite(value)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    chex.assert_trees_all_close(gradient, slope, atol=1e-4)


def test_turns_are_runs_of_trained_tokens():
    mask = jnp.asarray([[0, 1, 1, 1, 0, 0, 1, 1], [1, 1, 0, 1, 0, 0, 0, 0], [0] * 8], bool)
    places = [[0, 0, 1, 2, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0, 0, 0], [0] * 8]
    assert logprobs.turn_places(mask).tolist() == places


def test_a_temperature_alone_costs_nothing_else():
    """The program under `Sampling(temperature=T)` is the one under `temperature=T`."""
    tokens = tiny.tokens()
    jaxpr = lambda **kwargs: str(  # noqa: E731
        jax.make_jaxpr(lambda p: logprobs.token_logps(tiny.model(), p, tokens, **kwargs))(tiny.params())
    )
    assert jaxpr(sampling=Sampling(temperature=0.7, stop_ids=(1,))) == jaxpr(temperature=0.7)
    with pytest.raises(ValueError, match=r"temperature is 0.5, but sampling has its own \(0.7\)"):
        logprobs.token_logps(tiny.model(), tiny.params(), tokens, temperature=0.5, sampling=Sampling(temperature=0.7))


def test_filters_hold_no_logits_of_the_whole_batch(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 3 * 8 * 61)
    tokens = tiny.tokens(rows=8, length=12)
    loss = lambda p: jnp.sum(logprobs.token_logps(tiny.model(), p, tokens, sampling=EVERYTHING))  # noqa: E731
    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(tiny.params()))
    assert "f32[8,3,61]" in jaxpr
    for whole in ("8,12,61]", "8,11,61]", "4,8,3,61]"):
        assert whole not in jaxpr


@pytest.mark.slow
def test_what_else_describes_a_token_arrives_with_it():
    """Extra arrays are gathered and cut into chunks as the ids are."""
    tokens = tiny.tokens(empty=(2,))
    column = jnp.broadcast_to(jnp.arange(12), (8, 12))
    per_token = lambda logits, ids, at, twice: (ids, at, twice)  # noqa: E731
    for max_trained in (None, 11):
        for chunk in (None, 4):
            got = logprobs.map_logits(
                tiny.model(),
                tiny.params(),
                tokens,
                per_token,
                extras=(column, 2 * column),
                max_trained=max_trained,
                chunk=chunk,
            )
            for found, expected in zip(got, (tokens.ids, column, 2 * column), strict=True):
                np.testing.assert_array_equal(found, jnp.where(tokens.mask, expected, 0))
