"""Rewards by the words that a completion shares with a reference, all in [0, 1].

The reference is the data's field `reference`, or its field `answer` where there is none: a text a row, or a list of
texts of which the best counts (BLEU and chrF take all at once); None does not apply to the row.

Each metric drops something before it compares, and what is left decides: ROUGE keeps runs of the letters a to z and of
digits, in lower case (no signs, so that -5 is 5; no accents, no other scripts), token_f1 drops punctuation (again -5 is
5) and English articles, and takes what white space separates for words, chrF drops white space. A reference of which
nothing is left is a UserError. For other scripts take `chrf`, or `bleu` with a tokenizer made for them.
"""

from __future__ import annotations

import collections
import functools
import re
import string
from collections.abc import Callable, Sequence
from typing import Any

from rljax.errors import UserError
from rljax.rewards.matching import accepted
from rljax.rewards.text import needs

TOKENIZERS = ("13a", "intl", "zh", "ja-mecab", "ko-mecab", "char", "flores101", "flores200", "spm", "none")


def bleu(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    answer: Sequence[Any] | None = None,
    reference: Sequence[Any] | None = None,
    tokenize: str = "13a",
) -> list[float | None]:
    """Sentence BLEU by sacrebleu / 100: exponential smoothing, orders without any n-gram left out.

    tokenize: sacrebleu's; "13a" takes what white space and Latin punctuation separate for words, so that a Chinese or
      Japanese sentence is one word: "zh", "ja-mecab", "ko-mecab", "char" or "flores200" are for these, "intl" for
      Unicode's punctuation and symbols.
    """
    if tokenize not in TOKENIZERS:
        raise UserError(f"bleu: tokenize is {tokenize!r}; choose one of {', '.join(TOKENIZERS)}")
    metric = _sacrebleu("BLEU", effective_order=True, tokenize=tokenize)
    wanted = _left("bleu", references("bleu", answer, reference), lambda text: metric.tokenizer(text).strip())
    return _each(completions, wanted, lambda c, r: metric.sentence_score(c, r).score / 100)


def chrf(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    answer: Sequence[Any] | None = None,
    reference: Sequence[Any] | None = None,
    word_order: int = 0,
) -> list[float | None]:
    """Sentence chrF2 by sacrebleu / 100, over character 6-grams (Popović 2015); word_order=2 is chrF++."""
    metric = _sacrebleu("CHRF", word_order=word_order)
    wanted = _left("chrf", references("chrf", answer, reference), str.strip)
    return _each(completions, wanted, lambda c, r: metric.sentence_score(c, r).score / 100)


def rouge_1(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    answer: Sequence[Any] | None = None,
    reference: Sequence[Any] | None = None,
) -> list[float | None]:
    """ROUGE-1 F1 by rouge-score (Lin 2004), without stemming: words."""
    return _rouge("rouge1", "rouge_1", completions, references("rouge_1", answer, reference))


def rouge_2(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    answer: Sequence[Any] | None = None,
    reference: Sequence[Any] | None = None,
) -> list[float | None]:
    """ROUGE-2 F1 by rouge-score (Lin 2004), without stemming: pairs of words; 0 for a reference of one word."""
    return _rouge("rouge2", "rouge_2", completions, references("rouge_2", answer, reference))


def rouge_l(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    answer: Sequence[Any] | None = None,
    reference: Sequence[Any] | None = None,
) -> list[float | None]:
    """ROUGE-L F1 by rouge-score (Lin 2004), without stemming: the longest common subsequence of words."""
    return _rouge("rougeL", "rouge_l", completions, references("rouge_l", answer, reference))


def token_f1(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    answer: Sequence[Any] | None = None,
    reference: Sequence[Any] | None = None,
) -> list[float | None]:
    """F1 of the words shared with the reference, as SQuAD scores answers (Rajpurkar et al. 2016, arXiv:1606.05250).

    Words are lower-cased, without punctuation and the articles a, an, the, so that "A" is no answer to choose by (take
    `exact_match`). The empty text as reference, of a question without an answer, agrees with one without words.
    """
    given = references("token_f1", answer, reference)
    wanted = _left("token_f1", given, lambda text: squad_words(text) or not text)
    return _each(completions, wanted, lambda c, r: max(_f1(c, one) for one in r))


def references(name: str, answer: Sequence[Any] | None, reference: Sequence[Any] | None) -> list[list[str] | None]:
    """The reference texts of each row."""
    column = answer if reference is None else reference
    if column is None:
        raise UserError(f"the reward {name} compares with a reference: the data needs a field reference, or answer")
    found = [None if one is None else [str(text) for text in accepted(one)] for one in column]
    if [] in found:
        raise UserError(f"the reward {name}: row {found.index([])} has an empty list of references; give null instead")
    return found


def _left(name: str, wanted: Sequence[list[str] | None], kept: Callable[[str], Any]) -> Sequence[list[str] | None]:
    """`wanted`, if of a reference of each row something is left to compare with."""
    for row, texts in enumerate(wanted):
        if texts is not None and not any(kept(text) for text in texts):
            raise UserError(
                f"the reward {name} keeps nothing of the reference of row {row}, {texts[0]!r}, so that no completion "
                "could agree with it: choose a metric that reads such texts (chrf, bleu with tokenize=, exact_match), "
                "or give null"
            )
    return wanted


def _each(
    completions: Sequence[str],
    wanted: Sequence[list[str] | None],
    score: Callable[[str, list[str]], float],
) -> list[float | None]:
    return [None if r is None else float(score(c, r)) for c, r in zip(completions, wanted, strict=True)]


def squad_words(text: str) -> list[str]:
    """SQuAD's normalisation: lower case, no punctuation, no articles, split at white space."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _f1(completion: str, reference: str) -> float:
    said, wanted = squad_words(completion), squad_words(reference)
    if not said or not wanted:
        return float(said == wanted)
    common = sum((collections.Counter(said) & collections.Counter(wanted)).values())
    return 2.0 * common / (len(said) + len(wanted))


def _rouge(kind: str, name: str, completions: Sequence[str], wanted: Sequence[list[str] | None]) -> list[float | None]:
    scorer = _rouge_scorer(kind)
    wanted = _left(name, wanted, lambda text: re.search("[a-z0-9]", text.lower()))
    return _each(completions, wanted, lambda c, r: max(scorer.score(one, c)[kind].fmeasure for one in r))


@functools.cache
def _rouge_scorer(kind: str) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise UserError(needs(kind, "rouge-score")) from error
    return RougeScorer([kind])


@functools.cache
def _sacrebleu(metric: str, **settings: Any) -> Any:
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise UserError(needs(metric, "sacrebleu")) from error
    return getattr(metrics, metric)(**settings)
