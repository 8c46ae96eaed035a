"""A tiny random decoder and batches with uneven masks: enough for every property of the training code."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from rljax import models
from rljax.logprobs import token_logps
from rljax.types import LanguageModel, Output, PolicyBatch, PreferenceBatch, Rollout, Tokens

CONFIG = models.ModelConfig(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_positions=64,
)


@functools.cache
def model():
    return models.build(CONFIG)


@functools.cache
def params(seed: int = 0):
    """Random weights, larger than at a real initialisation so that the model has opinions."""
    tree = model().init(jax.random.key(seed))
    return jax.tree.map(lambda x: x * 4 if x.ndim > 2 else x, tree)


def tokens(rows: int = 8, length: int = 12, seed: int = 0, *, empty: tuple[int, ...] = ()) -> Tokens:
    """Right-padded rows: prompts of 1 to 4 tokens, responses of 0 to the rest; rows in `empty` hold no token at all."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, CONFIG.vocab_size, (rows, length)).astype(np.int32)
    prompt = rng.integers(1, 5, (rows, 1))
    total = np.minimum(prompt + rng.integers(0, length, (rows, 1)), length)
    total[list(empty)] = 0
    column = np.arange(length)[None]
    segments = (column < total).astype(np.int32)
    mask = (column >= prompt) & (column < total)
    return Tokens(ids=jnp.asarray(ids), segments=jnp.asarray(segments), mask=jnp.asarray(mask))


def pairs(rows: int = 8, length: int = 12, seed: int = 0, *, empty: tuple[int, ...] = ()) -> PreferenceBatch:
    rng = np.random.default_rng(seed + 100)
    ref = rng.normal(-20, 3, (2, rows)).astype(np.float32)
    return PreferenceBatch(
        chosen=tokens(rows, length, seed, empty=empty),
        rejected=tokens(rows, length, seed + 1, empty=empty),
        ref_chosen_logps=jnp.asarray(ref[0]),
        ref_rejected_logps=jnp.asarray(ref[1]),
    )


@functools.cache
def bigram() -> LanguageModel:
    """A table of logits [v v], the next token given the last. Compiles at once: for tests that need no attention.

    Params: {"table": f32[v v]}; hidden states are rows of the table.
    """
    config = dataclasses.replace(CONFIG, hidden_size=CONFIG.vocab_size)

    def init(key):
        return {"table": jax.random.normal(key, (CONFIG.vocab_size, CONFIG.vocab_size))}

    def apply(params, ids, segments, *, cache=None):
        del segments
        return Output(params["table"][ids], cache)

    return LanguageModel(init=init, apply=apply, unembed=lambda params, hidden: hidden, config=config)


@functools.cache
def bigram_params(seed: int = 0):
    return bigram().init(jax.random.key(seed))


def rollouts(rows: int = 8, length: int = 12, seed: int = 0, *, empty: tuple[int, ...] = ()) -> PolicyBatch:
    """Rows as a policy-gradient loss gets them: log-probabilities of a policy near the table's, random advantages."""
    rng = np.random.default_rng(seed + 200)
    some = tokens(rows, length, seed, empty=empty)
    moved, advantages = jnp.where(some.mask, rng.normal(0, [[[0.3]], [[1.0]]], (2, rows, length)), 0.0)
    return PolicyBatch(
        tokens=some, old_logps=token_logps(bigram(), bigram_params(), some) + moved, advantages=advantages
    )


def rollout(lengths=(6, 1, 3, 6, 0, 4), prompts=(4, 1, 2, 3, 0, 4), *, budget: int = 6, seed: int = 0) -> Rollout:
    """Completions of these many tokens after prompts of these many, left-padded to 4, as `sampling.generate` gives
    them. A row that has not used its budget ended by itself; one without a prompt is empty.
    """
    rng = np.random.default_rng(seed + 300)
    rows, width = len(lengths), max(prompts)
    ids = rng.integers(0, CONFIG.vocab_size, (rows, width + budget)).astype(np.int32)
    column, new, before = np.arange(width + budget)[None], np.asarray(lengths)[:, None], np.asarray(prompts)[:, None]
    mask = (column >= width) & (column < width + new)
    segments = (mask | ((column < width) & (column >= width - before))).astype(np.int32)
    logps = np.where(mask, rng.normal(-2, 0.7, ids.shape), 0).astype(np.float32)
    some = Tokens(ids=jnp.asarray(ids), segments=jnp.asarray(segments), mask=jnp.asarray(mask))
    return Rollout(tokens=some, logps=jnp.asarray(logps), finished=jnp.asarray((new[:, 0] < budget) & (new[:, 0] > 0)))
