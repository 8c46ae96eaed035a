"""What tokens are as text: one function for all that a policy writes, whichever tokenizer it has.

A decoder works on a whole sequence. SentencePiece's drops the space before the first word, so that the tokens of
" was happy" by themselves are "was happy"; a byte-level one shows half a character as U+FFFD. So the text of a
completion is that of prompt and completion, less that of the prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from rljax.types import Tokens

Ids = Sequence[int] | np.ndarray  # i32[n]


def decode(tokenizer: Any, ids: Ids, *, special: bool = False) -> str:
    """The text of a whole sequence, spaces as they were written. special: with its special tokens."""
    return tokenizer.decode(
        np.asarray(ids, np.int64).tolist(), skip_special_tokens=not special, clean_up_tokenization_spaces=False
    )


def continuation(tokenizer: Any, before: Ids, ids: Ids, *, special: bool = False) -> str:
    """The text that `ids` add to that of the ids before them: decode(before + ids) − decode(before).

    A character whose bytes stand on both sides of the border belongs to the side that ends it.
    """
    if not len(ids):
        return ""
    start = decode(tokenizer, before, special=special)
    whole = decode(
        tokenizer, np.concatenate([np.asarray(before, np.int64), np.asarray(ids, np.int64)]), special=special
    )
    if whole.startswith(start):
        return whole[len(start) :]
    same = next((i for i, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), min(len(start), len(whole)))
    return whole[same:]


def written(tokenizer: Any, before: Ids, ids: Ids, *, stop_ids: Collection[int]) -> tuple[str, str]:
    """(the text of a completion without special tokens, with them but for the one that it stopped at)."""
    kept = without_stop(tokenizer, ids, stop_ids)
    return continuation(tokenizer, before, ids), continuation(tokenizer, before, kept, special=True)


def without_stop(tokenizer: Any, ids: Ids, stop_ids: Collection[int]) -> Ids:
    """The ids but for a special token at their end that they stopped at."""
    ended = len(ids) and int(ids[-1]) in stop_ids and int(ids[-1]) in special_ids(tokenizer)
    return ids[:-1] if ended else ids


def rows(tokens: Tokens) -> list[tuple[np.ndarray, np.ndarray]]:
    """(the ids before the first trained token, the trained ones) of each row; on the host."""
    ids, segments, mask = (np.asarray(x) for x in (tokens.ids, tokens.segments, tokens.mask))
    before = (segments > 0) & (np.cumsum(mask, axis=1) == 0)
    return [(row[first], row[then]) for row, first, then in zip(ids, before, mask, strict=True)]


def texts(tokenizer: Any, tokens: Tokens, *, special: bool = False, stop_ids: Collection[int] = ()) -> list[str]:
    """The text of each row's trained tokens, without special tokens; or with them, but for one of `stop_ids` at its
    end.
    """
    stop_ids = stop_ids if special else ()
    return [
        continuation(tokenizer, before, without_stop(tokenizer, ids, stop_ids), special=special)
        for before, ids in rows(tokens)
    ]


def pieces(tokenizer: Any, before: Ids, ids: Ids) -> list[str]:
    """The text of each single token where it stands, special tokens shown."""
    near = 8  # tokens before it that are decoded with it: a character has at most four
    whole = np.concatenate([np.asarray(before, np.int64), np.asarray(ids, np.int64)])
    first = len(whole) - len(ids)
    return [
        continuation(tokenizer, whole[max(0, at - near) : at], whole[at : at + 1], special=True)
        for at in range(first, len(whole))
    ]


def specials(tokenizer: Any, ids: Ids, *, stop_ids: Collection[int] = ()) -> list[str]:
    """The special tokens among `ids` that a text without special tokens lacks, but for the stop token at their end."""
    found = dict.fromkeys(np.asarray(without_stop(tokenizer, ids, stop_ids)).tolist())
    return [str(tokenizer.convert_ids_to_tokens(i)) for i in found if i in special_ids(tokenizer)]


def special_ids(tokenizer: Any) -> frozenset[int]:
    """The ids of the tokens that are left out of a text without special tokens."""
    return _special_ids(tokenizer, len(tokenizer))


@functools.lru_cache(maxsize=8)
def _special_ids(tokenizer: Any, _size: int) -> frozenset[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset({*added, *tokenizer.all_special_ids})
