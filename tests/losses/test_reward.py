"""Reward-model losses and the negative log-likelihood."""

import jax
import numpy as np
import pytest

from rljax import losses


def test_bradley_terry_symmetries():
    chosen, rejected = np.asarray([2.0, -1.0]), np.asarray([0.5, 3.0])
    loss = losses.bradley_terry_loss(chosen, rejected)
    np.testing.assert_allclose(loss, losses.bradley_terry_loss(chosen + 9, rejected + 9), rtol=1e-5)  # per-prompt shift
    swapped = losses.bradley_terry_loss(rejected, chosen)
    np.testing.assert_allclose(np.exp(-loss) + np.exp(-swapped), 1.0, rtol=1e-6)  # one of the two wins
    np.testing.assert_allclose(losses.bradley_terry_loss(chosen, chosen), np.log(2), rtol=1e-6)


def test_bradley_terry_margin_per_pair_or_for_all():
    chosen, rejected = np.asarray([2.0, -1.0]), np.asarray([0.5, 3.0])
    shifted = losses.bradley_terry_loss(chosen - 1.0, rejected)
    np.testing.assert_allclose(losses.bradley_terry_loss(chosen, rejected, margin=1.0), shifted)
    np.testing.assert_allclose(losses.bradley_terry_loss(chosen, rejected, margin=np.ones(2)), shifted)
    np.testing.assert_allclose(
        losses.bradley_terry_loss(chosen, rejected, margin=0), losses.bradley_terry_loss(chosen, rejected)
    )


def test_best_of_two_is_bradley_terry():
    scores = np.asarray([[2.0, 0.5], [-1.0, 3.0]])
    pair = losses.bradley_terry_loss(scores[:, 0], scores[:, 1])
    np.testing.assert_allclose(losses.best_of_k_loss(scores, np.asarray([0, 0])), pair, rtol=1e-6)
    np.testing.assert_allclose(losses.best_of_k_loss(scores[:, ::-1], np.asarray([1, 1])), pair, rtol=1e-6)
    np.testing.assert_allclose(losses.best_of_k_loss(scores + 5, np.asarray([0, 0])), pair, rtol=1e-5)


@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_extreme_scores_stay_finite(gap):
    chosen, rejected = np.full(1, gap, np.float32), np.zeros(1, np.float32)
    value, slope = jax.value_and_grad(lambda x: losses.bradley_terry_loss(x, rejected).sum())(chosen)
    assert value == max(-gap, 0.0)
    assert slope == pytest.approx(-float(gap < 0))
    scores = np.stack([chosen, rejected], axis=1)
    assert losses.best_of_k_loss(scores, np.zeros(1, int)) == max(-gap, 0.0)


def test_nll_of_any_shape():
    assert losses.nll_loss(-2.0) == 2.0
    for shape in [(3,), (2, 3), (1, 2, 3)]:
        assert losses.nll_loss(np.full(shape, -1.5)).tolist() == np.full(shape, 1.5).tolist()
