"""What policies write in a turn: one call of the sampler for all episodes, on one device, a mesh, or several hosts."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rljax import reference, sharding
from rljax.policy import BUCKET, Policy, left_pad
from rljax.sampling import generate
from rljax.types import Rollout

LATER_TURNS = 2**31  # what turn t > 0 folds into an episode's key, beside t: more than any step of the first turn


class Action(NamedTuple):
    ids: np.ndarray  # i32[k]
    logps: np.ndarray  # f32[k]
    text: str  # without special tokens
    finished: bool  # it ends in a stop token


def write(
    policy: Policy,
    contexts: Sequence[np.ndarray],
    keys: Array,
    *,
    n: int,
    width: int,
    max_new_tokens: int,
    sampling: Mapping[str, Any],
    mesh: Mesh | None,
) -> list[Action | None]:
    """An action after each context i32[k] (k up to `width`); None after an empty one.

    n: how many neighbours have the same context, which is then read once. keys: one a context.
    mesh: rows are split over its data axes; of several processes each has contexts of its own.
    """
    count = len(contexts) // n
    rows = count if mesh is None else -(-count // _share(mesh)) * _share(mesh)
    prompts = left_pad(contexts[::n], rows=rows, width=width)
    keys = keys[jnp.arange(rows * n) % max(1, len(contexts))]  # empty rows fill up the share of every device
    if mesh is not None:
        prompts, keys = reference.place(prompts, mesh), _placed(keys, mesh)
    settings = {"stop_ids": policy.stop_ids, **sampling}
    rollout = generate(policy.model, policy.params, prompts, keys, max_new_tokens=max_new_tokens, n=n, **settings)
    return _actions(policy.tokenizer, _local(rollout, mesh), contexts)


def cut(action: Action, room: int, tokenizer: Any) -> Action:
    """Its first tokens, if there is no room for all of them."""
    if len(action.ids) <= room:
        return action
    ids = action.ids[:room]
    return Action(ids, action.logps[:room], tokenizer.decode(ids, skip_special_tokens=True), finished=False)


def bucket(width: int, limit: int) -> int:
    """Columns for contexts of `width` tokens. They double, so that few shapes compile."""
    columns = BUCKET
    while columns < width:
        columns *= 2
    return min(columns, limit)


@functools.partial(jax.jit, static_argnums=2)
def turn_keys(key: Array, turn: Array | int, episodes: int) -> Array:
    """One key an episode: in the first turn the one that `generate` makes of a single key."""
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(episodes))
    later = jax.vmap(jax.random.fold_in, (0, None))(keys, jnp.uint32(LATER_TURNS) + jnp.uint32(turn))
    return jnp.where(turn == 0, keys, later)


def most(mesh: Mesh | None, *numbers: int) -> list[int]:
    """The largest of each number over all processes: they go through the same turns in the same shapes."""
    if mesh is None or jax.process_count() == 1:
        return list(numbers)
    return multihost_utils.process_allgather(np.asarray(numbers)).max(0).tolist()


def _actions(tokenizer: Any, rollout: Rollout, contexts: Sequence[np.ndarray]) -> list[Action | None]:
    found: list[Action | None] = []
    for row, context in enumerate(contexts):
        mask = rollout.tokens.mask[row]
        ids = rollout.tokens.ids[row][mask]
        text = tokenizer.decode(ids, skip_special_tokens=True)
        action = Action(np.asarray(ids), np.asarray(rollout.logps[row][mask]), text, bool(rollout.finished[row]))
        found.append(action if len(context) else None)
    return found


def _share(mesh: Mesh) -> int:
    """What the rows of this process have to be a multiple of."""
    return max(1, sharding.ways(sharding.ROWS, mesh) // jax.process_count())


def _placed(keys: Array, mesh: Mesh) -> Array:
    """This process's keys as part of a global array."""
    rows = NamedSharding(mesh, P(sharding.ROWS))
    if jax.process_count() == 1:
        return jax.device_put(keys, rows)
    typed = jnp.issubdtype(keys.dtype, jax.dtypes.prng_key)
    data = np.asarray(jax.random.key_data(keys) if typed else keys)
    data = jax.make_array_from_process_local_data(rows, data)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(keys)) if typed else data


def _local(rollout: Rollout, mesh: Mesh | None) -> Rollout:
    """This process's rows, as numpy."""
    if mesh is None or jax.process_count() == 1:
        return jax.device_get(rollout)
    rows = P(sharding.ROWS)
    return jax.tree.map(lambda x: np.asarray(multihost_utils.global_array_to_host_local_array(x, mesh, rows)), rollout)
