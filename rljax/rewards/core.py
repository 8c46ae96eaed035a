"""What a reward is: a callable with a name and a weight, judged on the host or as part of a compiled program."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rljax.errors import UserError


class RewardError(UserError):
    """A reward that failed, or returned what is not a reward: says which, for which row, and what to do."""


@dataclasses.dataclass(frozen=True, eq=False)
class Reward:
    """A callable with a name and a weight. Make one with `reward`, `on_device` or `from_checkpoint`."""

    fn: Callable[..., Any]
    name: str
    weight: float = 1.0
    params: Any = None  # on_device only: a pytree of arrays, the first argument of `fn`
    on_device: bool = False
    special_tokens: bool = False  # it reads completions with the special tokens that the policy wrote

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What `fn` says, unweighted: a reward can be tried by hand."""
        return self.fn(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:  # so that options of `fn` are options of the reward
        return inspect.signature(self.fn)


class Scores(NamedTuple):
    """What the rewards of a batch say."""

    total: (
        np.ndarray
    )  # f32[b]; weighted sum of the rewards that apply, per-token ones with their sum; NaN: none applies
    per_token: list[np.ndarray] | None  # weighted, f32[len(completion)] a row; None where no reward is per token
    parts: dict[str, np.ndarray]  # f32[b]; unweighted, NaN where the reward does not apply; a per-token one as its sum


def reward(
    fn: Callable[..., Any],
    *,
    weight: float | None = None,
    name: str | None = None,
    special_tokens: bool | None = None,
) -> Reward:
    """A host reward: `fn(prompts, completions, **fields) -> numbers`, plain or async.

    fn: gets the whole batch. `prompts` are as in the data (texts, or lists of messages), `completions` are texts; by
      keyword it gets, of the data's fields (lists, with None where a row lacks the field) and of `prompt_ids` and
      `completion_ids` (lists of i32 arrays), those that its signature names, or all if it takes **kwargs; and if it
      names them `raw_completions` (texts with the special tokens that the policy wrote, but for the one that ended it)
      and `prompt_texts` (prompts as the policy read them: template, generation prompt, special tokens). The first two
      parameters may have any names; but one that is named like any of these gets just that, wherever it stands.
      Keywords that a `functools.partial` binds stay as bound. It returns b numbers (a list, numpy or jax array; True
      counts 1), with None where the reward does not apply to a row; or b sequences of numbers, one for each token of
      the completion.
    weight: of this reward in the sum; any finite number (1 if not given). One of weight 0 is only watched: it gives no
      score to a row to which no other applies. name: in metrics (the function's if not given). A Reward passes through,
      with what is given here changed.
    special_tokens: True hands the raw completions to it as its completions, for tags that are special tokens to the
      tokenizer, such as <think>; texts are without special tokens otherwise.
    """
    bound: dict[str, Any] = {}
    inner: Any = fn
    while isinstance(inner, functools.partial) and not inner.args:
        bound = {**inner.keywords, **bound}
        inner = inner.func
    if isinstance(inner, Reward):
        changed = {"weight": _weight(weight)} if weight is not None else {}
        changed |= {"name": _name(name)} if name is not None else {}
        changed |= {"fn": functools.partial(inner.fn, **bound)} if bound else {}
        changed |= {"special_tokens": special_tokens} if special_tokens is not None else {}
        return dataclasses.replace(inner, **changed)
    if not callable(fn):
        raise UserError(
            f"a reward is a callable (prompts, completions, **fields) -> numbers, or several in a tuple; not {fn!r}"
        )
    named, weighted = _name(_function_name(fn) if name is None else name), _weight(1.0 if weight is None else weight)
    return Reward(fn, named, weighted, special_tokens=bool(special_tokens))


def on_device(
    fn: Callable[..., Any], *, params: Any = None, weight: float | None = None, name: str | None = None
) -> Reward:
    """A reward that is a JAX function, so that sampling, scoring and learning can be one compiled program.

    fn: (tokens: Tokens) -> f32[b], or f32[b t] for a reward of every token (read at the trained tokens only); with
      params, (params, tokens). It must be jittable.
    params: its weights, a pytree of arrays. They travel as an argument: what a function closes over is compiled in.
    weight, name: as in `reward`; a Reward keeps those that are not given, and its params.

    Also a decorator: `@rewards.on_device`.
    """
    made = reward(fn, weight=weight, name=name)
    return dataclasses.replace(made, params=made.params if params is None else params, on_device=True)


def as_rewards(one_or_many: Callable[..., Any] | Sequence[Callable[..., Any]]) -> tuple[Reward, ...]:
    """One callable or Reward, or a sequence of them, as a tuple of Rewards with different names."""
    if callable(one_or_many):
        return (reward(one_or_many),)
    if isinstance(one_or_many, str | bytes | Mapping) or not isinstance(one_or_many, Sequence):
        raise UserError(
            f"rewards are a callable (prompts, completions, **fields) -> numbers, or a list of them, not {one_or_many}"
        )
    found = tuple(reward(one) for one in one_or_many)
    if not found:
        raise UserError("there is no reward in the list of rewards: give at least one callable")
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"{names.count(name)} rewards are called {name!r}, and each needs a name of its own for its metrics: "
                f'give one with rewards.reward(FUNCTION, name="…")'
            )
    return found


def deciding(rewards: Sequence[Reward]) -> Sequence[Reward]:
    """The rewards that decide whether a row has a score at all: those with a weight, or all where none has one.

    A reward of weight 0 is a monitor. That it applies to a row must not make that row one of score 0.
    """
    return [one for one in rewards if one.weight] or rewards


def described(error: BaseException) -> str:
    """The type and the message of an exception, even of one that fails to say what it is."""
    try:
        return f"{type(error).__name__}: {error}"
    except BaseException:  # in a thread of its own, which would else end without an answer
        return f"{type(error).__name__} (its message cannot be shown)"


def _function_name(fn: Any) -> str:
    while isinstance(fn, functools.partial):
        fn = fn.func
    name = getattr(fn, "__name__", type(fn).__name__)
    return "reward" if name == "<lambda>" else name


def _name(name: Any) -> str:
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"the name of a reward is a text that is not empty (it stands in metrics), not {name!r}")
    return name


def _weight(weight: Any) -> float:
    if isinstance(weight, str) or not math.isfinite(weight):
        raise UserError(f"the weight of a reward is a finite number, not {weight!r}")
    return float(weight)
