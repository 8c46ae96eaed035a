"""Checkpoints with Orbax: written in the background, exact to the bit, refused with a reason when they do not fit.

A step is one folder, `<folder>/<step>/`, that appears whole or not at all (Orbax writes beside it and renames). It
holds the arrays of a pytree (`state`) and a record (`rljax`, JSON): the caller's `extra`, the metrics that rank it, and
for every leaf its path, shape, dtype and a checksum. The checksum is computed on the device, does not depend on the
sharding, and is compared after restoring: what comes back is what was saved, on any mesh, or it is an error.

    with checkpoint.Checkpoints(folder, keep=3, best_metric="eval/loss", best_mode="min") as checkpoints:
        if (step := checkpoints.latest()) is not None:
            state, extra = checkpoints.restore(step, like)      # like: shapes, dtypes and shardings
        ...
        checkpoints.save(step, state, extra, metrics)           # returns once the arrays are copied to the host

Folders may be local or on a bucket (`gs://…`). Only this file knows Orbax.
"""

from __future__ import annotations

import json
import logging
import math
import re
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from rljax import sharding
from rljax.errors import UserError

log = logging.getLogger("rljax")
# Orbax logs every error of its threads with several tracebacks before it raises it; the raised one is enough. And it
# warns that what is opened to be read will only be read.
logging.getLogger("absl").addFilter(
    lambda line: (
        "orbax" not in line.pathname or (line.levelno < logging.ERROR and not re.search("read.only", str(line.msg)))
    )
)

FORMAT = 1
UNFINISHED = ".orbax-checkpoint-tmp"
_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # eight bytes become two words


class UnsavedError(OSError, UserError):
    """A checkpoint that could not be written: a full disk, no permission."""


class Checkpoints:
    """The checkpoints of one run: the last `keep` of them and, of all that were saved with metrics, the best.

    Errors: UserError for what cannot be used (a foreign or damaged folder, a state of other shapes), UnsavedError for
    what cannot be written (a full disk, no permission). A save that fails in the background raises at the next call.
    Every process of a multi-host run makes the same calls on a folder that all of them see.
    """

    def __init__(
        self,
        folder: Any,
        *,
        keep: int = 2,
        best_metric: str | None = None,
        best_mode: Literal["min", "max"] = "min",
        read_only: bool = False,
        alone: bool = False,
    ):
        """`read_only` never writes or cleans: for looking into a run that may still be going on. `alone`: of several
        processes this one looks by itself, and waits for no other.
        """
        if keep < 1:
            raise UserError(f"keep={keep} would keep no checkpoint to resume from; use 1 or more")
        if best_mode not in ("min", "max"):
            raise UserError(f'best_mode={best_mode!r} is neither "min" nor "max"')
        self.folder = _open(folder, read_only)
        self._keep, self._metric, self._sign = keep, best_metric, {"min": 1.0, "max": -1.0}[best_mode]
        self._scores: dict[int, float] = {}  # lower is better
        self._records = _scan(self.folder, {})
        self._rank()
        me = jax.process_index()
        waits = ocp.options.MultiprocessingOptions(me, {me}) if alone else ocp.options.MultiprocessingOptions()
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                multiprocessing_options=waits,
                read_only=read_only,
                create=False,
                cleanup_tmp_directories=not read_only,
                lightweight_initialize=True,  # the records above are ours; a damaged old step must not stop us here
                preservation_policy=types.SimpleNamespace(should_preserve=self._preserve),  # pyright: ignore[reportArgumentType]
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except Exception as error:
            if kind is None:
                raise
            log.error("The last checkpoint was not written; the run had failed before, for another reason: %s", error)

    def save(self, step: int, state: Any, extra: Mapping[str, Any], metrics: Mapping[str, float] | None = None) -> bool:
        """Start to write `state` (a pytree of jax arrays, which may be donated afterwards) as checkpoint `step`.

        extra: JSON, handed back by `restore`. metrics: must hold `best_metric`, where one is set; without metrics the
        step is never the best. Returns False, and writes no array, where this very state is already saved as that
        step; what goes with it (extra, and metrics where there are some) is then brought up to date.
        """
        self.wait()
        leaves = _flatten(state)
        jax.block_until_ready(leaves)
        record = {
            "format": FORMAT,
            "leaves": {path: _describe(path, leaf) for path, leaf in leaves.items()},
            "metrics": None if metrics is None else {name: float(value) for name, value in metrics.items()},
            "extra": dict(extra),
        }
        _add_checksums(record["leaves"], leaves)
        try:
            record = json.loads(json.dumps(record))
        except (TypeError, ValueError) as error:
            raise UserError(f"extra of checkpoint {step} cannot be written as JSON: {error}") from error
        if step in self._records:
            return self._already_saved(step, record)
        if metrics is not None and self._metric is not None:
            self._scores[step] = self._score(metrics)
        self._records[step] = record
        arrays = {path: _data(leaf) for path, leaf in leaves.items() if leaf.size}
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), rljax=ocp.args.JsonSave(record))
        self._guard(lambda: self._manager.save(step, args=items, force=True))
        return True

    def restore(self, step: int, like: Any, *, partial: bool = False) -> tuple[Any, dict[str, Any]]:
        """(state, extra) of checkpoint `step`, shaped and placed as the (abstract) arrays of `like` say.

        like: leaves with shape, dtype and sharding, as jax.ShapeDtypeStruct has; without a sharding a leaf goes to this
        process's first device. The mesh that is set does not matter. Nothing is ever cast. partial: `like` may hold a
        part of what was saved, e.g. the params alone.
        """
        record = self._record(step)
        wanted = _flatten(like)
        _compare(self.folder / str(step), record["leaves"], wanted, partial)
        targets = {path: _target(leaf) for path, leaf in wanted.items() if math.prod(leaf.shape)}
        args = ocp.args.PyTreeRestore(
            targets, restore_args=ocp.checkpoint_utils.construct_restore_args(targets), partial_restore=partial
        )
        try:
            arrays = self._manager.restore(step, args=ocp.args.Composite(state=args))["state"] if targets else {}
        except (jax.errors.JaxRuntimeError, MemoryError):  # no room on the device or the host: the checkpoint is well
            raise
        except Exception as error:
            raise UserError(self._damaged(step, f"{type(error).__name__}: {_first_line(error)}")) from error
        leaves = {path: _typed(path, arrays, leaf, record["leaves"]) for path, leaf in wanted.items()}
        self._verify(step, record, leaves)
        return jax.tree.unflatten(jax.tree.structure(like), list(leaves.values())), record["extra"]

    def extra(self, step: int) -> dict[str, Any]:
        """The `extra` of a checkpoint, without reading its arrays."""
        return self._record(step)["extra"]

    def steps(self) -> list[int]:
        """The finished checkpoints, oldest first."""
        self.wait()
        return sorted(self._records)

    def latest(self) -> int | None:
        """The newest finished checkpoint."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The checkpoint with the best metric, the earliest of equals; None where none was saved with metrics."""
        self.wait()
        return self._best()

    def wait(self) -> None:
        """Return when everything is on disk; raise what went wrong meanwhile."""
        self._guard(self._manager.wait_until_finished)

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._manager.close()

    def _guard(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            self._records, self._scores = _scan(self.folder, self._records), {}
            self._rank()
            saved = ", ".join(map(str, sorted(self._records))) or "none"
            raise UnsavedError(
                f"A checkpoint could not be written to {self.folder} ({type(error).__name__}: {_first_line(error)}). "
                f"Make room or give the folder write permission, then run again: the run goes on from the last "
                f"finished checkpoint. Finished, and untouched: {saved}."
            ) from error

    def _record(self, step: int) -> dict[str, Any]:
        self.wait()
        if step not in self._records:
            known = ", ".join(map(str, sorted(self._records))) or "none"
            raise UserError(f"{self.folder} has no checkpoint {step}; it has: {known}")
        return self._records[step]

    def _already_saved(self, step: int, record: dict[str, Any]) -> bool:
        if record["leaves"] != self._records[step]["leaves"]:
            raise UserError(
                f"{self.folder / str(step)} exists already and holds another state. A run resumed from an earlier "
                f"checkpoint must not mix with later ones: delete those after the one restored, or use a new folder."
            )
        before = self._records[step]
        record["metrics"] = before["metrics"] if record["metrics"] is None else record["metrics"]
        if record == before:
            return False
        self._records[step] = record
        if self._metric is not None and record["metrics"] is not None:
            self._scores[step] = self._score(record["metrics"])
        path = self.folder / str(step) / "rljax" / "metadata"
        if jax.process_index() == 0:
            draft = path.parent / f"{UNFINISHED}-metadata"
            draft.write_text(json.dumps(record))
            draft.replace(path)
        return False

    def _score(self, metrics: Mapping[str, float]) -> float:
        if self._metric is None or self._metric not in metrics:
            raise UserError(f"best_metric={self._metric!r} is not among this checkpoint's metrics: {sorted(metrics)}")
        score = self._sign * float(metrics[self._metric])
        return math.inf if math.isnan(score) else score

    def _rank(self) -> None:
        for step, record in self._records.items():
            if self._metric is not None and self._metric in (record["metrics"] or {}):
                self._scores[step] = self._score(record["metrics"])

    def _best(self) -> int | None:
        return min(self._scores, key=lambda step: (self._scores[step], step), default=None)

    def _preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """Orbax asks this for every known step while saving; what it drops goes once the new step is whole."""
        kept = {*sorted(self._records)[-self._keep :], self._best()}
        for step in set(self._records) - kept:
            self._records.pop(step)
            self._scores.pop(step, None)
        return [info.step in kept for info in checkpoints]

    def _damaged(self, step: int, why: str) -> str:
        earlier = [other for other in sorted(self._records) if other < step]
        then = f"goes on from checkpoint {earlier[-1]}" if earlier else "starts from the beginning"
        return f"The checkpoint {self.folder / str(step)} is damaged ({why}). Delete that folder: the run then {then}."

    def _verify(self, step: int, record: dict[str, Any], leaves: dict[str, Any]) -> None:
        found = {path: dict(record["leaves"][path]) for path in leaves}
        _add_checksums(found, leaves)
        wrong = [path for path in leaves if found[path] != record["leaves"][path]]
        if wrong:
            raise UserError(
                self._damaged(
                    step, f"{wrong[0]} has other bits than were saved; so have {len(wrong)} of {len(leaves)} leaves"
                )
            )


def _open(folder: Any, read_only: bool) -> epath.Path:
    """The folder as an absolute path, created if need be and seen to hold nothing but checkpoints."""
    path = epath.Path(folder)
    path = path if "://" in str(path) else path.absolute()
    if read_only and not path.is_dir():
        raise UserError(f"There is no folder of checkpoints at {path}; give the folder `checkpoints` of a run")
    try:
        path.mkdir(parents=True, exist_ok=True)
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise OSError(f"Checkpoints cannot be written to {path} ({error}); give a folder that can be made") from error
    unfinished = [name for name in names if UNFINISHED in name]
    foreign = [name for name in names if name not in unfinished and not name.isdecimal() and not name.startswith(".")]
    if foreign:
        raise UserError(
            f"{path} holds things that rljax did not write ({', '.join(foreign[:5])}): it is not a folder of "
            f"checkpoints of a run. Give an empty folder, or a new run name."
        )
    if unfinished:
        log.warning("Ignored: %s in %s, which was never finished (the run was killed while saving).", unfinished, path)
    return path


def _scan(folder: epath.Path, known: Mapping[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The records of the finished steps on disk. Raises for a newest step that is not ours or not whole.

    An older step without a record is one whose deletion was cut short by a kill: the next save removes the rest of it.
    """
    steps = sorted(found.step for found in ocp.path.step.standard_name_format().find_all(folder))
    records = {}
    for step in steps:
        try:
            records[step] = known[step] if step in known else _read_record(folder / str(step))
        except ValueError:
            if step == steps[-1]:
                raise
            log.warning(
                "Ignored: %s, without a readable record (the run was killed while deleting it).", folder / str(step)
            )
    return records


def _read_record(path: epath.Path) -> dict[str, Any]:
    try:
        record = json.loads((path / "rljax" / "metadata").read_text())
        valid = isinstance(record, dict) and {"format", "leaves", "metrics", "extra"} <= set(record)
    except (OSError, ValueError) as error:
        if not (path / "rljax").exists():
            raise UserError(
                f"{path} is not a checkpoint of rljax (it has no record). If another program wrote it, give this run "
                f"another folder; if it is what is left of a checkpoint of this run, delete it."
            ) from error
        raise UserError(
            f"The checkpoint {path} is damaged (its record cannot be read: {_first_line(error)}). Delete that folder: "
            f"the run then goes on from the checkpoint before it, or from the beginning."
        ) from error
    if not valid or record["format"] != FORMAT:
        raise UserError(f"{path} is not in the format that this version of rljax reads ({FORMAT}); use another folder")
    return record


def _flatten(tree: Any) -> dict[str, Any]:
    """{"params.embed.tokens": leaf, …} in the order of the tree's leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise UserError("Two leaves of the state have one path; a key of a dict must not hold a dot")
    return named


def _describe(path: str, leaf: Any) -> dict[str, Any]:
    if not isinstance(leaf, jax.Array):
        raise UserError(f"{path} of the state is a {type(leaf).__name__}; make it a jax.Array (with jnp.asarray)")
    described: dict[str, Any] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    if _is_key(leaf):
        described["key"] = str(jax.random.key_impl(leaf))
    return described


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _data(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    """What Orbax reads: for random keys, the words that they are made of."""
    place = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    data = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=place)


def _typed(path: str, arrays: Mapping[str, jax.Array], leaf: Any, saved: Mapping[str, Any]) -> jax.Array:
    if path not in arrays:  # an empty array has no bytes to read
        return jnp.zeros(leaf.shape, leaf.dtype, device=_target(leaf).sharding)
    return jax.random.wrap_key_data(arrays[path], impl=saved[path]["key"]) if _is_key(leaf) else arrays[path]


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    """Σ bits · (2·index + 1) mod 2³²: odd weights, so one changed element always shows; the sharding never matters."""
    array = array.astype(jnp.uint8) if array.dtype == jnp.bool_ else array
    bits = jax.lax.bitcast_convert_type(array, _BITS[array.dtype.itemsize]).astype(jnp.uint32)
    weight, stride = jnp.ones((), jnp.uint32), 2
    for axis in reversed(range(bits.ndim)):
        weight = weight + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(bits * weight, dtype=jnp.uint32)


def _add_checksums(described: dict[str, dict[str, Any]], leaves: Mapping[str, jax.Array]) -> None:
    with sharding.unset():  # a leaf need not be on the mesh that is set
        for path, leaf in leaves.items():  # one by one: on many CPU devices, several sums can starve each other
            described[path]["checksum"] = int(_checksum(_data(leaf)))


def _compare(path: epath.Path, saved: Mapping[str, Any], wanted: Mapping[str, Any], partial: bool) -> None:
    """Raise where the leaves that are wanted are not those that were saved."""
    there = {name: f"{leaf['dtype']}{leaf['shape']}" for name, leaf in saved.items()}
    here = {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in wanted.items()}
    both = [name for name in here if name in there]
    wrong = [f"{name} is {there[name]} there and {here[name]} here" for name in both if there[name] != here[name]]
    wrong += [f"{name} ({here[name]} here) is not there" for name in here if name not in there]
    if not partial:
        wrong += [f"{name} ({there[name]} there) is not here" for name in there if name not in here]
    if wrong:
        more = f", and {len(wrong) - 3} more differences" if len(wrong) > 3 else ""
        raise UserError(
            f"The checkpoint {path} is of another model, optimizer or precision than this run: "
            f"{'; '.join(wrong[:3])}{more}. Run with the settings that it was written with (experiment.json of its "
            f"run), or give this run another name."
        )


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or ["no message"])[0]
    return line if len(line) <= 400 else f"{line[:200]} … {line[-200:]}"  # the path stands first, the cause last
