"""Objectives: pure losses bound to a model, as `LossFn`s that a training step can differentiate."""

from rljax.objectives.offline import (
    comparison,
    pair_logps,
    preference,
    real_rows,
    reward_scale,
    sequence_logps,
    supervised,
    unpaired,
)
from rljax.objectives.online import clipped_tokens, is_ratio_loss, policy, surrogate_inputs

__all__ = [
    "clipped_tokens",
    "comparison",
    "is_ratio_loss",
    "pair_logps",
    "policy",
    "preference",
    "real_rows",
    "reward_scale",
    "sequence_logps",
    "supervised",
    "surrogate_inputs",
    "unpaired",
]
