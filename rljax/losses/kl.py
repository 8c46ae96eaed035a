"""KL divergences: estimated from samples (a penalty), or summed over the whole vocabulary (distillation)."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import ArrayLike, Float, Real

from rljax.errors import UserError
from rljax.ops import Scalar, as_float, finite_expm1, log_softmax, require_positive


def kl_penalty(
    logps: Real[ArrayLike, "b t"], ref_logps: Real[ArrayLike, "b t"], *, estimator: str
) -> Float[Array, "b t"]:
    """Per-token estimate of KL(π‖π_ref) from tokens that π sampled (Schulman 2020, "Approximating KL Divergence").

    With d = logps − ref_logps:   "k1"  d        "k2"  ½ d²        "k3"  exp(−d) + d − 1

    As a *number* (in the reward, or as a metric): k1 is unbiased and may be negative, k2 is biased, non-negative and of
    low variance, k3 is unbiased, non-negative and of low variance.

    As a *loss*, differentiated through logps on on-policy samples, they are not estimates of the same thing:
      k1  has expected gradient 0: it does nothing but add noise;
      k2  has the gradient of the reverse KL(π‖π_ref): the one to use;
      k3  has the gradient of the forward KL(π_ref‖π): π − π_ref in the logits.
    GRPO (Shao et al. 2024, arXiv:2402.03300 Eq. 4) puts k3 in the loss; PPO-RLHF (Ziegler et al. 2019,
    arXiv:1909.08593) and RLOO put k1 in the reward, where it is right. verl's "kl", "mse" and "low_var_kl" are k1, k2
    and k3; TRL's GRPO uses k3, its PPO k1 (`kl_estimator`).

    Raises UserError for an unknown estimator.
    """
    difference = as_float(logps) - as_float(ref_logps)
    match estimator:
        case "k1":
            return difference
        case "k2":
            return 0.5 * difference**2
        case "k3":
            return finite_expm1(-difference) + difference
    raise UserError(f'Unknown KL estimator {estimator!r}: choose "k1", "k2" or "k3".')


def _kl(logps: Array, other_logps: Array) -> Array:
    """Σ_v p log(p/q) over the last axis; impossible outcomes (p = 0) contribute 0, in the gradient too."""
    possible = logps > -jnp.inf
    logps, other_logps = jnp.where(possible, logps, 0.0), jnp.where(possible, other_logps, 0.0)
    return jnp.sum(jnp.where(possible, jnp.exp(logps) * (logps - other_logps), 0.0), axis=-1)


def _mixture(logps: Array, other_logps: Array, weight: Scalar) -> Array:
    """log((1 − weight)·p + weight·q)."""
    possible = jnp.maximum(logps, other_logps) > -jnp.inf
    logps, other_logps = jnp.where(possible, logps, 0.0), jnp.where(possible, other_logps, 0.0)
    return jnp.where(possible, jnp.logaddexp(jnp.log1p(-weight) + logps, jnp.log(weight) + other_logps), -jnp.inf)


def distillation_loss(
    student_logits: Real[ArrayLike, "b t v"],
    teacher_logits: Real[ArrayLike, "b t v"],
    *,
    divergence: str | tuple[str, Scalar],
    temperature: Scalar = 1.0,
) -> Float[Array, "b t"]:
    """Divergence between the teacher's and the student's next-token distributions, logits [b t v] -> [b t].

    S, T = softmax(logits / temperature) of student and teacher;   M = (1 − β) S + β T

    "forward_kl"   KL(T‖S): Hinton et al. 2015 (arXiv:1503.02531); mass-covering
    "reverse_kl"   KL(S‖T): MiniLLM, Gu et al. 2023 (arXiv:2306.08543); mode-seeking
    ("jsd", β)     β·KL(T‖M) + (1 − β)·KL(S‖M): GKD, Agarwal et al. 2023 (arXiv:2306.13649). It is 0 at β = 0 and 1;
                   divided by β (1 − β) it tends to the forward and the reverse KL there (which TRL's GKD takes)

    Both logits stand at the same positions: nothing is shifted, so position t is about token t + 1. There is no factor
    temperature² (Hinton's); multiply if you sweep the temperature. Raises UserError for an unknown divergence.
    """
    require_positive(temperature=temperature)
    student = log_softmax(as_float(student_logits) / temperature)
    teacher = log_softmax(as_float(teacher_logits) / temperature)
    match divergence:
        case "forward_kl":
            return _kl(teacher, student)
        case "reverse_kl":
            return _kl(student, teacher)
        case ("jsd", beta):
            mixture = _mixture(student, teacher, beta)
            return beta * _kl(teacher, mixture) + (1.0 - beta) * _kl(student, mixture)
    raise UserError(f'Unknown divergence {divergence!r}: choose "forward_kl", "reverse_kl" or ("jsd", β).')
