"""Writes tests/models/fixtures: a small random checkpoint per family, and the logits that transformers gives for it.

    python -m tests.models.make_fixtures [NAME …]

needs torch, which the tests themselves do not. Every parameter is random (also biases and norms, which start at 0 and
1), windows are shorter than the text, soft-caps are reached, heads are grouped, and head sizes differ from
hidden/heads where that is legal.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "fixtures"
LENGTH, PADS, SPLIT = 20, 7, 8  # tokens in a row, left pads of the padded row, tokens of the first packed document
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 12,
}
GEMMA = {"head_dim": 12, "query_pre_attn_scalar": 9, "sliding_window": 5}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
# name -> (class in transformers, settings); "stored" and "shard" say how it is written
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {"head_dim": 12}),
    "llama_biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama_linear": (
        "LlamaForCausalLM",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}},
    ),
    "llama_llama3": ("LlamaForCausalLM", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama_yarn": ("LlamaForCausalLM", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", {"sliding_window": 5, "shard": "30KB"}),
    "qwen2": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 12, "tie_word_embeddings": True, "stored": "bfloat16"}),
    "gemma": ("GemmaForCausalLM", {"head_dim": 12}),
    "gemma2": ("Gemma2ForCausalLM", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": (
        "Gemma3ForCausalLM",
        {
            **GEMMA,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    ),
    "gemma3_vision": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**SMALL, **GEMMA, "model_type": "gemma3_text"},
            "vision_config": {**VISION, "model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
        },
    ),
    "gpt2": ("GPT2LMHeadModel", {"n_inner": 40}),
    "gpt_neox": ("GPTNeoXForCausalLM", {"rotary_pct": 0.5}),
    "gpt_neox_serial": ("GPTNeoXForCausalLM", {"use_parallel_residual": False, "hidden_act": "gelu_new"}),
    "phi3": ("Phi3ForCausalLM", {"partial_rotary_factor": 0.5, "sliding_window": 6}),
    "phi3_longrope": ("Phi3ForCausalLM", {"rope_parameters": LONG, "original_max_position_embeddings": 12}),
    "olmo2": ("Olmo2ForCausalLM", {}),
}


def random_model(architecture: str, settings: dict[str, Any], seed: int) -> Any:
    """A transformers model in float32 whose every parameter is random."""
    import torch
    import transformers

    torch.manual_seed(seed)
    settings = {key: value for key, value in settings.items() if key not in ("stored", "shard")}
    cls = getattr(transformers, architecture)
    if "text_config" not in settings:
        settings = {**SMALL, **settings}
    if architecture in ("GPT2LMHeadModel", "GPTNeoXForCausalLM"):  # no grouped heads
        settings.pop("num_key_value_heads", None)
    config = cls.config_class(**settings)
    config._attn_implementation = "eager"  # the one that knows soft-caps
    model = cls(config).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.3)
            else:
                norm = "norm" in name or "ln_" in name
                centre = 1.0 if norm and name.endswith("weight") and "Gemma" not in architecture else 0.0
                parameter.normal_(centre, 0.3)
    return model


def logits_of(model: Any, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """float32[b t v] of int[b t]; a mask (1 for real tokens) also sets the positions, as generate does."""
    import torch

    inputs = {"input_ids": torch.tensor(ids, dtype=torch.long)}
    if mask is not None:
        kept = torch.tensor(mask, dtype=torch.long)
        inputs |= {"attention_mask": kept, "position_ids": (kept.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits.float().numpy()


def golden(model: Any, vocabulary: int, seed: int) -> dict[str, np.ndarray]:
    """Inputs and logits: two full rows, one row with left pads, and two documents on their own."""
    ids = np.random.default_rng(seed).integers(3, vocabulary, (2, LENGTH)).astype(np.int32)
    mask = np.ones((1, LENGTH), np.int32)
    mask[:, :PADS] = 0
    return {
        "ids": ids,
        "logits": logits_of(model, ids),
        "padded": logits_of(model, ids[:1] * mask, mask)[:, PADS:],
        "first": logits_of(model, ids[:1, :SPLIT]),
        "second": logits_of(model, ids[:1, SPLIT:]),
    }


def write(name: str, folder: pathlib.Path, seed: int) -> None:
    import torch

    architecture, settings = CASES[name]
    model = random_model(architecture, settings, seed)
    if "stored" in settings:  # round the weights, but not the rotary frequencies, which are no parameters
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.data = parameter.to(getattr(torch, settings["stored"]))
    model.save_pretrained(folder, max_shard_size=settings.get("shard", "5GB"))
    np.savez_compressed(folder / "golden.npz", **golden(model.float(), SMALL["vocab_size"], seed))


def main(names: list[str]) -> None:
    for seed, name in enumerate(CASES):
        if not names or name in names:
            write(name, FOLDER / name, seed)
            print(name, sum(f.stat().st_size for f in (FOLDER / name).iterdir()) // 1000, "kB")


if __name__ == "__main__":
    main(sys.argv[1:])
