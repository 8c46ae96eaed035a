"""Learning from demonstrations."""

from jax import Array
from jaxtyping import ArrayLike, Float, Real

from rljax.ops import as_float


def nll_loss(logps: Real[ArrayLike, "*s"]) -> Float[Array, "*s"]:
    """−logps, per token [b t] or per response [b]: the loss of SFT, and the other term of ORPO, CPO and SLiC."""
    return -as_float(logps)
