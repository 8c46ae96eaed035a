"""Scalar heads: reward models and critics are a decoder and one linear map of its hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rljax.errors import UserError
from rljax.types import LanguageModel, Params, Tokens


class Head(NamedTuple):
    init: Callable[[Array], Params]  # key -> {"kernel": f32[d], "bias": f32[]}
    apply: Callable[[Params, Array], Array]  # (params, hidden [… d]) -> f32[…]


class ScalarModel(NamedTuple):
    """A decoder with a scalar head. Params: {"model": the decoder's, "head": the head's}."""

    init: Callable[[Array], Params]
    values: Callable[[Params, Tokens], Array]  # f32[b t]: at every token, having read it; 0 at pads
    scores: Callable[[Params, Tokens], Array]  # f32[b]: at the last token of each row; 0 for a row of pads
    config: Any  # the decoder's ModelConfig


def scalar_head(hidden_size: int) -> Head:
    """w · h + b in float32, with w ~ N(0, 1 / (d + 1)) and b = 0 at the start (2403.17031, detail 12)."""

    def init(key: Array) -> Params:
        kernel = jax.random.normal(key, (hidden_size,), jnp.float32) * (hidden_size + 1) ** -0.5
        return {"kernel": kernel, "bias": jnp.zeros((), jnp.float32)}

    def apply(params: Params, hidden: Array) -> Array:
        kernel = params["kernel"].astype(jnp.float32)
        products = jnp.matmul(hidden.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST)
        return products + params["bias"].astype(jnp.float32)

    return Head(init=init, apply=apply)


def normalize_head(params: Params, *, mean: float, std: float) -> Params:
    """The head whose scores are (score − mean) / std of this one's. UserError for a std that is not positive."""
    if not std > 0:
        raise UserError(f"scores with std {std} cannot be brought to std 1: all samples score alike, or not a number")
    return {"kernel": params["kernel"] / std, "bias": (params["bias"] - mean) / std}


def reward_model(model: LanguageModel) -> ScalarModel:
    """The decoder with a scalar head in place of its unembedding, as reward model (`scores`) or critic (`values`).

    To start from a trained decoder, replace params["model"] by its params.
    """
    head = scalar_head(model.config.hidden_size)

    def init(key: Array) -> Params:
        model_key, head_key = jax.random.split(key)
        return {"model": model.init(model_key), "head": head.init(head_key)}

    def values(params: Params, tokens: Tokens) -> Array:
        hidden = model.apply(params["model"], tokens.ids, tokens.segments).hidden
        return jnp.where(tokens.segments > 0, head.apply(params["head"], hidden), 0.0)

    def scores(params: Params, tokens: Tokens) -> Array:
        hidden = model.apply(params["model"], tokens.ids, tokens.segments).hidden
        last, exists = last_token(tokens.segments)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        return jnp.where(exists, head.apply(params["head"], hidden), 0.0)

    return ScalarModel(init=init, values=values, scores=scores, config=model.config)


def before_tokens(values: Array, mask: Array) -> Array:
    """Values of states as values of tokens, f32[b t]: from V(having read token t) to V(about to write token t).

    The critic's counterpart of the shift in `ops.token_logps`: what a critic says of a token's choice, it says before
    the token is there. 0 where the mask is False. The token before a trained one is always of its own document.
    """
    return jnp.where(mask, jnp.pad(values[:, :-1], ((0, 0), (1, 0))), 0.0)


def last_token(segments: Array) -> tuple[Array, Array]:
    """From i32[b t]: the index of the last token that is not a pad i32[b], and whether the row has one bool[b]."""
    real = segments > 0
    last = jnp.max(jnp.where(real, jnp.arange(segments.shape[1])[None], 0), axis=1)
    return last, real.any(axis=1)
