"""Controlled sentiment: the first tokens of IMDB's reviews as prompts, and SiEBERT as the ground truth.

The set-up is that of Rafailov et al. 2023 (arXiv:2305.18290, section 6.1 and appendix C.1).
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import numpy as np

from rljax import data, offline, policy, rewards
from rljax.logprobs import token_logps

REVIEWS = "hf:stanfordnlp/imdb"  # text, label; the same rows are tfds:imdb_reviews
SIEBERT = rewards.from_checkpoint(
    "siebert/sentiment-roberta-large-english", label="POSITIVE", output="probability", name="siebert"
)
SHORTEST, LONGEST = 2, 8  # tokens of a prefix
COMPLETION = 64  # tokens
BATCH = 256  # prefixes continued at once


def prefixes(tokenizer: Any, source: str, split: str, *, count: int | None = None, seed: int = 0) -> list[str]:
    """The first 2 to 8 tokens of reviews, so many drawn at random (all, in the order of the data, without a count)."""
    rows, rng = data.read(source, split=split), np.random.default_rng(seed)
    chosen = range(len(rows)) if count is None or count >= len(rows) else rng.permutation(len(rows))[:count]
    found = []
    for index in chosen:
        ids = tokenizer(rows[int(index)]["text"], add_special_tokens=False, verbose=False)["input_ids"]
        found.append(tokenizer.decode(ids[: rng.integers(SHORTEST, LONGEST + 1)]))
    return found


def sampled_pairs(
    start: policy.Policy,
    key: jax.Array,
    *,
    source: str = REVIEWS,
    split: str = "train",
    count: int = 25_000,
    samples: int = 4,
    max_new_tokens: int = COMPLETION,
) -> list[dict]:
    """{"prompt", "chosen", "rejected"}: pairs of a prefix's continuations by the model, the more positive one chosen.

    Ties and empty continuations are left out.
    """
    asked = [p for p in prefixes(start.tokenizer, source, split, count=count) for _ in range(samples)]
    texts = policy.complete(start, asked, key, max_new_tokens=max_new_tokens, batch=BATCH).texts
    scores = np.asarray(SIEBERT.fn(asked, texts))
    made = []
    for begin in range(0, len(asked), samples):
        for pair in itertools.combinations(range(begin, begin + samples), 2):
            low, high = sorted(pair, key=lambda i: scores[i])
            if scores[low] < scores[high] and texts[low] and texts[high]:
                made.append({"prompt": asked[begin], "chosen": texts[high], "rejected": texts[low]})
    return made


def prompts(
    start: policy.Policy, key: jax.Array, *, source: str = REVIEWS, split: str = "train", count: int = 25_000
) -> list[dict]:
    """{"prompt"}: prefixes to be continued."""
    del key
    return [{"prompt": text} for text in prefixes(start.tokenizer, source, split, count=count)]


def reward_and_kl(
    now: policy.Policy,
    reference: dict,
    key: jax.Array,
    *,
    source: str = REVIEWS,
    split: str = "test",
    count: int = 1024,
) -> offline.Evaluation:
    """SiEBERT's mean probability, and KL(policy ‖ reference) in nats a sequence, on prefixes of held-out reviews."""
    asked = prefixes(now.tokenizer, source, split, count=count)
    written = policy.complete(now, asked, key, max_new_tokens=COMPLETION, batch=min(BATCH, count))
    scores = np.asarray(SIEBERT.fn(asked, written.texts))
    logps = jax.jit(functools.partial(token_logps, now.model, max_trained=COMPLETION))
    ratios = [logps(now.params, r.tokens) - logps(reference, r.tokens) for r in written.rollouts]
    kl = np.concatenate([np.asarray(ratio).sum(1) for ratio in ratios])
    return offline.Evaluation({"reward/mean": float(scores.mean()), "kl": float(kl.mean())})
