"""Scores before they become rewards: what replaces, penalises, clips and normalises the judgement of a completion.

Pure functions of scores `[b]`, one a row; a NaN score (no reward applies) stays NaN in its row and touches no other. KL
in the reward is `advantages.shape_rewards`, whitening is `ops.masked_whiten`. Everything computes in float32 at least;
float64 stays float64.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import ArrayLike, Bool, Float, Real

from rljax.errors import UserError
from rljax.ops import Scalar, as_float, require_positive, zero_where_masked
from rljax.types import pytree


def replace_unfinished(
    scores: Real[ArrayLike, " b"], finished: Bool[ArrayLike, " b"], *, value: Scalar = -1.0
) -> Float[Array, " b"]:
    """The score, and `value` for a completion that did not end by itself: the EOS trick, [b].

    A reward model is trained on texts that end, so its score of one that was cut off means nothing: OpenAI's runs put
    −1 in its place (Ziegler et al. 2019, arXiv:1909.08593; Huang et al. 2024, arXiv:2403.17031, detail 18). −1 is below
    most scores when these have mean 0 and std 1 (`standardize`).
    """
    scores = as_float(scores)
    return jnp.where(jnp.asarray(finished) | jnp.isnan(scores), scores, value)


def penalize_unfinished(
    scores: Real[ArrayLike, " b"], finished: Bool[ArrayLike, " b"], *, penalty: Scalar = 1.0
) -> Float[Array, " b"]:
    """The score, minus `penalty` for a completion that did not end by itself, [b]: TRL's `missing_eos_penalty`."""
    scores = as_float(scores)
    return jnp.where(jnp.asarray(finished), scores, scores - penalty)


def overlong_penalty(lengths: Real[ArrayLike, " b"], *, max_length: Scalar, buffer: Scalar) -> Float[Array, " b"]:
    """What is added to the score of a long completion: DAPO's soft overlong punishment, [b] in [−1, 0].

         0                                     |y| ≤ max_length − buffer
        ((max_length − buffer) − |y|) / buffer  up to max_length
        −1                                     beyond

    Yu et al. 2025 (arXiv:2503.14476), Eq. 13, with max_length 20 480 and buffer 4 096. lengths: tokens of the
    completions. A completion that the budget `max_new_tokens` cut has that length: −1 where max_length is the budget.
    """
    require_positive(buffer=buffer)
    return jnp.clip((max_length - buffer - as_float(lengths)) / buffer, -1.0, 0.0)


def clip_scores(scores: Real[ArrayLike, " b"], *, low: Scalar, high: Scalar) -> Float[Array, " b"]:
    """The score, limited to [low, high]: no single row can dominate a batch, [b]. UserError where low > high."""
    if isinstance(low, int | float) and isinstance(high, int | float) and low > high:
        raise UserError(f"clip_scores: low={low} is above high={high}, so that nothing is left; exchange them.")
    return jnp.clip(as_float(scores), low, high)


def standardize(scores: Real[ArrayLike, " b"], *, mean: Scalar, std: Scalar) -> Float[Array, " b"]:
    """(score − mean) / std, [b]: reference normalisation (Ziegler et al. 2019, arXiv:1909.08593, section 2.1).

    mean and std are those of the scores of reference samples (the initial policy's completions of the prompts), which
    so get mean 0 and std 1, once, before training: a KL coefficient then means the same for every reward.
    """
    require_positive(std=std)
    return (as_float(scores) - mean) / std


def worst_case(scores: Real[ArrayLike, "m b"]) -> Float[Array, " b"]:
    """The smallest of m reward models' scores, [b]: WCO (Coste et al. 2023, arXiv:2310.02743, Eq. 4)."""
    return jnp.min(as_float(scores), axis=0)


def uncertainty_weighted(scores: Real[ArrayLike, "m b"], *, coef: Scalar) -> Float[Array, " b"]:
    """mean − coef · variance over m reward models' scores, [b]: UWO (Coste et al. 2023, arXiv:2310.02743, Eq. 5).

    The variance is the population's (ddof = 0). coef 0 is the plain mean.
    """
    scores = as_float(scores)
    return jnp.mean(scores, axis=0) - coef * jnp.var(scores, axis=0)


# --- running statistics -----------------------------------------------------------------------------------------------


@pytree
class Moments:
    """Count, mean and sum of squared deviations of all scores so far. State of a run: it goes into its checkpoint."""

    count: Array  # f[]
    mean: Array  # f[]
    squares: Array  # f[]; Σ (x − mean)²

    def variance(self) -> Array:
        """Of the scores so far (biased, ddof = 0); 0 where there are none."""
        return self.squares / jnp.maximum(self.count, 1.0)


def init_moments() -> Moments:
    """Nothing seen yet."""
    return Moments(count=jnp.zeros(()), mean=jnp.zeros(()), squares=jnp.zeros(()))


def update_moments(moments: Moments, x: Real[ArrayLike, "*s"], mask: Bool[ArrayLike, "*s"]) -> Moments:
    """The moments with the scores x (where the mask is True) taken in.

        δ = mean_x − mean,   n = count + n_x
        mean ← mean + δ n_x / n,   squares ← squares + squares_x + δ² count n_x / n

    Chan, Golub & LeVeque 1983 (doi:10.1080/00031305.1983.10483115), Eq. 2.1: exact, in whatever batches the scores
    come, and without the cancellation of Σx² − (Σx)²/n.
    """
    mask, x = jnp.ravel(jnp.asarray(mask)), jnp.ravel(zero_where_masked(x, mask))
    here = jnp.sum(mask, dtype=moments.count.dtype)
    some = x[jnp.argmax(mask)]  # deviations from one of them: equal scores have variance 0, and not a rounding error
    mean = some + jnp.sum(jnp.where(mask, x - some, 0.0)) / jnp.maximum(here, 1.0)
    squares = jnp.sum(jnp.where(mask, (x - mean) ** 2, 0.0))
    count = moments.count + here
    share, shift = here / jnp.maximum(count, 1.0), mean - moments.mean
    return Moments(
        count=count,
        mean=moments.mean + shift * share,
        squares=moments.squares + squares + shift**2 * moments.count * share,
    )


def running_normalize(
    scores: Real[ArrayLike, " b"], moments: Moments, *, shift_mean: bool = False, eps: Scalar = 1e-8
) -> Float[Array, " b"]:
    """score / √(var + eps), and (score − mean) / √(var + eps) with `shift_mean`, [b], of the moments so far.

    Take the batch into the moments first (`update_moments`). Without shifting the mean as PPO's codes do, which divide
    by a running std (Engstrom et al. 2020, arXiv:2005.12729, section 3, "reward scaling"). While all scores so far are
    equal their variance says nothing, and the scale is 1.
    """
    scores, variance = as_float(scores), moments.variance()
    scale = jnp.where(variance > 0, 1.0 / jnp.sqrt(jnp.where(variance > 0, variance + eps, 1.0)), 1.0)
    return (scores - moments.mean if shift_mean else scores) * scale
