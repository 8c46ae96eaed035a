"""The losses, as mathematics: arrays in, unreduced arrays out; no model, no batch, no mean.

Arrays are positional, hyper-parameters keyword-only. Per-token losses are `[b t]`: reduce them with `ops.aggregate`.
Losses of whole responses are `[b]`. Everything computes in float32 at least. What is not differentiated is data: only
`cispo_loss` and `kto_loss` stop a gradient. A loss without a mask wants inputs zeroed at untrained positions.
"""

from rljax.losses.kl import distillation_loss, kl_penalty
from rljax.losses.policy import (
    cispo_loss,
    clip_fraction,
    gspo_clip_fraction,
    gspo_loss,
    ppo_clip_loss,
    reinforce_loss,
)
from rljax.losses.preference import (
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    cpo_loss,
    discopop_loss,
    dpo_loss,
    exo_loss,
    f_dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    nca_loss,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
    slic_loss,
    sppo_loss,
    unlikelihood_loss,
)
from rljax.losses.reward import best_of_k_loss, bradley_terry_loss
from rljax.losses.supervised import nll_loss
from rljax.losses.value import value_clip_loss

__all__ = [
    "apo_down_loss",
    "apo_zero_loss",
    "bco_loss",
    "best_of_k_loss",
    "bradley_terry_loss",
    "cispo_loss",
    "clip_fraction",
    "cpo_loss",
    "discopop_loss",
    "distillation_loss",
    "dpo_loss",
    "exo_loss",
    "f_dpo_loss",
    "gspo_clip_fraction",
    "gspo_loss",
    "hinge_loss",
    "ipo_loss",
    "kl_penalty",
    "kto_loss",
    "nca_loss",
    "nll_loss",
    "orpo_loss",
    "ppo_clip_loss",
    "reinforce_loss",
    "robust_dpo_loss",
    "simpo_loss",
    "slic_loss",
    "sppo_loss",
    "unlikelihood_loss",
    "value_clip_loss",
]
