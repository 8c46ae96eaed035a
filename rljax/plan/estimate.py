"""What compiled functions need of a device, and how fast they could be: memory, exchange, and the roofline."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rljax import program
from rljax.errors import UserError
from rljax.plan import costs, hlo, topologies
from rljax.plan.configs import describe
from rljax.plan.costs import Collective
from rljax.plan.programs import Program, Programs, programs
from rljax.plan.topologies import Chip, Machine


class Exchange(NamedTuple):
    """Collectives of one kind over the same axes of the mesh."""

    kind: str
    axes: str  # of the mesh, joined by +
    count: float  # per execution
    bytes: float  # that a device sends, all of them together
    ici: float | None  # seconds, as if nothing else used the links
    dcn: float | None


class Block(NamedTuple):
    """One compiled function on one device."""

    name: str
    note: str
    memory: dict[str, float]  # bytes, by what they are for; all of them are there at once
    limit: float  # bytes that a program can have
    needed: float
    flops: float = 0.0
    bytes: float = 0.0  # read from and written to the device's memory
    exchange: tuple[Exchange, ...] = ()
    seconds: dict[str, float | None] = {}  # noqa: RUF012 - at best, by resource; None where the figure is not known
    unknown: tuple[str, ...] = ()  # loops counted as one round
    uncounted: tuple[str, ...] = ()  # computations whose exchange is not counted
    refused: str = ""  # why the compiler made nothing of it

    @property
    def fits(self) -> bool:
        return self.needed <= self.limit and not self.refused

    @property
    def binding(self) -> str | None:
        """The resource that takes longest."""
        known = {name: value for name, value in self.seconds.items() if value is not None}
        return max(known, key=lambda name: known[name]) if any(known.values()) else None

    @property
    def step(self) -> float | None:
        """Seconds, at best."""
        return None if self.binding is None else self.seconds[self.binding]


class Plan(NamedTuple):
    machine: str
    devices: int
    chip: Chip
    mesh: dict[str, int]
    microbatches: int
    model: str
    parameters: int
    blocks: tuple[Block, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return all(block.fits for block in self.blocks)

    @property
    def step(self) -> float | None:
        """Seconds of all functions one after the other, at best."""
        steps = [block.step for block in self.blocks if block.step is not None]
        return sum(steps) if len(steps) == len(self.blocks) else None


def plan(run: Any, machine: Machine, say: Callable[[str], None] = lambda _: None) -> Plan:
    """An experiment of `offline` or `online` on a machine. say: gets a line before what takes long.

    UserError for an experiment that cannot run there; that it does not fit is in the plan.
    """
    program.check_settings(run)
    described, mesh = describe(run.model), program.make_mesh(run, machine.devices)
    made = programs(run, mesh, described)
    blocks = []
    for one in made.programs:
        say(f"compiling the {one.name} for {machine.name}, mesh {written(mesh)}")
        blocks.append(block(one, made, mesh, machine.chip))
    first = next(iter(made.held.values()))
    return Plan(
        machine=machine.name,
        devices=mesh.size,
        chip=machine.chip,
        mesh=dict(mesh.shape),
        microbatches=run.microbatches,
        model=run.model,
        parameters=sum(math.prod(x.shape) for x in jax.tree.leaves(first)),
        blocks=tuple(blocks),
        notes=tuple(made.notes),
    )


def written(mesh: Mesh) -> str:
    return " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "of one device"


def block(one: Program, made: Programs, mesh: Mesh, chip: Chip) -> Block:
    """Compiled, and looked at."""
    held = {name: on_device(tree) for name, tree in made.held.items()}
    known = {id(leaf) for tree in made.held.values() for leaf in jax.tree.leaves(tree)}
    others = sum(_bytes(leaf) for leaf in jax.tree.leaves(one.args) if id(leaf) not in known)
    memory: dict[str, float] = {**held, "batch": others}
    try:
        with jax.set_mesh(mesh):
            compiled = one.function.lower(*one.args).compile()
    except jax.errors.JaxRuntimeError as error:
        return _refused(one, memory, chip, str(error))
    module = hlo.parse(compiled.as_text())
    stats = compiled.memory_analysis()
    memory |= {
        "padding of layouts": max(0, stats.argument_size_in_bytes - costs.parameter_bytes(module)),
        "results": max(0, stats.output_size_in_bytes - stats.alias_size_in_bytes),
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    cost = costs.count(module, one.loops)
    exchange = exchanges(cost.collectives, mesh, chip)
    return Block(
        name=one.name,
        note=one.note,
        memory=memory,
        limit=chip.memory,
        needed=sum(memory.values()),
        flops=cost.flops,
        bytes=cost.bytes,
        exchange=exchange,
        seconds=_seconds(cost, exchange, chip),
        unknown=tuple(dict.fromkeys(cost.unknown)),
        uncounted=costs.uncounted(module),
    )


# --- memory -----------------------------------------------------------------------------------------------------------


def on_device(tree: Any) -> int:
    """Bytes of a tree of shapes with shardings in the memory of one device."""
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _bytes(leaf: Any) -> int:
    place = getattr(leaf, "sharding", None)
    if place is not None and place.memory_kind == "pinned_host":
        return 0
    shape = np.shape(leaf) if place is None else place.shard_shape(leaf.shape)
    return math.prod(shape) * (leaf.dtype.itemsize if hasattr(leaf, "dtype") else np.asarray(leaf).itemsize)


UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def _refused(one: Program, memory: dict[str, float], chip: Chip, message: str) -> Block:
    """A function that the compiler did not make: for lack of memory, or because it cannot."""
    needed = needed_bytes(message)
    if "RESOURCE_EXHAUSTED" not in message or needed is None:
        first = message.strip().splitlines()[0]
        raise UserError(f"the compiler refuses the {one.name}: {first}")
    inside = sum(_bytes(leaf) for leaf in jax.tree.leaves(one.args))
    beside = max(0.0, sum(memory.values()) - inside)  # what the device holds that is no argument of this function
    memory = {**memory, "temporaries and the rest": max(0.0, needed + beside - sum(memory.values()))}
    return Block(
        one.name, one.note, memory, chip.memory, max(needed + beside, sum(memory.values())), refused="out of memory"
    )


def needed_bytes(message: str) -> float | None:
    """What the compiler says that it would have needed."""
    sizes = [
        float(found[1]) * UNITS[found[2].upper()]
        for pattern in (
            r"required[^()]*\(([\d.]+)([KMGT]?)\)",
            r"[Uu]sed ([\d.]+)([KMGT]?) of",
            r"allocat\w+ ([\d.]+)([KMGT]?)i?B",
            r"size=(\d+)()\) would exceed",
        )
        if (found := re.search(pattern, message))
    ]
    return max(sizes, default=None)


# --- collectives ------------------------------------------------------------------------------------------------------


def exchanges(found: tuple[tuple[Collective, float], ...], mesh: Mesh, chip: Chip) -> tuple[Exchange, ...]:
    """Collectives by kind and axes, the largest first."""
    total: dict[tuple[str, str], Exchange] = {}
    for one, count in found:
        groups = groups_of(one, mesh)
        ici, dcn, axes = sent(one, groups, mesh)
        if ici == dcn == 0:
            continue
        spent = ici * count / bandwidth(groups, one.kind, mesh, chip) if chip.link else None
        far = 0.0 if dcn == 0 else dcn * count / chip.dcn if chip.dcn else None
        old = total.get((one.kind, axes), Exchange(one.kind, axes, 0, 0, 0, 0))
        total[one.kind, axes] = Exchange(
            one.kind,
            axes,
            old.count + count,
            old.bytes + (ici + dcn) * count,
            _plus(old.ici, spent),
            _plus(old.dcn, far),
        )
    return tuple(sorted(total.values(), key=lambda one: -one.bytes))


def groups_of(one: Collective, mesh: Mesh) -> np.ndarray:
    """i64[groups size]: the devices, by their place in the mesh, that exchange data. Between slices: those that have
    the same place in each, since slices lie along the first axis of the mesh.
    """
    if costs.between_slices(one.attributes) is None:
        return hlo.groups(one.attributes, mesh.size)
    slices = len({device.slice_index for device in mesh.devices.flat})
    places = np.arange(mesh.size).reshape(slices, -1)
    if one.kind == "collective-permute":
        return np.stack([places, np.roll(places, -1, axis=0)], axis=-1).reshape(-1, 2)
    return places.T


def _plus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def sent(one: Collective, groups: np.ndarray, mesh: Mesh) -> tuple[float, float, str]:
    """(bytes that a device sends within its slice, through the data-center network, the axes of the mesh).

    By algorithms on rings: what a device does not have of the result, or what it adds to those of the others. Between
    slices first within each, then between them.
    """
    axes = _axes(groups, one.kind, mesh)
    slices = np.array([getattr(device, "slice_index", 0) for device in mesh.devices.flat])
    if one.kind == "collective-permute":
        moved = groups[groups[:, 0] != groups[:, 1]]
        far = bool(len(moved)) and bool((slices[moved[:, 0]] != slices[moved[:, 1]]).any())
        size = float(one.bytes if len(moved) else 0)
        return (0.0, size, axes) if far else (size, 0.0, axes)
    n, s = groups.shape[1], len(set(slices[groups[0]].tolist()))
    k, b = n // s, float(one.bytes)
    match one.kind:
        case "all-reduce":
            return 2 * b * (k - 1) / k, 2 * b * (s - 1) / s / k, axes
        case "reduce-scatter":
            return b * (k - 1) / k, b * (s - 1) / s / k, axes
        case "all-gather":
            return b * s * (k - 1), b * (s - 1), axes
        case "collective-broadcast":
            return b * (k > 1), b * (s > 1), axes
    return b / s * (k - 1) / k, b * (s - 1) / s, axes  # all-to-all


def _axes(groups: np.ndarray, kind: str, mesh: Mesh) -> str:
    """The axes along which the members of a group differ."""
    places = np.stack(np.unravel_index(groups, mesh.devices.shape), axis=-1)
    members = places if kind == "collective-permute" else places[:1]
    varies = (members != members[:, :1]).any(axis=(0, 1))
    return "+".join(name for name, here in zip(mesh.axis_names, varies, strict=True) if here) or "none"


def bandwidth(groups: np.ndarray, kind: str, mesh: Mesh, chip: Chip) -> float:
    """Bytes/s out of a device to the others of its group, by the links of the torus along which the group lies: two a
    side where it is closed to a ring, else one. Elsewhere than on a torus, all that a device has.
    """
    assert chip.link is not None
    devices = list(mesh.devices.flat)
    if not chip.sides:
        return chip.link
    coords = np.array([device.coords for device in devices])
    size = coords.max(axis=0) + 1
    closed = (size % 4 == 0).all() if chip.sides == 3 else None
    members = coords[groups if kind == "collective-permute" else groups[:1]]
    varies = (members != members[:, :1]).any(axis=(0, 1))
    links = sum((2 if (length == 16 if closed is None else closed) else 1) for length in size[varies])
    return chip.link * max(links, 1)


# --- time -------------------------------------------------------------------------------------------------------------


def _seconds(cost: costs.Costs, exchange: tuple[Exchange, ...], chip: Chip) -> dict[str, float | None]:
    """At best, with everything overlapped."""
    ici, dcn = 0.0, 0.0
    for one in exchange:
        ici, dcn = _plus(ici, one.ici), _plus(dcn, one.dcn)
    return {
        "compute": cost.flops / chip.flops if chip.flops else None,
        "HBM": cost.bytes / chip.hbm if chip.hbm else None,
        "ICI": ici,
        "DCN": dcn,
    }


__all__ = ["Block", "Exchange", "Plan", "block", "plan", "topologies"]
