"""What policies write in a turn: one call of the sampler for all episodes, on one device, a mesh, or several hosts."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from rljax import decoding, hosts
from rljax.environments.turns import Written
from rljax.policy import BUCKET, Policy, full, left_pad
from rljax.sampling import generate
from rljax.types import Rollout, Tokens

T = TypeVar("T")
LATER_TURNS = 2**31  # what turn t > 0 folds into an episode's key, beside t: more than any step of the first turn


class Action(NamedTuple):
    ids: np.ndarray  # i32[k]
    logps: np.ndarray  # f32[k]
    text: Written
    finished: bool  # it ends in a stop token


def write(
    policy: Policy,
    contexts: Sequence[np.ndarray],
    key: Array,
    turn: int,
    numbers: np.ndarray,
    *,
    n: int,
    width: int,
    max_new_tokens: int,
    sampling: Mapping[str, Any],
    mesh: Mesh | None,
) -> Rollout:
    """What the policy writes after each context i32[k] (k up to `width`), on the host: a row each, for `taken`.

    numbers: of the contexts among those of all processes: each samples with its own key (see `turn_keys`).
    n: how many neighbours have the same context, which is then read once.
    mesh: rows are split over its data axes; of several processes each has contexts of its own (none, if there are too
      few), and they are written together.
    """
    alone = mesh is None or jax.process_count() == 1
    processes, process = (1, 0) if alone else (jax.process_count(), jax.process_index())
    (most,) = (len(contexts),) if alone else hosts.most(len(contexts))
    rows = _room(most // n, processes, mesh)
    prompts = left_pad(contexts[::n], rows=rows, width=width)
    keys = turn_keys(key, turn, np.resize(numbers, rows * n))  # empty rows fill up the share of every device
    if mesh is not None:
        prompts, keys = _together(prompts, keys, mesh)
    settings = {"stop_ids": policy.stop_ids, "absent": policy.absent, **sampling}
    rollout = generate(policy.model, policy.params, prompts, keys, max_new_tokens=max_new_tokens, n=n, **settings)
    rollout = jax.device_get(rollout) if mesh is None else hosts.whole(rollout)
    first = process * rows * n
    return jax.tree.map(lambda x: x[first : first + len(contexts)], rollout)


def taken(policy: Policy, rollout: Rollout, contexts: Sequence[np.ndarray]) -> list[Action | None]:
    """The action in each row; None after an empty context."""
    found: list[Action | None] = []
    for row, context in enumerate(contexts):
        mask = rollout.tokens.mask[row]
        ids, logps = np.asarray(rollout.tokens.ids[row][mask]), np.asarray(rollout.logps[row][mask])
        action = Action(ids, logps, _text(policy, context, ids), bool(rollout.finished[row]))
        found.append(action if len(context) else None)
    return found


def cut(action: Action, room: int, policy: Policy, context: np.ndarray) -> Action:
    """Its first tokens, if there is no room for all of them. context: i32[k], what it follows."""
    if len(action.ids) <= room:
        return action
    ids = action.ids[:room]
    return Action(ids, action.logps[:room], _text(policy, context, ids), finished=False)


def _text(policy: Policy, context: np.ndarray, ids: np.ndarray) -> Written:
    text, raw = decoding.written(policy.tokenizer, context, ids, stop_ids=policy.stop_ids)
    return Written(text, raw=raw, prompt=decoding.decode(policy.tokenizer, context, special=True))


def bucket(width: int, limit: int) -> int:
    """Columns for contexts of `width` tokens. They double, so that few shapes compile."""
    columns = BUCKET
    while columns < width:
        columns *= 2
    return min(columns, limit)


@jax.jit
def turn_keys(key: Array, turn: Array | int, numbers: Array | np.ndarray) -> Array:
    """One key an episode, by its number: in the first turn the one that `generate` makes of a single key."""
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(numbers)
    later = jax.vmap(jax.random.fold_in, (0, None))(keys, jnp.uint32(LATER_TURNS) + jnp.uint32(turn))
    return jnp.where(turn == 0, keys, later)


def most(mesh: Mesh | None, *numbers: int) -> list[int]:
    """The largest of each number over all processes: they go through the same turns in the same shapes."""
    return list(numbers) if mesh is None else hosts.most(*numbers)


def apart(mesh: Mesh | None, call: Callable[[], T]) -> T:
    """What each process does for itself between two turns; if that fails on one, all raise."""
    return call() if mesh is None else hosts.together(call)


def _room(rows: int, processes: int, mesh: Mesh | None) -> int:
    """The least number of rows a process, at least so many, of which those of all can be spread over the mesh."""
    step = full(1, mesh) // math.gcd(full(1, mesh), processes)
    return -(-rows // step) * step


def _together(prompts: Tokens, keys: Array, mesh: Mesh) -> tuple[Tokens, Array]:
    """The rows of all processes, one process after the other, spread over the mesh."""
    typed = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    rows = prompts, np.asarray(jax.random.key_data(keys) if typed else keys)
    if jax.process_count() > 1:
        rows = multihost_utils.process_allgather(rows, tiled=True)
    prompts, data = hosts.spread_rows(rows, mesh)
    return prompts, jax.random.wrap_key_data(data, impl=jax.random.key_impl(keys)) if typed else data
