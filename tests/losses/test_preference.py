"""Preference losses: limits, symmetries, extremes, and how the variants relate."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import losses

FAMILY = {
    "dpo": functools.partial(losses.dpo_loss, beta=0.3),
    "cdpo": functools.partial(losses.dpo_loss, beta=0.3, label_smoothing=0.1),
    "robust": functools.partial(losses.robust_dpo_loss, beta=0.3, label_smoothing=0.1),
    "ipo": functools.partial(losses.ipo_loss, beta=0.3),
    "hinge": functools.partial(losses.hinge_loss, beta=0.3),
    "exo": functools.partial(losses.exo_loss, beta=0.3, label_smoothing=1e-3),
    "nca": functools.partial(losses.nca_loss, beta=0.3),
    "bco": functools.partial(losses.bco_loss, beta=0.3, delta=0.2),
    "sppo": functools.partial(losses.sppo_loss, beta=0.3),
    "apo_zero": functools.partial(losses.apo_zero_loss, beta=0.3),
    "apo_down": functools.partial(losses.apo_down_loss, beta=0.3),
    "discopop": functools.partial(losses.discopop_loss, beta=0.3),
    "reverse_kl": functools.partial(losses.f_dpo_loss, beta=0.3, divergence="reverse_kl"),
    "forward_kl": functools.partial(losses.f_dpo_loss, beta=0.3, divergence="forward_kl"),
    "js": functools.partial(losses.f_dpo_loss, beta=0.3, divergence="js"),
    "alpha": functools.partial(losses.f_dpo_loss, beta=0.3, divergence=("alpha", 0.4)),
}
each = pytest.mark.parametrize("name", FAMILY)


def loss(name, chosen, rejected):
    """The loss of one pair from its log-ratios d_w and d_l."""
    x = jnp.stack([jnp.asarray(chosen, float), jnp.asarray(rejected, float)])[:, None]
    return FAMILY[name](x[0], x[1], jnp.zeros(1, x.dtype), jnp.zeros(1, x.dtype))[0]


# d loss / d d_w and d d_l at (d_w, d_l) = (1.2, -0.7), from the papers' formulas by hand: s = σ, b = 0.3, h = 1.9
def _reference_slopes():
    def s(x):
        return 1 / (1 + np.exp(-x))

    b, w, l = 0.3, 1.2, -0.7  # noqa: E741
    h, z = w - l, 0.3 * 1.9
    q = s(z)
    exo = b * q * (1 - q) * (z - np.log(0.999 / 0.001))
    mix = s(z / 0.05)
    disco = mix * (1 - mix) / 0.05 * (np.log(s(z)) + np.exp(-z)) - (1 - mix) * s(-z) - mix * np.exp(-z)
    pairwise = {  # functions of h alone: the slopes are opposite
        "dpo": -b * s(-z),
        "cdpo": -0.9 * b * s(-z) + 0.1 * b * s(z),
        "robust": (-0.9 * b * s(-z) - 0.1 * b * s(z)) / 0.8,
        "ipo": 2 * (h - 1 / 0.6),
        "hinge": -b,
        "exo": exo,
        "discopop": b * disco,
        "reverse_kl": -b * s(-z),
    }
    forward = s(-b * (np.exp(-l) - np.exp(-w)))
    js = s(-b * (np.log(s(w)) - np.log(s(l))))
    alpha = s(-b * (np.exp(-0.4 * l) - np.exp(-0.4 * w)) / 0.4)
    return {k: (v, -v) for k, v in pairwise.items()} | {
        "nca": (-b * s(-b * w) + 0.5 * b * s(b * w), 0.5 * b * s(b * l)),
        "bco": (-b * s(-(b * w - 0.2)), b * s(b * l - 0.2)),
        "sppo": (2 * (w - 1 / 0.6), 2 * (l + 1 / 0.6)),
        "apo_zero": (-b * s(b * w) * s(-b * w), b * s(b * l) * s(-b * l)),
        "apo_down": (b * s(b * w) * s(-b * w) - b * s(z) * s(-z), b * s(z) * s(-z)),
        "forward_kl": (-forward * b * np.exp(-w), forward * b * np.exp(-l)),
        "js": (-js * b * s(-w), js * b * s(-l)),
        "alpha": (-alpha * b * np.exp(-0.4 * w), alpha * b * np.exp(-0.4 * l)),
    }


SLOPES = _reference_slopes()


@each
def test_trap_06_gradient_is_that_of_the_paper_s_formula_under_jit(name):
    with jax.enable_x64(True):
        slopes = jax.jit(jax.grad(functools.partial(loss, name), argnums=(0, 1)))(1.2, -0.7)
        np.testing.assert_allclose(slopes, SLOPES[name], rtol=1e-9)


@each
def test_values_and_gradients_are_finite_to_ten_thousand_nats(name):
    extremes = jnp.asarray([1e4, -1e4, 100.0, -100.0, 0.0], jnp.float32)
    w, l = (x.ravel() for x in jnp.meshgrid(extremes, extremes))  # noqa: E741
    zero = jnp.zeros_like(w)
    values, slopes = jax.value_and_grad(lambda w, l: FAMILY[name](w, l, zero, zero).sum(), argnums=(0, 1))(w, l)  # noqa: E741
    assert np.isfinite(values)
    assert np.isfinite(slopes).all()


def test_dpo_at_the_reference_is_ln_2_and_trap_07_beta_zero_too():
    x = np.asarray([-3.0, -70.0])
    np.testing.assert_allclose(losses.dpo_loss(x, x - 1, x, x - 1, beta=0.5), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(losses.dpo_loss(x, x - 9, x, x - 1, beta=0.0), np.log(2), rtol=1e-6)


def test_trap_07_zero_is_a_value():
    x, y, z = np.asarray([-1.0]), np.asarray([-4.0]), np.zeros(1)
    assert losses.dpo_loss(x, y, z, z, beta=0.5, label_smoothing=0.0) == losses.cpo_loss(x, y, beta=0.5)
    assert losses.robust_dpo_loss(x, y, z, z, beta=0.5, label_smoothing=0.0) == losses.cpo_loss(x, y, beta=0.5)
    assert losses.hinge_loss(x, y, z, z, beta=0.0) == 1.0
    for pair in (losses.apo_zero_loss, losses.apo_down_loss):
        assert pair(x, y, z, z, beta=0.0) == 1.0
    assert losses.nca_loss(x, y, z, z, beta=0.0) == pytest.approx(2 * np.log(2))
    assert losses.bco_loss(x, y, z, z, beta=0.0, delta=0.0) == pytest.approx(2 * np.log(2))
    assert losses.discopop_loss(x, y, z, z, beta=0.0) == pytest.approx(0.5 * np.log(2) + 0.5)
    assert losses.exo_loss(x, y, z, z, beta=0.0, label_smoothing=0.5) == pytest.approx(0.0, abs=1e-6)
    assert losses.simpo_loss(x, y, beta=0.0, gamma=0.0) == pytest.approx(np.log(2))
    assert losses.orpo_loss(x, y, beta=0.0) == 0.0
    assert losses.slic_loss(x, y, delta=0.0) == 0.0
    kto = functools.partial(losses.kto_loss, x, z, np.asarray([True]), 0.0)
    assert kto(beta=0.0) == 0.5
    assert kto(beta=0.5, desirable_weight=0.0) == 0.0
    assert losses.kto_loss(x, z, np.asarray([False]), 0.0, beta=0.5, undesirable_weight=0.0) == 0.0


@pytest.mark.parametrize("h", [0.3, -2.0, 5.0])
def test_swapping_chosen_and_rejected(h):
    # L(h) − L(−h) = −βh
    assert float(loss("dpo", h, 0.0) - loss("dpo", 0.0, h)) == pytest.approx(-0.3 * h, rel=1e-4)


def test_robust_dpo_is_unbiased_under_flips():
    clean = loss("dpo", 1.3, -0.4)
    noisy = 0.9 * loss("robust", 1.3, -0.4) + 0.1 * loss("robust", -0.4, 1.3)
    assert float(noisy) == pytest.approx(float(clean), rel=1e-5)


def test_cdpo_and_exo_optima_are_at_one_minus_epsilon():
    h = float(np.log(9.0) / 0.3)  # σ(βh) = 0.9
    assert jax.grad(functools.partial(loss, "cdpo"))(h, 0.0) == pytest.approx(0.0, abs=1e-6)
    exo = jax.grad(lambda w: losses.exo_loss(w, w * 0, w * 0, w * 0, beta=0.3, label_smoothing=0.1).sum())
    assert exo(jnp.asarray([h])) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("beta", "probability"), [(0.1, 0.993307), (0.5, 0.731059), (1.0, 0.622459), (10.0, 0.512497)])
def test_ipo_optimum_of_a_deterministic_preference(beta, probability):
    # π(y_1) = σ(1/(2τ)), where DPO would give 1
    h = np.log(probability / (1 - probability))
    assert losses.ipo_loss(np.asarray([h]), *np.zeros((3, 1)), beta=beta) == pytest.approx(0.0, abs=1e-8)


def test_alpha_divergence_goes_from_reverse_to_forward_kl():
    points = [(1.0, -0.5), (-0.3, 0.8), (2.0, 2.5)]
    for w, l in points:  # noqa: E741
        x, y, z = np.asarray([w]), np.asarray([l]), np.zeros(1)
        f = functools.partial(losses.f_dpo_loss, x, y, z, z, beta=0.5)
        np.testing.assert_allclose(f(divergence="reverse_kl"), losses.dpo_loss(x, y, z, z, beta=0.5), rtol=1e-6)
        np.testing.assert_allclose(f(divergence=("alpha", 0.0)), f(divergence="reverse_kl"), rtol=1e-6)
        np.testing.assert_allclose(f(divergence=("alpha", 1e-5)), f(divergence="reverse_kl"), rtol=1e-4)
        np.testing.assert_allclose(f(divergence=("alpha", 1)), f(divergence="forward_kl"), rtol=1e-6)


def test_only_losses_without_a_per_response_term_ignore_the_level():
    # adding a constant to both log-ratios leaves h alone
    for name in ("dpo", "cdpo", "robust", "ipo", "hinge", "exo", "discopop", "reverse_kl"):
        assert float(loss(name, 1.0, -0.5)) == pytest.approx(float(loss(name, 4.0, 2.5)), rel=1e-5)
    for name in ("nca", "bco", "sppo", "apo_zero", "apo_down", "forward_kl", "js", "alpha"):
        assert float(loss(name, 1.0, -0.5)) != pytest.approx(float(loss(name, 4.0, 2.5)), rel=1e-2)


def test_errors_name_the_value_and_the_fix():
    x = np.zeros(1)
    with pytest.raises(ValueError, match=r"label_smoothing is 0\.0.*for example 1e-3"):
        losses.exo_loss(x, x, x, x, beta=0.1, label_smoothing=0.0)
    with pytest.raises(ValueError, match=r"label_smoothing is 0\.5.*below 0\.5"):
        losses.robust_dpo_loss(x, x, x, x, beta=0.1, label_smoothing=0.5)
    for function in (losses.ipo_loss, losses.sppo_loss):
        with pytest.raises(ValueError, match=r"beta is 0\.0.*above 0"):
            function(x, x, x, x, beta=0.0)
    with pytest.raises(ValueError, match=r"tau is 0\.0"):
        losses.discopop_loss(x, x, x, x, beta=0.1, tau=0.0)
    with pytest.raises(ValueError, match="Unknown divergence 'hellinger': choose"):
        losses.f_dpo_loss(x, x, x, x, beta=0.1, divergence="hellinger")


def test_orpo_at_certainty_and_at_impossibility():
    extremes = np.asarray([0.0, -1e-9, -1e4, -0.5], np.float32)
    w, l = (x.ravel() for x in np.meshgrid(extremes, extremes))  # noqa: E741
    value, slopes = jax.value_and_grad(lambda a, b: losses.orpo_loss(a, b, beta=0.1).sum(), argnums=(0, 1))(w, l)
    assert np.isfinite(value)
    assert np.isfinite(slopes).all()
    assert losses.orpo_loss(np.zeros(1), np.zeros(1), beta=1.0) == pytest.approx(np.log(2))


def test_kto_saturates_and_its_reference_point_is_data():
    kto = functools.partial(losses.kto_loss, beta=0.5)
    thumbs = np.asarray([True, False])
    for extreme in (1e4, -1e4):
        x = np.full(2, extreme, np.float32)
        values = kto(x, np.zeros(2), thumbs, 0.0)
        np.testing.assert_allclose(values, [float(extreme < 0), float(extreme > 0)])
        assert not np.any(jax.grad(lambda x: kto(x, np.zeros(2), thumbs, 0.0).sum())(x))  # outliers are ignored
    slope = jax.grad(lambda kl: kto(np.zeros(2), np.zeros(2), thumbs, kl).sum())(1.0)
    assert slope == 0.0
    repeated = kto(np.zeros(2), np.ones(2), thumbs, np.full(2, 0.7))
    np.testing.assert_allclose(kto(np.zeros(2), np.ones(2), thumbs, 0.7), repeated)


def test_trap_06_kto_is_no_sigmoid_of_a_pair_and_hinge_is_not_slic():
    # KTO at z = 0 and d = 0 is ½, DPO ln 2; the hinge has a reference, SLiC none
    zero, thumbs = np.zeros(1), np.asarray([True])
    assert losses.kto_loss(zero, zero, thumbs, 0.0, beta=0.1) == 0.5
    reference = np.asarray([-3.0])
    assert losses.hinge_loss(reference, zero, reference, zero, beta=1.0) == 1.0
    assert losses.slic_loss(reference, zero, delta=1.0) == 4.0


def test_simpo_gamma_is_not_multiplied_by_beta():
    x = np.asarray([-1.0])
    np.testing.assert_allclose(losses.simpo_loss(x, x, beta=2.5, gamma=1.0), np.log(1 + np.e), rtol=1e-6)
