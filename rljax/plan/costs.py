"""What a compiled program does, counted from its HLO: products, memory traffic, exchange, loops with their rounds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from rljax.plan.hlo import Computation, Instruction, Module, Shape

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# How a TPU says what goes from slice to slice: a transfer through the host, started by a `send` (MegaScale).
BETWEEN_SLICES = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
# No traffic of their own: names for what is there, what happens in a computation of its own, the ends of what began.
FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "call",
    "conditional",
    "after-all",
    "partition-id",
    "replica-id",
    "opt-barrier",
    "optimization-barrier",
    "add-dependency",
    "domain",
}
MARKS = ("AllocateBuffer", "AsyncCollectiveStart", "AsyncCollectiveDone", "ConcatBitcast")  # custom calls like them


class Collective(NamedTuple):
    kind: str
    bytes: int  # that one device puts in
    attributes: str  # where its groups are written
    scope: str


class Costs(NamedTuple):
    """Of one execution on one device."""

    flops: float = 0.0  # 2 for a multiplication with its addition, of matrix products alone
    bytes: float = 0.0  # read from and written to the device's memory
    collectives: tuple[tuple[Collective, float], ...] = ()  # each with how often it runs
    unknown: tuple[str, ...] = ()  # scopes of loops whose rounds are not known, counted as one

    def __add__(self, other: Costs) -> Costs:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Costs(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.collectives + other.collectives,
            self.unknown + other.unknown,
        )

    def times(self, rounds: float) -> Costs:
        repeated = tuple((one, count * rounds) for one, count in self.collectives)
        return Costs(self.flops * rounds, self.bytes * rounds, repeated, self.unknown)


def count(module: Module, loops: Mapping[str, float] | None = None) -> Costs:
    """Of the entry computation. loops: rounds of the loops that data end, by the named scope just around them."""
    return _Counter(module, loops or {}).of(module.entry)


def uncounted(module: Module) -> tuple[str, ...]:
    """Computations that exchange data and that no instruction known here calls: `count` does not have them."""
    counter = _Counter(module, {})
    counter.of(module.entry)

    def exchanges(computation: Computation) -> bool:
        return any(one.opcode.removesuffix("-start") in COLLECTIVES for one in computation.values())

    return tuple(n for n, found in module.computations.items() if n not in counter.known and exchanges(found))


def parameter_bytes(module: Module) -> int:
    """What the arguments take without the padding of layouts."""
    entry = module.computations[module.entry].values()
    return sum(shape.bytes for one in entry if one.opcode == "parameter" for shape in one.shapes)


class _Counter:
    """Costs of computations, each counted once."""

    def __init__(self, module: Module, loops: Mapping[str, float]) -> None:
        self.module, self.loops = module, loops
        self.known: dict[str, Costs] = {}

    def of(self, name: str) -> Costs:
        if name not in self.known:
            self.known[name] = self._counted(self.module.computations[name])
        return self.known[name]

    def _counted(self, computation: Computation) -> Costs:
        total, channels = Costs(), set()
        for one in computation.values():
            cost = self._of_instruction(one, computation)
            if one.opcode == "fusion":  # the steps of a collective that overlaps with products each name its channel
                new = tuple(
                    c for c in cost.collectives if (channel := _channel(c[0])) is None or channel not in channels
                )
                channels |= {_channel(c[0]) for c in new} - {None}
                cost = cost._replace(collectives=new)
            total += cost
        return total

    def _of_instruction(self, one: Instruction, computation: Computation) -> Costs:
        kind = one.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            sizes = [shape for name in one.operands for shape in computation[name].shapes]
            made = Collective(kind, sum(shape.bytes for shape in sizes), one.attributes, one.scope)
            return Costs(bytes=_traffic(one, computation, self.module), collectives=((made, 1.0),))
        match one.opcode:
            case "send" if (transfer := between_slices(one.attributes)) is not None:
                made = Collective(transfer, one.shapes[0].bytes, one.attributes, one.scope)
                return Costs(bytes=_traffic(one, computation, self.module), collectives=((made, 1.0),))
            case "while":
                return self._of_loop(one, computation)
            case "fusion":
                inside = self._fused(one)
                return inside._replace(bytes=_traffic(one, computation, self.module))
            case "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
                names = re.findall(r"[\w.\-]+", branches[1]) if branches else []
                names += [n for key in ("true_computation", "false_computation") if (n := one.called(key))]
                return max((self.of(name) for name in names), key=lambda cost: (cost.flops, cost.bytes))
            case "call" | "call-start" | "async-start":  # some chips have cores of their own for collectives
                called = one.called("to_apply") or one.called("calls")
                return self.of(called) if called else Costs()
        return Costs(flops=_flops(one, computation), bytes=_traffic(one, computation, self.module))

    def _fused(self, one: Instruction) -> Costs:
        """Products and collectives of a fusion; its memory traffic is at its edge."""
        name = one.called("calls")
        if name is None:
            return Costs()
        inside = self.of(name)
        scattered = _root(self.module.computations[name]).opcode == "dynamic-slice"
        kinds = tuple(
            (c._replace(kind="reduce-scatter") if scattered and c.kind == "all-reduce" else c, n)
            for c, n in inside.collectives
        )
        return inside._replace(collectives=kinds)

    def _of_loop(self, one: Instruction, computation: Computation) -> Costs:
        body, condition = one.called("body"), one.called("condition")
        assert body, one.name
        assert condition, one.name
        rounds = self._rounds(one, computation, body, condition)
        cost = (self.of(body) + self.of(condition)).times(1.0 if rounds is None else rounds)
        return cost if rounds is not None else cost._replace(unknown=(*cost.unknown, one.scope or one.name))

    def _rounds(self, one: Instruction, computation: Computation, body: str, condition: str) -> float | None:
        said = re.search(r'"known_trip_count":\{"n":"(\d+)"', one.attributes)
        if said:
            return float(said[1])
        around = re.search(r"([^/]+)/while$", one.scope)
        if around and around[1] in self.loops:
            return self.loops[around[1]]
        parts = self.module.computations
        start = _resolve(one.operands[0], computation)
        begun = [_number(name, computation) for name in start.operands] if start.opcode == "tuple" else []
        return counted_rounds(parts[body], parts[condition], begun, parts)


def counted_rounds(
    body: Computation, condition: Computation, begun: list[float | None], parts: Mapping[str, Computation]
) -> float | None:
    """How often a loop runs whose counter is compared with a number; None where another thing decides.

    begun: the numbers among what the loop starts with.
    """
    test, names = _root(condition), None
    if test.opcode == "fusion":
        inner = parts[test.called("calls") or ""]
        names, test = test.operands, _root(inner)
    if test.opcode != "compare":
        return None
    sides = []
    for name in test.operands:
        side = _resolve(name, parts[_root(condition).called("calls") or ""] if names else condition)
        if names and side.opcode == "parameter":
            side = _resolve(names[int(re.match(r"\d+", side.attributes)[0])], condition)  # pyright: ignore
        sides.append(side)
    places = [_element(side) for side in sides]
    numbers = [_value(side) for side in sides]
    for which, place in enumerate(places):  # what the loop carries and does not change is a number too
        if place is not None and place < len(begun) and _unchanged(body, place):
            numbers[which], places[which] = begun[place], None
    if places[0] is None or numbers[1] is None:
        return None
    first = begun[places[0]] if places[0] < len(begun) else None
    first, step = 0.0 if first is None else first, _step(body, places[0])
    direction = re.search(r"direction=(\w+)", test.attributes)
    way = direction[1] if direction else ""
    if step is None or way not in ("LT", "LE", "GT", "GE", "NE"):
        return None
    rounds = (numbers[1] - first + (math.copysign(1, step) if way in ("LE", "GE") else 0)) / step
    return float(math.ceil(rounds)) if rounds > 0 else None


def _root(computation: Computation) -> Instruction:
    return next(one for one in computation.values() if one.root)


def _resolve(name: str, computation: Computation) -> Instruction:
    """What a name stands for, through copies."""
    one = computation[name]
    while one.opcode in ("copy", "bitcast", "convert", "opt-barrier") and one.operands:
        one = computation[one.operands[0]]
    return one


def _number(name: str, computation: Computation) -> float | None:
    return _value(_resolve(name, computation))


def _value(one: Instruction) -> float | None:
    found = re.match(r"-?\d+(?=\)|,|$|\s)", one.attributes) if one.opcode == "constant" else None
    return float(found[0]) if found else None


def _element(one: Instruction) -> int | None:
    """Which element of what a loop carries this is."""
    found = re.search(r"index=(\d+)", one.attributes) if one.opcode == "get-tuple-element" else None
    return int(found[1]) if found else None


def _step(body: Computation, place: int) -> float | None:
    """What a round adds to an element that the loop carries."""
    root = _root(body)
    if root.opcode != "tuple" or place >= len(root.operands):
        return None
    one = _resolve(root.operands[place], body)
    if one.opcode not in ("add", "fusion") or not one.operands:
        return None
    if one.opcode == "fusion":
        return 1.0  # of a counter alone, which XLA fuses with what depends on it
    numbers = [_number(name, body) for name in one.operands]
    return next((number for number in numbers if number is not None), None)


def _unchanged(body: Computation, place: int) -> bool:
    root = _root(body)
    return (
        root.opcode == "tuple"
        and place < len(root.operands)
        and _element(_resolve(root.operands[place], body)) == place
    )


def between_slices(attributes: str) -> str | None:
    """The kind of collective that a transfer between slices belongs to; None for anything else."""
    found = re.search(r'_xla_megascale_transfer_type="(\w+)"', attributes)
    return BETWEEN_SLICES.get(found[1], "all-to-all") if found else None


def _channel(one: Collective) -> str | None:
    found = re.search(r"channel_id=(\d+)", one.attributes)
    return found[1] if found else None


# --- products ---------------------------------------------------------------------------------------------------------


def _flops(one: Instruction, computation: Computation) -> float:
    match one.opcode:
        case "dot":
            left = computation[one.operands[0]].shapes[0].dims
            return 2.0 * math.prod(one.shapes[0].dims) * math.prod(left[i] for i in _axes(one, "lhs_contracting_dims"))
        case "convolution":
            left, right = (computation[name].shapes[0] for name in one.operands)
            return convolution_flops(one, left, right)
        case "custom-call":
            return _custom_flops(one, computation)
    return 0.0


def _axes(one: Instruction, key: str) -> list[int]:
    found = re.search(rf"{key}=\{{([\d,]*)\}}", one.attributes)
    return [int(n) for n in found[1].split(",") if n] if found else []


def convolution_flops(one: Instruction, left: Shape, right: Shape) -> float:
    """TPUs write matrix products as convolutions; a product's batch is then a spatial dimension whose window meets one
    element at a time. Multiplications with padding or with the holes of a dilation are not counted.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    assert labels is not None, one.name
    inputs, kernel, result = labels.groups()
    out = one.shapes[0].dims
    window = _window(one.attributes)
    spatial = [letter for letter in result if letter.isdigit()]
    size = 2.0 * right.dims[kernel.index("i")] * out[result.index("f")] * out[result.index("b")]
    batches = re.search(r"batch_group_count=(\d+)", one.attributes)
    for place, letter in enumerate(sorted(spatial)):
        sizes = left.dims[inputs.index(letter)], right.dims[kernel.index(letter)], out[result.index(letter)]
        size *= _meetings(*sizes, {key: values[place] for key, values in window.items()})
    return size / (int(batches[1]) if batches else 1)


def _window(attributes: str) -> dict[str, list[int]]:
    """{what: a number for each spatial dimension} of window={size=… stride=… pad=…}; of padding that before."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    pairs = (part.split("=") for part in (found[1].split() if found else ()))
    return {key: [int(text.partition("_")[0]) for text in value.split("x")] for key, value in pairs}


def _meetings(size: int, kernel: int, out: int, window: Mapping[str, int]) -> int:
    """How many pairs (output, element of the window) meet an input that is neither padding nor a hole."""
    stride, base, spread = (window.get(key, 1) for key in ("stride", "lhs_dilate", "rhs_dilate"))
    outputs = np.arange(out)[:, None] * stride
    places = outputs + np.arange(kernel)[None] * spread - window.get("pad", 0)
    return int(((places >= 0) & (places <= (size - 1) * base) & (places % base == 0)).sum())


def _custom_flops(one: Instruction, computation: Computation) -> float:
    """Of a kernel that says what it costs (Pallas), of attention's, and of a library's matrix product on GPUs."""
    said = re.search(r'"flops":\s*"?(\d+)', one.attributes)
    if said:
        return float(said[1])
    if "splash_" in one.scope or "__cudnn$fmha" in one.attributes:
        return _attention_flops(one, computation)
    numbers = re.search(r'"dot_dimension_numbers":(\{[^}]*\})', one.attributes)
    if numbers and one.operands:
        dims = json.loads(numbers[1]).get("lhs_contracting_dimensions", [])
        left = computation[one.operands[0]].shapes[0].dims
        return 2.0 * math.prod(one.shapes[0].dims) * math.prod(left[int(i)] for i in dims)
    return 0.0


def _attention_flops(one: Instruction, computation: Computation) -> float:
    """Of the scores that a kernel computes: two products of them forward, five backward (splash computes two of these
    in each of its two kernels). Splash skips blocks, and `models.kernels` says how many scores are left of a head.
    """
    splash = re.search(r"scores_(\d+)/.*splash_\w+?_(fwd|dkv|dq)", one.scope)
    if splash:
        query = next(x for name in one.operands for x in computation[name].shapes if re.match("bf|f", x.dtype))
        heads = math.prod(query.dims) / query.dims[-2]  # times the head size
        return 2.0 * {"fwd": 2, "dkv": 4, "dq": 3}[splash[2]] * heads * int(splash[1])
    cudnn = re.search(r'"intermediate_tensor_shape":\{.*?"dimensions":\[([^\]]*)\]', one.attributes)
    if not cudnn:
        return 0.0
    scores = math.prod(int(n) for n in re.findall(r"\d+", cudnn[1])) / (2 if "CAUSAL" in one.attributes else 1)
    head = computation[one.operands[0]].shapes[0].dims[-1]
    return 2.0 * (5 if "Backward" in one.attributes else 2) * scores * head


# --- memory traffic ---------------------------------------------------------------------------------------------------


def _traffic(one: Instruction, computation: Computation, module: Module) -> float:
    """Bytes that an instruction reads from and writes to the device's memory."""
    if one.opcode in FREE or one.opcode.endswith("-done"):
        return 0.0
    if one.opcode == "custom-call" and any(f'"{mark}"' in one.attributes for mark in MARKS):
        return 0.0
    operands = [computation[name] for name in one.operands if name in computation]
    match one.opcode:
        case "fusion":
            return _fusion_traffic(one, operands, module)
        case "dynamic-slice" | "slice" | "gather":
            return 2.0 * _hbm(one.shapes)
        case "dynamic-update-slice":
            return 2.0 * _hbm(operands[1].shapes)
        case "scatter":
            return 2.0 * _hbm(operands[-1].shapes)
        case "copy-start" | "slice-start":  # results: (target, source, …), (sources, target, …)
            target, source = one.shapes[:1] if one.opcode == "copy-start" else one.shapes[1:2], operands[0].shapes
            return float(sum(x.bytes * ((x.space == 0) + (y.space == 0)) for x, y in zip(target, source, strict=False)))
    results = one.shapes[len(operands) :] if one.opcode.endswith("-start") else one.shapes
    return float(_hbm(results) + sum(_hbm(operand.shapes) for operand in operands))


def _hbm(shapes: Iterable[Shape]) -> int:
    return sum(shape.hbm for shape in shapes)


def _fusion_traffic(one: Instruction, operands: list[Instruction], module: Module) -> float:
    """At the edge of a fusion: slices count as what they take, updates in place as what they put."""
    inner = module.computations[one.called("calls") or ""]
    aliased = re.search(r"output_to_operand_aliasing=\{(.*?\})\}", one.attributes)
    pairs = re.findall(r"\{(\d*)\}: \((\d+)", aliased[1]) if aliased else []
    passed, taken = {int(out or 0) for out, _ in pairs}, {int(operand) for _, operand in pairs}
    parameters, total = _parameters(inner), 0.0
    for place, operand in enumerate(operands):
        if place not in taken and place in parameters:
            total += _read(parameters[place], inner, _hbm(operand.shapes), module)
    root = _root(inner)
    results = [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for place, (shape, made) in enumerate(zip(one.shapes, results, strict=False)):
        if place not in passed and shape.space == 0:
            made = _resolve(made.name, inner)
            update = made.opcode == "dynamic-update-slice"
            total += inner[made.operands[1]].shapes[0].bytes if update else shape.bytes
    return total


def _parameters(inner: Computation) -> dict[int, str]:
    """{place: name}"""
    return {
        int(match[0]): part.name
        for part in inner.values()
        if part.opcode == "parameter" and (match := re.match(r"\d+", part.attributes))
    }


def _read(name: str, inner: Computation, whole: int, module: Module) -> float:
    """What a fusion reads of one of its operands, also by a fusion within it."""
    if not whole:
        return 0.0
    total = float(whole) if _root(inner).name == name else 0.0  # as it is: somebody reads it further on
    for user in inner.values():
        if name not in user.operands:
            continue
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            total += sum(shape.bytes for shape in user.shapes)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            continue
        elif user.opcode == "bitcast":
            total += _read(user.name, inner, whole, module)
        elif user.opcode == "fusion":
            nested = module.computations[user.called("calls") or ""]
            places = [place for place, operand in enumerate(user.operands) if operand == name]
            total += sum(_read(_parameters(nested)[place], nested, whole, module) for place in places)
        else:
            return float(whole)
    return min(total, float(whole))
