"""The handful of rules that turn a `config.json` into a ModelConfig, per family.

Defaults of fields that `config.json` leaves out, and both spellings of those that were renamed (`rope_theta` and
`rope_parameters`), come from the config classes of `transformers`; nothing from a checkpoint is ever executed.
Each rule takes such a config object and gives the fields of ModelConfig that `common` does not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from rljax.errors import UserError
from rljax.models.config import Rope

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


def _activation(name: str) -> str:
    if name not in _ACTIVATIONS:
        raise UserError(
            f"config.json asks for the activation {name!r}; supported are {', '.join(sorted(_ACTIVATIONS))}."
        )
    return _ACTIVATIONS[name]


def _attention_factor(kind: str, given: Mapping[str, Any], factor: float, original: int) -> float:
    """Sharper attention for longer contexts, as transformers has it (YaRN, arXiv:2309.00071; LongRoPE, 2402.13753)."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))

    def mscale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return mscale(given["mscale"]) / mscale(given["mscale_all_dim"])
    return mscale(1.0)


def _rope(given: Mapping[str, Any], max_positions: int) -> Rope:
    kind = given.get("rope_type") or given.get("type") or "default"
    rope = Rope(theta=float(given["rope_theta"]))
    if kind == "default":
        return rope
    if kind not in ("linear", "llama3", "yarn", "longrope"):
        raise UserError(
            f"config.json asks for RoPE scaling {kind!r}; supported are default, linear, llama3, yarn and longrope."
        )
    original = int(given.get("original_max_position_embeddings") or max_positions)
    factor = float(given.get("factor") or max_positions / original)
    rope = dataclasses.replace(rope, kind=kind, factor=factor)
    if kind == "linear":
        return rope
    rope = dataclasses.replace(rope, original_max_positions=original)
    if kind == "llama3":
        low, high = float(given["low_freq_factor"]), float(given["high_freq_factor"])
        return dataclasses.replace(rope, low_freq_factor=low, high_freq_factor=high)
    rope = dataclasses.replace(rope, attention_factor=_attention_factor(kind, given, factor, original))
    if kind == "longrope":
        short, long = (tuple(map(float, given[name])) for name in ("short_factor", "long_factor"))
        return dataclasses.replace(rope, short_factor=short, long_factor=long)
    fast, slow = float(given.get("beta_fast") or 32), float(given.get("beta_slow") or 1)
    return dataclasses.replace(rope, beta_fast=fast, beta_slow=slow, truncate=bool(given.get("truncate", True)))


def _positions(c: Any, head_dim: int) -> dict[str, Any]:
    """Rotation: one set of frequencies, or (Gemma 3) one per kind of layer."""
    given = getattr(c, "rope_parameters", None)
    if not given:
        return {}
    length = c.max_position_embeddings
    kinds = sorted(set(c.layer_types)) if "full_attention" in given or "sliding_attention" in given else []
    if kinds:
        ropes, layers = tuple(_rope(given[kind], length) for kind in kinds), tuple(map(kinds.index, c.layer_types))
        return {"ropes": ropes, "rope_of_layer": layers if len(kinds) > 1 else ()}
    rotated = int(head_dim * given.get("partial_rotary_factor", 1.0))
    rotated += rotated % 2  # as transformers: an odd width is rounded up to whole pairs
    return {"ropes": (_rope(given, length),), "rotary_dim": 0 if rotated == head_dim else rotated}


def _windows(c: Any, *, typed: bool) -> tuple[int, ...]:
    """Sliding windows: of the layers that `layer_types` calls sliding, or of all."""
    if not getattr(c, "sliding_window", None):
        return ()
    kinds = c.layer_types if typed else ["sliding_attention"] * c.num_hidden_layers
    unknown = set(kinds) - {"sliding_attention", "full_attention"}
    if unknown:
        raise UserError(f"config.json has layer_types {sorted(unknown)}; supported: full_attention, sliding_attention.")
    windows = tuple(c.sliding_window if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else ()


def common(c: Any) -> dict[str, Any]:
    """What every family says in the same way."""
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_layers": c.num_hidden_layers,
        "num_heads": c.num_attention_heads,
        "num_kv_heads": getattr(c, "num_key_value_heads", None) or c.num_attention_heads,
        "head_dim": head_dim,
        "max_positions": c.max_position_embeddings,
        "tied": bool(c.tie_word_embeddings),
        **_positions(c, head_dim),
    }


def llama(c: Any, *, activation: str = "hidden_act") -> dict[str, Any]:
    """RMS norms before, a gated MLP, and biases where the config has switches for them."""
    bias = bool(getattr(c, "attention_bias", False))
    return {
        "intermediate_size": c.intermediate_size,
        "norm_eps": c.rms_norm_eps,
        "activation": _activation(getattr(c, activation)),
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bool(getattr(c, "mlp_bias", False)),
    }


def mistral(c: Any) -> dict[str, Any]:
    return {**llama(c), "qkv_bias": False, "out_bias": False, "mlp_bias": False, "windows": _windows(c, typed=False)}


def qwen2(c: Any) -> dict[str, Any]:
    return {**llama(c), "qkv_bias": True, "out_bias": False, "mlp_bias": False, "windows": _windows(c, typed=True)}


def qwen3(c: Any) -> dict[str, Any]:
    return {**llama(c), "mlp_bias": False, "qk_norm": "head", "windows": _windows(c, typed=True)}


def gemma(c: Any, *, activation: str = "hidden_act") -> dict[str, Any]:
    if getattr(c, "use_bidirectional_attention", None):
        raise UserError(
            "config.json sets use_bidirectional_attention: this is an encoder; only decoders are supported."
        )
    return {
        **llama(c, activation=activation),
        "mlp_bias": False,
        "norm_offset": 1.0,
        "embed_scale": math.sqrt(c.hidden_size),
    }


def gemma2(c: Any) -> dict[str, Any]:
    return {
        **gemma(c, activation="hidden_activation"),
        "post_norm": True,
        "attention_scale": c.query_pre_attn_scalar**-0.5,
        "attention_softcap": c.attn_logit_softcapping,
        "final_softcap": c.final_logit_softcapping,
        "windows": _windows(c, typed=True),
    }


def gemma3(c: Any) -> dict[str, Any]:
    return {**gemma2(c), "qk_norm": "head"}


def olmo2(c: Any) -> dict[str, Any]:
    return {**llama(c), "mlp_bias": False, "pre_norm": False, "post_norm": True, "qk_norm": "full"}


def _equal_heads(c: Any) -> dict[str, Any]:
    """Families without grouped heads ignore the fields of those that have them."""
    return {"num_kv_heads": c.num_attention_heads, "head_dim": c.hidden_size // c.num_attention_heads}


def neox(c: Any) -> dict[str, Any]:
    return {
        **_equal_heads(c),
        "intermediate_size": c.intermediate_size,
        "norm": "layer",
        "norm_eps": c.layer_norm_eps,
        "activation": _activation(c.hidden_act),
        "gated": False,
        "qkv_bias": bool(c.attention_bias),
        "out_bias": bool(c.attention_bias),
        "mlp_bias": True,
        "parallel_residual": bool(c.use_parallel_residual),
    }


def gpt2(c: Any) -> dict[str, Any]:
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if getattr(c, name):
            raise UserError(f"config.json sets {name}, which is not supported for GPT2LMHeadModel.")
    return {
        **_equal_heads(c),
        "intermediate_size": c.n_inner or 4 * c.n_embd,
        "learned_positions": True,
        "norm": "layer",
        "norm_eps": c.layer_norm_epsilon,
        "activation": _activation(c.activation_function),
        "gated": False,
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
        "attention_scale": None if c.scale_attn_weights else 1.0,
    }
