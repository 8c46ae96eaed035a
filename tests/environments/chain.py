"""A policy that can be read off a table: after each token it writes the one that the table names."""

import jax
import jax.numpy as jnp
import numpy as np

from rljax import models
from rljax.policy import Policy
from rljax.types import LanguageModel, Output
from tests.data.conftest import byte_level

VOCAB, STOP = 64, 4
CONFIG = models.ModelConfig(
    vocab_size=VOCAB,
    hidden_size=VOCAB,
    intermediate_size=4,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=2,
    max_positions=64,
)


def _apply(params, ids, segments, *, cache=None):
    del segments
    return Output(params["next"][ids], cache)


MODEL = LanguageModel(lambda key: {}, _apply, lambda params, hidden: hidden, CONFIG)
TOKENIZER = byte_level()


def policy(table: dict[int, int]) -> Policy:
    """Greedy or sampled, the token after `token` is table[token] (STOP where the table says nothing)."""
    after = np.full(VOCAB, STOP)
    after[list(table)] = list(table.values())
    logits = jnp.asarray(60.0 * np.eye(VOCAB)[after], jnp.float32)
    return Policy(MODEL, {"next": logits, "layers": {"0": {}}}, TOKENIZER, (STOP,))


def key():
    return jax.random.key(0)
