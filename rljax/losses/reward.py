"""Reward modelling: scores [b] or [b k] of responses to the same prompt -> loss [b]."""

import jax
from jax import Array
from jaxtyping import ArrayLike, Float, Integer, Real

from rljax.ops import Scalar, aligned_logps, as_float


def bradley_terry_loss(
    chosen: Real[ArrayLike, " b"], rejected: Real[ArrayLike, " b"], *, margin: Scalar | Real[ArrayLike, " b"] = 0.0
) -> Float[Array, " b"]:
    """−log σ(r_w − r_l − margin): the probability that the better response wins (Bradley & Terry 1952).

    chosen, rejected: scores [b]. margin 0 is Stiennon et al. 2020 (arXiv:2009.01325) and InstructGPT (arXiv:2203.02155
    Eq. 1); a margin per pair [b], larger for clearer preferences, is Llama 2's (arXiv:2307.09288 Eq. 2).
    """
    return -jax.nn.log_sigmoid(as_float(chosen) - as_float(rejected) - as_float(margin))


def best_of_k_loss(scores: Real[ArrayLike, "b k"], best: Integer[ArrayLike, " b"]) -> Float[Array, " b"]:
    """−log softmax(scores)[best]: which of k responses was picked (Ziegler et al. 2019, arXiv:1909.08593 Eq. 1; k = 4).

    scores: [b k]; best: index of the chosen response [b]. With k = 2 it is `bradley_terry_loss`.
    """
    return -aligned_logps(scores, best)
