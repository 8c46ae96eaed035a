"""Optimized HLO text as data: computations, instructions, shapes. What they cost is counted in `costs.py`.

XLA's own cost analysis counts the body of a loop once, and so says nothing of a model whose layers are scanned; its
text has everything that is needed to count.
"""

from __future__ import annotations

import functools
import math
import re
from typing import NamedTuple

import numpy as np

from rljax.errors import UserError


class Shape(NamedTuple):
    """One array."""

    dtype: str
    dims: tuple[int, ...]
    space: int  # memory space: 0 is the device's main memory (HBM), others are on the chip

    @property
    def bytes(self) -> int:
        return math.ceil(math.prod(self.dims) * _width(self.dtype))

    @property
    def hbm(self) -> int:
        """Bytes in the device's main memory."""
        return self.bytes if self.space == 0 else 0


class Instruction(NamedTuple):
    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result; a tuple's leaves in order
    operands: tuple[str, ...]  # names
    attributes: str  # as written, behind the operands; of a constant or parameter what stands in its parentheses
    root: bool

    def called(self, key: str) -> str | None:
        """The computation that an attribute names: calls, body, condition, to_apply."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @property
    def scope(self) -> str:
        """The path of named scopes and transformations that the instruction comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]  # in the order of the text


class Module(NamedTuple):
    computations: dict[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Of `compiled.as_text()`. UserError where that is no HLO module."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in re.sub(r'\n(?="|\}\})', "", text).splitlines():  # what a kernel notes down is JSON over several lines
        if not line.startswith(" "):
            opened = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
            current = None
            if opened:
                current = computations.setdefault(opened[2], {})
                entry = opened[2] if opened[1] else entry
        elif current is not None and " = " in line:
            made = _instruction(line)
            current[made.name] = made
    if not entry:
        raise UserError(f"this is no HLO module with an entry computation: {text[:80]!r}…")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().partition(" = ")
    kind, rest = _split_type(rest)
    opcode, _, rest = rest.partition("(")
    inside, attributes = _closed(rest)
    plain = opcode in ("constant", "parameter")
    return Instruction(
        name=name.removeprefix("ROOT ").lstrip("%"),
        opcode=opcode.strip(),
        shapes=shapes(kind),
        operands=() if plain else tuple(re.findall(r"(?:^|[\s,])%?([\w.\-]+)(?=,|$)", _without_comments(inside))),
        attributes=f"{inside}{attributes}" if plain else attributes,
        root=name.startswith("ROOT "),
    )


def _split_type(rest: str) -> tuple[str, str]:
    """(the type, what follows it)."""
    if not rest.startswith("("):
        kind, _, rest = rest.partition(" ")
        return kind, rest
    inside, rest = _closed(rest[1:])
    return inside, rest.lstrip()


def _closed(text: str) -> tuple[str, str]:
    """(what stands before the parenthesis that closes the one just opened, what stands behind it)."""
    depth = 1
    for place in re.finditer(r"[()]", text):
        depth += 1 if place[0] == "(" else -1
        if depth == 0:
            return text[: place.start()], text[place.end() :]
    return text, ""


def _without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/", "", text).strip()


def shapes(kind: str) -> tuple[Shape, ...]:
    """The arrays of a type as HLO writes it."""
    found = re.finditer(r"\b([a-z]\w*)\[([\d,<=\s]*)\](?:\{([^}]*)\})?", kind)
    return tuple(_shape(dtype, dims, layout or "") for dtype, dims, layout in (m.groups() for m in found))


@functools.lru_cache(maxsize=65536)
def _shape(dtype: str, dims: str, layout: str) -> Shape:
    space = re.search(r"S\((\d+)\)", layout)
    return Shape(dtype, tuple(int(n) for n in re.findall(r"\d+", dims)), int(space[1]) if space else 0)


def _width(dtype: str) -> float:
    """Bytes of an element: pred, s32, bf16, f8e4m3fn, u4, c64, …"""
    if dtype == "pred":
        return 1
    bits = re.match(r"[a-z]+?(\d+)", dtype)  # token[] and opaque[] have none
    return int(bits[1]) / 8 if bits else 0


# --- groups of devices ------------------------------------------------------------------------------------------------


def groups(attributes: str, devices: int) -> np.ndarray:
    """i64[groups size]: which devices (by their place in the mesh) a collective lets exchange data.

    A permutation gives the pairs (source, target).
    """
    found = re.search(r"source_target_pairs=\{(.*?\})\}", attributes)
    if found:
        return np.array([_numbers(pair) for pair in re.findall(r"\{([\d,]+)", found[1] + "}")])
    found = re.search(r"replica_groups=(\{\{.*?\}\}|\{\}|mesh\[.*?\{[^}]*\}|[^ ]*?(?=, |$))", attributes)
    written = found[1] if found else "{}"
    if written == "{}":
        return np.arange(devices)[None]
    if written.startswith("{{"):
        return np.array([_numbers(group) for group in re.findall(r"\{([\d,]+)\}", written)])
    if written.startswith("mesh"):
        return _of_mesh(written)
    return _of_iota(written)


def _numbers(listed: str) -> list[int]:
    return [int(n) for n in listed.split(",")]


def _of_iota(written: str) -> np.ndarray:
    """[groups,size]<=[dims]T(permutation)."""
    found = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", written)
    if not found:
        raise UserError(f"replica groups in a form that is not known: {written[:80]}")
    dims = _numbers(found[2])
    return (
        np.arange(math.prod(dims))
        .reshape(dims)
        .transpose(_numbers(found[3]) if found[3] else None)
        .reshape(_numbers(found[1]))
    )


def _of_mesh(written: str) -> np.ndarray:
    """mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}: axes of a mesh of devices in that order; of a part of an axis
    {'a':(2)2}, which is (the size before it)its size.
    """
    mesh, _, chosen = written.rpartition("{")
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh)}
    order = re.search(r"device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\)", mesh)
    listed = re.search(r"device_ids=\(([\d,]+)\)", mesh)
    ids = np.array(_numbers(listed[1])) if listed else np.arange(math.prod(sizes.values()))
    if order:
        ids = ids.reshape(_numbers(order[1])).transpose(_numbers(order[2]) if order[2] else None)
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
    dims, mine = [], {}
    for name, size in sizes.items():
        cuts = sorted((int(before), int(part)) for axis, before, part in wanted if axis == name and before)
        left = 1
        for before, part in cuts:
            dims.append(before // left)
            mine[name, before] = len(dims)
            dims.append(part)
            left = before * part
        if any(axis == name and not before for axis, before, _ in wanted):
            mine[name, 0] = len(dims)
        dims.append(size // left)
    inner = [mine[axis, int(before or 0)] for axis, before, _ in wanted]
    outer = [place for place in range(len(dims)) if place not in inner]
    size = math.prod(dims[place] for place in inner)
    return ids.reshape(dims).transpose(outer + inner).reshape(-1, size)
