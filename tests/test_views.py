"""What parameters say of tokens: the same numbers from every layout of a run's parameters, as they would be sampled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import filters, models, views
from rljax.filters import Sampling
from tests import tiny

FILTERS = Sampling(temperature=0.7, top_k=20, top_p=0.9, min_p=0.01)


def head():
    return models.scalar_head(16).init(jax.random.key(5)) | {"bias": jnp.asarray(0.5)}


def test_one_tree_or_a_policy_within_it():
    params = tiny.params()
    assert views.decoder_params(params) is params
    assert views.decoder_params({"policy": params, "head": head()}) is params
    assert views.decoder_params({"policy": params, "critic": {"model": params, "head": head()}}) is params


@pytest.fixture(scope="module")
def looks():
    """Three ways to look at the same rows with the same policy."""
    tokens, model, params = tiny.tokens(empty=(3,)), tiny.model(), tiny.params()
    critic = {"model": tiny.params(1), "head": head()}
    settings = {"sampling": FILTERS, "max_trained": 11, "entropy": True}
    return tokens, {
        "alone": jax.jit(views.of_policy(model, **settings))(params, tokens),
        "critic": jax.jit(views.with_critic(model, model, **settings))({"policy": params, "critic": critic}, tokens),
        "head": jax.jit(views.with_value_head(model, **settings))({"policy": params, "head": head()}, tokens),
    }


@pytest.mark.slow
def test_log_probabilities_and_entropies_are_those_of_the_filtered_distribution(looks):
    tokens, found = looks
    hidden = tiny.model().apply(tiny.params(), tokens.ids, tokens.segments).hidden
    logits = tiny.model().unembed(tiny.params(), hidden)[:, :-1]
    # a sampled token is never cut; here they are any tokens, so keep them by hand
    left = filters.distribution(logits, FILTERS, keep=tokens.ids[:, 1:])
    logps = np.asarray(jax.nn.log_softmax(left))
    mask = np.asarray(tokens.mask)[:, 1:]
    own = np.where(mask, np.take_along_axis(logps, np.asarray(tokens.ids)[:, 1:, None], axis=2)[:, :, 0], 0)
    possible = np.where(np.isfinite(logps), logps, 0)
    entropy = np.where(mask, -np.sum(np.exp(logps) * possible, axis=2), 0)
    for look in found.values():
        np.testing.assert_allclose(look.logps[:, 1:], own, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(look.entropy[:, 1:], entropy, rtol=1e-4, atol=1e-4)
        assert not np.asarray(look.logps)[:, 0].any()
    assert found["alone"].values is None


def test_values_are_those_before_each_token(looks):
    tokens, found = looks
    mask = np.asarray(tokens.mask)
    for name, params in (("head", tiny.params()), ("critic", tiny.params(1))):
        hidden = np.asarray(tiny.model().apply(params, tokens.ids, tokens.segments).hidden)
        said = hidden @ np.asarray(head()["kernel"]) + 0.5
        expected = np.where(mask, np.pad(said, ((0, 0), (1, 0)))[:, :-1], 0)
        np.testing.assert_allclose(found[name].values, expected, rtol=1e-4, atol=1e-4)


def test_a_value_knows_nothing_of_its_token():
    """Another token t, and others after it: the value of t stays, that of t + 1 does not."""
    tokens = tiny.tokens(2, 12, seed=4)
    row = int(np.argmax(np.asarray(tokens.mask).sum(1)))
    at = int(np.flatnonzero(np.asarray(tokens.mask)[row])[1])
    changed = jax.tree.map(lambda x: x, tokens)
    changed = type(tokens)(
        ids=tokens.ids.at[row, at:].set((tokens.ids[row, at:] + 7) % 61), segments=tokens.segments, mask=tokens.mask
    )
    params = {"policy": tiny.params(), "head": head()}
    look = jax.jit(views.values(tiny.model()))
    one, other = np.asarray(look(params, tokens)), np.asarray(look(params, changed))
    np.testing.assert_allclose(one[row, : at + 1], other[row, : at + 1], atol=1e-6)
    assert abs(one[row, at + 1] - other[row, at + 1]) > 1e-3
