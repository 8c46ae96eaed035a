"""KL penalties and distillation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import losses

POLICY, REFERENCE = np.asarray([0.3, -0.5, 1.1, 0.0]), np.asarray([-0.2, 0.4, 0.1, 0.9])


def expected_loss(logits, estimator, stop):
    """E_π[kl_penalty] over all four outcomes; `stop` keeps the sampling distribution constant, as samples are."""
    logps = jax.nn.log_softmax(logits)
    penalty = losses.kl_penalty(logps[None], jax.nn.log_softmax(REFERENCE)[None], estimator=estimator)[0]
    return jnp.sum(stop(jnp.exp(logps)) * penalty)


def true_kl(logits, order):
    p, q = jax.nn.log_softmax(logits), jax.nn.log_softmax(REFERENCE)
    return jnp.sum(jnp.exp(p) * (p - q)) if order == "reverse" else jnp.sum(jnp.exp(q) * (q - p))


def test_kl_estimates_as_numbers():
    with jax.enable_x64(True):
        value = {k: float(expected_loss(POLICY, k, lambda p: p)) for k in ("k1", "k2", "k3")}
        exact = float(true_kl(POLICY, "reverse"))
    assert value["k1"] == pytest.approx(exact)
    assert value["k3"] == pytest.approx(exact)
    assert value["k2"] != pytest.approx(exact, rel=0.01)  # biased


def test_trap_08_kl_estimators_as_losses_have_different_gradients():
    with jax.enable_x64(True):
        gradient = {k: jax.grad(expected_loss)(POLICY, k, jax.lax.stop_gradient) for k in ("k1", "k2", "k3")}
        np.testing.assert_allclose(gradient["k1"], 0.0, atol=1e-12)
        np.testing.assert_allclose(gradient["k2"], jax.grad(true_kl)(POLICY, "reverse"), atol=1e-12)
        np.testing.assert_allclose(gradient["k3"], jax.grad(true_kl)(POLICY, "forward"), atol=1e-12)
        np.testing.assert_allclose(gradient["k3"], jax.nn.softmax(POLICY) - jax.nn.softmax(REFERENCE), atol=1e-12)
    assert "forward KL" in losses.kl_penalty.__doc__


def test_k3_keeps_its_precision_near_zero():
    # ½ d² to third order: 5.00167e-7 at d = −1e-3; exp(x) − 1 − x in float32 would be off by a tenth
    penalty = losses.kl_penalty(np.zeros((1, 1), np.float32), np.full((1, 1), 1e-3, np.float32), estimator="k3")
    np.testing.assert_allclose(penalty, 5.00167e-7, rtol=1e-3)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_penalty_is_finite_far_away_and_zero_at_the_reference(estimator):
    x = np.asarray([[1e4, -1e4, 0.0]], np.float32)
    loss, slope = jax.value_and_grad(lambda p: losses.kl_penalty(p, np.zeros_like(x), estimator=estimator).sum())(x)
    assert np.isfinite(loss)
    assert np.isfinite(slope).all()
    assert losses.kl_penalty(x, x, estimator=estimator).tolist() == [[0.0, 0.0, 0.0]]


def test_unknown_names_raise():
    x = np.zeros((1, 2))
    with pytest.raises(ValueError, match="Unknown KL estimator 'k4': choose \"k1\""):
        losses.kl_penalty(x, x, estimator="k4")
    with pytest.raises(ValueError, match=r"Unknown divergence 'kl': choose"):
        losses.distillation_loss(x[None], x[None], divergence="kl")
    with pytest.raises(ValueError, match=r"temperature is 0\.0"):
        losses.distillation_loss(x[None], x[None], divergence="reverse_kl", temperature=0.0)


def distil(student, teacher, divergence, **options):
    return losses.distillation_loss(student[None, None], teacher[None, None], divergence=divergence, **options)[0, 0]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", ("jsd", 0.3)])
def test_distillation_properties(divergence):
    assert distil(POLICY, POLICY + 7.0, divergence) == pytest.approx(0.0, abs=1e-6)  # logits up to a constant
    assert distil(POLICY, REFERENCE, divergence) > 0
    slope = jax.grad(distil)(jnp.asarray(POLICY), POLICY, divergence)
    np.testing.assert_allclose(slope, 0.0, atol=1e-6)
    doubled = distil(2 * POLICY, 2 * REFERENCE, divergence, temperature=2.0)
    assert doubled == pytest.approx(float(distil(POLICY, REFERENCE, divergence)), rel=1e-5)


def test_distillation_directions_swap():
    assert distil(POLICY, REFERENCE, "forward_kl") == pytest.approx(float(distil(REFERENCE, POLICY, "reverse_kl")))
    swapped = distil(REFERENCE, POLICY, ("jsd", 0.7))
    assert distil(POLICY, REFERENCE, ("jsd", 0.3)) == pytest.approx(float(swapped), rel=1e-5)


def test_trap_06_forward_kl_is_a_divergence_and_not_a_cross_entropy():
    # against a teacher of entropy ln 4 a cross-entropy would give ln 4
    assert distil(np.zeros(4), np.zeros(4), "forward_kl") == 0.0


def test_jsd_limits():
    with jax.enable_x64(True):
        for beta in (0.0, 1.0):
            assert distil(POLICY, REFERENCE, ("jsd", beta)) == pytest.approx(0.0, abs=1e-12)
        small = distil(POLICY, REFERENCE, ("jsd", 1e-6)) / 1e-6
        assert small == pytest.approx(float(distil(POLICY, REFERENCE, "forward_kl")), rel=1e-4)
        large = distil(POLICY, REFERENCE, ("jsd", 1 - 1e-6)) / 1e-6
        assert large == pytest.approx(float(distil(POLICY, REFERENCE, "reverse_kl")), rel=1e-4)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", ("jsd", 0.3)])
def test_impossible_tokens_cost_nothing(divergence):
    # a token with logit −inf in both leaves the divergence of the others, and no NaN in the gradient
    student, teacher = np.append(POLICY, -np.inf), np.append(REFERENCE, -np.inf)
    value, slope = jax.value_and_grad(distil)(student, teacher, divergence)
    assert value == pytest.approx(float(distil(POLICY, REFERENCE, divergence)), rel=1e-5)
    np.testing.assert_allclose(slope, np.append(jax.grad(distil)(POLICY, REFERENCE, divergence), 0.0), atol=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", ("jsd", 0.3)])
def test_extreme_logits_stay_finite(divergence):
    value, slope = jax.value_and_grad(distil)(np.asarray([1e4, 0.0, -1e4]), np.asarray([-1e4, 0.0, 1e4]), divergence)
    assert np.isfinite(value)
    assert np.isfinite(slope).all()
