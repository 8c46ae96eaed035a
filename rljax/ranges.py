"""What a setting may be: ranges that stand beside fields, read off their annotations and checked before a run.

    steps: Count = 200
    clip_norm: Positive | None = 1.0

A field whose annotation has a range takes finite numbers of that range and nothing else; every other plain annotation
(a Literal, bool, str, Callable, a class) is checked by what it says.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from rljax.errors import UserError

MOST = 2**31 - 1  # what the counters of a run can hold


@dataclasses.dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`; without the ends that are left out."""

    low: float
    high: float
    above: bool = False  # `low` itself is left out
    below: bool = False  # `high` itself is left out

    def __contains__(self, number: Any) -> bool:
        if not math.isfinite(number):
            return False
        over = number > self.low if self.above else number >= self.low
        return over and (number < self.high if self.below else number <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}"
        high = f"below {self.high:g}" if self.below else f"at most {self.high:g}"
        return low if self.high >= 1e6 else f"{low} and {high}"


Count = Annotated[int, Range(1, MOST)]
Natural = Annotated[int, Range(0, MOST)]
Seed = Annotated[int, Range(0, MOST)]
Positive = Annotated[float, Range(0, 1e6, above=True)]
Coefficient = Annotated[float, Range(0, 1e6)]  # of a term in a sum, and whatever else may be 0
Rate = Annotated[float, Range(0, 1000)]
Share = Annotated[float, Range(0, 1)]
Mass = Annotated[float, Range(0, 1, above=True)]  # a probability that something has to have
Decay = Annotated[float, Range(0, 1, below=True)]  # of a moving average; 1 would never move
Score = Annotated[float, Range(-1e9, 1e9)]  # a number of either sign
Bias = Annotated[int, Range(0, 1)]  # ddof of a variance

# Ranges of the keywords of rljax's and optax's own functions, by the field that holds the function; what is not here
# has to be finite.
KEYWORDS: dict[str, dict[str, Any]] = {
    "optimizer": {
        **dict.fromkeys(("b1", "b2", "b3", "momentum", "decay", "beta1", "beta2"), Decay),
        **dict.fromkeys(("eps", "eps_root", "weight_decay"), Coefficient),
    },
    "schedule": {"warmup": Natural, "end": Coefficient},
    "loss": {
        **dict.fromkeys(("beta", "tau"), Positive),
        **dict.fromkeys(("clip_low", "clip_high", "gamma", "alpha"), Coefficient),
        **dict.fromkeys(("desirable_weight", "undesirable_weight"), Coefficient),
        "label_smoothing": Annotated[float, Range(0, 0.5, below=True)],
        "dual_clip": Annotated[float, Range(1, 1e6, above=True)],
    },
    "value_loss": {"clip": Positive},
    "advantage": {"ddof": Bias, "eps": Coefficient, "gamma": Share},
}


def check(value: Any) -> None:
    """Raise UserError for a field of a dataclass value that its annotation does not allow, or for a keyword of a
    function that is not a number where it should be one.
    """
    hints = hints_of(type(value))
    for field in dataclasses.fields(value):
        given = getattr(value, field.name)
        check_one(field.name, hints[field.name], given)
        check_keywords(field.name, given)


@functools.cache
def hints_of(kind: type) -> dict[str, Any]:
    """The annotations of a dataclass by field, with their ranges."""
    return typing.get_type_hints(kind, include_extras=True)


def check_one(name: str, hint: Any, value: Any) -> None:
    """Raise UserError for a value that an annotation does not allow."""
    kinds = tuple(alternatives(hint))
    if not any(_fits(kind, value) for kind in kinds):
        *first, last = (_said(kind, value) for kind in kinds)
        allowed = f"{', '.join(first)} or {last}" if first else last
        raise UserError(f"{name} must be {allowed}, got {_shown(value)}")


def check_keywords(name: str, function: Any) -> None:
    """Raise UserError for a number bound to a keyword of a function, of those that are bound or made for one, that is
    not finite or, where the keyword's range is known, not within it.
    """
    while isinstance(function, functools.partial):
        known = KEYWORDS.get(name, {}) if _ours(function.func) else {}
        for key, value in _bound(function).items():
            if key in known and value is not None:
                check_one(f"{name}.{key}", known[key], value)
            elif isinstance(value, numbers.Real) and not math.isfinite(value):
                raise UserError(f"{name}.{key} must be a finite number, got {value!r}")
        function = function.func


def _bound(function: functools.partial) -> dict[str, Any]:
    """What a partial function binds, positional arguments by their names."""
    try:
        names = tuple(inspect.signature(function.func).parameters)
    except (TypeError, ValueError):  # some builtins have no signature
        names = ()
    return {**dict(zip(names, function.args, strict=False)), **function.keywords}


def _ours(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__module__", "")).partition(".")[0] in ("rljax", "optax")


def alternatives(hint: Any) -> Iterator[Any]:
    """The members of a union, each with its range if it has one."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from alternatives(part)
    else:
        yield hint


def range_of(hint: Any) -> Range | None:
    """The range of an annotation that is a number, or of one of its alternatives; None where there is none."""
    for kind in alternatives(hint):
        found = next((x for x in getattr(kind, "__metadata__", ()) if isinstance(x, Range)), None)
        if found is not None:
            return found
    return None


def _fits(kind: Any, value: Any) -> bool:
    if (limits := range_of(kind)) is not None:
        plain = typing.get_args(kind)[0]
        return _fits(plain, value) and value in limits
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in args)
    if origin is tuple:
        return isinstance(value, tuple | list) and all(_fits(args[0], item) for item in value)
    if kind is int or kind is float:
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool) and math.isfinite(value)
    if kind is Callable or origin is collections.abc.Callable:
        return callable(value)
    return isinstance(value, kind) if isinstance(kind, type) else True


def _said(kind: Any, value: Any) -> str:
    """What an alternative allows, in words; its type too, where this value is not of it."""
    if (limits := range_of(kind)) is not None:
        plain = typing.get_args(kind)[0]
        if not _fits(plain, value):
            return f"{_said(plain, value)} {limits}"
        return str(limits) if value <= limits.high or "and" in str(limits) else f"{limits} and at most {limits.high:g}"
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return ", ".join(repr(choice) for choice in args)
    if origin is tuple:
        return f"a tuple, each of it {_said(args[0], value)}"
    if kind is Callable or origin is collections.abc.Callable:
        return "a function"
    names = {int: "an integer", float: "a finite number", bool: "True or False", str: "a text", types.NoneType: "None"}
    return names.get(kind) or f"a {getattr(kind, '__module__', '')}.{getattr(kind, '__name__', kind)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}…"
