"""No prompt twice: neighbouring rows that begin with the same prompt are computed in one row that holds it once.

A row of the plain layout is a prompt and a completion; n of them become a prompt and n completions, of which each sees
the prompt and itself. Positions, and what each token sees, are the same, so hidden states, losses and gradients are
equal to rounding; the prompt's share of the work is done once instead of n times.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from rljax.errors import UserError
from rljax.models.transformer import Layout
from rljax.types import LanguageModel, Output, Params


def share_prompts(model: LanguageModel, *, n: int, completion: int) -> LanguageModel:
    """The same model for rows that stand in groups of n with one prompt: `apply` takes and gives the plain layout.

    Of every row the last `completion` columns are its own, and those before them are equal in the n rows of a group,
    padding included, but for rows that are all padding. What precedes the first token of a completion must stand in
    the last of the prompt's columns. Arrays are [g·n t], and with n = 1 this is the model itself.
    """

    def apply(params: Params, ids: Array, segments: Array, *, cache: Any = None) -> Output:
        if cache is not None:
            raise UserError("a model that shares prompts reads whole rows: decode with the plain model")
        rows, prompt = len(ids), ids.shape[1] - completion
        if rows % n or prompt < 1:
            raise UserError(
                f"rows of shape {ids.shape} cannot share prompts in groups of n={n} with {completion} columns of their "
                f"own: give a multiple of {n} rows, and at least one column of prompt"
            )
        packed = _pack(ids, segments, n, prompt)
        hidden = model.apply(params, *packed, layout=Layout(prompt, n)).hidden  # pyright: ignore[reportCallIssue]
        return Output(hidden=_unpack(hidden, n, prompt), cache=None)

    return model if n == 1 else model._replace(apply=apply)


def _pack(ids: Array, segments: Array, n: int, prompt: int) -> tuple[Array, Array]:
    """[g·n p+m] -> [g p+n·m]; the prompt is that of a row that has one."""
    ids, segments = (x.reshape(-1, n, x.shape[1]) for x in (ids, segments))
    row = jnp.argmax(jnp.any(segments > 0, axis=2), axis=1)[:, None, None]

    def pack(x: Array) -> Array:
        first = jnp.take_along_axis(x[:, :, :prompt], row, axis=1)[:, 0]
        return jnp.concatenate([first, x[:, :, prompt:].reshape(len(x), -1)], axis=1)

    return pack(ids), pack(segments)


def _unpack(hidden: Array, n: int, prompt: int) -> Array:
    """[g p+n·m d] -> [g·n p+m d]"""
    groups, _, size = hidden.shape
    first = jnp.broadcast_to(hidden[:, None, :prompt], (groups, n, prompt, size))
    rest = hidden[:, prompt:].reshape(groups, n, -1, size)
    return jnp.concatenate([first, rest], axis=2).reshape(groups * n, -1, size)
