"""Which shapes and batches the benchmarks measure. Imports nothing of the libraries: every side reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

PROMPT, NEW = 64, 64  # tokens of a prompt and of what follows it
FIGURES = ("dpo", "generate", "ppo-update", "ppo-iteration", "grpo-iteration")

SHAPES: dict[str, dict[str, Any]] = {
    "toy": {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_layers": 2, "num_heads": 4}
    | {"num_kv_heads": 2, "head_dim": 4, "tied": True},
    "tiny": {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 768, "num_layers": 6, "num_heads": 8}
    | {"num_kv_heads": 4, "head_dim": 32, "tied": True},
    "135M": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_layers": 30, "num_heads": 9}
    | {"num_kv_heads": 3, "head_dim": 64, "tied": True},  # SmolLM2-135M
    "1B": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_layers": 16, "num_heads": 32}
    | {"num_kv_heads": 8, "head_dim": 64, "tied": True},  # Llama-3.2-1B
    "8B": {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_layers": 32, "num_heads": 32}
    | {"num_kv_heads": 8, "head_dim": 128, "tied": False},  # Llama-3-8B
}


class Sizes(NamedTuple):
    """Rows of a batch."""

    sampled: int  # of `generate`
    ppo: int
    prompts: int  # of GRPO, each answered `group` times
    group: int
    pairs: int  # of DPO


SIZES = {
    "toy": Sizes(4, 4, 2, 2, 1),
    "tiny": Sizes(16, 16, 4, 4, 8),
    "135M": Sizes(16, 4, 2, 2, 2),
    "1B": Sizes(16, 16, 4, 4, 8),
    "8B": Sizes(16, 16, 4, 4, 8),
}


def sizes_of(shape: str, scale: int = 1) -> Sizes:
    """Every batch times `scale`; a group stays as large as it is."""
    s = SIZES[shape]
    return Sizes(scale * s.sampled, scale * s.ppo, scale * s.prompts, s.group, scale * s.pairs)


def weights(shape: Mapping[str, Any]) -> tuple[int, int]:
    """Weights in products of a token: (of all layers, of the unembedding)."""
    s = shape
    attention = 2 * s["hidden_size"] * s["head_dim"] * (s["num_heads"] + s["num_kv_heads"])
    layers = s["num_layers"] * (attention + 3 * s["hidden_size"] * s["intermediate_size"])
    return layers, s["hidden_size"] * s["vocab_size"]
