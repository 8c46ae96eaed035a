"""Log-probabilities, entropy, and statistics of masked arrays: what every loss and estimator is built from.

Every per-token array is `[b t]` and is indexed by the token that it describes. `token_logps` and `entropy` shift the
logits by one to get there; nothing else ever shifts. A function with a mask reads nothing where the mask is False
(garbage, inf and NaN included) and returns 0 there. Everything computes in float32 at least; float64 stays float64.
"""

import math
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import ArrayLike, Bool, Float, Integer, Real

from rljax.errors import UserError
from rljax.types import Mean

if TYPE_CHECKING:
    Scalar = float | Array
else:
    Scalar = Real[ArrayLike, ""]  # a hyper-parameter: a Python number, or a traced one when `vmap` runs over it


def require_positive(**values: Scalar) -> None:
    """Raise UserError for a hyper-parameter that a formula divides by and that is not above 0 (traced ones pass)."""
    for name, value in values.items():
        if isinstance(value, int | float) and not value > 0:
            raise UserError(f"{name} is {value}, and the formula divides by it: pass a {name} above 0.")


def as_float(x: Real[ArrayLike, "..."]) -> Float[Array, "..."]:
    """x in float32 at least: bfloat16, float16 and integers become float32, float64 stays."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def zero_where_masked(x: Real[ArrayLike, "*s"], mask: Bool[ArrayLike, "*s"]) -> Float[Array, "*s"]:
    """x in float32 at least, and 0 where the mask is False.

    For the inputs of an exp, not only its outputs: 0 · inf is NaN, in the gradient too.
    """
    return jnp.where(mask, as_float(x), 0.0)


def finite_expm1(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """exp(x) − 1, with finite values and gradients: its tangent continues it above 0.7·log(max) (62 in float32).

    A ratio of sequence probabilities overflows float32 at 88 nats; inf · 0 is NaN, and a clamp would hide the gradient
    just where it is largest. Exact everywhere below the bound.
    """
    bound = 0.7 * math.log(float(jnp.finfo(x.dtype).max))
    return jnp.expm1(jnp.minimum(x, bound)) + math.exp(bound) * jax.nn.relu(x - bound)


def finite_exp(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """exp(x), with the finite values and gradients of `finite_expm1`."""
    bound = 0.7 * math.log(float(jnp.finfo(x.dtype).max))
    return jnp.exp(jnp.minimum(x, bound)) + math.exp(bound) * jax.nn.relu(x - bound)


# The logarithm of a softmax, exact where a token is nearly certain: log Σ exp(x − max) is log1p of the terms other than
# the largest one, since 1 + 1e-8 is 1 in float32. Backward passes keep the logits as they came and [b t] numbers, and
# form the softmax again where it is used: plain autodiff would keep a float32 [b t v].


def _peak(logits: Array) -> Array:
    """The largest logit, [… 1]; 0 where none is finite."""
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    return jnp.where(jnp.isfinite(peak), peak, 0.0)


def _is(ids: Array, logits: Array) -> Array:
    return ids[..., None] == jax.lax.broadcasted_iota(ids.dtype, logits.shape, logits.ndim - 1)


def _chosen(logits: Array, ids: Array) -> tuple[Array, Array, Array]:
    """(log softmax(logits)[ids], log Σ exp(logits − max), max [… 1]). One sum over the vocabulary, without the chosen:
    log1p(Σ_{v ≠ id} exp d_v + exp d_id − 1), d = logits − max, is exact whenever the chosen token is the likeliest.
    """
    taken = jnp.take_along_axis(logits, ids[..., None], axis=-1, mode="fill", fill_value=jnp.nan)
    logits, peak = as_float(logits), _peak(as_float(logits))
    below = (as_float(taken) - peak)[..., 0]
    others = jnp.sum(jnp.where(_is(ids, logits), 0.0, jnp.exp(logits - peak)), axis=-1)
    size = jnp.log1p(others + jnp.expm1(below))
    return below - size, size, peak


@jax.custom_jvp
def _chosen_logps(logits: Array, ids: Array) -> Array:
    return _chosen(logits, ids)[0]


@jax.checkpoint
def _others_dot(logits: Array, ids: Array, size: Array, peak: Array, moved: Array) -> Array:
    p = jnp.where(_is(ids, logits), 0.0, jnp.exp((as_float(logits) - peak) - size[..., None]))
    return jnp.sum(p * as_float(moved), axis=-1)


@_chosen_logps.defjvp
def _chosen_logps_jvp(primals, tangents):
    logits, ids = primals
    logps, size, peak = _chosen(logits, ids)
    own = jnp.take_along_axis(tangents[0], ids[..., None], axis=-1, mode="fill", fill_value=0.0)[..., 0]
    return logps, -jnp.expm1(logps) * as_float(own) - _others_dot(logits, ids, size, peak, tangents[0])


def aligned_logps(logits: Real[ArrayLike, "*s v"], ids: Integer[ArrayLike, "*s"]) -> Float[Array, "*s"]:
    """log softmax(logits)[ids], for logits that already stand at the token they predict (no shift).

    Exact to rounding for nearly certain tokens too, as is the gradient, 1 − p at the token itself. No float32 array
    with a vocabulary axis outlives the call, backward pass included. An id beyond the vocabulary gives NaN, not a wrong
    token's number.
    """
    return _chosen_logps(jnp.asarray(logits), jnp.asarray(ids))


@jax.custom_jvp
def log_softmax(logits: Real[ArrayLike, "*s v"]) -> Float[Array, "*s v"]:
    """log softmax(logits) over the last axis, exact to rounding where one of them is nearly certain."""
    below = as_float(logits) - _peak(as_float(logits))
    ties = jnp.sum(below == 0, axis=-1, keepdims=True) - 1
    return below - jnp.log1p(jnp.sum(jnp.where(below == 0, 0.0, jnp.exp(below)), axis=-1, keepdims=True) + ties)


@log_softmax.defjvp
def _log_softmax_jvp(primals, tangents):
    logps, moved = log_softmax(*primals), as_float(tangents[0])
    return logps, moved - jnp.sum(jnp.exp(logps) * moved, axis=-1, keepdims=True)


@jax.custom_jvp
def _entropy(logits: Array) -> Array:
    logps = log_softmax(logits)
    return -jnp.sum(jnp.where(logps > -jnp.inf, jnp.exp(logps) * logps, 0.0), axis=-1)


@jax.checkpoint
def _entropy_slope(logits: Array, entropy: Array, moved: Array) -> Array:
    logps = log_softmax(logits)
    slope = jnp.where(logps > -jnp.inf, jnp.exp(logps) * (logps + entropy[..., None]), 0.0)
    return -jnp.sum(slope * as_float(moved), axis=-1)


@_entropy.defjvp
def _entropy_jvp(primals, tangents):
    entropy = _entropy(*primals)
    return entropy, _entropy_slope(*primals, entropy, *tangents)


def aligned_entropy(logits: Real[ArrayLike, "*s v"]) -> Float[Array, "*s"]:
    """−Σ_v p log p in nats, p = softmax(logits), for logits that already stand at the token they predict (no shift).

    Exact to rounding where one token is nearly certain.
    """
    return _entropy(jnp.asarray(logits))


def token_logps(logits: Real[ArrayLike, "b t v"], ids: Integer[ArrayLike, "b t"]) -> Float[Array, "b t"]:
    """The log-probability of each token given those before it: the place that shifts.

    out[:, t] = log softmax(logits[:, t-1])[ids[:, t]],   out[:, 0] = 0

    For the distribution at temperature T pass `logits / T`.
    """
    return jnp.pad(aligned_logps(jnp.asarray(logits)[:, :-1], jnp.asarray(ids)[:, 1:]), ((0, 0), (1, 0)))


def entropy(logits: Real[ArrayLike, "b t v"]) -> Float[Array, "b t"]:
    """Entropy (nats) of the distribution that each token is drawn from.

    out[:, t] = −Σ_v p log p,  p = softmax(logits[:, t-1]),   out[:, 0] = 0
    """
    return jnp.pad(aligned_entropy(jnp.asarray(logits)[:, :-1]), ((0, 0), (1, 0)))


def sequence_sum(x: Real[ArrayLike, "b t"], mask: Bool[ArrayLike, "b t"]) -> Float[Array, " b"]:
    """Σ_t x over the trained tokens of each row; 0 for an empty row."""
    return jnp.sum(zero_where_masked(x, mask), axis=1)


def sequence_mean(x: Real[ArrayLike, "b t"], mask: Bool[ArrayLike, "b t"]) -> Float[Array, " b"]:
    """Mean of x over the trained tokens of each row; 0 for an empty row (the denominator is at least 1)."""
    return sequence_sum(x, mask) / jnp.maximum(jnp.sum(jnp.asarray(mask), axis=1), 1)


def masked_mean(x: Real[ArrayLike, "*s"], mask: Bool[ArrayLike, "*s"]) -> Mean:
    """Σ x over the mask, and how many elements that is: a mean that is still a sum (`.value()` divides)."""
    total = jnp.sum(zero_where_masked(x, mask))
    return Mean(total=total, weight=jnp.sum(jnp.asarray(mask), dtype=total.dtype))


def masked_whiten(
    x: Real[ArrayLike, "b t"],
    mask: Bool[ArrayLike, "b t"],
    *,
    shift_mean: bool = True,
    ddof: int = 1,
    eps: Scalar = 1e-8,
) -> Float[Array, "b t"]:
    """Scale the trained tokens to unit variance, and with `shift_mean` to mean 0; 0 where the mask is False.

        out = (x − μ) / √(var + eps)  (+ μ without shift_mean),   var = Σ (x − μ)² / (n − ddof)

    μ, var and n are over the whole mask. One element has variance 0 for either ddof. Rewards are whitened without
    shifting the mean, advantages with. ddof=1 is TRL's `masked_whiten`; ddof=0 is `tf.nn.moments`, as in OpenAI's code
    (Ziegler et al. 2019, arXiv:1909.08593; Huang et al. 2024, arXiv:2403.17031). Both put eps inside the square root.
    """
    mask = jnp.asarray(mask)
    x, n = zero_where_masked(x, mask), jnp.sum(mask)
    mean = jnp.sum(x) / jnp.maximum(n, 1)
    centred = jnp.where(mask, x - mean, 0.0)
    variance = jnp.sum(centred**2) / jnp.maximum(n - ddof, 1) + eps
    whitened = centred * jnp.where(variance > 0, jax.lax.rsqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)
    return jnp.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def best_of_n(values: Real[ArrayLike, " s"], by: Real[ArrayLike, " s"], *, n: int) -> Float[Array, ""]:
    """The expected value of the best of n, by all ways to choose n of these samples (Nakano et al. 2021,
    arXiv:2112.09332, appendix I; Gao et al. 2022, arXiv:2210.10760).

    Σ_i C(i − 1, n − 1) / C(s, n) · value_i,   i = 1 … s the rank of `by`, n ≤ s

    values: what is averaged, such as gold rewards. by: what decides, such as proxy rewards; of equal ones the later is
    taken for the better. Raises UserError for n < 1 or n > s.
    """
    values, s = as_float(values), jnp.shape(values)[0]
    if not 1 <= n <= s:
        raise UserError(f"best_of_n takes the best of n={n} out of {s} samples: n must be from 1 to their number")
    below = jnp.arange(s - 1, -1, -1)  # i − 1, from the best down
    # the weight of rank i is n/s at the top, and (i − n)/(i − 1) of that above it below
    ratios = jnp.log(jnp.maximum(below[:-1] - (n - 1), 0) / jnp.maximum(below[:-1], 1))
    weights = n / s * jnp.exp(jnp.concatenate([jnp.zeros(1, values.dtype), jnp.cumsum(ratios)]))
    return jnp.vdot(weights, values[jnp.argsort(jnp.asarray(by))[::-1]])


def aggregate(
    x: Real[ArrayLike, "b t"],
    mask: Bool[ArrayLike, "b t"],
    *,
    mode: str,
    length: Scalar | None = None,
    rows: Bool[ArrayLike, " b"] | None = None,
) -> Mean:
    """A per-token loss to the sum and weight that the update divides; the modes of policy-gradient papers.

    "token_mean"           Σ x / number of tokens: DAPO (arXiv:2503.14476), TRL's "dapo", PPO in OpenAI's code
    "seq_mean_token_mean"  mean over rows of the row's mean: GRPO (arXiv:2402.03300 Eq. 3), TRL's "grpo", GSPO
    "seq_mean_token_sum"   mean over rows of the row's sum: REINFORCE and RLOO on whole completions (arXiv:2402.14740)
    "constant"             Σ x / (b · length): Dr. GRPO (arXiv:2503.20783), TRL's "dr_grpo"; length is the token budget

    An empty row has sum and mean 0 and still counts as a row, unless `rows` says which do. `length` is read by
    "constant" only.
    Raises UserError for an unknown mode, or for "constant" without length.
    """
    tokens = masked_mean(x, mask)
    count = jnp.asarray(jnp.shape(x)[0] if rows is None else jnp.sum(jnp.asarray(rows)), tokens.weight.dtype)
    match mode:
        case "token_mean":
            return tokens
        case "seq_mean_token_mean":
            return Mean(total=jnp.sum(sequence_mean(x, mask)), weight=count)
        case "seq_mean_token_sum":
            return Mean(total=tokens.total, weight=count)
        case "constant" if length is not None:
            return Mean(total=tokens.total, weight=count * length)
        case "constant":
            raise UserError('aggregate mode "constant" divides by rows · length: pass length=, e.g. max_new_tokens.')
    modes = '"token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant"'
    raise UserError(f"Unknown aggregate mode {mode!r}: choose one of {modes}.")
