"""Writes tests/models/fixtures/encoder_*: small random encoders, and what transformers computes with them.

    python -m tests.models.make_encoder_fixtures [NAME …]

needs torch, which the tests themselves do not. Every parameter is random, also biases and norms, whose epsilon is
large enough to be noticed.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from tests.models.make_fixtures import FOLDER

LENGTHS = (12, 7, 1)  # tokens of the rows; right pads, as transformers has them
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 20,
    "layer_norm_eps": 1e-3,
}
DISTIL: dict[str, Any] = {
    "vocab_size": 64,
    "dim": 24,
    "hidden_dim": 40,
    "n_layers": 2,
    "n_heads": 3,
    "max_position_embeddings": 20,
}
ROBERTA: dict[str, Any] = {**SIZES, "pad_token_id": 1, "type_vocab_size": 1}
LABELS = {"id2label": {0: "bad", 1: "fine", 2: "good"}, "label2id": {"bad": 0, "fine": 1, "good": 2}}
# name -> (class in transformers, settings)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "encoder_bert": ("BertModel", SIZES),
    "encoder_bert_classifier": ("BertForSequenceClassification", {**SIZES, **LABELS}),
    "encoder_distilbert": ("DistilBertModel", DISTIL),
    "encoder_distilbert_classifier": ("DistilBertForSequenceClassification", {**DISTIL, **LABELS}),
    "encoder_roberta": ("RobertaModel", ROBERTA),
    "encoder_roberta_classifier": ("RobertaForSequenceClassification", {**ROBERTA, **LABELS}),
}


def random_encoder(architecture: str, settings: dict[str, Any], seed: int) -> Any:
    """A transformers model in float32 whose every parameter is random."""
    import torch
    import transformers

    torch.manual_seed(seed)
    cls = getattr(transformers, architecture)
    model = cls(cls.config_class(**settings)).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "norm" in name.lower() and name.endswith("weight")
            parameter.normal_(1.0 if norm else 0.0, 0.3)
    return model


def rows(config: Any, seed: int, lengths: tuple[int, ...] = LENGTHS) -> dict[str, np.ndarray]:
    """Random texts i32[b t], ones for their tokens, and the types of pairs (0 where the family has none).

    The ids of real tokens include the pad id, except for RoBERTa, where transformers would not count it.
    """
    draw = np.random.default_rng(seed)
    shape = (len(lengths), max(lengths))
    segments = (np.arange(shape[1])[None] < np.array(lengths)[:, None]).astype(np.int32)
    ids = draw.integers(2 if config.model_type == "roberta" else 0, config.vocab_size, shape)
    ids = np.where(segments, ids, config.pad_token_id).astype(np.int32)
    kinds = getattr(config, "type_vocab_size", 1)
    types = np.sort(draw.integers(0, kinds, shape), axis=1) * segments
    return {"ids": ids, "segments": segments, "types": types.astype(np.int32)}


def outputs(model: Any, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """hidden f32[b t d], 0 at pads, and the logits f32[b n] of a classifier."""
    import torch

    given = {"input_ids": batch["ids"], "attention_mask": batch["segments"], "token_type_ids": batch["types"]}
    if model.config.model_type == "distilbert":
        del given["token_type_ids"]
    tensors = {name: torch.tensor(value, dtype=torch.long) for name, value in given.items()}
    with torch.no_grad():
        base = getattr(model, model.base_model_prefix, model)
        hidden = base(**tensors).last_hidden_state.float().numpy() * batch["segments"][:, :, None]
        if not type(model).__name__.endswith("SequenceClassification"):
            return {"hidden": hidden}
        return {"hidden": hidden, "logits": model(**tensors).logits.float().numpy()}


def write(name: str, seed: int) -> None:
    architecture, settings = CASES[name]
    model, folder = random_encoder(architecture, settings, seed), FOLDER / name
    model.save_pretrained(folder)
    batch = rows(model.config, seed)
    arrays: dict[str, Any] = {**batch, **outputs(model, batch)}
    np.savez_compressed(folder / "golden.npz", **arrays)


def main(names: list[str]) -> None:
    for seed, name in enumerate(CASES):
        if not names or name in names:
            write(name, seed)
            print(name, sum(f.stat().st_size for f in (FOLDER / name).iterdir()) // 1000, "kB")


if __name__ == "__main__":
    main(sys.argv[1:])
