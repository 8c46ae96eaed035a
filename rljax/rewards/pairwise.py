"""Rewards by comparison: what a judge of pairs says, as a number for each completion of a group."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rljax.rewards.answers import Wrong, parse
from rljax.rewards.core import Reward, reward
from rljax.rewards.judging import bound, parameters

Pairs = list[tuple[int, int]]  # rows, in the order in which the judge sees them


def win_rate(judge: Callable[..., Any], *, weight: float | None = None, name: str | None = None) -> Reward:
    """How often a completion wins against the others of its prompt, in [0, 1]: a reward for judges of pairs.

    judge: (prompts, first, second, **fields) -> for each pair the probability that the completion `first` is the better
      answer; True, False, or None for a tie (0.5). Plain or async. It gets all pairs of the batch at once, and the
      data's fields by keyword, as a reward does (see `reward`), but no completion_ids.
    weight, name: as in `reward`; the name is "win_rate" if not given.

    The reward of row i is the mean over the other rows j of its group of (P(i, j) + 1 − P(j, i)) / 2: every pair is
    judged in both orders, so that a liking for the first place cancels, with g · (g − 1) questions for a group of g.
    Neighbours with equal prompts are a group. A row without a companion, as in evaluation, has no win rate: the reward
    does not apply. The mean over a group is 1/2 whatever the policy does, so watch another reward for progress.

    With two samples a prompt, the better one of which is the chosen one, that is online DPO from AI feedback (Guo et
    al. 2024, arXiv:2402.04792).
    """
    return reward(WinRate(judge), weight=weight, name="win_rate" if name is None else name)


@dataclasses.dataclass(frozen=True)
class WinRate:
    """The callable behind `win_rate`."""

    judge: Callable[..., Any]

    @property
    def __signature__(self) -> inspect.Signature:  # so that it is handed the fields that the judge names
        named = {p.name: p for p in parameters(self.judge) if p.kind != p.VAR_POSITIONAL}
        places = [p.name for p in named.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:3]
        texts = [inspect.Parameter(text, inspect.Parameter.POSITIONAL_ONLY) for text in ("prompts", "completions")]
        more = [p if p.kind == p.VAR_KEYWORD else p.replace(kind=p.KEYWORD_ONLY) for p in named.values()]
        return inspect.Signature([*texts, *(p for p in more if p.name not in places)])

    def __call__(self, prompts: Sequence[Any], completions: Sequence[str], /, **fields: Sequence[Any]) -> Any:
        pairs = _pairs(prompts)
        if not pairs:
            return [None] * len(completions)
        firsts, seconds = ([completions[pair[place]] for pair in pairs] for place in (0, 1))
        columns = {
            name: [column[i] for i, _ in pairs]
            for name, column in fields.items()
            if name != "completion_ids" and name not in bound(self.judge)
        }
        said = self.judge([prompts[i] for i, _ in pairs], firsts, seconds, **columns)
        if not inspect.isawaitable(said):
            return _rates(said, pairs, len(completions))

        async def later() -> list[float | None]:
            return _rates(await said, pairs, len(completions))

        return later()


def _pairs(prompts: Sequence[Any]) -> Pairs:
    """All ordered pairs of two rows of a group."""
    groups = itertools.groupby(range(len(prompts)), lambda row: prompts[row])
    return [pair for _, group in groups for pair in itertools.permutations(group, 2)]


def _rates(said: Any, pairs: Pairs, rows: int) -> list[float | None]:
    wins: list[list[float]] = [[] for _ in range(rows)]
    for (first, second), chance in zip(pairs, _chances(said, pairs), strict=True):
        wins[first].append(chance)
        wins[second].append(1.0 - chance)
    return [sum(one) / len(one) if one else None for one in wins]


def _chances(said: Any, pairs: Pairs) -> list[float]:
    """A judge's answers as probabilities."""
    try:
        answer = parse(said, [0] * len(pairs))
    except Wrong as wrong:
        row = None if wrong.row is None else pairs[wrong.row][0]
        raise Wrong(f"its judge answers for {len(pairs)} pairs as for completions, and {wrong.what}", row) from None
    chances = np.where(np.isnan(answer.sums), 0.5, answer.sums).astype(np.float64)
    outside = np.flatnonzero((chances < 0) | (chances > 1))
    if len(outside) or answer.per_token is not None:
        pair = int(outside[0]) if len(outside) else 0
        what = "sequences" if answer.per_token is not None else f"{chances[pair]:g} for a pair"
        raise Wrong(
            f"its judge returned {what}, and wanted is the probability in [0, 1] that the first is the better one "
            "(of a score, the sigmoid of the difference), or None for a tie",
            pairs[pair][0],
        )
    return chances.tolist()
