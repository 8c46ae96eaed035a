"""What holds for every function of the mathematics: goldens, gradients, jit, precision, masks."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from rljax import advantages, losses, ops
from rljax.types import Mean
from tests.losses.goldens import GOLDENS, Golden
from tests.losses.support import arrays, lookup, matches, numerical_gradient, with_gradients

each_golden = pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.id)
FIRST = {golden.function: golden for golden in reversed(GOLDENS)}
each_function = pytest.mark.parametrize("golden", FIRST.values(), ids=FIRST.keys())
MASKED = [golden for golden in GOLDENS if any(a.dtype == bool and a.ndim == 2 for a in golden.arrays())]

# the names of the design, whose order and keywords callers outside the project rely on
SIGNATURES = {
    "ops": """token_logps(logits, ids) entropy(logits) sequence_sum(x, mask) sequence_mean(x, mask) masked_mean(x, mask)
        masked_whiten(x, mask, *, shift_mean=True, ddof=1, eps=1e-08)
        aggregate(x, mask, *, mode, length=None, rows=None)""",
    "losses": """
        ppo_clip_loss(logps, old_logps, advantages, *, clip_low=0.2, clip_high=0.2, dual_clip=None)
        reinforce_loss(logps, advantages) gspo_loss(logps, old_logps, advantages, mask, *, clip_low, clip_high)
        cispo_loss(logps, old_logps, advantages, *, clip_low, clip_high)
        value_clip_loss(values, old_values, returns, *, clip) kl_penalty(logps, ref_logps, *, estimator)
        clip_fraction(logps, old_logps, advantages, *, clip_low, clip_high, dual_clip=None)
        gspo_clip_fraction(logps, old_logps, advantages, mask, *, clip_low, clip_high)
        dpo_loss(A, *, beta, label_smoothing=0.0) ipo_loss(A, *, beta) hinge_loss(A, *, beta)
        robust_dpo_loss(A, *, beta, label_smoothing) exo_loss(A, *, beta, label_smoothing) nca_loss(A, *, beta)
        bco_loss(A, *, beta, delta=0.0) sppo_loss(A, *, beta) apo_zero_loss(A, *, beta) apo_down_loss(A, *, beta)
        discopop_loss(A, *, beta, tau=0.05) f_dpo_loss(A, *, beta, divergence)
        simpo_loss(chosen_average_logps, rejected_average_logps, *, beta, gamma)
        orpo_loss(chosen_average_logps, rejected_average_logps, *, beta)
        cpo_loss(policy_chosen_logps, policy_rejected_logps, *, beta)
        slic_loss(policy_chosen_logps, policy_rejected_logps, *, delta)
        kto_loss(policy_logps, ref_logps, desirable, kl, *, beta, desirable_weight=1.0, undesirable_weight=1.0)
        bradley_terry_loss(chosen, rejected, *, margin=0.0) best_of_k_loss(scores, best) nll_loss(logps)
        distillation_loss(student_logits, teacher_logits, *, divergence, temperature=1.0)""",
    "advantages": """gae(rewards, values, mask, *, gamma, lam) discounted_returns(rewards, mask, *, gamma)
        shape_rewards(scores, logps, ref_logps, mask, *, kl_coef, estimator='k1')
        group_relative(rewards, *, divide_by_std, ddof=1, eps=0.0001, applies=None)
        leave_one_out(rewards, *, applies=None)
        adaptive_kl(coef, kl, *, target, horizon, batch_size)""",
}
FOUR = "policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps"


@pytest.mark.parametrize("module", [ops, losses, advantages], ids=lambda module: module.__name__)
def test_signatures_are_those_of_the_design(module):
    wanted = SIGNATURES[module.__name__.removeprefix("rljax.")].replace("(A,", f"({FOUR},")
    for want in (part + ")" for part in " ".join(wanted.split()).split(") ")):
        name = want.split("(")[0]
        parameters = inspect.signature(getattr(module, name)).parameters.values()
        plain = inspect.Signature([p.replace(annotation=inspect.Parameter.empty) for p in parameters])
        assert f"{name}{plain}" == want.replace("))", ")")


def test_every_public_function_has_a_golden():
    public = {f"losses.{name}" for name in losses.__all__}
    for module in (ops, advantages):
        short = module.__name__.removeprefix("rljax.")
        public |= {f"{short}.{n}" for n in SIGNATURES[short].replace("(", " ").split() if hasattr(module, n)}
    assert public <= FIRST.keys()


@pytest.mark.slow
@each_golden
def test_golden(golden: Golden):
    result = lookup(golden)(*golden.arrays())
    assert matches(result, golden), arrays(result)


@functools.cache
def compiled(golden_id: str) -> Callable[..., Any]:
    """A golden's result, a scalar of it and its gradients, under jit: one compilation for the tests that share it."""
    golden = next(g for g in GOLDENS if g.id == golden_id)
    return jax.jit(with_gradients(lookup(golden), golden.gradient))


@each_golden
def test_under_jit_in_float64_and_the_gradient_is_that_of_finite_differences(golden: Golden):
    with jax.enable_x64(True):
        args, function = golden.arrays(np.float64), compiled(golden.id)
        result, _, gradients = function(*args)
        assert all(part.dtype == np.float64 for part in arrays(result))
        assert matches(result, golden, atol=1e-6)
        for position, gradient in zip(golden.gradient, gradients, strict=True):  # a stopped gradient has its own test
            expected = numerical_gradient(lambda *a: function(*a)[1], args, position)
            np.testing.assert_allclose(gradient, expected, atol=1e-7, rtol=1e-6)


@each_function
def test_bfloat16_in_float32_out(golden: Golden):
    for part in arrays(lookup(golden)(*golden.arrays(jnp.bfloat16))):
        assert part.dtype == np.float32
        assert np.isfinite(part).all()


@pytest.mark.parametrize("golden", MASKED, ids=lambda golden: golden.id)
@pytest.mark.parametrize("garbage", [1e6, np.inf, -np.inf, np.nan])
def test_trap_09_garbage_where_masked_changes_neither_value_nor_gradient(golden: Golden, garbage: float):
    with jax.enable_x64(True):
        clean, function = golden.arrays(np.float64), compiled(golden.id)
        mask = next(a for a in clean if a.dtype == bool)
        dirty = [np.where(mask, a, garbage) if a.shape == mask.shape and a is not mask else a for a in clean]
        result, _, gradients = function(*dirty)
        assert matches(result, golden)
        for gradient, wanted in zip(gradients, function(*clean)[2], strict=True):
            np.testing.assert_array_equal(gradient, wanted)
            assert gradient.shape != mask.shape or not np.any(np.asarray(gradient)[~mask])


@pytest.mark.parametrize("golden", MASKED, ids=lambda golden: golden.id)
def test_all_masked_is_zero_in_value_and_gradient(golden: Golden):
    with jax.enable_x64(True):
        args = [np.zeros_like(a) if a.dtype == bool else np.full_like(a, np.nan) for a in golden.arrays(np.float64)]
        result, _, gradients = compiled(golden.id)(*args)
        values = [result.total, result.value()] if isinstance(result, Mean) else arrays(result)
        assert not any(np.any(np.asarray(x)) for x in [*values, *gradients])


@each_function
def test_a_wrong_shape_raises(golden: Golden):
    args = golden.arrays()
    if golden.function in ("losses.nll_loss", "ops.aligned_entropy"):
        pytest.skip("takes any shape")
    args[-1] = np.zeros((7, 5, 3, 2), args[-1].dtype)
    with pytest.raises(TypeCheckError):
        lookup(golden)(*args)
