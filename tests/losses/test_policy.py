"""Policy-gradient losses: the clip table, limits, and how the variants relate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import losses, ops

CLIP = {"clip_low": 0.2, "clip_high": 0.2}


def at(x: float) -> np.ndarray:
    return np.full((1, 1), x, np.float32)


def value_and_slope(loss, ratio: float, advantage: float, **options) -> tuple[float, float]:
    """The loss of one token with a given ratio, and d loss / d logp."""
    value, slope = jax.value_and_grad(lambda logp: loss(logp, at(0.0), at(advantage), **options).sum())(
        at(np.log(ratio))
    )
    return float(value), float(slope[0, 0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (2.0, 1.0, -1.2, 0.0),  # moved enough already: clipped
        (0.5, 1.0, -0.5, -0.5),  # moved the wrong way: full gradient −ρA
        (2.0, -1.0, 2.0, 2.0),  # moved the wrong way: full gradient, unbounded
        (0.5, -1.0, 0.8, 0.0),
        (1.1, 1.0, -1.1, -1.1),  # inside the range
        (0.9, -1.0, 0.9, 0.9),
    ],
)
def test_trap_01_ppo_clip_table_of_loss_and_gradient(ratio, advantage, loss, slope):
    got = value_and_slope(losses.ppo_clip_loss, ratio, advantage)
    np.testing.assert_allclose(got, (loss, slope), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("ratio", "loss", "slope"), [(2.0, 2.0, 2.0), (3.5, 3.0, 0.0), (0.5, 0.8, 0.0)])
def test_dual_clip_bounds_the_loss_of_negative_advantages_only(ratio, loss, slope):
    got = value_and_slope(losses.ppo_clip_loss, ratio, -1.0, dual_clip=3.0)
    np.testing.assert_allclose(got, (loss, slope), rtol=1e-5, atol=1e-6)
    assert value_and_slope(losses.ppo_clip_loss, 5.0, 1.0, dual_clip=3.0) == pytest.approx((-1.2, 0.0))


def test_trap_02_cispo_weight_carries_no_gradient():
    for ratio, advantage, weight in [
        (2.0, 1.0, 1.2),
        (0.5, 1.0, 0.8),
        (2.0, -1.0, 1.2),
        (0.5, -3.0, 0.8),
        (1.1, 2.0, 1.1),
    ]:
        value, slope = value_and_slope(losses.cispo_loss, ratio, advantage, **CLIP)
        assert slope == pytest.approx(-weight * advantage, rel=1e-5)
        assert value == pytest.approx(-weight * advantage * np.log(ratio), rel=1e-5)
    # far below logp = −1 the gradient through the ratio would have flipped the sign
    slope = jax.grad(lambda logp: losses.cispo_loss(logp, at(-5.0), at(1.0), **CLIP).sum())(at(-5.0))
    assert slope == pytest.approx(-1.0)


def test_trap_07_a_clip_of_zero_is_a_clip_of_zero():
    options = {"clip_low": 0.0, "clip_high": 0.0}
    assert value_and_slope(losses.ppo_clip_loss, 1.1, 1.0, **options) == pytest.approx((-1.0, 0.0))
    assert value_and_slope(losses.cispo_loss, 1.1, 1.0, **options)[1] == pytest.approx(-1.0)
    assert losses.clip_fraction(at(0.01), at(0.0), at(1.0), **options) == 1.0
    assert losses.gspo_loss(at(0.1), at(0.0), at(1.0), at(1.0) > 0, **options) == -1.0
    assert losses.ppo_clip_loss(at(1.0), at(0.0), at(-1.0), dual_clip=0.0) == 0.0
    assert losses.value_clip_loss(at(3.0), at(1.0), at(0.0), clip=0.0) == 4.5


def test_trap_11_clip_fraction_counts_the_strictly_larger_clipped_term():
    ratios = np.log(np.asarray([[2.0, 2.0, 0.5, 0.5, 1.0, 2.0]], np.float32))
    advantages = np.asarray([[1.0, -1.0, 1.0, -1.0, 1.0, 0.0]], np.float32)
    fraction = losses.clip_fraction(ratios, np.zeros_like(ratios), advantages, **CLIP)
    np.testing.assert_array_equal(fraction, [[1, 0, 0, 1, 0, 0]])  # |ρ − 1| > 0.2 would count five


def test_first_epoch_of_ppo_is_reinforce():
    key = jax.random.key(0)
    logps, advantages = -jax.random.exponential(key, (2, 5)), jax.random.normal(key, (2, 5))
    ppo = jax.grad(lambda x: losses.ppo_clip_loss(x, logps, advantages).sum())(logps)
    reinforce = jax.grad(lambda x: losses.reinforce_loss(x, advantages).sum())(logps)
    cispo = jax.grad(lambda x: losses.cispo_loss(x, logps, advantages, **CLIP).sum())(logps)
    np.testing.assert_allclose(ppo, reinforce, rtol=1e-6)
    np.testing.assert_allclose(cispo, reinforce, rtol=1e-6)


def test_gspo_of_one_token_is_ppo():
    logps, old = np.log([[1.5], [0.5], [1.1]]), np.zeros((3, 1))
    advantages, mask = np.asarray([[1.0], [1.0], [-2.0]]), np.ones((3, 1), bool)
    np.testing.assert_allclose(
        losses.gspo_loss(logps, old, advantages, mask, **CLIP), losses.ppo_clip_loss(logps, old, advantages), rtol=1e-6
    )


def test_gspo_gradient_is_the_paper_s():
    # s·A·(1/|y|) Σ ∇log π, negated: the same for every token of the sequence, and 0 where clipped
    mask = np.asarray([[True, True, True, False], [True, True, False, False]])
    old, advantages = np.zeros((2, 4)), np.asarray([[2.0] * 4, [1.0] * 4])
    logps = np.asarray([[0.1, -0.2, 0.05, 7.0], [0.9, 0.9, 7.0, 7.0]])

    def objective(x):
        loss = losses.gspo_loss(x, old, advantages, mask, **CLIP)
        return ops.aggregate(loss, mask, mode="seq_mean_token_mean").value()

    ratio = np.exp(-0.05 / 3)
    expected = np.where(mask, [[-ratio * 2 / 3 / 2], [0.0]], 0.0)
    np.testing.assert_allclose(jax.grad(objective)(logps), expected, rtol=1e-5)


@pytest.mark.parametrize("difference", [1e4, -1e4, 100.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_extreme_ratios_stay_finite(difference, advantage):
    mask = np.ones((1, 1), bool)
    for loss in (
        losses.ppo_clip_loss,
        lambda *a: losses.ppo_clip_loss(*a, dual_clip=3.0),
        lambda *a: losses.cispo_loss(*a, **CLIP),
        lambda *a: losses.gspo_loss(*a, mask, **CLIP),
    ):
        value, slope = jax.value_and_grad(lambda x, f=loss: f(x, at(0.0), at(advantage)).sum())(at(difference))
        assert jnp.isfinite(value)
        assert jnp.isfinite(slope).all()
        assert advantage != 0 or (value == 0 and slope == 0)


def test_value_clip_limits():
    values, old, returns = at(3.0), at(1.0), at(0.0)
    assert losses.value_clip_loss(values, old, returns, clip=np.inf) == 4.5  # plain ½ (V − R)²
    # V clipped to 1.2 is farther from R = 2.9 than V is: pessimistic, and without gradient
    loss, slope = jax.value_and_grad(lambda v: losses.value_clip_loss(v, old, at(2.9), clip=0.2).sum())(values)
    assert (loss, slope[0, 0]) == (pytest.approx(0.5 * 1.7**2), 0.0)


def test_vmap_over_a_hyper_parameter():
    sweep = jax.vmap(lambda clip: losses.ppo_clip_loss(at(1.0), at(0.0), at(1.0), clip_high=clip))(
        jnp.asarray([0.1, 0.5])
    )
    np.testing.assert_allclose(sweep.ravel(), [-1.1, -1.5], rtol=1e-6)
