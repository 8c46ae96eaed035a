"""What one process of several has: the rows on its devices, the rows that it judges, and what all know alike.

Rows of a batch lie where the mesh puts them, so a mesh whose tensor or context axis spans processes gives several of
them the same rows. With one process everything here is the identity. With several, all make the same calls in the same
order, as JAX asks; what can fail on one of them alone goes through `together`, so that it ends all of them.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rljax import distributed, failures, sharding
from rljax.errors import UserError

T = TypeVar("T")
MESSAGE = 4000  # characters of an error that the other processes get to see


class AgreedError(UserError):
    """An error that every process raises at the same point, so that all can still do something together: save."""


class Share(NamedTuple):
    """A process's part of the rows of a batch. Numbers are ascending."""

    rows: int  # of the whole batch
    here: np.ndarray  # i64[k]: the rows that its devices hold
    mine: np.ndarray  # i64[m]: those of them that it judges; every row is judged by one process
    apart: bool  # no row is held by two processes, so that what it judges is all that it holds


def share(rows: int, mesh: Mesh) -> Share:
    """This process's part of so many rows, by where the mesh puts them. Rows that several processes hold are dealt out
    to them in equal parts. UserError for a number of rows that cannot be spread over the mesh.
    """
    ways = sharding.ways(sharding.ROWS, mesh)
    if rows % ways:
        raise UserError(
            f"{rows} rows cannot be spread over data×fsdp={ways} devices: make it a multiple of {ways}, or change the "
            f"mesh {dict(mesh.shape)}"
        )
    me, holders = jax.process_index(), _holders(rows, mesh)
    here = [np.arange(*ends) for ends, processes in sorted(holders.items()) if me in processes]
    mine = [part for ends, processes in sorted(holders.items()) for part in _dealt(np.arange(*ends), processes, me)]
    apart = all(len(processes) == 1 for processes in holders.values())
    return Share(rows, np.concatenate(here), np.concatenate(mine), apart)


def share_of_known(rows: int) -> Share:
    """This process's part of so many rows that all processes have."""
    processes = list(range(jax.process_count()))
    (mine,) = _dealt(np.arange(rows), processes, jax.process_index())
    return Share(rows, np.arange(rows), mine, len(processes) == 1)


def grouped(part: Share, n: int) -> Share:
    """The same part where every row has become n neighbours: the completions of a prompt stay together."""

    def each(rows: np.ndarray) -> np.ndarray:
        return (rows[:, None] * n + np.arange(n)).ravel()

    return Share(part.rows * n, each(part.here), each(part.mine), part.apart)


def _holders(rows: int, mesh: Mesh) -> dict[tuple[int, int], list[int]]:
    """{(first row, end): the processes whose devices hold these rows}."""
    found: dict[tuple[int, int], set[int]] = {}
    places = NamedSharding(mesh, P(sharding.ROWS)).devices_indices_map((rows,))
    for device, (cut,) in places.items():
        found.setdefault(cut.indices(rows)[:2], set()).add(device.process_index)
    return {ends: sorted(processes) for ends, processes in found.items()}


def _dealt(rows: np.ndarray, processes: list[int], me: int) -> list[np.ndarray]:
    """Nothing, or one process's part of rows that all these processes have."""
    parts = np.array_split(rows, len(processes))
    return [part for process, part in zip(processes, parts, strict=True) if process == me]


# --- arrays -----------------------------------------------------------------------------------------------------------


def place(batch: Any, mesh: Mesh) -> Any:
    """The rows of a batch that this process's devices hold (`share(…).here`), in numpy -> global arrays, rows over the
    data axes and tokens over context.
    """
    ways = sharding.ways(sharding.ROWS, mesh)
    parts = len(share(ways, mesh).here)

    def abstract(x: Any) -> jax.ShapeDtypeStruct:
        rows, rest = np.shape(x)[:1], np.shape(x)[1:]
        return jax.ShapeDtypeStruct((*(n // parts * ways for n in rows), *rest), x.dtype)

    def placed(x: Any, place: NamedSharding) -> jax.Array:
        return jax.make_array_from_process_local_data(place, x, abstract(x).shape)

    return jax.tree.map(placed, batch, sharding.batch_shardings(jax.tree.map(abstract, batch), mesh))


def spread(batch: Any, mesh: Mesh) -> Any:
    """A batch that all processes have, in numpy -> global arrays, rows over the data axes and tokens over context."""
    return jax.tree.map(_spread, batch, sharding.batch_shardings(batch, mesh))


def spread_rows(batch: Any, mesh: Mesh) -> Any:
    """The same, with whole rows."""
    rows = NamedSharding(mesh, P(sharding.ROWS))
    return jax.tree.map(lambda x: _spread(x, rows), batch)


def local(tree: Any, mesh: Mesh) -> Any:
    """Global arrays of a batch -> the rows that this process's devices hold, in numpy. What is numpy stays as it is."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(functools.partial(_held, NamedSharding(mesh, P(sharding.ROWS))), tree)


def whole(tree: Any) -> Any:
    """Arrays -> all of each on every process, in numpy."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    leaves, shape = jax.tree.flatten(tree)
    apart = [i for i, x in enumerate(leaves) if not _known(x)]
    for i, x in zip(apart, _copied([leaves[i] for i in apart]), strict=True):
        leaves[i] = x.addressable_data(0)
    return shape.unflatten([np.asarray(x) for x in leaves])


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that arrays are on; None for arrays on one device."""
    place = getattr(jax.tree.leaves(tree)[0], "sharding", None)
    return place.mesh if isinstance(place, NamedSharding) and isinstance(place.mesh, Mesh) else None


def first(tree: Any, rows: int) -> Any:
    """The first rows of arrays, on every process, in numpy."""
    if jax.process_count() == 1:
        return jax.tree.map(lambda x: x[:rows], jax.device_get(tree))
    return whole(_cut(tree, rows))


def _spread(x: Any, place: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(x.shape, place, lambda index: x[index])


def _held(rows: NamedSharding, x: Any) -> np.ndarray:
    if not isinstance(x, jax.Array):
        return x
    if not x.sharding.is_equivalent_to(rows, x.ndim):
        x = jax.jit(_same, out_shardings=rows)(x)
    pieces = {shard.index[0].indices(len(x))[0]: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(pieces[first]) for first in sorted(pieces)])


def _known(x: Any) -> bool:
    """Whether this process has all of it."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated


def _copied(arrays: list[jax.Array]) -> list[jax.Array]:
    """The arrays, of one mesh, with a copy on each of its devices: one program, however many there are."""
    if not arrays:
        return []
    place = arrays[0].sharding
    assert isinstance(place, NamedSharding), place
    return jax.jit(_same, out_shardings=NamedSharding(place.mesh, P()))(arrays)


@functools.partial(jax.jit, static_argnums=1)
def _cut(tree: Any, rows: int) -> Any:
    return jax.tree.map(lambda x: x[:rows], tree)


def _same(x: Any) -> Any:
    return x


# --- agreement --------------------------------------------------------------------------------------------------------


def exchange(part: Share, tree: Any) -> Any:
    """What this process found out of the rows that it judges (numpy, one entry each) -> the same of all its rows."""
    if part.apart:
        return tree

    def all_of(x: np.ndarray) -> np.ndarray:
        filled = np.zeros((part.rows, *x.shape[1:]), x.dtype)
        filled[part.mine] = x  # the zeros elsewhere are other processes' entries, so a sum puts them together
        return multihost_utils.process_allgather(filled).sum(0, dtype=x.dtype)[part.here]

    return jax.tree.map(all_of, tree)


def most(*numbers: int) -> list[int]:
    """The largest of each number over all processes."""
    if jax.process_count() == 1:
        return list(numbers)
    return multihost_utils.process_allgather(np.asarray(numbers, np.int32)).max(0).tolist()


def told(tree: Any) -> Any:
    """Arrays of the first process, on all of them; those of the others only lend their shapes."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def together(call: Callable[[], T], *, patience: float | None = None) -> T:
    """call(), done by every process at the same point. If it raises on some, all raise: an AgreedError with the first
    one's reason. They wait for the slowest on the host, for as long as it takes: a collective of devices has a limit.

    `call` may not wait for other processes, except with `patience`: seconds for which one that failed waits for the
    others. Are they not here then, they wait for it in their call, and it raises what it raised: that ends all of them.
    """
    if jax.process_count() == 1:
        return call()
    result, caught = None, None
    try:
        result = call()
    except Exception as error:
        caught = error
    try:
        failed = first_failure(None) if caught is None else first_failure(failures.line(caught), patience)
    except TimeoutError:
        assert caught is not None
        raise caught from None
    if failed is None:
        return result  # pyright: ignore[reportReturnType]
    raise AgreedError(f"process {failed[0]} of {jax.process_count()}: {failed[1]}") from caught


def first_failure(said: str | None, patience: float | None = None) -> tuple[int, str] | None:
    """(process, what it said) of the first process that has something to say; None where none has. TimeoutError where
    some do not come to say so for `patience` seconds.
    """
    if jax.process_count() == 1:
        return None if said is None else (0, said)
    heard = distributed.everyone("" if said is None else f"!{said[:MESSAGE]}", patience)
    return next(((process, text[1:]) for process, text in enumerate(heard) if text), None)


def connected(mesh: Mesh) -> Mesh:
    """This mesh, whose devices can exchange at once. CPUs of several processes connect, group by group, when a group
    first exchanges something, and all have to come within 30 s then (Gloo's limit, which nothing sets): one that
    compiles or loads for longer than another would end both. Here they meet on the host, and every group adds a number.
    """
    if jax.process_count() == 1 or mesh.devices.flat[0].platform != "cpu":
        return mesh
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    groups = [some for count in range(1, len(axes) + 1) for some in itertools.combinations(axes, count)]
    everywhere = P(mesh.axis_names)

    def add(x: jax.Array) -> list[jax.Array]:
        return [jax.lax.psum(x, some) for some in groups]

    one_each = jax.make_array_from_callback(
        (mesh.size,), NamedSharding(mesh, everywhere), lambda _: np.ones(1, np.float32)
    )
    mapped = jax.shard_map(add, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    adds = jax.jit(mapped).lower(one_each).compile()
    distributed.everyone("")
    jax.block_until_ready(adds(one_each))
    most(0)  # what goes from process to process has groups of its own
    return mesh


def sync(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
