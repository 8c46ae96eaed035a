"""Policy gradients, per token: log-probs and advantages [b t] -> loss [b t], to be reduced by `ops.aggregate`.

Notation: ρ = exp(logps − old_logps), A the advantage. Everything but `logps` is data. An advantage of 0 (as at
untrained positions, which the caller zeroes) gives loss 0 and gradient 0. Ratios are exact up to e⁶² and finite beyond.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import ArrayLike, Bool, Float, Real

from rljax.ops import Scalar, as_float, finite_exp, sequence_mean, zero_where_masked


def _ratio(logps: Real[ArrayLike, "b t"], old_logps: Real[ArrayLike, "b t"]) -> Array:
    return finite_exp(as_float(logps) - as_float(old_logps))


def _sequence_ratio(
    logps: Real[ArrayLike, "b t"], old_logps: Real[ArrayLike, "b t"], mask: Bool[ArrayLike, "b t"]
) -> Array:
    """The geometric mean of a row's ratios, at each of its tokens."""
    difference = zero_where_masked(as_float(logps) - as_float(old_logps), mask)
    return jnp.broadcast_to(finite_exp(sequence_mean(difference, mask))[:, None], difference.shape)


def _terms(ratio: Array, advantages: Array, clip_low: Scalar, clip_high: Scalar) -> tuple[Array, Array]:
    """The loss without clipping, −ρA, and with the ratio clipped."""
    return -advantages * ratio, -advantages * jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)


def ppo_clip_loss(
    logps: Real[ArrayLike, "b t"],
    old_logps: Real[ArrayLike, "b t"],
    advantages: Real[ArrayLike, "b t"],
    *,
    clip_low: Scalar = 0.2,
    clip_high: Scalar = 0.2,
    dual_clip: Scalar | None = None,
) -> Float[Array, "b t"]:
    """PPO's clipped surrogate (Schulman et al. 2017, arXiv:1707.06347 Eq. 7), GRPO's and DAPO's policy term.

    loss = max(−ρA, −clip(ρ, 1 − clip_low, 1 + clip_high) A)

    The maximum is pessimistic: a token whose ratio moved in the *wrong* direction keeps its gradient. For A < 0 and
    ρ ≫ 1 the loss is unbounded; `dual_clip` c > 1 bounds it at c·|A| (Ye et al. 2020, arXiv:1912.09729; c = 3, verl's
    `clip_ratio_c`). clip_high > clip_low is DAPO's clip-higher (arXiv:2503.14476: 0.2, 0.28).
    """
    advantages = as_float(advantages)
    loss = jnp.maximum(*_terms(_ratio(logps, old_logps), advantages, clip_low, clip_high))
    if dual_clip is None:
        return loss
    return jnp.where(advantages < 0, jnp.minimum(loss, -advantages * dual_clip), loss)


def reinforce_loss(logps: Real[ArrayLike, "b t"], advantages: Real[ArrayLike, "b t"]) -> Float[Array, "b t"]:
    """−A · logps: the policy gradient itself (Williams 1992); RLOO with `advantages.leave_one_out` (arXiv:2402.14740).

    Its gradient is that of `ppo_clip_loss` at ρ = 1.
    """
    return -as_float(advantages) * as_float(logps)


def gspo_loss(
    logps: Real[ArrayLike, "b t"],
    old_logps: Real[ArrayLike, "b t"],
    advantages: Real[ArrayLike, "b t"],
    mask: Bool[ArrayLike, "b t"],
    *,
    clip_low: Scalar,
    clip_high: Scalar,
) -> Float[Array, "b t"]:
    """PPO's surrogate with one ratio per sequence (GSPO, Zheng et al. 2025, arXiv:2507.18071 Eq. 5-7).

    s = exp(mean_t(logps − old_logps)) over the mask;   loss = max(−sA, −clip(s, 1 − clip_low, 1 + clip_high) A)

    The sequence's loss stands at each of its trained tokens (0 elsewhere), so that "seq_mean_token_mean" of
    `ops.aggregate` is the paper's objective, with its gradient −s·A·mean_t ∇logps; "token_mean" weights sequences by
    their length. Paper: clip_low = 3e-4, clip_high = 4e-4, since a sequence's ratio moves far less than a token's.
    """
    ratio = _sequence_ratio(logps, old_logps, mask)
    loss = jnp.maximum(*_terms(ratio, zero_where_masked(advantages, mask), clip_low, clip_high))
    return zero_where_masked(loss, mask)


def cispo_loss(
    logps: Real[ArrayLike, "b t"],
    old_logps: Real[ArrayLike, "b t"],
    advantages: Real[ArrayLike, "b t"],
    *,
    clip_low: Scalar,
    clip_high: Scalar,
) -> Float[Array, "b t"]:
    """−sg(clip(ρ, 1 − clip_low, 1 + clip_high)) · A · logps (MiniMax-M1, arXiv:2506.13585 Eq. 4-5).

    REINFORCE with a clipped importance weight: every token keeps a gradient, −sg(clip(ρ)) A. clip_low ≥ 1 leaves the
    lower side open, as the paper does.
    """
    weight = jnp.clip(_ratio(logps, old_logps), 1.0 - clip_low, 1.0 + clip_high)
    return reinforce_loss(logps, jax.lax.stop_gradient(weight) * as_float(advantages))


def clip_fraction(
    logps: Real[ArrayLike, "b t"],
    old_logps: Real[ArrayLike, "b t"],
    advantages: Real[ArrayLike, "b t"],
    *,
    clip_low: Scalar,
    clip_high: Scalar,
    dual_clip: Scalar | None = None,
) -> Float[Array, "b t"]:
    """1 where `ppo_clip_loss` takes the clipped term (it is strictly larger, so the gradient is 0), else 0.

    Not |ρ − 1| > clip: a ratio that moved against its advantage is outside the range and not clipped. OpenAI's code and
    TRL count so (`policy/clipfrac_avg`). Where `dual_clip` bounds the loss, the gradient is 0 too.
    """
    ratio, advantages = _ratio(logps, old_logps), as_float(advantages)
    plain, clipped = _terms(ratio, advantages, clip_low, clip_high)
    flat = clipped > plain
    if dual_clip is not None:
        flat |= (advantages < 0) & (ratio > dual_clip)
    return flat.astype(plain.dtype)


def gspo_clip_fraction(
    logps: Real[ArrayLike, "b t"],
    old_logps: Real[ArrayLike, "b t"],
    advantages: Real[ArrayLike, "b t"],
    mask: Bool[ArrayLike, "b t"],
    *,
    clip_low: Scalar,
    clip_high: Scalar,
) -> Float[Array, "b t"]:
    """1 at the trained tokens of a sequence where `gspo_loss` takes the clipped term, else 0."""
    ratio = _sequence_ratio(logps, old_logps, mask)
    plain, clipped = _terms(ratio, zero_where_masked(advantages, mask), clip_low, clip_high)
    return (clipped > plain).astype(plain.dtype)
