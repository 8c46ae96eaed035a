"""The pad token of exported reward models: `transformers` scores the last token of a row that is not it."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Sequence
from typing import Any

from rljax.models.hf_read import NOTE


def apart(source: dict[str, Any], tokenizer: Any, stop_ids: Sequence[int]) -> tuple[dict[str, Any], Any]:
    """config.json and tokenizer with a pad token in which no text ends.

    source: config.json as it is kept (`ModelConfig.source`). tokenizer: an object, a folder with one, or None. Both are
    returned as they are where their pad token is one already. `tokenizer` is copied where it changes.
    """
    if isinstance(tokenizer, str | os.PathLike):
        from rljax.models.resolve import load_tokenizer

        loaded = load_tokenizer(tokenizer)
        changed, found = apart(source, loaded, stop_ids)
        return changed, tokenizer if found is loaded else found
    generation = (source.get(NOTE) or {}).get("generation_config") or {}
    given = [source.get("eos_token_id"), generation.get("eos_token_id"), getattr(tokenizer, "eos_token_id", None)]
    ends = {*stop_ids, *(i for ids in given for i in (ids if isinstance(ids, list) else [ids]) if i is not None)}
    vocab = source.get("vocab_size", 2**31)
    known = source.get("pad_token_id") if tokenizer is None else tokenizer.pad_token_id
    if known is not None and known not in ends and 0 <= known < vocab:
        return {**source, "pad_token_id": known}, tokenizer
    chosen = None if tokenizer is None else _other(tokenizer, ends, vocab)
    if chosen is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen)
    return {**source, "pad_token_id": chosen}, tokenizer


def _other(tokenizer: Any, ends: set[int], vocab: int) -> int | None:
    """A special token that no text ends in: one made for padding, a spare one, or whichever is no end by its name."""
    names = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    free = {i: name for i, name in names.items() if i not in ends and i < vocab}
    ranks = ("pad", "reserved|unused|extra_id|spare", "unk")

    def rank(i: int) -> tuple[bool, int, int]:
        place = next((k for k, words in enumerate(ranks) if re.search(words, free[i], re.IGNORECASE)), len(ranks))
        return bool(re.search(r"end|eos|eot|eom|</s>", free[i], re.IGNORECASE)), place, i

    return min(free, key=rank, default=None)
