"""Rewards of 0 and 1: does a completion hold the answer, or have the form that was asked for."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import regex

from rljax.errors import UserError
from rljax.rewards import numerals
from rljax.rewards.text import prompt_text

PATIENCE = 5.0  # seconds that a pattern given by a user may take with one text; microseconds are usual
THINK_ANSWER = (
    r"<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>"  # each tag once, thoughts first
)
_TAG = re.compile(r"<[^\W\d][^<>\s]*>|\[[^\W\d][^\[\]\s]*\]|<\|[^<>\s|]+\|>")  # one that opens
_TAGS = re.compile(r"(?:(?:<[^<>\s]+>|\[[^\[\]\s]+\])\s*)+\Z")  # at the end of a prompt


def exact_match(prompts: Sequence[Any], completions: Sequence[str], *, answer: Sequence[Any]) -> list[float | None]:
    """1 where the whole completion is the answer, else 0.

    answer: a text or number a row, or a list of accepted ones; None does not apply. Both sides are brought to one form
      first (`normalize`): capital letters, white space and a final full stop do not count.
    """
    return [
        None if wanted is None else float(normalize(completion) in {normalize(str(one)) for one in accepted(wanted)})
        for completion, wanted in zip(completions, answer, strict=True)
    ]


def normalize(text: str) -> str:
    """Unicode NFKC, case-folded, runs of white space as one space, none around, no full stop at the end."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).removesuffix(".").rstrip()


def accepted(answer: Any) -> list[Any]:
    """The accepted answers of a row's field: one, or each of a list."""
    return list(answer) if isinstance(answer, Sequence) and not isinstance(answer, str) else [answer]


def numeric_match(
    prompts: Sequence[Any], completions: Sequence[str], *, answer: Sequence[Any], tolerance: float = 0.0
) -> list[float | None]:
    """1 where the completion's number is that of the answer, else 0; 0 too where the completion has no number, or one
    that cannot be told without doubt.

    A text's number is the one after its last "####" (as in GSM8K), else that of its last \\boxed{…}, else the last in
    it: -3, −3, 1,234.50, 1{,}234 (or with thin spaces), $5, 1e-3, 2\\times 10^{5}, 10⁵, 12% (which is 12), 3/4, 2 1/2,
    \\frac{3}{4}, ½, 5 million. Of a range, 5-3, it is the second. Nothing else is evaluated: the end of 2+3, 3,14 (a
    pair, or a decimal comma), 12:30, 2\\sqrt{3}, 5x or \\pi/2 is in doubt. Numbers are compared exactly, as fractions.
    answer: a number or a text with one, a whole GSM8K solution for instance; None does not apply, nor does one in
      doubt; one without a number is a UserError. tolerance: how far apart the two may be.
    """
    return [
        None if wanted is None else _same_number(completion, wanted, tolerance)
        for completion, wanted in zip(completions, answer, strict=True)
    ]


def _same_number(completion: str, wanted: Any, tolerance: float) -> float | None:
    try:
        goal = numerals.number(str(wanted))
    except numerals.Doubt:
        return None
    if goal is None:
        raise UserError(f"numeric_match: there is no number in the field answer: {wanted!r}")
    said = last_number(completion)
    return float(said is not None and abs(said - goal) <= Fraction(tolerance))


def last_number(text: str) -> Fraction | None:
    """The number that a text comes to (see `numeric_match`), or None where it has none, or one in doubt."""
    try:
        return numerals.number(text)
    except numerals.Doubt:
        return None


def regex_match(
    prompts: Sequence[Any], completions: Sequence[str], *, pattern: str | Sequence[str | None]
) -> list[float | None]:
    """1 where `pattern` is found somewhere in the completion, else 0.

    pattern: a Python regular expression, bound with functools.partial(regex_match, pattern=…), or a field of the data
      with one a row, where None does not apply. (?i) at its start ignores case, (?s) lets a dot match line ends. A
      pattern with nested repetition, such as (a|aa)+$, can take for ever on some texts: after 5 seconds with one text
      that is a UserError which names both.
    """
    patterns = [pattern] * len(completions) if isinstance(pattern, str) else pattern
    return [
        None if one is None else float(_in_time(_compiled(one).search, text))
        for one, text in zip(patterns, completions, strict=True)
    ]


def format_reward(
    prompts: Sequence[Any],
    completions: Sequence[str],
    *,
    pattern: str = THINK_ANSWER,
    raw_completions: Sequence[str] | None = None,
    prompt_texts: Sequence[str] | None = None,
) -> list[float]:
    """1 where the whole completion (white space around it aside) has the form `pattern`, else 0.

    pattern: a Python regular expression in which a dot matches line ends too; the default wants
      <think>…</think> <answer>…</answer>, each once (DeepSeek-R1, arXiv:2501.12948). See `regex_match` for its risk.
    Tags may be special tokens of the tokenizer (raw_completions), and the prompt may have opened them: where the
    generation prompt ends in tags that begin the form (<think>), or the assistant's answer was begun in the prompt,
    completions may go on from there.
    """
    compiled = _compiled(pattern, re.DOTALL)
    raw = completions if raw_completions is None else raw_completions
    befores = [prompt_text(prompt) for prompt in prompts] if prompt_texts is None else prompt_texts
    found = []
    for prompt, before, *forms in zip(prompts, befores, completions, raw, strict=True):
        starts = ["", *_opened(compiled, prompt, before)]
        texts = dict.fromkeys((start + text).strip() for start in starts for text in forms)
        found.append(float(any(_in_time(compiled.fullmatch, text) for text in texts)))
    return found


def _opened(compiled: Any, prompt: Any, before: str) -> list[str]:
    """What the end of a prompt has already written of the form: its last tags, or the beginning of an answer.

    It has to be the beginning of a match, and not all of one. Nothing else of the prompt counts: a user may quote tags.
    """
    tags = _TAGS.search(before)
    end = tags[0] if tags else ""
    starts = [end[at.start() :] for at in _TAG.finditer(end) if _in_form(compiled, at[0])]
    if not isinstance(prompt, str) and len(prompt) and prompt[-1].get("role") == "assistant":
        starts.append((prompt[-1].get("content") or "").lstrip())
    return [
        start
        for start in starts
        if start.strip() and _in_time(compiled.fullmatch, start, partial=True)
        if not _in_time(compiled.fullmatch, start.strip())
    ]


def _in_form(compiled: Any, tag: str) -> bool:
    """<name> may be of any form; what could be a template's header, such as <|assistant|>, has to stand in this one."""
    return re.fullmatch(r"<\w+>", tag) is not None or tag in compiled.pattern or re.escape(tag) in compiled.pattern


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str, flags: int = 0) -> Any:
    """By `regex`, since `re` keeps the interpreter's lock while it searches: nothing else runs, no time-out fires."""
    try:
        return regex.compile(pattern, flags)
    except regex.error as error:
        raise UserError(f"the pattern {pattern!r} is not a regular expression: {error}") from None


def _in_time(match: Callable[..., Any], text: str, **options: Any) -> bool:
    """Whether a compiled pattern's method finds it in the text, while other threads go on."""
    try:
        return match(text, timeout=PATIENCE, concurrent=True, **options) is not None
    except TimeoutError:
        shown = text if len(text) <= 200 else f"{text[:200]}…"
        raise UserError(
            f"the pattern {match.__self__.pattern!r} took more than {PATIENCE:g} seconds with the text {shown!r}: "
            "write it without repetitions inside of repetitions, such as (a|aa)+"
        ) from None
