"""Customer service: the environment is the customer of a written conversation, the policy answers as the agent."""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rljax import extras
from rljax.data import Row
from rljax.environments.prompts import Reward, host_rewards, judge
from rljax.environments.turns import Environment, Text, Turn, message, stripped
from rljax.errors import UserError

CATEGORIES = ("tech_support", "conversations")
SYSTEM = "You are a friendly customer service agent. Answer the customer in one sentence."


class _Talk(NamedTuple):
    turns: tuple[str, ...]  # customer, agent, customer, agent, …; an even number
    at: int  # the customer's last word


def customer_service(reward: Reward, *, chat: bool = False, system: str = SYSTEM, max_turns: int = 8) -> Environment:
    """Rows {"turns": [customer, agent, customer, agent, …]}: the customer says what it says in the conversation,
    whatever the policy answers.

    reward: judges every answer by the field "answer", the agent's words in the conversation (`rewards.token_f1`).
    chat: messages for a chat template, or else a text of lines "Customer: …" and "Agent: …", after `system` in both.
    An episode is done after the last words that the conversation has an answer to.
    """
    several = host_rewards(reward)

    def reset(row: Row, seed: int) -> tuple[_Talk, Text]:
        del seed
        turns = row.get("turns")
        if isinstance(turns, str) or not isinstance(turns, Sequence) or not all(isinstance(t, str) for t in turns):
            raise UserError(f"customer service needs rows with 'turns', a list of texts, not {turns!r}")
        if len(turns) < 2:
            raise UserError(f"a conversation begins with a customer and an agent; 'turns' has {len(turns)} texts")
        talk = _Talk(tuple(turns[: len(turns) // 2 * 2]), 0)
        if chat:
            opening = [message(talk.turns[0])]
            return talk, [message(system, "system"), *opening] if system else opening
        return talk, f"{system}\n{_line(talk.turns[0])}".lstrip()

    def step(talk: _Talk, text: str, ids: np.ndarray) -> tuple[_Talk, Turn]:
        words, answer = talk.turns[talk.at : talk.at + 2]
        score = judge(several, words, stripped(text), ids, {"answer": answer})
        talk = talk._replace(at=talk.at + 2)
        if talk.at == len(talk.turns):
            return talk, Turn(None, score, done=True)
        words = talk.turns[talk.at]
        return talk, Turn([message(words)] if chat else f"\n{_line(words)}", score)

    return Environment(reset, step, max_turns)


def _line(words: str) -> str:
    return f"Customer: {words}\nAgent:"


def conversations(categories: Sequence[str] = CATEGORIES, *, language: str = "english") -> list[dict[str, Any]]:
    """Rows {"turns"} of the conversations of the PyPI package chatterbot-corpus (BSD licence), each once.

    Not all categories hold dialogues: in "computers" and "emotion" one text is followed by several answers to it.
    Needs the extra `environments`.
    """
    try:
        import yaml

        folder = importlib.resources.files("chatterbot_corpus") / "data" / language
    except ImportError as error:
        raise UserError(f"conversations needs the corpus: {extras.install('environments')}") from error
    if not folder.is_dir():
        raise UserError(f"chatterbot-corpus has no language {language!r}")
    found: dict[tuple[str, ...], None] = {}
    for category in categories:
        file = folder / f"{category}.yml"
        if not file.is_file():
            names = ", ".join(sorted(one.name.removesuffix(".yml") for one in folder.iterdir()))
            raise UserError(f"chatterbot-corpus has no category {category!r} in {language}: choose of {names}")
        # BaseLoader builds texts, lists and mappings only: a plain "Yes" stays a text.
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
        talks = [talk for talk in content["conversations"] if isinstance(talk, list) and len(talk) > 1]
        found |= dict.fromkeys(tuple(" ".join(words.split()) for words in talk) for talk in talks)
    return [{"turns": list(talk)} for talk in found]
