"""What a run says on the terminal: one progress line, phases ("compiling … 12.3 s"), tables of samples.

On a terminal the line stays in place and is redrawn; in a file or a pipe it is a new plain line at most every ten
seconds, so that logs stay readable. Model FLOPs utilisation is shown where the peak of the device is known.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from rljax.failures import visible

# Dense bfloat16 FLOP/s of one JAX device, from the makers' data sheets, by the start of `device.device_kind`; the
# longest matching start counts. A TPU v7x chip shows as two devices.
PEAK_FLOPS: dict[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "TPU v7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA A800": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H800": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
}


def peak_flops(device_kind: str | None = None) -> float | None:
    """Peak dense bfloat16 FLOP/s of one device; None where it is not known, as on a CPU."""
    kind = jax.devices()[0].device_kind if device_kind is None else device_kind
    known = [name for name in PEAK_FLOPS if kind == name or kind.startswith((name + " ", name + "-"))]
    return PEAK_FLOPS[max(known, key=len)] if known else None


GONE = (errno.EPIPE, errno.EIO, errno.EBADF)  # of a stream that nobody reads any more


class _Lossy:
    """A stream that goes on without its reader: a pipe that was closed, a terminal that is gone."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _try(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except OSError as error:
            if error.errno not in GONE:
                return
            with contextlib.suppress(OSError, ValueError):  # into nothing from here on: nobody stumbles, exit included
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, self._stream.fileno())
                os.close(nothing)


@contextlib.contextmanager
def lossy_screen() -> Iterator[None]:
    """What is printed while nobody reads it any more (`rljax run … | head -1`, a terminal that was closed) is lost, and
    nothing else is: neither a run nor a reward that prints ends by it.
    """
    out, err = sys.stdout, sys.stderr
    with contextlib.ExitStack() as opened:
        mine = tuple(_Lossy(stream or opened.enter_context(open(os.devnull, "w"))) for stream in (out, err))
        sys.stdout, sys.stderr = mine  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            for stream in mine:
                stream.flush()
            if (sys.stdout, sys.stderr) == mine:
                sys.stdout, sys.stderr = out, err


class Stopwatch:
    """When steps end, and how long they took without the phases in between; read by a thread of its own, since a step
    ends on the device while the host has begun the next.
    """

    def __init__(self, clock: Callable[[], float]):
        self._clock = clock
        self._asked: queue.SimpleQueue[tuple[list[jax.Array], queue.SimpleQueue[float]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._answer: queue.SimpleQueue[float] | None = None
        self._end: float | None = None  # of the step that is expected, where it is known
        self._before: float | None = None  # of the step before it
        self._pauses: list[tuple[float, float]] = []
        self._depth = 0

    def expect(self, results: Any) -> None:
        """A step is under way that ends when `results` are there."""
        arrays = [x for x in jax.tree.leaves(results) if hasattr(x, "block_until_ready")]
        arrays = [x for x in arrays if not getattr(x, "is_ready", bool)()]
        self._end = None
        self._answer = answer = queue.SimpleQueue()
        if not arrays:
            self._end = self._clock()
        elif all(isinstance(x, jax.Array) for x in arrays):
            if self._thread is None:
                self._thread = threading.Thread(target=self._wait, name="rljax-stopwatch", daemon=True)
                self._thread.start()
            self._asked.put((arrays, answer))
        else:
            self._answer = None

    def arrive(self) -> None:
        """Its results are there."""
        if self._end is None:
            self._end = self._clock() if self._answer is None else self._answer.get()

    def lap(self) -> tuple[float, float | None]:
        """(when the step ended, its seconds where it is known when the one before did)"""
        self.arrive()
        assert self._end is not None
        end, before, self._before = self._end, self._before, self._end
        if before is None:
            return end, None
        paused = sum(max(0.0, min(stop, end) - max(start, before)) for start, stop in self._pauses)
        self._pauses = [pause for pause in self._pauses if pause[1] > end]
        return end, end - before - paused

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What does not count; a pause within a pause is a part of it."""
        start, self._depth = self._clock(), self._depth + 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._pauses.append((start, self._clock()))

    def _wait(self) -> None:
        while True:
            arrays, answer = self._asked.get()
            with contextlib.suppress(Exception):  # the main thread meets it too
                jax.block_until_ready(arrays)
            answer.put(self._clock())
            del arrays


class Line:
    """The progress line. `shown` is the metric that matters; `quiet` says nothing (processes other than the first)."""

    def __init__(
        self,
        total: int,
        *,
        shown: str | None = None,
        quiet: bool = False,
        console: Console | None = None,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._shown, self._every, self._clock = total, shown, every, clock
        terminal = None if sys.stdout.isatty() else False  # notebooks and some pipes call themselves terminals
        self.console = console or Console(quiet=quiet, highlight=False, force_terminal=terminal, force_jupyter=False)
        self._bar: Progress | None = None
        self._printed: float | None = None
        if self.console.is_terminal and not quiet:
            bar = Progress(BarColumn(24), TextColumn("{task.description}", markup=False), console=self.console)
            self._bar, self._task = bar, bar.add_task("", total=total)

    def status(self, text: str) -> None:
        """One line that stays."""
        self.console.print(Text(visible(text)))

    @contextlib.contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """Announce something that takes a while, and how long it took: `with line.phase("compiling the update"): …`."""
        start = self._clock()
        self.status(f"{text} …")
        yield
        self.status(f"{text}: {duration(self._clock() - start)}")

    def update(self, step: int, values: Mapping[str, float | None], timing: Mapping[str, float]) -> None:
        """Show the values of `step`, and those of held-out rows on a line that stays. timing: seconds (of one step),
        tokens_per_second and mfu, as far as known.
        """
        held_out = {f"eval/{name}": None for name in ("loss", "reward", self._shown)}
        found = [f"{name} {number(values[name])}" for name in held_out if name in values]
        if found:
            self.status(f"step {step}: {'  '.join(found)}")
        text = visible(self._text(step, values, timing))
        if self._bar is not None:
            self._bar.start()
            self._bar.update(self._task, completed=step, description=text)
        elif self._printed is None or self._clock() - self._printed >= self._every or step >= self._total:
            self._printed = self._clock()
            self.console.print(Text(text), soft_wrap=True)

    def _text(self, step: int, values: Mapping[str, float | None], timing: Mapping[str, float]) -> str:
        parts = [f"step {step:>{len(str(self._total))}}/{self._total}"]
        if step < self._total and "seconds" in timing:
            parts.append(f"eta {duration((self._total - step) * timing['seconds'])}")
        for name in dict.fromkeys(("loss", self._shown)):
            if name is not None and name in values:
                parts.append(f"{name} {number(values[name])}")
        if "tokens_per_second" in timing:
            parts.append(f"{quantity(timing['tokens_per_second'])} tokens/s")
        if "mfu" in timing:
            parts.append(f"mfu {timing['mfu']:.1%}")
        return "  ".join(parts)

    def samples(self, rows: Sequence[Mapping[str, Any]], *, title: str = "", limit: int = 280) -> None:
        """A table of prompts, completions and whatever else the rows hold."""
        self.console.print(sample_table(rows, title=title, limit=limit))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def plain(value: Any) -> str:
    """A text as it is; a list of messages as lines of their own: `user: What is …`."""
    if isinstance(value, list | tuple) and value and all(isinstance(m, Mapping) and "role" in m for m in value):
        return "\n".join(f"{m['role']}: {_said(m)}" for m in value)
    return str(value)


def _said(message: Mapping[str, Any]) -> str:
    """The content of a message, and what else it holds (calls of tools, say) as JSON."""
    content = message.get("content")
    more = {name: value for name, value in message.items() if name not in ("role", "content") and value is not None}
    texts = ["" if content is None else str(content), json.dumps(more, ensure_ascii=False, default=str) if more else ""]
    return " ".join(text for text in texts if text)


def sample_table(rows: Sequence[Mapping[str, Any]], *, title: str = "", limit: int = 280) -> Table:
    """Texts are shown as they are (no markup, and nothing that steers the terminal), cut in the middle where they are
    longer than `limit` characters.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = Table(title=Text(visible(title)) if title else None, show_lines=True)
    for name in names:
        table.add_column(
            Text(visible(str(name))), overflow="fold", ratio=4 if name in ("prompt", "completion") else None
        )
    for row in rows:
        table.add_row(*(Text(visible(_cell(row.get(name), limit))) for name in names))
    return table


def _cell(value: Any, limit: int) -> str:
    if isinstance(value, float):
        return number(value)
    text = "" if value is None else plain(value)
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"


def number(value: float | None) -> str:
    """Four significant digits; "–" for no number."""
    return "–" if value is None else f"{value:.4g}"


def quantity(value: float) -> str:
    """1234567 -> 1.23M"""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """0.25 s, 12.3 s, 3:21, 1:02:03"""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
