"""A user's functions on a few numbers before anything is loaded: what they return, and whether it depends on the
policy.

A function that raises here is left to the run, whose own call says where; rljax's own are known. Raises UserError for
what would be broadcast and trained: another shape, integers, no gradient, NaN.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rljax.errors import UserError


def _f32(x: Any) -> np.ndarray:
    return np.asarray(x, np.float32)


# Log-probabilities of three rows: the policy prefers either answer, and is the reference in the last.
CHOSEN, REJECTED = _f32([-3.0, -9.0, -5.0]), _f32([-8.0, -2.0, -5.5])
REFERENCE = _f32([-4.0, -7.0, -5.0]), _f32([-6.0, -4.0, -5.5])
LOGPS = _f32([[0, -1.0, -2.0, -0.5], [0, -0.1, -3.0, 0]])
MASK = np.asarray([[0, 1, 1, 1], [0, 1, 1, 0]], bool)
GROUPS = _f32([[1.0, 0.0, 0.5, 2.0], [1.0, 1.0, 1.0, 1.0]])  # rewards, those of the second prompt alike


def pairs(loss: Callable[..., Any], *, reference: bool = True) -> None:
    """A loss of `objectives.preference`."""
    _try("loss", loss, (CHOSEN, REJECTED, *REFERENCE) if reference else (CHOSEN, REJECTED), learned=(0, 1))


def unpaired(loss: Callable[..., Any]) -> None:
    """A loss of `objectives.unpaired`."""
    _try("loss", loss, (CHOSEN, REFERENCE[0], np.asarray([True, False, True]), _f32(0.1)), learned=(0,))


def comparison(loss: Callable[..., Any]) -> None:
    """A loss of `objectives.comparison`, on scores."""
    names = inspect.signature(loss).parameters
    if "best" in names:
        _try("loss", loss, (np.stack([CHOSEN, REJECTED], 1), np.asarray([0, 1, 0])), learned=(0,), like=CHOSEN)
    else:
        _try("loss", loss, (CHOSEN, REJECTED), learned=(0, 1))


def surrogate(loss: Callable[..., Any], names: Sequence[str]) -> None:
    """A loss of `objectives.policy`, given what its parameters are named after."""
    given = {
        "logps": LOGPS,
        "old_logps": LOGPS,
        "advantages": np.where(MASK, _f32([[1.0], [-2.0]]), 0),
        "mask": MASK,
    }
    learned = tuple(i for i, name in enumerate(names) if name == "logps")
    _try("loss", loss, tuple(given[name] for name in names), learned=learned, like=LOGPS)


def value_loss(loss: Callable[..., Any]) -> None:
    """`(values, old_values, returns) -> [b t]`."""
    _try("value_loss", loss, (LOGPS, LOGPS, LOGPS + 1), learned=(0,))


def advantage(function: Callable[..., Any], group: int) -> None:
    """(rewards [g n]) -> [g n], or with a parameter `mask` (rewards [b t], mask) -> [b t]."""
    names = inspect.signature(function).parameters
    if "mask" in names:
        _try("advantage", function, (np.where(MASK, LOGPS, 0), MASK))
        return
    rewards = np.resize(GROUPS[0], (2, group)) if group < 2 else np.stack([np.resize(row, group) for row in GROUPS])
    more: dict[str, Any] = {"applies": np.ones(rewards.shape, bool)} if "applies" in names else {}
    if "greedy" in names:
        more["greedy"] = np.zeros(2, np.float32)
    _try("advantage", lambda rewards: function(rewards, **more), (rewards,), named=function)


def _try(
    field: str,
    function: Callable[..., Any],
    given: tuple[Any, ...],
    *,
    learned: tuple[int, ...] | None = None,
    like: Any = None,
    named: Any = None,
) -> None:
    like, named = given[0] if like is None else like, function if named is None else named
    name = name_of(named)
    if getattr(getattr(named, "func", named), "__module__", "").partition(".")[0] == "rljax":
        return

    def total(*given: Any) -> tuple[Array, Any]:
        made = function(*given)
        check_form(field, name, made, like)
        return jnp.sum(made), made

    try:
        if learned:
            (_, made), slopes = jax.jit(jax.value_and_grad(total, argnums=learned, has_aux=True))(*given)
        else:
            (_, made), slopes = jax.jit(total)(*given), ()
    except UserError:
        raise
    except Exception:
        return
    if learned == () or (slopes and not any(np.any(np.asarray(slope)) for slope in slopes)):
        raise UserError(
            f"{field}={name} does not depend on the policy: its gradient is exactly 0 for every row, so that nothing "
            "would be learned"
        )
    if not all(np.isfinite(np.asarray(x)).all() for x in (made, *slopes)):
        raise UserError(
            f"{field}={name} gives numbers that are not finite, or such a gradient, for ordinary ones: it returned "
            f"{np.asarray(made).tolist()} for {[np.asarray(x).tolist() for x in given]}. Divisions need a small number "
            "below, a mask goes on the input of an exp or a log"
        )


def check_form(field: str, name: str, made: Any, like: Any) -> None:
    """Raise UserError for what a function made of arrays like this one, where it is not floats of the same shape."""
    wanted = "one number a row, [b]" if np.ndim(like) == 1 else "one number for each of its inputs, of the same shape"
    shape, kind = (
        getattr(made, "shape", ()),
        getattr(made, "dtype", np.dtype(type(made)) if np.isscalar(made) else None),
    )
    if tuple(shape) != np.shape(like) or kind is None or not jnp.issubdtype(kind, jnp.floating):
        raise UserError(
            f"{field}={name} must return {wanted}, in floating point: for {np.shape(like)} it returned {kind}"
            f"{list(shape)}, which would be broadcast or rounded. Leave means and sums over the batch to the run"
        )


def name_of(function: Any) -> str:
    function = getattr(function, "func", function)
    return getattr(function, "__qualname__", type(function).__qualname__)
