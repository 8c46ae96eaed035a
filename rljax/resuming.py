"""How a run begins, or goes on: what may have changed since it was begun, and what its record is compared with.

A field is in one of four classes (docs/resuming.md has them as a table):

    free       changes no result: where to log, what to show, when to save
    rounding   changes the last bits alone: how work is spread and computed
    extending  `steps` and `eval_every`, where nothing that was done so far depends on them
    all others make another experiment
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from rljax import hosts, kept, report, tracking
from rljax.checkpoint import Checkpoints
from rljax.errors import UserError
from rljax.identity import contents, describe
from rljax.manifest import differences, read_json, to_json, write_manifest
from rljax.program import Run, resumed, updates

FREE = (
    "name",
    "out",
    "keep",
    "save_every",
    "samples",
    "sample_tokens",
    "checks",
    "waive",
    "profile",
    "wandb",
    "evidence",
    "reward_timeout",
    "max_rounds",
    "on_nan",
    "accept_changes",
)
ROUNDING = (
    "mesh",
    "microbatches",
    "attention",
    "remat",
    "unroll",
    "gather",
    "offload_reference",
    "share_prompts",
    "slots",
    "cache_reference",
)
EXTENDING = ("steps", "eval_every")


def begin(run: Run, folder: pathlib.Path) -> bool:
    """Record this start of a run, and say what is worth knowing of it. False: it is finished, its report is written.

    UserError where the folder holds a run of another experiment; what is different is named.
    """
    latest, extra = _latest(folder)
    finished = latest is not None and resumed(run, latest, extra).done
    accept, experiment = _accepted(run), describe(run)
    before = read_json(folder / "experiment.json")
    if before is not None and latest is None and not _trained(folder):
        before = None  # it ended before its first step: there is nothing that this one would go on with
        _forget(folder)
    may_change = (*FREE, *ROUNDING, *_extending(run, before, latest))
    defaults = _defaults(run)
    if finished:
        there, here = {**defaults, **(before or {}), "contents": {}}, {**experiment, "contents": {}}
        as_it_was = not differences(json.loads(to_json(there)), json.loads(to_json(here)), may_change)
        finished_alike = bool(hosts.told(np.asarray(as_it_was)))  # before the first process writes
    else:
        finished_alike = False
    if not finished_alike:
        content = found_contents(run, folder)
        notes = write_manifest(
            folder,
            experiment={**experiment, "contents": content},
            seed=run.seed,
            may_change=may_change,
            accept=accept,
            defaults=defaults,
            at=latest,
        )
        for note in notes:
            print(f"rljax: {note}")
        kept.keep(folder, run.model, content["model"])
    if finished and jax.process_index() == 0:
        early = "" if latest == run.steps else f" of {run.steps}, where its patience ended"
        print(f"{folder} is finished: step {latest}{early}. More of it: --steps N; anew: --name OTHER")
        print(f"report: {report.write_report(folder)}\nexport: rljax export {folder} FOLDER")
    return not finished


def found_contents(run: Run, folder: pathlib.Path) -> dict[str, Any]:
    """What stands behind the names and paths of a run: hashes of models and of data sets."""
    found: dict[str, Any] = {}
    for name in ("model", "critic"):
        value = getattr(run, name, None)
        if isinstance(value, str) and value not in ("policy", "shared"):
            found[name] = contents.model(value)
    for name in ("data", "eval_data", "pretrain_data"):
        value = getattr(run, name, None)
        if isinstance(value, str):
            found[name] = contents.rows(value, run.split if name != "eval_data" else run.eval_split or "train")
    made = folder / "data" / "train.jsonl"
    if callable(run.data) and made.is_file():
        found["data"] = contents.rows(str(made))
    return found


def _latest(folder: pathlib.Path) -> tuple[int | None, Mapping[str, Any]]:
    """(the step of the last checkpoint, what it remembers)"""
    path = folder / "checkpoints"
    if not path.is_dir():
        return None, {}
    with Checkpoints(path, read_only=True, alone=True) as checkpoints:  # the others may not see the folder yet
        latest = checkpoints.latest()
        return latest, {} if latest is None else checkpoints.extra(latest)


def _trained(folder: pathlib.Path) -> bool:
    return any(row["step"] > 0 for row in tracking.read_rows(folder / "metrics.jsonl"))


def _forget(folder: pathlib.Path) -> None:
    """The record of a run that trained nothing."""
    if jax.process_index() == 0:
        (folder / "experiment.json").unlink(missing_ok=True)
        print(f"rljax: the run in {folder} had ended before its first step: this one takes its place")


def _accepted(run: Run) -> list[str]:
    names = [name.strip() for name in run.accept_changes.split(",") if name.strip()]
    known = {"all", *(field.name for field in dataclasses.fields(run))}
    for name in names:
        if name.split(".")[0] not in known:
            raise UserError(f"accept_changes={name!r} is no field of {type(run).__name__}: name those that changed")
    return names


def _defaults(run: Run) -> dict[str, Any]:
    """Descriptions of the fields' defaults, for a record that an earlier version wrote without some of them."""
    return {f.name: describe(f.default) for f in dataclasses.fields(run) if f.default is not dataclasses.MISSING}


def _extending(run: Run, before: Mapping[str, Any] | None, latest: int | None) -> list[str]:
    """Those of `EXTENDING` that may be others now."""
    may = []
    if run.best is None:  # else evaluations decide which checkpoint is best, and when to stop
        may.append("eval_every")
    old = (before or {}).get("steps")
    if isinstance(old, int) and _same_so_far(run, old, latest or 0):
        may.append("steps")
    return may


def _same_so_far(run: Run, old: int, latest: int) -> bool:
    """Whether a run of `old` steps has done until step `latest` what this one would have done."""
    if latest > run.steps or (latest >= old and getattr(run, "normalize", 0)):
        return False  # trained further already; or a reward that was normalised at the end

    def rates(steps: int) -> np.ndarray:
        return _rates(run, updates(dataclasses.replace(run, steps=steps)), done)

    done = updates(dataclasses.replace(run, steps=latest))
    ours, theirs = rates(run.steps), rates(old)
    return bool(np.array_equal(ours, theirs))


def _rates(run: Run, total: int, done: int) -> np.ndarray:
    """The learning rates of the updates that were made."""
    schedule, counts = run.schedule(run.learning_rate, total), np.arange(max(1, done))
    try:
        return np.broadcast_to(np.asarray(schedule(counts)), counts.shape)  # pyright: ignore[reportArgumentType]
    except Exception:  # a schedule of plain Python numbers
        return np.asarray([float(schedule(int(count))) for count in counts])  # pyright: ignore[reportArgumentType]
