"""Calling goldens, and the comparisons that the tests of the mathematics share."""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rljax.types import Mean
from tests.losses.goldens import Golden


def lookup(golden: Golden, module: ModuleType | None = None) -> Callable[..., Any]:
    """The golden's function with its options bound; from `module` (a mutant) where given."""
    name, function = golden.function.split(".")
    source = module or importlib.import_module(f"rljax.{name}")
    return functools.partial(getattr(source, function), **golden.options)


def arrays(result: Any) -> list[np.ndarray]:
    """A result (array, tuple of arrays, or Mean) or an expectation (nested lists, or a tuple of them) as a list."""
    if isinstance(result, Mean):
        result = (result.total, result.weight)
    return [np.asarray(part) for part in (result if isinstance(result, tuple) else (result,))]


def matches(result: Any, golden: Golden, atol: float = 3e-6) -> bool:
    """Whether a result has the golden's shapes and numbers."""
    got, want = arrays(result), arrays(golden.expected)
    return len(got) == len(want) and all(
        g.shape == w.shape and bool(np.allclose(g, w, rtol=3e-6, atol=atol)) for g, w in zip(got, want, strict=True)
    )


def with_gradients(function: Callable[..., Any], positions: tuple[int, ...]) -> Callable[..., Any]:
    """The function's result, its elements weighted by 1, 2, 3, … and summed, and the gradients of that sum."""

    def weighted(*args: Any) -> tuple[jax.Array, Any]:
        result = function(*args)
        outputs = (result.total,) if isinstance(result, Mean) else jax.tree.leaves(result)
        sums = [jnp.sum(x * jnp.arange(1.0, x.size + 1.0, dtype=x.dtype).reshape(x.shape)) for x in outputs]
        return sum(sums), result

    def run(*args: Any) -> tuple[Any, jax.Array, tuple[jax.Array, ...]]:
        if not positions:
            value, result = weighted(*args)
            return result, value, ()
        (value, result), gradients = jax.value_and_grad(weighted, argnums=positions, has_aux=True)(*args)
        return result, value, gradients

    return run


def numerical_gradient(function: Callable[..., Any], args: list[Any], position: int, step: float = 1e-6) -> np.ndarray:
    """Central differences of `function` (to a scalar) in every element of one float64 argument."""
    gradient = np.zeros_like(args[position])
    for index in np.ndindex(gradient.shape):
        sides = []
        for sign in (1, -1):
            moved = [np.array(a) for a in args]
            moved[position][index] += sign * step
            sides.append(float(function(*moved)))
        gradient[index] = (sides[0] - sides[1]) / (2 * step)
    return gradient
