"""TPU slices by name, as the compiler sees them, and what one of their devices can do."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from rljax import extras, progress
from rljax.errors import UserError


class Chip(NamedTuple):
    """One JAX device; None where a figure is not published."""

    kind: str
    memory: float  # bytes that a program can have
    flops: float | None = None  # dense bfloat16 FLOP/s
    hbm: float | None = None  # bytes/s of its memory
    link: float | None = None  # bytes/s out of one of its links to neighbours in a torus; elsewhere of all of them
    dcn: float | None = None  # bytes/s out of the slice, through the data-center network
    sides: int = 0  # dimensions of the torus


class Machine(NamedTuple):
    """What is planned for."""

    name: str
    devices: Sequence[Any]
    chip: Chip


GIB = 2**30

# Memory is what the compiler grants a program of the chip's HBM: it says so when it refuses one that takes more. The
# other figures are those of cloud.google.com/tpu/docs/v4, v5e, v5p, v6e and tpu7x: peak bf16, HBM bandwidth, and per
# chip the bidirectional ICI bandwidth, here divided by two and by the ports (6 in a 3D torus, 4 in a 2D one), and the
# DCN bandwidth (v5e: 2 × 100 Gbit/s for 8 chips; v4: not published). A chip of v4 and v5p has two cores that work as
# one device ("megacore"). One of tpu7x has two devices of half its memory each; they share its links.
CHIPS: dict[str, Chip] = {
    "v4": Chip("TPU v4", 30.75 * GIB, 275e12, 1228e9, 50e9, None, 3),
    "v5e": Chip("TPU v5e", 15.75 * GIB, 197e12, 819e9, 50e9, 25e9 / 8, 2),
    "v5p": Chip("TPU v5p", 95.74 * GIB, 459e12, 2765e9, 100e9, 50e9 / 8, 3),
    "v6e": Chip("TPU v6e", 31.25 * GIB, 918e12, 1638e9, 100e9, 100e9 / 8, 2),
    "tpu7x": Chip("TPU7x (half a chip)", 94.75 * GIB, 2307e12 / 2, 7380e9 / 2, 100e9 / 2, 100e9 / 8 / 2, 3),
}
KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}  # device_kind

# NVIDIA's data sheets: bytes/s of the memory, and of NVLink in one direction.
GPUS: dict[str, tuple[float, float]] = {
    "NVIDIA A100-SXM4-40GB": (1555e9, 300e9),
    "NVIDIA A100-SXM4-80GB": (2039e9, 300e9),
    "NVIDIA H100 80GB HBM3": (3350e9, 450e9),
    "NVIDIA H200": (4800e9, 450e9),
    "NVIDIA B200": (8000e9, 900e9),
}

# libtpu asks the metadata server of a cloud machine what it runs on, unless it is told, and lets one process of a
# machine have its chips, of which compiling needs none.
OFFLINE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


def machine(topology: str | None, slices: int | None = None) -> Machine:
    """Named TPU slices ("v5e:16x16", "2xv5p:8x8x8"), none of which has to be there; None: the devices of this process.

    ImportError without libtpu; UserError for a name that it does not know.
    """
    if topology is None:
        if slices is not None:
            raise UserError(f"slices={slices} are of a topology: name one, --topology v5e:16x16 say")
        return Machine(f"{len(jax.devices())} × {jax.devices()[0].device_kind}", jax.devices(), _at_hand())
    count, generation, shape = _parse(topology)
    if slices is not None and count not in (1, slices):
        raise UserError(f"the topology {topology!r} has {count} slices and slices={slices}: give one of the two")
    if slices is not None and slices < 1:
        raise UserError(f"slices={slices} must be at least 1")
    count = max(count, slices or 1)
    name = f"{generation}:{'x'.join(map(str, shape))}"
    return Machine(f"{count}x{name}" if count > 1 else name, _devices(generation, shape, count), CHIPS[generation])


def _parse(topology: str) -> tuple[int, str, tuple[int, ...]]:
    """(slices, generation, sides)."""
    found = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*):(\d+(?:x\d+)*)", topology.strip().lower())
    generation = found[2] if found else None
    if found is None or generation not in CHIPS:
        raise UserError(
            f"there is no topology {topology!r}: it is a generation and the sides of a slice, "
            f"{', '.join(map(_example, CHIPS))}, and with several slices 2xv5e:16x16"
        )
    sides = tuple(map(int, found[3].split("x")))
    wanted = CHIPS[generation].sides
    if len(sides) != wanted or 0 in sides or found[1] == "0":
        raise UserError(
            f"the topology {topology!r} has {len(sides)} sides, but slices of {generation} have {wanted}, of one chip "
            f"or more: {_example(generation)}, say"
        )
    return int(found[1] or 1), generation, sides


def _example(generation: str) -> str:
    return f"{generation}:{'4x4x4' if CHIPS[generation].sides == 3 else '16x16'}"


def _devices(generation: str, sides: tuple[int, ...], slices: int) -> Sequence[Any]:
    """Devices of a slice (or several) that is not there, to compile for."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"planning for a TPU needs its compiler, which runs anywhere: {extras.install('plan')}")
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)
    if os.environ.get("JAX_PLATFORMS") is None:  # no TPU is wanted here, but for its compiler
        jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if generation == "v4":
        options["chip_config_name"] = "megacore"
    if math.prod(sides) < 4:  # less than a host's chips
        options["chips_per_host_bounds"] = (*sides, 1)[:3]
    name = f"{generation}:{'x'.join(map(str, sides))}"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except Exception as error:  # the errors of the plug-in have classes of their own
        reason = str(error).splitlines()[0]
        raise UserError(
            f"the compiler knows no slice {name} ({reason}): take sides that are offered, powers of two or multiples "
            f"of four"
        ) from error


def _at_hand() -> Chip:
    """The devices of this process. CPU devices share the memory of the machine."""
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if device.device_kind in KINDS:
        chip = CHIPS[KINDS[device.device_kind]]
        return chip._replace(memory=limit or chip.memory)
    if device.platform == "cpu":
        shared = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return Chip("CPU", shared / jax.local_device_count())
    hbm, link = next((GPUS[name] for name in GPUS if device.device_kind.startswith(name)), (None, None))
    return Chip(device.device_kind, limit or math.inf, progress.peak_flops(), hbm, link)
