"""Models as bundles of pure functions. The only package that knows Flax."""

from rljax.models.cache import Cache, init_cache, repeat_cache
from rljax.models.config import COMPUTED, ModelConfig, Rope
from rljax.models.heads import Head, ScalarModel, normalize_head, reward_model, scalar_head
from rljax.models.rules import RULES
from rljax.models.shared import share_prompts
from rljax.models.transformer import build, unstack

__all__ = [
    "COMPUTED",
    "RULES",
    "Cache",
    "Head",
    "ModelConfig",
    "Rope",
    "ScalarModel",
    "build",
    "init_cache",
    "normalize_head",
    "repeat_cache",
    "reward_model",
    "scalar_head",
    "share_prompts",
    "unstack",
]
