"""What an environment is: frozen bundles of functions, and what they answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rljax.data import Row
from rljax.types import Rollout

Text = str | np.ndarray | list[dict[str, Any]]  # a text, token ids [k], or messages for the chat template


class Written(str):
    """The text of an action, without special tokens.

    raw: the same with those that the policy wrote, but for the one it stopped at: <think> may be one. prompt: all that
    the action follows, as the policy read it; a template's generation prompt, which may end in <think>, closes it.
    """

    raw: str
    prompt: str

    def __new__(cls, text: str, *, raw: str | None = None, prompt: str = "") -> Written:
        made = super().__new__(cls, text)
        made.raw, made.prompt = str(text) if raw is None else raw, prompt
        return made

    def __reduce__(self) -> Any:
        return _written, (str(self), self.raw, self.prompt)


def _written(text: str, raw: str, prompt: str) -> Written:
    return Written(text, raw=raw, prompt=prompt)


def stripped(text: str) -> Written:
    """Without the white space around it."""
    return Written(text.strip(), raw=getattr(text, "raw", text).strip(), prompt=getattr(text, "prompt", ""))


class Turn(NamedTuple):
    """What an environment answers to an action."""

    observation: Text | None  # what the policy reads next; None when done
    reward: float = 0.0  # lands on the last token of the action
    done: bool = False


class Environment(NamedTuple):
    """A task of one or several turns, as functions on the host; best pure ones, whose states are values.

    reset: (data row, seed) -> (state, prompt). The copies of an episode (n > 1) share one reset and its prompt, and
      each has a deep copy of the state, so that a step may change it. Where a state cannot be copied, reset is called
      again for each copy, with the same seed.
    step: (state, the action as text (`Written`: a str, whose `raw` has the special tokens too), its token ids) ->
      (state, Turn). Runs in a thread of its
      own; it may block, raise, or take too long, and ends nothing but its own episode.
    max_turns: how many times the policy may act.
    """

    reset: Callable[[Row, int], tuple[Any, Text]]
    step: Callable[[Any, str, np.ndarray], tuple[Any, Turn]]
    max_turns: int


class Round(NamedTuple):
    """What a game answers to the action of one player: one entry a player."""

    observations: tuple[Text | None, ...]  # what each is told; None: nothing new
    rewards: tuple[float, ...]  # of their own; each lands on the last token of that player's latest action
    shared: float = 0.0  # a reward that every player gets beside its own
    done: bool = False


class Game(NamedTuple):
    """Players that take turns, the first one first. As `Environment`, with the player's number as a second argument.

    reset: (data row, seed) -> (state, one prompt a player).
    step: (state, player, text, ids) -> (state, Round).
    max_turns: how many times each player may act.
    """

    reset: Callable[[Row, int], tuple[Any, tuple[Text, ...]]]
    step: Callable[[Any, int, str, np.ndarray], tuple[Any, Round]]
    players: int
    max_turns: int


class Episodes(NamedTuple):
    """What one player did and saw in a batch of episodes, on the host. The n copies of a data row are neighbours."""

    rollout: Rollout  # of numpy arrays [b t]: prompt, action, observation, action, …; mask and logps: actions only
    rewards: np.ndarray  # f32[b t]; each turn's reward at the last token of its action
    turns: np.ndarray  # i32[b]; how many times the player acted
    failures: list[str | None]  # why an episode broke off; nothing of such a one is trained (its mask is False)
    texts: list[str]  # everything after the prompt, special tokens left out
    states: list[Any]  # the environment's last state; None where reset failed


def message(text: str, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": text}
