"""Transcripts: an episode as one player sees it, in tokens.

What was generated keeps its ids for ever: only prompts and observations are tokenised, each by itself, once.
  - A text is tokenised as it stands after other text: no beginning-of-sequence token, no space put before it.
  - Messages become what the chat template puts between the end of the last answer and the beginning of the next one.
    The end-of-turn token is left out where the policy wrote it, and is there where its tokens ran out before.
  - Token ids are taken as they are.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np

from rljax.data import chat, prompt_ids, prompt_row
from rljax.environments.turns import Text
from rljax.errors import UserError

Messages = list[dict[str, Any]]


class Piece(NamedTuple):
    ids: np.ndarray  # i32[k]
    logps: np.ndarray | None = None  # f32[k], of an action; None for what the player was told
    reward: float = 0.0  # of an action


@dataclasses.dataclass(frozen=True, eq=False)
class Transcript:
    """Its first piece is the prompt, with all that the player was told before it first acted."""

    prompt: Text
    pieces: tuple[Piece, ...] = ()
    heard: tuple[Text, ...] = ()  # observations that are not tokens yet
    messages: tuple[dict[str, Any], ...] = ()  # the dialogue so far, where the prompt is messages
    finished: bool = False  # the last action ended in a stop token

    @property
    def ids(self) -> np.ndarray:
        return np.concatenate([piece.ids for piece in self.pieces])

    @property
    def actions(self) -> int:
        return sum(piece.logps is not None for piece in self.pieces)

    @property
    def length(self) -> int:
        """How many tokens there are after the prompt."""
        return sum(len(piece.ids) for piece in self.pieces[1:])


def hear(transcript: Transcript, observation: Text) -> Transcript:
    """Remember an observation until the player acts again."""
    return dataclasses.replace(transcript, heard=(*transcript.heard, observation))


def read(transcript: Transcript, tokenizer: Any, *, max_prompt: int, vocab: int) -> Transcript:
    """What was heard, as tokens: the player is about to act.

    Prompts of more than `max_prompt` tokens keep their end. Raises UserError for an observation that has no tokens, is
    of the wrong kind, or holds ids that are not below `vocab`.
    """
    if not transcript.pieces:
        return _begin(transcript, tokenizer, max_prompt, vocab)
    ids, messages, last = [], list(transcript.messages), int(transcript.pieces[-1].ids[-1])
    for kind, observations in itertools.groupby(transcript.heard, lambda one: isinstance(one, list)):
        if kind:
            new = [message for observation in observations for message in _messages(observation)]
            ids += continuation_ids(_delta(messages, new, tokenizer, last), tokenizer, after=last)
            messages += new
        else:
            ids += [token for observation in observations for token in _plain(observation, tokenizer, vocab)]
        last = ids[-1] if ids else last
    if not ids:
        raise UserError("the observation has no tokens, so the policy would act twice without having read anything")
    return dataclasses.replace(
        transcript, pieces=(*transcript.pieces, Piece(_i32(ids))), heard=(), messages=tuple(messages)
    )


def act(transcript: Transcript, ids: np.ndarray, logps: np.ndarray, text: str, *, finished: bool) -> Transcript:
    """The player's next action, as sampled."""
    messages = transcript.messages
    if messages and messages[-1]["role"] == "assistant":  # it went on after a text in the middle of its answer
        messages = (*messages[:-1], {**messages[-1], "content": (messages[-1].get("content") or "") + str(text)})
    elif messages:
        messages = (*messages, {"role": "assistant", "content": str(text)})
    return dataclasses.replace(
        transcript, pieces=(*transcript.pieces, Piece(ids, logps)), messages=messages, finished=finished
    )


def give(transcript: Transcript, reward: float) -> Transcript:
    """Add a reward to the last action; without one there is nothing that could have earned it."""
    at = max((i for i, piece in enumerate(transcript.pieces) if piece.logps is not None), default=None)
    if at is None:
        return transcript
    pieces = list(transcript.pieces)
    pieces[at] = pieces[at]._replace(reward=pieces[at].reward + reward)
    return dataclasses.replace(transcript, pieces=tuple(pieces))


def continuation_ids(text: str, tokenizer: Any, *, after: int | None = None) -> list[int]:
    """The tokens of a text that is not a beginning. after: the id before it; it matters if it is a special token."""
    special = str(tokenizer.added_tokens_decoder.get(after, ""))
    for before in filter(None, (special, "\n", ".", "0", "a")):
        head, ids = _encode(before, tokenizer), _encode(before + text, tokenizer)
        if ids[: len(head)] == head:  # nothing is merged across the border
            return ids[len(head) :]
    return _encode(text, tokenizer)


def _encode(text: str, tokenizer: Any) -> list[int]:
    return tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _begin(transcript: Transcript, tokenizer: Any, max_prompt: int, vocab: int) -> Transcript:
    prompt: Any = transcript.prompt
    heard, messages = list(transcript.heard), ()
    if isinstance(prompt, list):
        while heard and isinstance(heard[0], list):
            prompt = [*prompt, *heard.pop(0)]
        messages = tuple(_messages(prompt))
    told = [token for observation in heard for token in _plain(observation, tokenizer, vocab)]
    told = told[-(max_prompt - 1) :] if max_prompt > 1 else []
    room = max_prompt - len(told)
    if isinstance(prompt, str | list):
        ids = prompt_ids(cast(Any, prompt), tokenizer, max_prompt=room)
    else:
        ids = _plain(prompt, tokenizer, vocab)[-room:]
    if not len(ids) + len(told):
        raise UserError("the prompt has no tokens: give the policy something to continue")
    return dataclasses.replace(transcript, pieces=(Piece(_i32([*ids, *told])),), heard=(), messages=messages)


def _plain(observation: Any, tokenizer: Any, vocab: int) -> list[int]:
    """The tokens of a text or of ids."""
    if isinstance(observation, str):
        return continuation_ids(observation, tokenizer)
    if isinstance(observation, list):
        raise UserError("messages can only follow an answer in a chat: answer with text, or begin with messages")
    ids = np.asarray(observation)
    if ids.ndim != 1 or not (np.issubdtype(ids.dtype, np.integer) or not ids.size):
        raise UserError(f"a prompt or observation is a text, messages, or a row of token ids, not {observation!r}")
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab:
        raise UserError(f"token ids are from 0 to {vocab - 1}; the observation has {ids.min()} to {ids.max()}")
    return ids.tolist()


def _messages(observation: Any) -> Messages:
    """Messages, checked to be such."""
    try:
        return prompt_row({"prompt": observation})["prompt"] if observation else []
    except ValueError as error:
        raise UserError(str(error).replace("field 'prompt'", "a prompt or observation")) from None


def _delta(messages: Messages, new: Messages, tokenizer: Any, last: int) -> str:
    """What the chat template puts between the end of the last answer and the beginning of the next one.

    Rendered with a mark in place of the last answer, so that no template can rewrite it; what stands before the mark
    (some templates leave thoughts out of earlier answers) plays no part.
    """
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError("messages can only follow an answer in a chat: answer with text, or begin with messages")
    mark = "RLJAXLASTTURN"
    while any(mark in str(message) for message in (*messages, *new)):
        mark = f"X{mark}"
    dialogue = [*messages[:-1], {**messages[-1], "content": mark}, *new]
    text = chat.render(dialogue, tokenizer, generation_prompt=True)
    delta = text.rpartition(mark)[2]
    end = chat.special_pattern(tokenizer).search(delta)
    if end and tokenizer.convert_tokens_to_ids(end.group()) == last:
        return delta[end.end() :]
    return delta


def _i32(ids: Sequence[int]) -> np.ndarray:
    return np.asarray(ids, np.int32)
