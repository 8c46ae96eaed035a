"""What distinguishes one decoder family from another, as values: the model itself has no families."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position frequencies: a base and how it is stretched for long contexts."""

    theta: float = 10_000.0
    kind: Literal["default", "linear", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    attention_factor: float = 1.0  # multiplies cos and sin (yarn, longrope)
    short_factor: tuple[float, ...] = ()  # longrope, up to original_max_positions
    long_factor: tuple[float, ...] = ()  # longrope, beyond


# Fields that say how a model is computed, not what it is.
COMPUTED = ("compute_dtype", "attention", "remat", "unroll", "longest_row")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Frozen and hashable, so it can be a static argument of `jit`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int

    # positions
    learned_positions: bool = False  # GPT-2: a table instead of rotation
    rotary_dim: int = 0  # how much of head_dim rotates (0: all of it); GPT-NeoX and Phi rotate a part
    ropes: tuple[Rope, ...] = (Rope(),)
    rope_of_layer: tuple[int, ...] = ()  # index into ropes (empty: 0 everywhere); Gemma 3 has a local and a global one

    # attention
    windows: tuple[int, ...] = ()  # tokens each layer sees, itself included; 0 is all (empty: all everywhere)
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None
    qk_norm: Literal["none", "head", "full"] = "none"  # per head (Qwen3, Gemma 3) or over all heads at once (OLMo-2)
    qkv_bias: bool = False
    out_bias: bool = False

    # block
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # Gemma scales by 1 + weight
    pre_norm: bool = True
    post_norm: bool = False  # OLMo-2 norms only after, Gemma 2 and 3 before and after
    parallel_residual: bool = False  # GPT-NeoX: attention and MLP read the same input
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    gated: bool = True
    mlp_bias: bool = False

    # ends
    embed_scale: float = 1.0  # Gemma: sqrt(hidden_size)
    tied: bool = True
    final_softcap: float | None = None

    # how to run it: changes speed and rounding, not the model
    compute_dtype: str = "float32"
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"  # of rows without a cache: see `models.kernels`
    remat: Literal["none", "dots", "full"] = "none"
    longest_row: int | None = None  # tokens: all rows get the factors of LongRoPE that it gets; None: by slots
    unroll: int | None = None  # layers per step of the scan; num_layers removes the loop; None: see `layers_at_once`

    # where it came from: config.json as read, so that saving gives it back
    source: str = ""
