"""Guess a number: told "higher" or "lower" after every guess, the sooner the better."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rljax.data import Row
from rljax.environments.turns import Environment, Text, Turn, message


class _Secret(NamedTuple):
    number: int
    guesses: int = 0


def number_guessing(
    *, low: int = 1, high: int = 100, max_turns: int = 7, chat: bool = False, prompt: str | None = None
) -> Environment:
    """A secret number from `low` to `high`: the row's field "secret", or else drawn by the seed of the episode.

    The first number in the policy's text is its guess. A hit at guess k of K is worth 1 − (k − 1)/K, everything else 0;
    `best_score` is what the best strategy earns. An action without a number in the range costs a turn.
    """
    text = prompt or f"I am thinking of a number from {low} to {high}. What is your guess?"

    def read(text: str, ids: np.ndarray) -> int | None:
        del ids
        found = re.search(r"-?[0-9]{1,9}", text)
        return int(found.group()) if found else None

    def answer(guess: int | None, secret: int) -> Text:
        if guess is None or not low <= guess <= high:
            reply = f"Give a number from {low} to {high}."
        else:
            reply = "Higher." if secret > guess else "Lower."
        return [message(reply)] if chat else f"\n{reply} Your guess:"

    opening = [message(text)] if chat else f"{text}\nYour guess:"
    return _guessing(range(low, high + 1), max_turns, lambda: opening, read, answer)


def number_guessing_in_tokens(
    prompt: Sequence[int], numbers: Sequence[int], *, higher: Sequence[int], lower: Sequence[int], max_turns: int = 3
) -> Environment:
    """The same game in token ids, for models without words: numbers[i] is the token of number i.

    The first of these tokens in an action is its guess; it is answered with the ids `higher` or `lower`. An action
    without one costs a turn and is answered with `higher` and `lower`. With stop_ids=numbers among the settings of the
    sampler an action ends in its guess.
    """
    values = {token: i for i, token in enumerate(numbers)}

    def read(text: str, ids: np.ndarray) -> int | None:
        del text
        return next((values[token] for token in ids.tolist() if token in values), None)

    def answer(guess: int | None, secret: int) -> Text:
        if guess is None:
            return np.asarray([*higher, *lower], np.int32)
        return np.asarray(higher if secret > guess else lower, np.int32)

    return _guessing(range(len(numbers)), max_turns, lambda: np.asarray(prompt, np.int32), read, answer)


def best_score(count: int, max_turns: int) -> float:
    """What a strategy earns on average that halves what is left of `count` equally likely numbers: none earns more.

    Up to 2^(k−1) numbers can be hit at guess k.
    """
    left, total = count, 0.0
    for k in range(max_turns):
        hit = min(2**k, left)
        left, total = left - hit, total + hit * (1 - k / max_turns)
    return total / count


def _guessing(
    numbers: range,
    max_turns: int,
    prompt: Callable[[], Text],
    read: Callable[[str, np.ndarray], int | None],
    answer: Callable[[int | None, int], Text],
) -> Environment:
    if not numbers:
        raise ValueError("there is no number to guess: give a range, or tokens, of at least one")

    def reset(row: Row, seed: int) -> tuple[_Secret, Text]:
        secret: Any = row.get("secret")
        if secret is None:
            secret = int(np.random.default_rng(seed).integers(numbers.start, numbers.stop))
        if secret not in numbers:
            raise ValueError(f"the secret {secret!r} is not among the numbers from {numbers[0]} to {numbers[-1]}")
        return _Secret(int(secret)), prompt()

    def step(secret: _Secret, text: str, ids: np.ndarray) -> tuple[_Secret, Turn]:
        guess, secret = read(text, ids), secret._replace(guesses=secret.guesses + 1)
        if guess == secret.number:
            return secret, Turn(None, 1 - (secret.guesses - 1) / max_turns, done=True)
        return secret, Turn(answer(guess, secret.number))

    return Environment(reset, step, max_turns)
