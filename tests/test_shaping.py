"""Shaping of scores: values worked out by hand, and what must hold for any scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rljax import shaping

SCORES = np.asarray([0.5, -2.0, 0.7, np.nan], np.float32)
FINISHED = np.asarray([True, False, False, False])
NAN = np.nan


def close(got, wanted):
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted, np.float64), rtol=1e-6, atol=1e-7)


def test_an_unfinished_completion_gets_minus_one_or_a_penalty():
    close(shaping.replace_unfinished(SCORES, FINISHED), [0.5, -1.0, -1.0, NAN])
    close(shaping.replace_unfinished(SCORES, FINISHED, value=0.0), [0.5, 0.0, 0.0, NAN])
    close(shaping.penalize_unfinished(SCORES, FINISHED), [0.5, -3.0, -0.3, NAN])
    close(shaping.penalize_unfinished(SCORES, FINISHED, penalty=0.0), SCORES)


def test_overlong_penalty_is_dapos_equation_13():
    lengths = np.asarray([0, 80, 81, 90, 99, 100, 101, 500])
    close(
        shaping.overlong_penalty(lengths, max_length=100, buffer=20), [0.0, 0.0, -0.05, -0.5, -0.95, -1.0, -1.0, -1.0]
    )
    # the paper's numbers: 16 384 tokens are free, 18 432 cost a half, 20 480 all
    close(
        shaping.overlong_penalty(np.asarray([16_384, 18_432, 20_480]), max_length=20_480, buffer=4_096), [0, -0.5, -1.0]
    )
    with pytest.raises(ValueError, match="buffer is 0"):
        shaping.overlong_penalty(lengths, max_length=100, buffer=0)


def test_clip_scores():
    close(shaping.clip_scores(SCORES, low=-1.0, high=0.6), [0.5, -1.0, 0.6, NAN])
    close(shaping.clip_scores(SCORES, low=0.0, high=0.0), [0.0, 0.0, 0.0, NAN])
    with pytest.raises(ValueError, match="is above high"):
        shaping.clip_scores(SCORES, low=1.0, high=0.5)


def test_ensembles_of_reward_models_by_hand():
    scores = np.asarray([[1.0, 0.0, 5.0], [3.0, 0.0, NAN], [8.0, 0.0, 5.0]], np.float32)  # three models, three rows
    close(shaping.worst_case(scores), [1.0, 0.0, NAN])
    close(shaping.uncertainty_weighted(scores, coef=0.5), [4.0 - 0.5 * (9 + 1 + 16) / 3, 0.0, NAN])
    close(shaping.uncertainty_weighted(scores, coef=0.0), [4.0, 0.0, NAN])
    close(shaping.uncertainty_weighted(scores[:1], coef=0.5), scores[0])


def test_standardize_gives_reference_samples_mean_0_and_std_1():
    close(shaping.standardize(SCORES, mean=0.5, std=0.5), [0.0, -5.0, 0.4, NAN])
    reference = np.random.default_rng(0).normal(3.0, 7.0, size=256)
    scores = shaping.standardize(reference, mean=reference.mean(), std=reference.std())
    np.testing.assert_allclose([np.mean(scores), np.std(scores)], [0.0, 1.0], atol=1e-5)
    with pytest.raises(ValueError, match=r"std is 0\.0"):
        shaping.standardize(SCORES, mean=0.0, std=0.0)


def test_moments_of_two_batches_by_hand():
    first = shaping.update_moments(shaping.init_moments(), np.asarray([1.0, 3.0]), np.ones(2, bool))
    close([first.count, first.mean, first.squares], [2.0, 2.0, 2.0])
    both = shaping.update_moments(first, np.asarray([5.0, NAN, 7.0]), np.asarray([True, False, True]))
    close([both.count, both.mean, both.squares, both.variance()], [4.0, 4.0, 20.0, 5.0])
    scores = np.asarray([4.0, 9.0, NAN], np.float32)
    close(shaping.running_normalize(scores, both, eps=0.0), np.asarray([4.0, 9.0, NAN]) / np.sqrt(5.0))
    close(shaping.running_normalize(scores, both, eps=4.0), np.asarray([4.0, 9.0, NAN]) / 3.0)
    close(shaping.running_normalize(scores, both, shift_mean=True, eps=4.0), [0.0, 5.0 / 3.0, NAN])


def test_moments_of_nothing_and_of_equal_scores_scale_nothing():
    empty = shaping.update_moments(shaping.init_moments(), np.asarray([NAN, np.inf]), np.zeros(2, bool))
    close([empty.count, empty.mean, empty.squares, empty.variance()], [0.0, 0.0, 0.0, 0.0])
    close(shaping.running_normalize(np.asarray([2.0]), empty), [2.0])
    equal = shaping.init_moments()
    for _ in range(3):  # 0.1 in float32 is no binary fraction: a mean of seven of them rounds
        equal = shaping.update_moments(equal, np.full(7, 0.1, np.float32), np.ones(7, bool))
    assert float(equal.squares) == 0.0
    close(shaping.running_normalize(np.asarray([0.1]), equal), [0.1])


batches = st.lists(
    st.lists(st.tuples(st.floats(-100, 100, width=32), st.booleans()), min_size=4, max_size=4), min_size=1, max_size=5
)


@settings(max_examples=40, deadline=None)
@given(batches)
def test_moments_are_those_of_all_scores_at_once(rows):
    update, moments = jax.jit(shaping.update_moments), shaping.init_moments()
    for row in rows:
        x, mask = (np.asarray(column) for column in zip(*row, strict=True))
        moments = update(moments, np.where(mask, x, NAN).astype(np.float32), mask)
    kept = np.asarray([x for row in rows for x, used in row if used])
    assert float(moments.count) == len(kept)
    if len(kept):
        np.testing.assert_allclose(moments.mean, kept.mean(), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(moments.variance(), kept.var(), rtol=1e-4, atol=2e-3)


def test_moments_do_not_cancel_far_from_zero():
    x = (1e6 + np.arange(8)).astype(np.float32)
    moments = shaping.init_moments()
    for part in np.split(x, 4):
        moments = shaping.update_moments(moments, part, np.ones(2, bool))
    np.testing.assert_allclose(moments.variance(), 5.25)


@pytest.mark.parametrize("dtype", ["bfloat16", "int32", "float32"])
def test_float32_at_least(dtype):
    scores, yes = jnp.asarray([1, 0], dtype), np.asarray([True, False])
    for shaped in (
        shaping.replace_unfinished(scores, yes),
        shaping.penalize_unfinished(scores, yes),
        shaping.overlong_penalty(scores, max_length=2, buffer=1),
        shaping.clip_scores(scores, low=0, high=1),
        shaping.standardize(scores, mean=0.5, std=2.0),
        shaping.worst_case(scores[None]),
        shaping.uncertainty_weighted(scores[None], coef=1.0),
        shaping.running_normalize(scores, shaping.update_moments(shaping.init_moments(), scores, yes)),
    ):
        assert shaped.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(shaping.update_moments(shaping.init_moments(), scores, yes))} == {
        jnp.dtype("float32")
    }


def test_float64_stays():
    with jax.enable_x64(True):
        x, yes = np.asarray([1.0, 1.0 + 1e-12]), np.ones(2, bool)
        assert shaping.replace_unfinished(x, yes)[1] == x[1]
        assert shaping.standardize(x, mean=1.0, std=1.0)[1] == x[1] - 1.0
        moments = shaping.update_moments(shaping.init_moments(), x, yes)
        assert moments.mean.dtype == shaping.running_normalize(x, moments).dtype == jnp.float64
        np.testing.assert_allclose(moments.squares, 0.5e-24, rtol=1e-3)


def test_traced_settings_and_vmap():
    sweep = jax.jit(jax.vmap(lambda value: shaping.replace_unfinished(SCORES, FINISHED, value=value)))
    close(sweep(jnp.asarray([-1.0, 0.0]))[:, 1], [-1.0, 0.0])
