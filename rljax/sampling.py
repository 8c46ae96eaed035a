"""Text from a policy: prompts read once, then one loop on the device that ends when every row has stopped."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

from rljax import filters, sharding
from rljax.errors import UserError
from rljax.filters import filter_logits
from rljax.models import RULES, Cache, init_cache, repeat_cache, unstack
from rljax.models.cache import insert, lengthen
from rljax.models.heads import last_token
from rljax.types import LanguageModel, Params, Rollout, Tokens

__all__ = ["filter_logits", "generate"]

BLOCK = 128  # tokens of the vocabulary that share a sum when one is drawn
REFILL = 4  # slots are refilled when one in so many is free
GATHER = 8.0  # GiB of a device for weights that decoding has whole, instead of gathering them at every token


def generate(
    model: LanguageModel,
    params: Params,
    prompts: Tokens,
    key: Array,
    *,
    max_new_tokens: int,
    n: int = 1,
    temperature: float | Array = 1.0,
    top_k: int | None = None,
    top_p: float | Array | None = None,
    min_p: float | Array | None = None,
    min_new_tokens: int = 0,
    stop_ids: tuple[int, ...] = (),
    absent: tuple[tuple[int, int], ...] = (),
    slots: int | None = None,
    gather: float = GATHER,
) -> Rollout:
    """Continue every prompt n times until a row writes one of `stop_ids` or `max_new_tokens` tokens.

    prompts: [b p], one document a row, padding anywhere (segments 0). Rows i·n to i·n + n − 1 of the result continue
      prompt i, which is read once. A row is the prompt's p columns followed by the new tokens, [b·n, p +
      max_new_tokens]; columns after a stop token are padding. The stop token is part of the response.
    key: one key, from which row i of the result gets fold_in(key, i), or an array of b·n keys, one for each row. A row
      draws its token at step s with fold_in(its key, s), so what it samples depends neither on its companions nor on
      its place in the batch.
    temperature, top_k, top_p, min_p, min_new_tokens, absent: see `filters.Sampling`. `Rollout.logps` are those of the
      distribution that is left after all of them (log-probability 0 for greedy); `logprobs.token_logps` with the
      same settings computes them again. Temperature, top_p and min_p may be traced.
    slots: how many rows are written at once, a multiple of n; None writes all. With fewer slots than rows, those whose
      rows have stopped get the next prompts, a quarter of the slots at a time, and the tokens are the same ones.
    gather: on a mesh that splits the weights over fsdp they are gathered once, in the dtype of the products and still
      split over tensor, where that takes at most so many GiB of a device; else layer by layer at every token.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if n < 1:
        raise UserError(f"n must be at least 1 sample of each prompt, got {n}")
    if slots is not None and (slots < 1 or slots % n):
        raise UserError(f"slots={slots} must be a positive multiple of n={n}: the samples of a prompt start together")
    numbers = {"temperature": temperature, "top_p": top_p, "min_p": min_p}
    known = {name: _known(number) for name, number in numbers.items()}
    filters.check(**known, top_k=top_k, min_new_tokens=min_new_tokens, stop_ids=stop_ids, absent=absent)
    return _generate(
        model,
        params,
        prompts,
        key,
        **numbers,
        max_new_tokens=max_new_tokens,
        n=n,
        top_k=top_k,
        min_new_tokens=min_new_tokens,
        stop_ids=stop_ids,
        absent=absent,
        slots=slots,
        gather=gather,
    )


def _known(number: Any) -> Any:
    """A number that has a value now as one of Python's; what is traced, or one a row, as it is."""
    if number is None or isinstance(number, Tracer) or np.ndim(number):
        return number
    return float(number)


@functools.partial(
    jax.jit,
    static_argnames=(
        "model",
        "max_new_tokens",
        "n",
        "top_k",
        "min_new_tokens",
        "stop_ids",
        "absent",
        "slots",
        "gather",
    ),
)
def _generate(
    model: LanguageModel,
    params: Params,
    prompts: Tokens,
    key: Array,
    *,
    max_new_tokens: int,
    n: int,
    temperature: float | Array,
    top_k: int | None,
    top_p: float | Array | None,
    min_p: float | Array | None,
    min_new_tokens: int,
    stop_ids: tuple[int, ...],
    absent: tuple[tuple[int, int], ...],
    slots: int | None,
    gather: float,
) -> Rollout:
    """`generate`, compiled; its numbers are checked before, since here they are traced."""
    rows = prompts.ids.shape[0] * n
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    params = sharding.gathered(params, RULES, model.config.compute_dtype, limit=gather * 2**30)
    if sharding.platform() == "cpu":
        params = unstack(params)  # else XLA copies each layer's slice at every token; on accelerators memory is dearer
    task = _Task(
        model=model,
        params=params,
        settings=settings,
        min_new_tokens=min_new_tokens,
        stop_ids=stop_ids,
        absent=absent,
        max_new_tokens=max_new_tokens,
        n=n,
    )
    keys = _row_keys(key, rows)
    if slots is None or slots >= rows:
        written, cache = _start(task, prompts, keys)
        with jax.named_scope("decode"):
            written, _ = lax.while_loop(
                lambda now: jnp.any(now[0].alive), functools.partial(_step, task), (written, cache)
            )
    else:
        written = _in_slots(task, prompts, keys, slots)
    return _rollout(task, prompts, written)


class _Task(NamedTuple):
    """What does not change while tokens are drawn."""

    model: LanguageModel
    params: Params
    settings: dict[str, Any]
    min_new_tokens: int
    stop_ids: tuple[int, ...]
    absent: tuple[tuple[int, int], ...]
    max_new_tokens: int
    n: int


class _Rows(NamedTuple):
    """Rows that are being written, m new tokens at most."""

    key: Array  # [r]
    segment: Array  # i32[r]; that of the prompt
    place: Array  # i32[r]; how many tokens were drawn
    token: Array  # i32[r]; the last of them
    alive: Array  # bool[r]; another one follows
    ids: Array  # i32[r m]
    logps: Array  # f32[r m]


def _row_keys(key: Array, rows: int) -> Array:
    """One key a row, from one for all of them or from as many."""
    single = key.ndim == (0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1)
    if single:
        return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(rows))
    if key.shape[0] != rows:
        raise UserError(f"there are {key.shape[0]} keys for {rows} rows (prompts · n): give one each, or a single key")
    return key


def _blank(task: _Task, keys: Array, segment: Array) -> _Rows:
    """Rows without a token yet, that are not written to."""
    rows = segment.size
    return _Rows(
        key=keys,
        segment=segment,
        place=jnp.zeros(rows, jnp.int32),
        token=jnp.zeros(rows, jnp.int32),
        alive=jnp.zeros(rows, bool),
        ids=jnp.zeros((rows, task.max_new_tokens), jnp.int32),
        logps=jnp.zeros((rows, task.max_new_tokens), jnp.float32),
    )


def _start(task: _Task, prompts: Tokens, keys: Array) -> tuple[_Rows, Cache]:
    """Every prompt read once, the first token of each of its n rows, and a cache with room for the others."""
    rows, cache = _read(task, prompts, keys)
    return rows, lengthen(cache)


def _read(task: _Task, prompts: Tokens, keys: Array) -> tuple[_Rows, Cache]:
    """`_start`, with a cache as long as the prompts."""
    count, width = prompts.ids.shape
    cache = init_cache(task.model.config, count, width, capacity=width + task.max_new_tokens)
    hidden, cache = task.model.apply(task.params, prompts.ids, prompts.segments, cache=cache)
    last, exists = last_token(prompts.segments)
    hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    segment = jnp.max(prompts.segments, axis=1)
    hidden, segment, alive = (jnp.repeat(x, task.n, axis=0) for x in (hidden, segment, exists))
    rows = _blank(task, keys, segment)._replace(alive=alive)  # a row without a prompt has nothing to continue
    return _write(task, rows, hidden), repeat_cache(cache, task.n)


def _step(task: _Task, now: tuple[_Rows, Cache]) -> tuple[_Rows, Cache]:
    """Read the last token of every row, write the next."""
    rows, cache = now
    segments = jnp.where(rows.alive, rows.segment, 0)
    hidden, cache = task.model.apply(task.params, rows.token[:, None], segments[:, None], cache=cache)
    return _write(task, rows, hidden[:, 0]), cache


def _write(task: _Task, rows: _Rows, hidden: Array) -> _Rows:
    """Draw the next token of every row that is alive, from the state [r d] that predicts it."""
    keys = jax.vmap(jax.random.fold_in)(rows.key, rows.place)
    logits = task.model.unembed(task.params, hidden)
    if (nothing := filters.without_token(task.absent, logits.shape[-1])) is not None:
        logits = jnp.where(nothing[None], -jnp.inf, logits)
    if task.min_new_tokens and task.stop_ids:
        early = filters.forbid(rows.place < task.min_new_tokens, task.stop_ids, logits.shape[-1])
        logits = jnp.where(early, -jnp.inf, logits)
    token, logp = _draw(logits, keys, **task.settings)
    place = rows.place + rows.alive
    here = rows.alive[:, None] & (jnp.arange(task.max_new_tokens)[None] == rows.place[:, None])
    stopped = jnp.isin(token, jnp.asarray(task.stop_ids, jnp.int32))
    return rows._replace(
        place=place,
        token=token,
        alive=rows.alive & ~stopped & (place < task.max_new_tokens),
        ids=jnp.where(here, token[:, None], rows.ids),
        logps=jnp.where(here, logp[:, None], rows.logps),
    )


def _rollout(task: _Task, prompts: Tokens, rows: _Rows) -> Rollout:
    """Prompts and what was written, side by side."""
    before = jax.tree.map(lambda x: jnp.repeat(x, task.n, axis=0), prompts)
    before = dataclasses.replace(before, mask=jnp.zeros_like(before.mask))
    mask = jnp.arange(task.max_new_tokens)[None] < rows.place[:, None]
    segments = jnp.where(mask, jnp.max(before.segments, axis=1)[:, None], 0)
    new = Tokens(ids=rows.ids.astype(prompts.ids.dtype), segments=segments, mask=mask)
    last = jnp.take_along_axis(rows.ids, jnp.maximum(rows.place - 1, 0)[:, None], axis=1)[:, 0]
    return Rollout(
        tokens=jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), before, new),
        logps=jnp.pad(rows.logps, ((0, 0), (prompts.ids.shape[1], 0))),
        finished=(rows.place > 0) & jnp.isin(last, jnp.asarray(task.stop_ids, jnp.int32)),
    )


# More rows than slots: a slot whose row has stopped is filled again.


class _Slots(NamedTuple):
    rows: _Rows  # of s slots
    owner: Array  # i32[s]; the row of the result that a slot writes
    cache: Cache  # a ring
    results: _Rows  # what was written, of all rows
    group: Array  # i32[]; the prompts that come next


def _in_slots(task: _Task, prompts: Tokens, keys: Array, slots: int) -> _Rows:
    """All rows, with `slots` of them at work at any time.

    Prompts are read in groups that fill a quarter of the slots (`REFILL`): as soon as so many are free, so that one
    that has stopped does not wait for long, and reading prompts still is a product with many rows.
    """
    size = max(1, slots // task.n // REFILL)
    groups = -(-prompts.ids.shape[0] // size)
    prompts = jax.tree.map(lambda x: jnp.pad(x, ((0, groups * size - len(x)), (0, 0))), prompts)
    rows = len(prompts.ids) * task.n
    keys, wanted = keys[jnp.minimum(jnp.arange(rows), len(keys) - 1)], len(keys)
    segment = jnp.repeat(jnp.max(prompts.segments, axis=1), task.n)
    length = prompts.ids.shape[1] + task.max_new_tokens

    def busy(now: _Slots) -> Array:
        free = jnp.sum(~now.rows.alive)
        return (free < slots) & ((free < size * task.n) | (now.group == groups))

    def step(now: _Slots) -> _Slots:
        rows, cache = _step(task, (now.rows, now.cache))
        return now._replace(rows=rows, cache=dataclasses.replace(cache, index=cache.index % length))

    def turn(now: _Slots) -> _Slots:
        now = _refill(task, now, prompts, keys, size)
        with jax.named_scope("decode"):
            return lax.while_loop(busy, step, now)

    start = _Slots(
        rows=_blank(task, keys[:slots], segment[:slots]),
        owner=jnp.full(slots, rows),  # none
        cache=init_cache(task.model.config, slots, length),
        results=_blank(task, keys, segment),
        group=jnp.zeros((), jnp.int32),
    )
    with jax.named_scope("refill"):
        end = lax.while_loop(lambda now: now.group < groups, turn, start)
    return jax.tree.map(lambda x: x[:wanted], _collect(end, jnp.arange(slots)).results)


def _refill(task: _Task, now: _Slots, prompts: Tokens, keys: Array, size: int) -> _Slots:
    """The next `size` prompts in free slots, as many as their samples need."""
    fresh = size * task.n
    free = jnp.argsort(now.rows.alive, stable=True)[:fresh]
    now = _collect(now, free)
    some = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, now.group * size, size), prompts)
    rows, cache = _read(task, some, lax.dynamic_slice_in_dim(keys, now.group * fresh, fresh))
    return now._replace(
        rows=jax.tree.map(lambda old, new: old.at[free].set(new), now.rows, rows),
        owner=now.owner.at[free].set(now.group * fresh + jnp.arange(fresh)),
        cache=insert(now.cache, free, cache),
        group=now.group + 1,
    )


def _collect(now: _Slots, slots: Array) -> _Slots:
    """What these slots (i32[f]) wrote, among the results."""
    owner = now.owner[slots]
    put = lambda results, rows: results.at[owner].set(rows[slots], mode="drop")  # noqa: E731
    return now._replace(results=jax.tree.map(put, now.results, now.rows))


def _draw(
    logits: Array,
    keys: Array,
    *,
    temperature: float | Array,
    top_k: int | None,
    top_p: float | Array | None,
    min_p: float | Array | None,
) -> tuple[Array, Array]:
    """logits[r v] -> (token i32[r], its log-probability f32[r] under the distribution it was drawn from).

    The inverse of the distribution function, in two levels: one uniform number picks a block of tokens by the sums of
    their probabilities, another the token in it. That takes two random numbers a row where Gumbel noise takes v, and
    no search through the whole vocabulary. Greedy is the same with the likeliest tokens alone and the number 0.
    """
    greedy = jnp.asarray(temperature == 0)
    logits = filters.cut(logits / jnp.where(greedy, 1.0, temperature), top_k=top_k, top_p=top_p, min_p=min_p)
    peak = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.where(greedy, (logits == peak).astype(logits.dtype), jnp.exp(logits - peak))
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,), logits.dtype))(keys)
    uniform = jnp.where(greedy, 0.0, uniform)

    rows, vocab = logits.shape
    weights = jnp.pad(weights, ((0, 0), (0, -vocab % BLOCK))).reshape(rows, -1, BLOCK)
    sums = jnp.sum(weights, axis=-1)
    block = _pick(sums, uniform[:, 0])
    weights = jnp.take_along_axis(weights, block[:, None, None], axis=1)[:, 0]
    inside = _pick(weights, uniform[:, 1])
    token = block * BLOCK + inside
    # As in `ops.aligned_logps`: what was not drawn is added up apart, so that a nearly certain token keeps it.
    elsewhere = jnp.sum(jnp.where(jnp.arange(sums.shape[1])[None] == block[:, None], 0.0, sums), axis=-1)
    beside = jnp.sum(jnp.where(jnp.arange(BLOCK)[None] == inside[:, None], 0.0, weights), axis=-1)
    below = (jnp.take_along_axis(logits, token[:, None], axis=1) - peak)[:, 0]
    logp = below - jnp.log1p(elsewhere + beside + jnp.expm1(below))
    return token.astype(jnp.int32), jnp.where(greedy, 0.0, logp)


def _pick(weights: Array, uniform: Array) -> Array:
    """Index i32[r] of weights [r m], each with a probability in proportion to it, by uniform numbers [r] in [0, 1).

    What has no weight is never picked, whatever rounding does to the sums.
    """
    sums = jnp.cumsum(weights, axis=-1)
    beyond = (sums > uniform[:, None] * sums[:, -1:]) & (weights > 0)
    return jnp.argmax(jnp.where(beyond.any(axis=-1, keepdims=True), beyond, weights), axis=-1).astype(jnp.int32)
