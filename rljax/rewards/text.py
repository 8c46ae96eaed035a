"""Rewards that read a completion by itself: its length, its repetitions, its sentiment."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

from rljax import extras
from rljax.errors import UserError


def length(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    completion_ids: Sequence[Any],
    unit: Literal["tokens", "words"] = "tokens",
    target_length: float | None = None,
) -> list[float]:
    """How long a completion is; with `target_length` how near to it, 1 − |length − target| / target.

    unit: "tokens" (the end token counts), or "words" (what white space separates). The plain length as a reward shows
    how much of a reward model's gain is length (Singhal et al. 2023, arXiv:2310.03716).
    """
    if unit not in ("tokens", "words"):
        raise UserError(f"length: unit is {unit!r}; choose 'tokens' or 'words'")
    if target_length is not None and not target_length > 0:
        raise UserError(f"length: target_length is {target_length}, and lengths are measured against it: above 0")
    counted = completion_ids if unit == "tokens" else [text.split() for text in completions]
    counts = [float(len(one)) for one in counted]
    return counts if target_length is None else [1.0 - abs(n - target_length) / target_length for n in counts]


def repetition_penalty(prompts: Sequence[Any], completions: Sequence[str], *, ngram_size: int = 3) -> list[float]:
    """Minus the share of n-grams of words that were there before, in (−1, 0]: 0 where nothing is said twice.

        different n-grams / all n-grams − 1

    Words are lower-cased and separated by white space; fewer than `ngram_size` of them give 0. Yeo et al. 2025
    (arXiv:2502.03373) penalise repetition of long thoughts likewise; how much is the reward's weight.
    """
    if ngram_size < 1:
        raise UserError(f"repetition_penalty: ngram_size is {ngram_size}; it must be at least 1")
    found = []
    for completion in completions:
        words = completion.lower().split()
        grams = [tuple(words[i : i + ngram_size]) for i in range(len(words) - ngram_size + 1)]
        found.append(len(set(grams)) / len(grams) - 1.0 if grams else 0.0)
    return found


def vader_sentiment(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    judged: Literal["completion", "prompt+completion"] = "completion",
) -> list[float]:
    """VADER's compound score of each text, in [−1, 1]: rules and a lexicon of English words (Hutto & Gilbert 2014).

    judged: the completion alone, or with the prompt that it continues.
    """
    polarity = _vader().polarity_scores
    return [float(polarity(text)["compound"]) for text in judged_texts(prompts, completions, judged)]


@functools.cache
def _vader() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UserError(needs("vader_sentiment", "vaderSentiment")) from error
    return SentimentIntensityAnalyzer()


def needs(reward: str, package: str) -> str:
    return f"the reward {reward} needs the package {package}: {extras.install('metrics')}"


def judged_texts(prompts: Sequence[Any], completions: Sequence[str], judged: str) -> list[str]:
    """The completions, or each behind its prompt (of messages, their contents on lines of their own)."""
    if judged not in ("completion", "prompt+completion"):
        raise UserError(f"judged is {judged!r}; choose 'completion' or 'prompt+completion'")
    if judged == "completion":
        return list(completions)
    return [prompt_text(prompt) + completion for prompt, completion in zip(prompts, completions, strict=True)]


def prompt_text(prompt: Any) -> str:
    """A prompt as plain text: itself, or the contents of its messages, a line each."""
    return prompt if isinstance(prompt, str) else "".join(f"{message.get('content') or ''}\n" for message in prompt)
