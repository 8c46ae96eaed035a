"""Regression of a critic."""

import jax.numpy as jnp
from jax import Array
from jaxtyping import ArrayLike, Float, Real

from rljax.ops import Scalar, as_float


def value_clip_loss(
    values: Real[ArrayLike, "b t"], old_values: Real[ArrayLike, "b t"], returns: Real[ArrayLike, "b t"], *, clip: Scalar
) -> Float[Array, "b t"]:
    """½ max((V − R)², (V_clipped − R)²),   V_clipped = V_old + clip(V − V_old, ±clip).

    The pessimistic value loss of OpenAI's baselines and RLHF code (Ziegler et al. 2019, arXiv:1909.08593: clip = 0.2);
    it is not in the PPO paper. `clip=inf` is plain regression. The ½ is OpenAI's and TRL's, before their vf_coef.
    """
    values, old_values, returns = as_float(values), as_float(old_values), as_float(returns)
    clipped = old_values + jnp.clip(values - old_values, -clip, clip)
    return 0.5 * jnp.maximum((values - returns) ** 2, (clipped - returns) ** 2)
