"""A run's directory: what was run (manifest), what came out (metrics, samples), who may write (lock) and when it ends.

    runs/<name>/  experiment.json  manifest.json  metrics.jsonl  timing.jsonl  samples.jsonl  tensorboard/

`metrics.jsonl` and `samples.jsonl` hold nothing that depends on the clock: a run that was killed and resumed leaves the
same bytes as one that was not. Seconds, tokens/s and MFU are in `timing.jsonl`. In `metrics.jsonl` a value that is not
finite is null, and a metric without any data (weight 0) is left out.

    with tracking.lock(folder), tracking.graceful_stop() as stop:
        tracking.write_manifest(folder, experiment=…, seed=…)
        with tracking.Tracker(folder, total_steps=…, resumed=checkpoints.latest(), shown="rewards/margins") as tracker:
            for step in …:
                state, metrics = update(state, batch)
                tracker.log(step, metrics, tokens=…)      # writes the previous step: never waits for this one
                if stop.requested: …
                tracker.flush()                           # before a checkpoint of this step: its record must be on disk
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import pathlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console

from rljax import extras, failures, progress, silence, traces
from rljax.errors import UserError
from rljax.manifest import read_json, to_json, write_json, write_manifest
from rljax.stops import Stop, graceful_stop
from rljax.types import Mean

__all__ = ["Stop", "Tracker", "graceful_stop", "lock", "read_rows", "truncate_after", "values", "write_manifest"]

FILES = ("metrics.jsonl", "timing.jsonl", "samples.jsonl", "evidence.jsonl", "failures.jsonl")


class Tracker:
    """Writes the records of one run, and its progress line. Only process 0 of a multi-host run writes or prints.

    resumed: the step of the checkpoint that the run goes on from, None for a fresh start; records after it are dropped.
    shown: the metric that matters, for the progress line. flops_per_token: of the model, forward and backward, for MFU.
    wandb: the name of a Weights & Biases project, or None. config: the experiment, shown there.
    profile: so many steps are traced, for TensorBoard's Profile tab.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        total_steps: int,
        resumed: int | None = None,
        shown: str | None = None,
        flops_per_token: float | None = None,
        tensorboard: bool = True,
        profile: int = 0,
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.folder = pathlib.Path(folder)
        self._writes = jax.process_index() == 0
        self._clock, self._start = clock, clock()
        self._pending: tuple[int, dict[str, Any], Any] | None = None
        self._last_step = -1 if resumed is None else resumed
        self._silence = silence.Silence(total_steps) if resumed is None else None
        self._seconds = progress.Stopwatch(clock)
        peak = progress.peak_flops()
        self._flops = flops_per_token / (peak * jax.device_count()) if flops_per_token and peak else None
        self.line = progress.Line(total_steps, shown=shown, quiet=not self._writes, console=console, clock=clock)
        self._board, self._wandb, self._files, self._stable = None, None, {}, False
        self._lost: Exception | None = None  # once a record could not be written, nothing more is saved
        self._trace = traces.Trace(self.folder / "tensorboard", profile if self._writes else 0)
        if self._writes:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                truncate_after(self.folder / name, self._last_step)
            self._wandb = _open_wandb(self.folder, wandb, config) if wandb is not None else None
            self._board = _open_board(self.folder / "tensorboard", self._last_step + 1) if tensorboard else None
            self._files = {n: (self.folder / n).open("a", buffering=1, encoding="utf-8") for n in FILES}
            here, there = (self._files["metrics.jsonl"].fileno(), self.folder / "metrics.jsonl")
            self._stable = os.path.samestat(os.fstat(here), there.stat())  # not on every file system

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, KeyboardInterrupt):
            with contextlib.suppress(Exception):  # the first error is the one to see
                self.flush()
            self._pending = None
        self.close()

    def log(self, step: int, metrics: Mapping[str, Any], *, prefix: str = "", tokens: Any = None) -> None:
        """Take the metrics of `step` (Means, arrays or floats) without waiting for them; write those of earlier steps.

        Several calls with one step make one record (`prefix="eval/"`). tokens: how many were processed since the last
        call that gave some, for the throughput; a number or an array that is not there yet.
        """
        named = {prefix + name: value for name, value in metrics.items()}
        if self._pending is not None and step != self._pending[0]:
            self._write_pending()
        if step <= self._last_step:
            raise UserError(f"Step {step} was logged already: the last one written is {self._last_step}")
        if self._pending is None and self._writes:
            self._seconds.expect(named)
        if self._pending is None and prefix == "" and self._trace.step(named):
            self.status(f"traced: tensorboard --logdir {self._trace.folder} (Profile)")
        _, before, counted = self._pending or (step, {}, None)
        twice = sorted(({"step"} | set(before)) & set(named))
        if twice:
            raise UserError(f"Step {step} has {twice} twice; log a metric once per step, or give a prefix")
        if self._writes:
            for leaf in jax.tree.leaves(named):
                if isinstance(leaf, jax.Array):
                    leaf.copy_to_host_async()
        self._pending = (step, before | named, tokens if counted is None else counted + (tokens or 0))

    def hold(self) -> dict[str, float | None]:
        """Wait for the last step and bring all records before it to the disk; its own, which stays open. A checkpoint
        that is saved before the step is evaluated keeps it, for `take_back`.
        """
        assert self._pending is not None
        self._sync()
        return values(self._pending[1])

    def take_back(self, step: int, record: Mapping[str, float | None]) -> None:
        """Go on with the record of `step`, as `hold` gave it: what is logged of that step becomes a part of it.

        What an evaluation that was cut short has left of it is dropped: its metrics and its samples.
        """
        self._last_step = step - 1
        for name in ("metrics.jsonl", "samples.jsonl", "failures.jsonl") if self._writes else ():
            truncate_after(self.folder / name, step - 1)
        self._seconds.expect(())
        self._pending = (step, {name: math.nan if value is None else value for name, value in record.items()}, None)

    def flush(self) -> None:
        """Wait for the last step's metrics and bring everything to the disk; call it before saving a checkpoint."""
        self._write_pending()
        self._sync()

    def _append(self, name: str, record: Mapping[str, Any]) -> None:
        try:
            self._files[name].write(to_json(record) + "\n")
        except OSError as error:  # half of it may stand there, and nothing must come after that
            self._lost = error
            raise

    def _sync(self) -> None:
        if self._lost is not None:
            raise self._lost
        self._see_folder()
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        if self._board is not None:
            self._board.flush()

    def _see_folder(self) -> None:
        """UserError where the folder is gone: what is written from here on would be lost, or stand in another one."""
        file = self._files.get("metrics.jsonl")
        if file is None:
            return
        here, path = os.fstat(file.fileno()), self.folder / "metrics.jsonl"
        if path.exists() and here.st_nlink and (not self._stable or os.path.samestat(here, path.stat())):
            return
        for other in self._files.values():
            other.close()
        self._files, self._pending, self._board = {}, None, None
        self._lost = UserError(
            f"{self.folder} was deleted, renamed or replaced while the run wrote to it: the run ends after step "
            f"{self._last_step}, and what was not saved before is lost. Where the folder was renamed, give it its name "
            "back, and run again: the run goes on from its last checkpoint."
        )
        raise self._lost

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]], *, show: int = 3, title: str = "") -> None:
        """Append rows ("prompt", "completion", "reward", "phase", … as there are); print the first `show` of them."""
        if not self._writes:
            return
        for row in rows:
            self._append("samples.jsonl", {"step": step, **row})
        if show and rows:
            self.line.samples(rows[:show], title=title or f"step {step}")

    def evidence(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Append what a step did to single tokens (see evidence.py)."""
        if self._writes:
            for row in rows:
                self._append("evidence.jsonl", {"step": step, **row})

    def note(self, step: int, text: str) -> None:
        """Say something that went wrong and that the report says as well."""
        if self._writes and self._lost is None:
            self._append("failures.jsonl", {"step": step, "note": text})
        self.status(text)

    def status(self, text: str) -> None:
        self.line.status(text)

    @contextlib.contextmanager
    def phase(self, text: str | None = None) -> Iterator[None]:
        """Something that does not count in the throughput (evaluation, compilation, saving); announced with its
        seconds if it has a text. What is logged inside is a part of it, and waited for."""
        self._settle()  # else the phase waits for the step, and takes its seconds away
        with self._seconds.pause(), contextlib.nullcontext() if text is None else self.line.phase(text):
            yield
            self._settle()  # else the next step has the seconds of its evaluation

    def _settle(self) -> None:
        if self._pending is not None:
            jax.block_until_ready(self._pending[1])
            self._seconds.arrive()

    def close(self) -> None:
        self._trace.close()
        if self._lost is None:
            self.flush()
        self.line.close()
        for file in self._files.values():
            try:
                file.close()
            except OSError:
                if self._lost is None:
                    raise
        self._files = {}
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._board = self._wandb = None

    def _write_pending(self) -> None:
        if self._pending is None:
            return
        (step, metrics, tokens), self._pending = self._pending, None
        self._last_step = step
        if not self._writes:
            return
        found = values(metrics)
        self._see_folder()
        timing = self._timing(None if tokens is None else int(tokens))
        self._append("metrics.jsonl", {"step": step, **found})
        self._append("timing.jsonl", {"step": step, **timing})
        scalars = {name: value for name, value in found.items() if value is not None}
        scalars |= {f"timing/{name}": value for name, value in timing.items() if name != "time"}
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)
        self.line.update(step, found, timing)
        for text in self._silence.see(found) if self._silence is not None else ():
            self.status(text)

    def _timing(self, tokens: int | None) -> dict[str, float]:
        """Seconds from the end of the step before to that of this one, phases left out; none for the first."""
        done, seconds = self._seconds.lap()
        timing = {"time": round(done - self._start, 3)}
        if seconds is not None and seconds > 0:
            timing["seconds"] = round(seconds, 6)
            if tokens:
                timing["tokens_per_second"] = round(tokens / seconds, 3)
                if self._flops is not None:
                    timing["mfu"] = round(tokens / seconds * self._flops, 6)
        return timing


def values(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Means, arrays and floats as numbers, in one transfer: None where not finite; no entry where the weight is 0."""
    host = jax.device_get(dict(metrics))
    found = {}
    for name, value in host.items():
        if isinstance(value, Mean):
            if not value.weight:
                continue
            with np.errstate(all="ignore"):
                value = np.asarray(value.total) / np.asarray(value.weight)
        found[name] = _shortest(value)
    return found


def _shortest(value: Any) -> float | None:
    """The float whose text is shortest in the value's own precision (0.1, not 0.10000000149011612)."""
    number = np.asarray(value)
    number = number if number.dtype.kind == "f" and number.dtype.itemsize >= 4 else number.astype(np.float64)
    return float(str(number.reshape(())[()])) if math.isfinite(number) else None


def read_rows(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a .jsonl file of a run; [] where there is none. A torn last line is left out."""
    path = pathlib.Path(path)
    return [row for row, _ in _rows(path)] if path.exists() else []


def read_numbers(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The same of a file of metrics or of seconds: UserError for a value that is no number (nor null, of metrics)."""
    nothing = () if pathlib.Path(path).name == "timing.jsonl" else (None,)
    rows = read_rows(path)
    for row in rows:
        for name, value in row.items():
            if isinstance(value, bool) or not (
                value in nothing or (isinstance(value, int | float) and abs(value) < 1e300)
            ):
                raise UserError(f"{path}: {name} of step {row['step']} is no number but {value!r:.60}; mend that line")
    return rows


def truncate_after(path: pathlib.Path, step: int) -> None:
    """Drop the records after `step`, and a last line torn by a kill. Records stand in the order of their steps."""
    if not path.exists():
        return
    end = 0
    for row, stop in _rows(path):
        if row["step"] > step:
            break
        end = stop
    if end != path.stat().st_size:
        os.truncate(path, end)


def _rows(path: pathlib.Path) -> Iterator[tuple[dict[str, Any], int]]:
    """(record, the byte where its line ends)"""
    end = 0
    lines = path.read_bytes().splitlines(keepends=True)
    for index, line in enumerate(lines):
        end += len(line)
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, KeyError, TypeError) as error:
            if index == len(lines) - 1:
                return
            raise UserError(f"{path}:{index + 1} is no record of a run ({error}); delete that line") from error
        if line.endswith(b"\n"):
            yield row, end


def _open_board(folder: pathlib.Path, first: int) -> Any:
    from tensorboardX import SummaryWriter  # slow to import

    return SummaryWriter(str(folder), purge_step=first)


def _open_wandb(folder: pathlib.Path, project: str, config: Mapping[str, Any] | None) -> Any:
    """The same W&B run at every start of the same directory."""
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"wandb is not installed: {extras.install('wandb')}, or leave --wandb out") from error
    kept = folder / "wandb.json"
    if not kept.exists():
        write_json(kept, {"project": project, "id": secrets.token_hex(4)})
    run_id = read_json(kept)["id"]
    try:
        return wandb.init(
            project=project, id=run_id, name=folder.name, resume="allow", dir=str(folder), config=dict(config or {})
        )
    except Exception as error:  # its own classes, and those of its HTTP client
        raise UserError(
            f"Weights & Biases does not start ({failures.described(error)}): `wandb login`, or WANDB_MODE=offline, or "
            "leave --wandb out"
        ) from error


@contextlib.contextmanager
def lock(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a run's directory, so that no two processes write to one run; the kernel frees it when the process dies."""
    folder = pathlib.Path(folder)
    if jax.process_index() != 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"{folder} is in use by process {file.read().strip() or '?'}: two must not write to one run. "
                f"Wait for it, end it, or give this run another name."
            ) from error
        except OSError as error:  # network file systems, as they may be mounted
            raise UserError(
                f"{folder} cannot be locked ({error.strerror or error}), so nothing would keep another process from "
                f"writing to this run: its file system has no flock. Mount it with locks (Lustre: -o flock; NFS: "
                f"without nolock), or give --out a folder on a local disk."
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
        file.truncate(0)
