"""A plan as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from rljax.plan.estimate import Block, Plan


def show(plan: Plan, console: Console) -> None:
    """What a researcher wants to know before paying."""
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    console.print(
        f"{plan.model}: {parameters(plan.parameters)} parameters on {plan.machine}, {plan.devices} devices "
        f"({plan.chip.kind}), mesh {mesh}, microbatches={plan.microbatches}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    for block in plan.blocks:
        console.print()
        _show_block(block, console)
    if len(plan.blocks) > 1 and plan.step is not None:
        console.print(f"\nan iteration, at best: {duration(plan.step)}", highlight=False)


def _show_block(block: Block, console: Console) -> None:
    say = lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)  # noqa: E731
    say(f"{block.name}{f' ({block.note})' if block.note else ''}: {verdict(block)}")
    table = _table("memory of a device", "")
    for name, taken in block.memory.items():
        table.add_row(name, size(taken))
    table.add_row("all together", size(block.needed))
    console.print(table)
    if block.refused:
        return
    table = _table("exchange with other devices", "times", "sent", "at best")
    for one in block.exchange:
        times = [value for value in (one.ici, one.dcn) if value]
        table.add_row(
            f"{one.kind} over {one.axes}",
            f"{one.count:,.0f}",
            size(one.bytes),
            duration(sum(times)) if times else "?",
        )
    console.print(table if block.exchange else "no exchange with other devices")
    bound = (
        f"at best {duration(block.step)}, bound by {block.binding}"
        if block.step
        else "time: the figures of this device are not known"
    )
    parts = ", ".join(f"{name} {duration(value)}" for name, value in block.seconds.items() if value)
    say(f"{quantity(block.flops)}FLOP of matrix products, {size(block.bytes)} to and from memory")
    say(f"{bound}{f' ({parts})' if parts else ''}")
    for scope in block.unknown:
        say(f"note: a loop whose rounds data decide is counted once: {scope}")
    if block.uncounted:
        say(f"note: exchange is missing above, that of {', '.join(block.uncounted)}: rljax does not know what calls it")


def verdict(block: Block) -> str:
    """fits or does not, and by how much."""
    if math.isinf(block.limit):
        return f"needs {size(block.needed)}; how much a device has is not known"
    free = block.limit - block.needed
    if block.fits:
        return f"fits, {size(free)} of {size(block.limit)} free ({free / block.limit:.0%})"
    return (
        f"does not fit: needs {size(block.needed)} of {size(block.limit)}, {size(-free)} over; "
        "use more microbatches, --remat full, a smaller batch, or more devices on the fsdp or tensor axis"
    )


def ranking(plans: Sequence[Plan], console: Console) -> None:
    """Searched plans, the best first."""
    table = _table("mesh and microbatches", "at best", "bound by", "needed", "")
    for plan in plans:
        worst = max(plan.blocks, key=lambda block: block.needed)
        slowest = max(plan.blocks, key=lambda block: block.step or 0.0)
        table.add_row(
            setting(plan),
            duration(plan.step) if plan.step else "?",
            f"{slowest.name}: {slowest.binding}" if slowest.binding else "",
            size(worst.needed),
            "fits" if plan.fits else "does not fit",
        )
    console.print(table)


def setting(plan: Plan) -> str:
    """As options of the command line."""
    mesh = " ".join(f"--mesh.{axis} {size}" for axis, size in plan.mesh.items() if size > 1 or axis == "fsdp")
    return mesh + (f" --microbatches {plan.microbatches}" if plan.microbatches > 1 else "")


def _table(title: str, *columns: str) -> Table:
    table = Table(title, *columns, box=None, pad_edge=False, header_style="dim")
    for column in table.columns:
        column.no_wrap = True
        column.justify = "left" if column is table.columns[0] else "right"
    return table


def size(count: float) -> str:
    """Bytes, in the unit that suits them."""
    unit = next((name for name in ("GiB", "MiB") if count >= 0.1 * UNITS[name]), "KiB")
    return f"{count / UNITS[unit]:,.2f} {unit}"


UNITS = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


def parameters(count: int) -> str:
    return f"{count / 1e9:.2f} billion" if count >= 1e8 else f"{count:,}"


def quantity(count: float) -> str:
    """A number with its prefix: 1.23 T."""
    prefix, scale = next(((p, s) for p, s in (("P", 1e15), ("T", 1e12), ("G", 1e9)) if count >= s), ("M", 1e6))
    return f"{count / scale:,.2f} {prefix}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything, in bytes and seconds."""
    blocks = [
        {
            **block._asdict(),
            "limit": None if math.isinf(block.limit) else block.limit,
            "exchange": [one._asdict() for one in block.exchange],
            "fits": block.fits,
            "binding": block.binding,
            "step": block.step,
        }
        for block in plan.blocks
    ]
    chip = {name: None if value == math.inf else value for name, value in plan.chip._asdict().items()}
    return {**plan._asdict(), "chip": chip, "blocks": blocks, "fits": plan.fits, "step": plan.step}
