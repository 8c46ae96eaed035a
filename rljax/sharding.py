"""Where arrays live: a mesh, ordered rules, and the PartitionSpecs that follow from them."""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rljax.errors import UserError

AXES: tuple[str, ...] = ("data", "fsdp", "tensor", "context")
ROWS = ("data", "fsdp")  # the axes that split a batch
Rules = Sequence[tuple[str, P]]


def make_mesh(
    *, data: int = 1, fsdp: int = -1, tensor: int = 1, context: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh over all devices with the axes data, fsdp, tensor, context; one size may be -1: the devices left.

    data     replicas: the batch is split, parameters are copied
    fsdp     the batch is split and so are the parameters, each gathered when it is used
    tensor   heads, feed-forward and vocabulary are split
    context  the tokens of a row are split

    devices: those of this run; others are for compiling ahead of time. Where they are slices of a TPU pod that only
    the data-center network connects, the slices lie along data.

    Without -1 a part of the machine can be asked for: its first devices. UserError where the sizes do not divide
    the number of devices.
    """
    sizes: dict[str, int] = dict(zip(AXES, (data, fsdp, tensor, context), strict=True))
    devices = jax.devices() if devices is None else devices
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"the mesh {sizes} needs positive sizes, and -1 for at most one axis: the devices left")
    taken = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % taken:
        raise UserError(
            f"the mesh {sizes} needs a multiple of {taken} devices, but there are {len(devices)}: choose sizes whose "
            f"product divides {len(devices)}"
        )
    if free:
        sizes[free[0]] = len(devices) // taken
    elif taken < len(devices) and len({device.process_index for device in devices}) > 1:
        raise UserError(
            f"the mesh {sizes} leaves {len(devices) - taken} of {len(devices)} devices idle, which several processes "
            f"cannot do: set one size to -1"
        )
    return Mesh(_laid_out(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _laid_out(sizes: dict[str, int], devices: Sequence[Any]) -> np.ndarray:
    """Devices in the form of the mesh, neighbours in an axis near each other, slices along data."""
    used, shape = devices[: math.prod(sizes.values())], tuple(sizes.values())
    slices = len({getattr(device, "slice_index", 0) for device in used}) if used[0].platform == "tpu" else 1
    if shape[0] % slices:
        raise UserError(
            f"the mesh {sizes} is to lie on {slices} slices, which only the data-center network connects: the data "
            f"axis runs over them, so its size must be a multiple of {slices}"
        )
    make, inner = mesh_utils.create_device_mesh, shape
    if slices > 1:
        inner = (shape[0] // slices, *shape[1:])
        make = functools.partial(mesh_utils.create_hybrid_device_mesh, dcn_mesh_shape=(slices, 1, 1, 1))
    try:
        return make(inner, devices=used)
    except NotImplementedError:  # no axis of the torus has this size: one has to be cut
        return make(inner, devices=used, allow_split_physical_axes=True)


def platform() -> str:
    """ "cpu", "gpu" or "tpu": what the mesh that is set (`jax.set_mesh`) is made of, else where JAX runs by itself.

    A program that is compiled ahead of time for a machine that is not this one has the mesh of that machine.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    kind = device.device_kind.lower()
    return "cpu" if kind == "cpu" else "tpu" if kind.startswith("tpu") else "gpu"


def specs(tree: Any, rules: Rules) -> Any:
    """The PartitionSpec of every leaf: that of the first rule whose regex is found in its path (`re.search`).

    A path is the keys joined by "/", such as "layers/mlp/up/kernel", or "0/mu/layers/mlp/up/kernel" in an optax
    state: rules that end in `$` and have no `^` place parameters and moments alike. Scalars are replicated without a
    rule. So is a leaf of lower rank than its rule, such as the factored moments of Adafactor. Leaves need only a
    shape, so the tree may be abstract (`jax.eval_shape`). UserError for a leaf without a rule: its path and shape.
    """

    def spec(path: Any, leaf: Any) -> P:
        name, shape = jax.tree_util.keystr(path, simple=True, separator="/"), jax.numpy.shape(leaf)
        if not shape:
            return P()
        for pattern, found in rules:
            if re.search(pattern, name):
                return found if len(found) <= len(shape) else P()
        raise UserError(
            f"no sharding rule matches {name!r} with shape {shape}: add a (regex, PartitionSpec) pair for it, or a "
            f"last rule ('.*', PartitionSpec()) that replicates what is left"
        )

    return jax.tree_util.tree_map_with_path(spec, tree)


def shardings(tree: Any, rules: Rules, mesh: Mesh) -> Any:
    """The NamedSharding of every leaf on this mesh, by `specs`.

    A dimension that its mesh axes do not divide (9 heads on tensor=8) is replicated instead: nothing changes but
    memory. UserError for a rule that names an axis which the mesh does not have.
    """

    def place(leaf: Any, spec: P) -> NamedSharding:
        return NamedSharding(mesh, divisible(spec, jax.numpy.shape(leaf), mesh))

    return jax.tree.map(place, tree, specs(tree, rules))


def divisible(spec: P, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """The spec without the axes of those dimensions that they do not divide evenly."""
    kept = (axes if size % ways(axes, mesh) == 0 else None for axes, size in zip(spec, shape, strict=False))
    return P(*kept)


def ways(axes: str | tuple[str, ...] | None, mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts these axes split a dimension."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    unknown = [name for name in names if name not in mesh.shape]
    if unknown:
        raise UserError(f"a sharding rule names the axis {unknown[0]!r}, but the mesh has {tuple(mesh.shape)}")
    return math.prod(mesh.shape[name] for name in names)


def ways_here(axes: tuple[str, ...]) -> int:
    """The same on the mesh that is set (`jax.set_mesh`); 1 where none is."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(name, 1) for name in axes)


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """The NamedSharding of every array of a batch: rows (the first axis) over data and fsdp, tokens (the last axis
    of at least two) over context. Leaves need only a shape. UserError where rows or tokens cannot be split evenly.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        shape = jax.numpy.shape(leaf)
        axes = (ROWS, *(None,) * (len(shape) - 2), "context")[: len(shape)]
        for size, axis in zip(shape, axes, strict=True):
            if size % ways(axis, mesh):
                name = jax.tree_util.keystr(path, simple=True, separator="/")
                raise UserError(
                    f"{name!r} with shape {shape} cannot be split evenly: {size} over the mesh axes {axis} of "
                    f"{ways(axis, mesh)} devices; change the batch or sequence length, or the mesh {dict(mesh.shape)}"
                )
        return NamedSharding(mesh, P(*axes))

    return jax.tree_util.tree_map_with_path(place, batch)


def mesh_here() -> Mesh | None:
    """The mesh that is set (`jax.set_mesh`); None where none is."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def unset() -> contextlib.AbstractContextManager[Any]:
    """Within it no mesh is set: what is computed runs where its arrays are, on one device if they are new."""
    return jax.set_mesh(Mesh(np.empty((), object), ()))


def constrain(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """Pin the layout of x inside `jit` where a mesh is set (`with jax.set_mesh(mesh)`); elsewhere it is x itself.

    Axes that the mesh does not have, or that do not divide their dimension, are left out.
    """
    mesh = jax.sharding.get_abstract_mesh()
    known = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    if not known:
        return x
    present = (
        tuple(name for name in ((axis,) if isinstance(axis, str) else axis or ()) if name in known) for axis in axes
    )
    return jax.lax.with_sharding_constraint(x, divisible(P(*present), x.shape, mesh))


def in_host_memory(tree: Any) -> Any:
    """Arrays moved to the pinned memory of their devices' host, sharded as they were. UserError for devices without.

    Inside `jit` they can be arguments, and nothing else than `in_device_memory` can be done with them.
    """

    def one(x: Array) -> Array:
        device = next(iter(x.sharding.device_set))
        kinds = [memory.kind for memory in device.addressable_memories()]
        if "pinned_host" not in kinds:
            raise UserError(f"{device} cannot reach pinned host memory (it has {kinds}): keep everything on the device")
        return jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))

    return jax.tree.map(one, tree)


def in_device_memory(tree: Any) -> Any:
    """Arrays in their devices' own memory, inside and outside `jit`. What is there already stays as it is."""

    def one(x: Any) -> Any:
        away = jax.typeof(x).memory_space == jax.memory.Space.Host
        return jax.device_put(x, jax.memory.Space.Device) if away else x

    return jax.tree.map(one, tree)


def gathered(params: Any, rules: Rules, dtype: str, *, limit: float) -> Any:
    """Inside `jit`: params without their split over fsdp, cast to the dtype that they are used in, if what one device
    then has of them takes at most `limit` bytes; else (and without a mesh that has fsdp) as they are.

    A loop that reads all weights in every round then gathers them once. Leaves that fsdp does not split stay as they
    are. Their cast comes before the exchange, which is of so many bytes less.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape.get("fsdp", 1) == 1:
        return params
    split = jax.tree.map(lambda x, spec: divisible(spec, x.shape, mesh), params, specs(params, rules))
    whole = jax.tree.map(lambda spec: P(*(None if axes == "fsdp" else axes for axes in spec)), split)

    def held(x: Array, spec: P) -> int:
        return x.size // math.prod(ways(axes, mesh) for axes in spec) * jax.numpy.dtype(dtype).itemsize

    if sum(jax.tree.leaves(jax.tree.map(held, params, whole))) > limit:
        return params

    def one(x: Array, before: P, after: P) -> Array:
        return x if before == after else constrain(constrain(x.astype(dtype), *before), *after)

    return jax.tree.map(one, params, split, whole)
