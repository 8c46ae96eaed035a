"""Rows to tokens: pure functions from a row and a tokenizer to what a model is trained on.

Rules, the same for all of them:
  - A prompt is tokenised alone, so that training sees the very tokens that generation continues. The completion gets
    the tokens that it has in prompt + completion tokenised once, wherever that tokenisation begins with the prompt's
    tokens: always where a special token stands at the border (chat templates). Where the tokenizer would merge across
    the border, the prompt keeps its tokens and the completion is tokenised as a continuation.
  - The beginning-of-sequence token stands at the start, once, if the tokenizer adds one (`tokenizer.add_bos_token =
    True` makes it); never inside a response. With a chat template it is the template's business.
  - A completion that is not cut ends in one end token, trained: eos, or the chat template's end of turn. Nothing comes
    after it; one that holds an end token before its end is refused.
  - Prompts that are too long keep their end (and their beginning-of-sequence token); completions keep their beginning.
  - The first token of an example is never trained: nothing predicts it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rljax.data import chat, forms
from rljax.data.forms import Text
from rljax.data.messages import Messages
from rljax.data.rows import Row
from rljax.errors import UserError

Span = tuple[int, int]  # characters start..end


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One document, or one prompt with its completion."""

    ids: np.ndarray  # i32[n]
    mask: np.ndarray  # bool[n]; the trained tokens
    prompt: int = 0  # how many of the tokens are the prompt's
    lost: tuple[int, int] = dataclasses.field(
        default=(0, 0), metadata={"content": False}
    )  # what the limits took: tokens
    # of the prompt's beginning, and of the end


class Unpaired(NamedTuple):
    example: Example
    desirable: bool


class Comparison(NamedTuple):
    examples: tuple[Example, ...]  # [k], of one prompt
    best: int
    margin: float


def text_example(row: Row, tokenizer: Any, *, max_length: int | None = None) -> Example:
    """{"text"}: all tokens but the first are trained, and eos after the last (unless the text is cut)."""
    _at_least_one(max_length=max_length)
    text, eos = forms.text_row(row)["text"], _eos(tokenizer)
    ids = _begun(text, tokenizer).ids
    while len(ids) > 1 and ids[-2:] == [eos, eos]:
        ids.pop()
    ids = ids if ids[-1:] == [eos] else [*ids, eos]
    if not text or len(ids) < 2:
        raise UserError("field 'text' is empty: nothing in it can be trained")
    return _example(ids[:max_length], [True] * len(ids[:max_length]), lost=(0, len(ids) - len(ids[:max_length])))


def prompt_ids(prompt: Text, tokenizer: Any, *, max_prompt: int | None = None) -> np.ndarray:
    """The tokens i32[n] that generation continues: of a text, or of messages up to where the answer begins."""
    _at_least_one(max_prompt=max_prompt)
    return np.asarray(_cut(_prompt(prompt, tokenizer), max_prompt), np.int32)


def prompt_example(row: Row, tokenizer: Any, *, max_prompt: int | None = None) -> Example:
    """{"prompt"}: nothing is trained."""
    _at_least_one(max_prompt=max_prompt)
    prompt = _prompt(forms.prompt_row(row)["prompt"], tokenizer)
    ids = np.asarray(_cut(prompt, max_prompt), np.int32)
    return Example(ids, np.zeros(len(ids), bool), len(ids), (len(prompt.ids) - len(ids), 0))


def completion_example(
    row: Row, tokenizer: Any, *, max_prompt: int | None = None, max_completion: int | None = None
) -> Example:
    """{"prompt", "completion"}, texts or messages: the completion and its end token are trained.

    Of a completion of several messages (a dialogue with a user or a tool) only the assistant's are.
    """
    row = forms.completion_row(row)
    return _join(row["prompt"], [row["completion"]], tokenizer, max_prompt, max_completion)[0]


def chat_example(row: Row, tokenizer: Any, *, max_length: int | None = None) -> Example:
    """{"messages"}: the assistant's contents and end-of-turn tokens are trained, in every turn (see `chat.turns`).

    The tokens are exactly those of tokenizer.apply_chat_template(messages), cut at `max_length`; where the template
    writes no end-of-turn token and the assistant speaks last, eos is appended and trained.
    """
    _at_least_one(max_length=max_length)
    messages = forms.chat_row(row)["messages"]
    text, turns = chat.turns(messages, tokenizer)
    ids, offsets = _encode(tokenizer, text)
    mask = _covered(offsets, [(turn.start, turn.end) for turn in turns])
    if turns[-1].message == len(messages) - 1 and not turns[-1].closed:
        ids, mask = _close(ids, mask, tokenizer)
    return _example(ids[:max_length], mask[:max_length], lost=(0, len(ids) - len(ids[:max_length])))


def preference_example(
    row: Row, tokenizer: Any, *, max_prompt: int | None = None, max_completion: int | None = None
) -> tuple[Example, Example]:
    """{"prompt", "chosen", "rejected"} (see `preference_row`) -> (chosen, rejected), with equal prompt tokens."""
    row = forms.preference_row(row)
    chosen, rejected = _join(row["prompt"], [row["chosen"], row["rejected"]], tokenizer, max_prompt, max_completion)
    return chosen, rejected


def unpaired_example(
    row: Row, tokenizer: Any, *, max_prompt: int | None = None, max_completion: int | None = None
) -> Unpaired:
    """{"prompt", "completion", "label"} -> the completion and whether it is desirable."""
    row = forms.unpaired_row(row)
    example = _join(row["prompt"], [row["completion"]], tokenizer, max_prompt, max_completion)[0]
    return Unpaired(example, row["label"])


def comparison_example(
    row: Row, tokenizer: Any, *, max_prompt: int | None = None, max_completion: int | None = None
) -> Comparison:
    """{"prompt", "completions", "best"}, or a preference row (k = 2, best 0), with an optional "margin"."""
    row = forms.comparison_row(row)
    examples = _join(row["prompt"], row["completions"], tokenizer, max_prompt, max_completion)
    return Comparison(tuple(examples), row["best"], row["margin"])


def mismatch(prompt_of: Example, completion_of: Example) -> Example:
    """The prompt of one example with the completion of another: KTO's pairs for its estimate of the KL."""
    head, tail = prompt_of.ids[: prompt_of.prompt], completion_of.ids[completion_of.prompt :]
    mask = np.concatenate([np.zeros(len(head), bool), completion_of.mask[completion_of.prompt :]])
    return _example(np.concatenate([head, tail]), mask, len(head))


# --- prompt + completion ----------------------------------------------------------------------------------------------


class _Prompt(NamedTuple):
    text: str
    ids: list[int]  # not yet cut
    keep: int  # how many tokens at the start mark the beginning of the sequence, and survive cutting
    plain: list[int]  # the tokens of the text alone


def _join(
    prompt: Text, completions: Sequence[Text], tokenizer: Any, max_prompt: int | None, max_completion: int | None
) -> list[Example]:
    _at_least_one(max_prompt=max_prompt, max_completion=max_completion)
    start = _prompt(prompt, tokenizer)
    head, examples = _cut(start, max_prompt), []
    for completion in completions:
        if isinstance(completion, str):
            tail = _ended(_continuation(start, completion, tokenizer)[0], tokenizer)
            mask = [True] * len(tail)
        else:
            tail, mask = _answer(start, prompt, completion, tokenizer)
        lost = (len(start.ids) - len(head), len(tail) - len(tail[:max_completion]))
        tail, mask = tail[:max_completion], mask[:max_completion]
        examples.append(_example([*head, *tail], [False] * len(head) + mask, len(head), lost))
    return examples


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    """The tokens of a text with one end token after them, where generation stops: UserError for one before it."""
    eos = _eos(tokenizer)
    while ids[-1:] == [eos]:
        ids = ids[:-1]
    if eos in ids:
        raise UserError(
            f"the completion holds {tokenizer.eos_token!r}, the token where generation stops, so what follows it would "
            "never be written: end the completion there, or write that text in another way"
        )
    return [*ids, eos]


def _answer(start: _Prompt, prompt: Any, completion: Messages, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Tokens and mask of messages after a prompt of messages, up to the end of the last answer."""
    text, first, dialogue = start.text, len(prompt), prompt.followed_by(completion)
    if chat.continues(prompt):
        first, dialogue = len(prompt) - 1, forms.continued(prompt, completion)
    whole, turns = chat.turns(dialogue, tokenizer, first=first)
    if not whole.startswith(text):
        raise UserError(
            "the chat template's generation prompt is not how it begins an answer, so training would not see what "
            f"generation sees: the prompt ends in {text[-40:]!r}, where the dialogue has {whole[: len(text)][-40:]!r}; "
            "mend tokenizer.chat_template, or give prompts and completions as texts"
        )
    rest, spans = whole[len(text) :], [(turn.start - len(text), turn.end - len(text)) for turn in turns]
    if turns[0].message == first:
        spans[0] = (-1, spans[0][1])  # all that generation has to write, an empty <think> block for instance
    closed, last = turns[-1].closed, turns[-1].message == len(dialogue) - 1
    end = chat.special_pattern(tokenizer).match(rest, spans[-1][1] + len(_blank(rest, spans[-1][1])))
    if closed and last and end and not _ends_in_special(rest[: spans[-1][1]], tokenizer):
        spans[-1] = (spans[-1][0], end.end())  # {% generation %} marks that leave the end of turn out
    ids, offsets = _continuation(start, rest, tokenizer)
    mask = _covered(offsets, spans)
    trained = max((i for i, trained in enumerate(mask) if trained), default=-1)
    ids, mask = ids[: trained + 1], mask[: trained + 1]
    return (ids, mask) if closed else _close(ids, mask, tokenizer)


def _blank(text: str, start: int) -> str:
    return text[start : len(text) - len(text[start:].lstrip())]


def _ends_in_special(text: str, tokenizer: Any) -> bool:
    ends = list(chat.special_pattern(tokenizer).finditer(text))
    return bool(ends) and ends[-1].end() == len(text)


def _close(ids: list[int], mask: list[bool], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """End after the last trained token with a trained eos: for chat templates that write no end-of-turn token."""
    last = max((i for i, trained in enumerate(mask) if trained), default=len(mask) - 1)
    return [*ids[: last + 1], _eos(tokenizer)], [*mask[: last + 1], True]


def _prompt(prompt: Text, tokenizer: Any) -> _Prompt:
    if isinstance(prompt, str):
        begun = _begun(prompt, tokenizer)
        if not begun.ids:
            raise UserError("the prompt is empty, so there is nothing to continue: leave such rows out")
        return begun
    text = chat.prompt(prompt, tokenizer)
    plain = _encode(tokenizer, text)[0]
    # A template may begin with what is called the bos token without meaning it (SmolLM2's <|im_start|>).
    begins = "bos_token" in tokenizer.get_chat_template() and text.startswith(str(tokenizer.bos_token))
    return _Prompt(text, plain, int(begins), plain)


def _begun(text: str, tokenizer: Any) -> _Prompt:
    """A text as the beginning of a sequence."""
    lead = _lead(tokenizer, tokenizer.bos_token_id, getattr(tokenizer, "add_bos_token", False))
    plain = _encode(tokenizer, text)[0]
    ids = plain if plain[: len(lead)] == list(lead) else [*lead, *plain]
    return _Prompt(text, ids, len(lead), plain)


def _cut(prompt: _Prompt, limit: int | None) -> list[int]:
    """The last `limit` tokens of the prompt, the beginning of the sequence kept."""
    ids, keep = prompt.ids, prompt.keep
    if limit is None or len(ids) <= limit:
        return ids
    keep = min(keep, limit)
    return [*ids[:keep], *ids[len(ids) - limit + keep :]]


def _continuation(prompt: _Prompt, rest: str, tokenizer: Any) -> tuple[list[int], list[Span]]:
    """Tokens of `rest` as it stands after the prompt, and their characters in `rest`."""
    # Where the tokenizer merges across the border, another neighbour shows how it tokenises a text that is not a
    # beginning (so that, for instance, no space is put before it).
    for before in (prompt.text, "\n", ".", "0", "a"):
        head = prompt.plain if before == prompt.text else _encode(tokenizer, before)[0]
        ids, offsets = _encode(tokenizer, before + rest)
        if ids[: len(head)] == head:
            shift = len(before)
            return ids[len(head) :], [(max(0, a - shift), b - shift) for a, b in offsets[len(head) :]]
    return _encode(tokenizer, rest)


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[Span]]:
    """Tokens and the characters each stands for; no special token is added."""
    if not text:
        return [], []
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"a text has half of a surrogate pair (U+{ord(text[error.start]):04X}) at character {error.start + 1}, "
            "which is no character: write it as UTF-8 again"
        ) from error
    backend = tokenizer.backend_tokenizer
    if backend.truncation is None and backend.padding is None and not tokenizer.split_special_tokens:
        found = backend.encode(text, add_special_tokens=False)  # as below, in half the time
        return found.ids, found.offsets
    out = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    return out["input_ids"], out["offset_mapping"]


@functools.lru_cache(maxsize=8)
def _lead(tokenizer: Any, _bos: int | None, _added: bool) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before every text (the other arguments only tell settings apart)."""
    plain, full = _encode(tokenizer, "a")[0], tokenizer("a", verbose=False)["input_ids"]
    return tuple(full[: next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)])


def _covered(offsets: list[Span], spans: list[Span]) -> list[bool]:
    """Which tokens lie in a span of characters.

    Some tokenizers trim spaces from offsets, so that a token of spaces stands for no character, at the place where it
    ends: it counts as part of a span that ends there.
    """
    first, last = np.asarray(offsets, np.int64).reshape(-1, 2).T
    mask = np.zeros(len(offsets), bool)
    for start, end in spans:
        mask |= (last > start) & ((first < end) | (last == end))
    return mask.tolist()


def _example(ids: Any, mask: Any, prompt: int = 0, lost: tuple[int, int] = (0, 0)) -> Example:
    ids, mask = np.asarray(ids, np.int32), np.asarray(mask, bool)
    mask[:1] = False
    return Example(ids, mask, prompt, lost)


def _eos(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'!r} has no end-of-sequence token, so no "
            "completion could end: set tokenizer.eos_token"
        )
    return tokenizer.eos_token_id


def _at_least_one(**limits: int | None) -> None:
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise UserError(f"{name}={limit} leaves no token; give at least 1, or None for no limit")
