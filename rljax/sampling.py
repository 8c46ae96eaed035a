"""Text from a policy: one prefill, then one loop on the device that ends when every row has stopped."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rljax import ops
from rljax.models import init_cache, unstack
from rljax.models.heads import last_token
from rljax.types import LanguageModel, Params, Rollout, Tokens


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "top_k", "stop_ids"))
def generate(
    model: LanguageModel,
    params: Params,
    prompts: Tokens,
    key: Array,
    *,
    max_new_tokens: int,
    temperature: float | Array = 1.0,
    top_k: int | None = None,
    top_p: float | Array | None = None,
    stop_ids: tuple[int, ...] = (),
) -> Rollout:
    """Continue every prompt until it writes one of `stop_ids` or `max_new_tokens` tokens.

    prompts: [b p], one document a row, padding anywhere (segments 0). The result's rows are the prompt's p columns
      followed by the new tokens, [b, p + max_new_tokens]; columns after a stop token are padding. The stop token is
      part of the response.
    key: row i draws its token at step s with fold_in(fold_in(key, i), s), so what a row samples does not depend on
      its companions.
    temperature: logits are divided by it; 0 is greedy decoding. top_k keeps the k likeliest tokens, top_p the
      smallest set of likeliest tokens whose probability reaches it (applied in this order). `Rollout.logps` are those
      of the distribution that is left after all three: log-probability 0 for greedy.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if jax.default_backend() == "cpu":
        params = unstack(params)  # else XLA copies each layer's slice at every token; on accelerators memory is dearer
    segment = jnp.max(prompts.segments, axis=1)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(segment.size))
    draw = functools.partial(_draw, temperature=temperature, top_k=top_k, top_p=top_p)

    def step(loop: _Loop) -> _Loop:
        now = jax.vmap(jax.random.fold_in, (0, None))(keys, loop.count)
        token, logp = draw(model.unembed(params, loop.hidden), now)
        alive = ~loop.done
        token = jnp.where(alive, token, 0)
        hidden, cache = model.apply(params, token[:, None], jnp.where(alive, segment, 0)[:, None], cache=loop.cache)
        return _Loop(
            count=loop.count + 1,
            ids=loop.ids.at[:, loop.count].set(token),
            logps=loop.logps.at[:, loop.count].set(jnp.where(alive, logp, 0.0)),
            mask=loop.mask.at[:, loop.count].set(alive),
            done=loop.done | jnp.isin(token, jnp.asarray(stop_ids, jnp.int32)) & alive,
            hidden=hidden[:, 0],
            cache=cache,
        )

    start = _prefill(model, params, prompts, max_new_tokens)
    end = jax.lax.while_loop(lambda loop: (loop.count < max_new_tokens) & ~jnp.all(loop.done), step, start)
    new = Tokens(ids=end.ids, segments=jnp.where(end.mask, segment[:, None], 0), mask=end.mask)
    before = dataclasses.replace(prompts, mask=jnp.zeros_like(prompts.mask))
    return Rollout(
        tokens=jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), before, new),
        logps=jnp.pad(end.logps, ((0, 0), (prompts.ids.shape[1], 0))),
        finished=end.done & (segment > 0),
    )


class _Loop(NamedTuple):
    count: Array
    ids: Array
    logps: Array
    mask: Array
    done: Array
    hidden: Array
    cache: Any


def _prefill(model: LanguageModel, params: Params, prompts: Tokens, max_new_tokens: int) -> _Loop:
    """The loop before its first token: every prompt read once, and the state that predicts what follows it."""
    rows, width = prompts.ids.shape
    new = (rows, max_new_tokens)
    cache = init_cache(model.config, rows, width + max_new_tokens)
    hidden, cache = model.apply(params, prompts.ids, prompts.segments, cache=cache)
    last, exists = last_token(prompts.segments)
    return _Loop(
        count=jnp.zeros((), jnp.int32),
        ids=jnp.zeros(new, prompts.ids.dtype),
        logps=jnp.zeros(new, jnp.float32),
        mask=jnp.zeros(new, bool),
        done=~exists,  # a row without a prompt has nothing to continue
        hidden=jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0],
        cache=cache,
    )


def _draw(
    logits: Array, keys: Array, *, temperature: float | Array, top_k: int | None, top_p: float | Array | None
) -> tuple[Array, Array]:
    """logits[b v] -> (token i32[b], its log-probability f32[b] under the distribution it was drawn from)."""
    logits = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    tokens = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    return tokens, ops.aligned_logps(logits, tokens)


def filter_logits(
    logits: Array, *, temperature: float | Array = 1.0, top_k: int | None = None, top_p: float | Array | None = None
) -> Array:
    """Logits of the distribution that tokens are sampled from: temperature, then top-k, then top-p; what is cut is
    -inf.
    """
    greedy = jnp.asarray(temperature == 0)
    best = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=bool)
    logits = logits / jnp.where(greedy, 1.0, temperature)
    if top_k is not None and top_k < logits.shape[-1]:
        logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][..., -1:], -jnp.inf, logits)
    if top_p is not None:
        logits = jnp.where(_nucleus(logits, top_p), logits, -jnp.inf)
    return jnp.where(greedy & ~best, -jnp.inf, logits)


def _nucleus(logits: Array, top_p: float | Array) -> Array:
    """bool[… v]: the smallest set of likeliest tokens whose probability reaches top_p; never empty."""
    ordered = jnp.flip(jnp.sort(logits, axis=-1), axis=-1)
    before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(ordered, axis=-1)
    threshold = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return logits >= jnp.minimum(threshold, jnp.max(logits, axis=-1, keepdims=True))
