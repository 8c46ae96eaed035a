"""Guess one of an ordered row of things: told "higher" or "lower" after every guess, and the sooner the better."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rljax.data import Row
from rljax.environments.turns import Environment, Text, Turn, message
from rljax.errors import UserError


class _Secret(NamedTuple):
    position: int  # among the choices
    guesses: int = 0


def number_guessing(*, low: int = 1, high: int = 100, max_turns: int = 7, chat: bool = False) -> Environment:
    """A secret number from `low` to `high`: see `guessing`. chat: as messages, or else as a text that goes on."""
    text, again = f"I am thinking of a number from {low} to {high}.", f"Give a number from {low} to {high}."
    numbers = [str(number) for number in range(low, high + 1)]
    if chat:
        opening = [message(f"{text} What is your guess?")]
        return guessing(numbers, opening, higher="Higher.", lower="Lower.", again=again, max_turns=max_turns)
    ask = " My guess:"
    higher, lower, again = f"\nHigher.{ask}", f"\nLower.{ask}", f"\n{again}{ask}"
    return guessing(numbers, f"{text}{ask}", higher=higher, lower=lower, again=again, max_turns=max_turns)


def guessing(
    choices: Sequence[str], prompt: Text, *, higher: str, lower: str, again: str, max_turns: int
) -> Environment:
    """One of `choices`, which stand in order, is the secret: the row's field "secret", or else drawn by the seed.

    The first choice that the policy's text has as a word of its own is the guess. A hit at guess k of K is worth
    1 − (k − 1)/K, everything else 0; `best_score` is what the best strategy earns. `higher` or `lower` (the secret is)
    answers a guess, `again` an action without one, which costs a turn: as texts that go on, or as messages of the user
    where the prompt is messages.
    """
    places = {choice: i for i, choice in enumerate(choices)}
    if not choices or len(places) < len(choices):
        raise UserError(f"something is guessed among different choices, at least one; got {list(choices)}")
    longest = sorted(choices, key=len, reverse=True)
    word = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, longest))})(?!\w)")

    def reset(row: Row, seed: int) -> tuple[_Secret, Text]:
        secret = row.get("secret")
        if secret is None:
            return _Secret(int(np.random.default_rng(seed).integers(len(choices)))), prompt
        if str(secret) not in places:
            raise UserError(f"the secret {secret!r} is none of the choices from {choices[0]} to {choices[-1]}")
        return _Secret(places[str(secret)]), prompt

    def step(secret: _Secret, text: str, ids: np.ndarray) -> tuple[_Secret, Turn]:
        del ids
        found, secret = word.search(text), secret._replace(guesses=secret.guesses + 1)
        place = places[found.group()] if found else None
        if place == secret.position:
            return secret, Turn(None, 1 - (secret.guesses - 1) / max_turns, done=True)
        answer = again if place is None else higher if secret.position > place else lower
        return secret, Turn([message(answer)] if isinstance(prompt, list) else answer)

    return Environment(reset, step, max_turns)


def best_score(count: int, max_turns: int) -> float:
    """What a strategy earns on average that halves what is left of `count` equally likely choices: none earns more.

    Up to 2^(k−1) of them can be hit at guess k.
    """
    left, total = count, 0.0
    for k in range(max_turns):
        hit = min(2**k, left)
        left, total = left - hit, total + hit * (1 - k / max_turns)
    return total / count
