"""The transform of logits that sampler and trainer share: by hand, against a sorted list, and through its gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import filters, logprobs, ops, policy, sampling
from rljax.filters import Sampling, filter_logits
from tests import tiny

P = (0.15, 0.5, 0.05, 0.3)
LOGITS = jnp.log(jnp.asarray([P]))


def left(logits=LOGITS, **kwargs) -> list[float]:
    """Probabilities of the first row after filtering."""
    return jax.nn.softmax(filter_logits(logits, **kwargs))[0].tolist()


def test_filters_by_hand():
    """p = (.5, .3, .15, .05): top-k and top-p keep the likeliest and renormalise; the first to reach top_p is kept."""
    assert sampling.filter_logits is filter_logits
    assert left() == pytest.approx(P)
    assert left(top_k=2) == pytest.approx([0, 0.625, 0, 0.375])
    assert left(top_k=100) == pytest.approx(P)
    assert left(top_p=0.75) == pytest.approx([0, 0.625, 0, 0.375])
    assert left(top_p=0.5) == pytest.approx([0, 1, 0, 0])
    assert left(top_p=0.0) == pytest.approx([0, 1, 0, 0])
    assert left(top_p=1.0) == pytest.approx(P)
    assert left(temperature=0.5) == pytest.approx(np.square(P) / 0.365)
    assert left(temperature=0.0) == pytest.approx([0, 1, 0, 0])


def test_min_p_by_hand():
    """Less likely than a fraction of the likeliest, 0.5: below 0.2 goes at 0.4; 0.05 is not below 0.1 · 0.5."""
    assert left(min_p=0.4) == pytest.approx([0, 0.625, 0, 0.375])
    assert left(min_p=0.0999) == pytest.approx(P)
    assert left(min_p=0.101) == pytest.approx([3 / 19, 10 / 19, 0, 6 / 19])
    assert left(min_p=1.0) == pytest.approx([0, 1, 0, 0])
    assert left(min_p=0.0) == pytest.approx(P)


def test_what_is_forbidden_goes_first():
    """Without token 1: p = (.15, 0, .05, .3) / .5, and all borders are those of this distribution."""
    forbidden = jnp.asarray([[False, True, False, False]])
    assert left(forbidden=forbidden) == pytest.approx([0.3, 0, 0.1, 0.6])
    assert left(forbidden=forbidden, temperature=0.0) == pytest.approx([0, 0, 0, 1])
    assert left(forbidden=forbidden, top_k=2) == pytest.approx([1 / 3, 0, 0, 2 / 3])
    assert left(forbidden=forbidden, top_k=3) == pytest.approx([0.3, 0, 0.1, 0.6])
    assert left(forbidden=forbidden, top_p=0.6) == pytest.approx([0, 0, 0, 1])
    assert left(forbidden=forbidden, min_p=0.4) == pytest.approx([1 / 3, 0, 0, 2 / 3])


def test_the_order_is_temperature_top_k_top_p_min_p():
    """Each border is one of what the step before has left, so another order would leave other tokens."""
    assert left(temperature=0.5, top_p=0.6) == pytest.approx([0, 1, 0, 0])  # .685 at T = 0.5, .5 at T = 1
    assert left(top_k=2, top_p=0.6) == pytest.approx([0, 1, 0, 0])  # .625 of what top-k leaves
    assert left(top_k=3, top_p=0.9, min_p=0.29) == pytest.approx([3 / 19, 10 / 19, 0, 6 / 19])


def test_a_kept_token_is_never_cut():
    keep = jnp.asarray([2])
    assert left(top_k=2, keep=keep) == pytest.approx([0, 10 / 17, 1 / 17, 6 / 17])
    assert left(temperature=0.0, keep=keep) == pytest.approx([0, 10 / 11, 1 / 11, 0])
    assert left(top_k=2, keep=jnp.asarray([1])) == pytest.approx([0, 0.625, 0, 0.375])  # was not cut anyway
    forbidden = jnp.asarray([[False, False, True, False]])
    assert left(forbidden=forbidden, keep=keep) == pytest.approx(P)


def by_sorting(x: np.ndarray, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None):
    """One row, one token after the other, in float64: which tokens are left."""
    x = x.astype(np.float64) / temperature
    order = np.argsort(-x, kind="stable")
    if top_k is not None:
        order = order[:top_k]
    p = np.exp(x[order] - x.max())
    if top_p is not None:
        order = order[: 1 + int(np.sum(np.cumsum(p) < top_p * p.sum()))]
    if min_p is not None:
        order = order[np.exp(x[order] - x.max()) >= min_p]
    return set(order.tolist())


@pytest.mark.parametrize("settings", [(0.7, 20, 0.8, 0.05), (1.0, None, 0.95, None), (2.0, 3, None, None)])
def test_against_a_sorted_list(settings):
    """Random logits of a real vocabulary's size: the same tokens are left as when they are sorted, which is slow."""
    x = np.random.default_rng(0).normal(0, 3, (6, 5000)).astype(np.float32)
    kwargs = dict(zip(("temperature", "top_k", "top_p", "min_p"), settings, strict=True))
    got = np.asarray(jax.jit(functools.partial(filter_logits, **kwargs))(x))
    for row, logits in zip(got, x, strict=True):
        assert set(np.flatnonzero(np.isfinite(row)).tolist()) == by_sorting(logits, *settings)
    traced = jax.jit(functools.partial(filter_logits, top_k=settings[1]))
    numbers = {name: jnp.float32(value) for name, value in kwargs.items() if value is not None and name != "top_k"}
    np.testing.assert_array_equal(traced(x, **numbers), got)


def test_ties_at_a_border_all_stay_and_signs_do_not_matter():
    x = jnp.asarray([[-1.0, -3.0, -1.0, -2.0], [1.0, -1.0, 0.0, 0.0]])
    assert jnp.isfinite(filter_logits(x, top_k=1)).tolist() == [[True, False, True, False], [True] + [False] * 3]
    assert jnp.isfinite(filter_logits(x, top_k=2)).tolist() == [[True, False, True, False], [True, False, True, True]]
    assert jnp.isfinite(filter_logits(x, temperature=0.0)).sum(1).tolist() == [1, 1]  # greedy draws one: the first


def test_any_float_is_computed_in_float32_at_least():
    assert filter_logits(LOGITS.astype(jnp.bfloat16), top_k=2, top_p=0.5).dtype == jnp.float32
    with jax.enable_x64(True):
        logits = jnp.log(jnp.asarray([P], jnp.float64))
        assert left(logits, top_p=0.75, top_k=3) == pytest.approx([0, 0.625, 0, 0.375], rel=1e-12)


@pytest.mark.parametrize("token", [1, 2])
def test_the_gradient_is_that_of_the_tokens_left(token):
    """d log p / d logit = onehot − softmax over what is left, over T; finite also for a token that would be cut."""
    ids = jnp.asarray([token])
    logp = lambda x: ops.aligned_logps(filter_logits(x, temperature=0.5, top_k=2, keep=ids), ids)[0]  # noqa: E731
    p = np.square(P) * (np.isin(np.arange(4), [1, 3]) | (np.arange(4) == token))
    expected = ((np.arange(4) == token) - p / p.sum()) / 0.5
    np.testing.assert_allclose(jax.grad(logp)(LOGITS)[0], expected, rtol=1e-5)


def test_a_minimum_length_forbids_stop_tokens_before_it():
    settings = Sampling(min_new_tokens=2, stop_ids=(1, 3), top_k=1)
    logits = jnp.tile(LOGITS, (4, 1))
    got = jnp.argmax(filters.distribution(logits, settings, place=jnp.arange(4)), axis=1)
    assert got.tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="min_new_tokens=2"):
        filters.distribution(logits, settings)


def test_settings_are_values():
    settings = Sampling(temperature=0.7, top_k=5, stop_ids=(1, 2))
    assert hash(settings) == hash(dataclasses.replace(settings))
    assert Sampling() == Sampling(temperature=1.0)
    cutting = [
        {"temperature": 0.0},
        {"top_k": 3},
        {"top_p": 0.5},
        {"min_p": 0.1},
        {"min_new_tokens": 1, "stop_ids": (1,)},
    ]
    assert all(filters.cuts(Sampling(**kwargs)) for kwargs in cutting)
    assert not any(filters.cuts(s) for s in (Sampling(), Sampling(temperature=0.5, stop_ids=(1,), min_new_tokens=0)))
    assert not filters.cuts(Sampling(min_new_tokens=3))  # nothing stops, so nothing is forbidden


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1"),
        ({"stop_ids": (-1,)}, r"stop_ids are \(-1,\)"),
    ],
)
def test_settings_that_no_distribution_has_are_refused(kwargs, said):
    with pytest.raises(ValueError, match=said):
        Sampling(**kwargs)


@pytest.mark.slow
def test_ids_without_a_token_have_no_probability_in_sampler_or_trainer():
    """Five of 61, in two ranges, though their logits are the largest; under all other filters and under none."""
    absent, params = ((7, 9), (58, 61)), {**tiny.bigram_params(), "layers": {"0": {}}}
    params["table"] = params["table"].at[:, np.r_[7:9, 58:61]].add(5.0)
    prompts = policy.left_pad([np.asarray([1, 2]), np.asarray([3])], rows=2, width=2)
    for settings in ({}, {"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9, "min_new_tokens": 2}):
        drawn = Sampling(stop_ids=(4, 5), absent=absent, **settings)
        write = functools.partial(sampling.generate, tiny.bigram(), params, prompts, jax.random.key(1))
        rollout = write(max_new_tokens=8, n=4, **dataclasses.asdict(drawn))
        mask = np.asarray(rollout.tokens.mask)
        ids = np.asarray(rollout.tokens.ids)[mask]
        assert not np.isin(ids, [7, 8, 58, 59, 60]).any()
        trained = logprobs.token_logps(tiny.bigram(), params, rollout.tokens, sampling=drawn)
        np.testing.assert_allclose(np.asarray(trained)[mask], np.asarray(rollout.logps)[mask], atol=1e-5)
        logits = filters.distribution(params["table"], drawn, place=jnp.zeros(61, jnp.int32))
        assert np.isneginf(np.asarray(logits)[:, [7, 8, 58, 59, 60]]).all()
    there = write(max_new_tokens=8, n=4, **dataclasses.asdict(Sampling()))  # which shows that they would be drawn
    assert np.isin(np.asarray(there.tokens.ids)[np.asarray(there.tokens.mask)], [7, 8, 58, 59, 60]).any()
    plain = Sampling(temperature=0.7)
    assert filters.cuts(Sampling(absent=((3, 4),)))
    assert not filters.cuts(plain)  # where every id has a token nothing changes
    with pytest.raises(ValueError, match="absent is"):
        Sampling(absent=((4, 4),))
