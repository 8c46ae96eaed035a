"""Which mesh and how many microbatches: candidates by arithmetic, the most promising ones compiled, ranked by time."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from rljax import program, settings, sharding
from rljax.errors import UserError
from rljax.models import ModelConfig
from rljax.plan.configs import describe
from rljax.plan.estimate import Plan, plan
from rljax.plan.topologies import Chip, Machine

LONG = 4096  # tokens of a row for each device on the context axis: shorter pieces are not worth the exchange


class Guess(NamedTuple):
    """What arithmetic says of a candidate: good enough for an order, not for a decision."""

    run: Any
    needed: float  # bytes
    seconds: float


class Found(NamedTuple):
    plans: list[Plan]  # the best first; those that do not fit last
    candidates: int  # that are valid
    dropped: dict[str, int]  # why others are not, and how many


def search(run: Any, machine: Machine, *, tries: int, say: Callable[[str], None] = lambda _: None) -> Found:
    """Meshes of data, fsdp, tensor and (for long rows) context with microbatches, `tries` of them compiled.

    UserError where the experiment has a mesh function of its own, or where no mesh is valid.
    """
    if tries < 1:
        raise UserError(f"tries={tries} must be at least 1 mesh to compile")
    function = run.mesh.func if isinstance(run.mesh, functools.partial) else run.mesh
    if function is not sharding.make_mesh:
        raise UserError(f"a search sets data, fsdp, tensor and context of rljax's mesh, but this one is {function}")
    config = describe(run.model).config
    good, dropped = [], {}
    for candidate in _candidates(run, len(machine.devices)):
        reason = _invalid(candidate, config, machine)
        if reason is None:
            good.append(guess(candidate, config, machine.chip, len(machine.devices)))
        else:
            dropped[reason] = dropped.get(reason, 0) + 1
    if not good:
        why = "; ".join(f"{count} because {reason}" for reason, count in dropped.items())
        raise UserError(f"no mesh of {len(machine.devices)} devices is valid for this experiment: {why}")
    plans = []
    for number, one in enumerate(_in_order(good, machine.chip)[:tries]):
        say(f"{number + 1} of {min(tries, len(good))}: about {one.needed / 2**30:.1f} GiB by arithmetic")
        plans.append(plan(one.run, machine, say))
    plans.sort(key=_order)
    return Found(plans, len(good), dropped)


def _in_order(good: list[Guess], chip: Chip) -> list[Guess]:
    """The most promising first, and every mesh once before one comes again with other microbatches."""
    good = sorted(good, key=lambda one: (one.needed > chip.memory, one.seconds))
    seen: dict[tuple[int, ...], int] = {}
    turns = []
    for one in good:
        mesh = tuple(one.run.mesh.keywords.values())
        turns.append(seen.setdefault(mesh, 0))
        seen[mesh] += 1
    order = sorted(range(len(good)), key=lambda i: (good[i].needed > chip.memory, turns[i]))
    return [good[i] for i in order]


def _order(one: Plan) -> tuple[bool, float, float]:
    """What fits first, then by time to three digits, then by memory."""
    step = math.inf if one.step is None else float(f"{one.step:.3g}")
    return not one.fits, step, max(block.needed for block in one.blocks)


def _candidates(run: Any, devices: int) -> Iterator[Any]:
    """The run on every mesh that uses all devices, with every number of microbatches that is a power of two."""
    sizes = [n for n in range(1, devices + 1) if devices % n == 0]
    contexts = [n for n in sizes if n == 1 or (run.max_prompt + run.max_completion) // n >= LONG]
    rows = _rows(run)
    for context, tensor, fsdp in itertools.product(contexts, sizes, sizes):
        data, left = divmod(devices, context * tensor * fsdp)
        for cuts in range(rows.bit_length()):
            if data and not left and rows % 2**cuts == 0:
                mesh = {"data": data, "fsdp": fsdp, "tensor": tensor, "context": context}
                mesh = functools.partial(sharding.make_mesh, **mesh)
                yield dataclasses.replace(run, mesh=mesh, microbatches=2**cuts)


def _rows(run: Any) -> int:
    """Rows of one update: pairs count as one."""
    if not isinstance(run, settings.Sampled):
        return run.batch
    alone = isinstance(run, settings.OnlinePreference | settings.Imitation)
    return (run.batch if alone else run.batch * run.group) // run.minibatches


def _invalid(run: Any, config: ModelConfig, machine: Machine) -> str | None:
    """Why a candidate is none; None where it is one."""
    sizes = run.mesh.keywords
    shards = sizes["data"] * sizes["fsdp"]
    if _rows(run) % (shards * run.microbatches) or run.batch % shards:
        return "the rows of the batch cannot be spread over data×fsdp and the microbatches"
    if config.num_kv_heads % sizes["tensor"]:
        return f"tensor does not divide the {config.num_kv_heads} key-value heads"
    if config.hidden_size % sizes["fsdp"]:
        return f"fsdp does not divide the hidden size {config.hidden_size}"
    try:
        program.check_settings(run)
        program.make_mesh(run, machine.devices)
    except ValueError as error:
        return str(error)
    return None


def guess(run: Any, config: ModelConfig, chip: Chip, devices: int) -> Guess:
    """Memory and time of an update, roughly: weights and moments, what the backward pass keeps, one layer's weights
    gathered; products against the exchange of weights over fsdp, of gradients over data, of activations over tensor.
    """
    sizes, m = run.mesh.keywords, run.microbatches
    c, layers = config, config.num_layers
    heads = c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    layer = c.hidden_size * (heads + c.intermediate_size * (3 if c.gated else 2))
    weights = layers * layer + c.vocab_size * c.hidden_size * (1 if c.tied else 2)
    models = 2 if getattr(run, "critic", "shared") != "shared" else 1
    split = sizes["fsdp"] * sizes["tensor"]
    length = run.max_prompt + run.max_completion
    tokens = _rows(run) * length * (1 if isinstance(run, settings.Sampled) else 2)
    here = tokens / (devices / sizes["tensor"]) / m  # of a microbatch, on a device
    kept = {"full": 1.0, "dots": 2 + (heads + 3 * c.intermediate_size) / c.hidden_size / sizes["tensor"]}
    kept["none"] = 2 * kept["dots"]
    scores = here * length * c.num_heads / sizes["tensor"] * 4
    if chip.sides and run.attention != "xla" and run.compute_dtype != "float32":
        scores = 0.0  # on TPUs a kernel holds none
    needed = (
        weights * (3 * models + 1) * 4 / split
        + here * c.hidden_size * layers * 2 * kept[run.remat]
        + scores
        + 2 * layer * 2 / sizes["tensor"]
        + 2**29
    )
    if chip.flops is None or chip.link is None:
        return Guess(run, needed, here)
    compute = (8 if run.remat == "full" else 6) * weights * tokens * models / devices / chip.flops
    links = 2 * chip.link * max(chip.sides, 1)
    exchange = 0.0
    if sizes["fsdp"] > 1:
        exchange += m * 4 * weights * models * 2 / sizes["tensor"] / links
    if sizes["data"] > 1:
        exchange += 2 * weights * models * 4 / split / links
    if sizes["tensor"] > 1:
        exchange += m * layers * models * 6 * here * c.hidden_size * 2 * 2 / (2 * chip.link)
    return Guess(run, needed, max(compute, exchange))
