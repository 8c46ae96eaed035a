"""Split the coins: two players claim shares of a pile in turns, until both claims can be met."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from rljax.data import Row
from rljax.environments.turns import Game, Round, Text, message


class _Claims(NamedTuple):
    latest: tuple[int | None, int | None] = (None, None)
    moves: int = 0


def split_coins(*, coins: int = 10, max_turns: int = 3, shared: float = 0.0, chat: bool = False) -> Game:
    """Two players; the first number of an action is what its player claims of the coins, after hearing the other.

    As soon as the latest claims of both come to no more than there is, each gets what it claims (Nash's demand game,
    1953, in turns): its own reward is its share of the coins, and the shared reward is `shared` times the share of the
    coins that found an owner. Without agreement after `max_turns` claims each there is nothing for anybody. An action
    without a number from 0 to `coins` withdraws its player's claim.
    """
    rules = (
        f"Two players split {coins} coins. In turn, each says how many it wants. As soon as the two numbers fit into "
        f"{coins}, each gets what it wants; if they do not after {max_turns} turns, both get nothing."
    )

    def opening(first: bool) -> Text:
        if chat:
            system = message(rules, "system")
            return [system, message("You begin. How many do you want?")] if first else [system]
        return f"{rules}\nI want" if first else rules

    def reset(row: Row, seed: int) -> tuple[_Claims, tuple[Text, ...]]:
        del row, seed
        return _Claims(), (opening(True), opening(False))

    def step(claims: _Claims, player: int, text: str, ids: np.ndarray) -> tuple[_Claims, Round]:
        del ids
        claim = _claim(text, coins)
        latest = (claim, claims.latest[1]) if player == 0 else (claims.latest[0], claim)
        claims = _Claims(latest, claims.moves + 1)
        first, second = latest
        if first is not None and second is not None and first + second <= coins:
            together = shared * (first + second) / coins
            return claims, Round((None, None), (first / coins, second / coins), together, done=True)
        if claims.moves == 2 * max_turns:
            return claims, Round((None, None), (0.0, 0.0), done=True)
        said = "says nothing of use" if claim is None else f"wants {claim}"
        news = f"The other player {said}."
        told = [message(f"{news} How many do you want?")] if chat else f"\n{news} I want"
        return claims, Round((None, told) if player == 0 else (told, None), (0.0, 0.0))

    return Game(reset, step, players=2, max_turns=max_turns)


def _claim(text: str, coins: int) -> int | None:
    found = re.search(r"-?[0-9]{1,9}", text)
    return int(found.group()) if found and 0 <= int(found.group()) <= coins else None
