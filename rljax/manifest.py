"""What a run was: `experiment.json` (its settings) and `manifest.json` (code, versions, devices, per start)."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax

import rljax
from rljax import failures
from rljax.errors import UserError
from rljax.identity import masking

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "grain", "numpy")


class Change(NamedTuple):
    """A setting, or what stands behind it, that is not what it was when the run was begun."""

    name: str  # dotted: loss.beta, data.sha256
    old: str
    new: str

    def __str__(self) -> str:
        meaning = {"code": " (what it computes)", "uses": " (a global that it reads)"}
        parts = self.name.split(".")
        return f"{self.name} was {self.old} and is {self.new}{next((meaning[p] for p in parts if p in meaning), '')}"


def write_manifest(
    folder: str | os.PathLike[str],
    *,
    experiment: Mapping[str, Any],
    seed: int | None,
    may_change: Collection[str] = (),
    accept: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
    at: int | None = None,
) -> list[str]:
    """Write experiment.json, and append this start to the sessions of manifest.json. Process 0 only.

    may_change: fields that are not compared, the top-level ones that do not change results, such as where to log.
    accept: fields (or "all") whose change is meant; the session lists what it accepted. defaults: values of fields that
    an earlier version did not know. at: the step that this start goes on from. Returns what is worth a line: what was
    accepted, and which versions or devices are others than at the start before. Errors: UserError where the directory
    holds a run of another experiment.
    """
    if jax.process_index() != 0:
        return []
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    now = json.loads(to_json(dict(experiment)))
    before = read_json(folder / "experiment.json")
    if before is not None:
        before = {**json.loads(to_json({k: v for k, v in (defaults or {}).items() if k in now})), **before}
    changed = differences(before, now, may_change)
    refused = [change for change in changed if not {"all", change.name, change.name.split(".")[0]} & set(accept)]
    if refused:
        state = "" if at is None else f", at step {at}"
        names = ",".join(dict.fromkeys(change.name.split(".")[0] for change in refused))
        raise UserError(
            f"{folder} holds a run of another experiment{state} ({'; '.join(map(str, refused[:5]))}"
            f"{f'; and {len(refused) - 5} more' if len(refused) > 5 else ''}). Give this run another name, or undo the "
            f"change; delete the directory to start over. To go on with the change: --accept-changes {names}"
        )
    write_json(folder / "experiment.json", now)
    sessions = (read_json(folder / "manifest.json") or {}).get("sessions", [])
    session = {**environment(), **({} if at is None else {"step": at})}
    if changed:
        session["accepted"] = list(map(str, changed))
    notes = [f"accepted: {change}" for change in changed]
    if at is not None and sessions and (other := moved(sessions[-1], session)):
        notes.append(f"{other}: from here on, results may differ in their last bits")
    write_json(folder / "manifest.json", {"seed": seed, "sessions": [*sessions, session]})
    return notes


def record_contents(folder: str | os.PathLike[str], name: str, content: Mapping[str, Any]) -> None:
    """Add to experiment.json what a source turned out to hold that this run made itself. Process 0 only."""
    path = pathlib.Path(folder) / "experiment.json"
    if jax.process_index() == 0 and (experiment := read_json(path)) is not None:
        write_json(path, {**experiment, "contents": {**experiment.get("contents", {}), name: content}})


def moved(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """ "jax 0.10.1 → 0.12.0, devices 1 × cpu → 8 × TPU v5e": where two sessions differ; "" where they do not."""
    old, new = _surroundings(before), _surroundings(now)
    names = [name for name in new if name in old and old[name] != new[name]]
    return ", ".join(f"{name} {old[name]} → {new[name]}" for name in names)


def _surroundings(session: Mapping[str, Any]) -> dict[str, str]:
    """What the last bits of a result depend on, beside the experiment."""
    versions = {name: str(session.get("versions", {}).get(name)) for name in ("jax", "jaxlib", "rljax")}
    commit = (session.get("rljax_git") or {}).get("commit")
    if commit is not None:
        versions["rljax"] += f" ({commit[:9]}{' with changes' if session['rljax_git'].get('dirty') else ''})"
    devices = ", ".join(f"{count} × {kind}" for kind, count in session.get("devices", {}).items())
    return {**versions, "backend": str(session.get("backend")), "devices": devices}


def environment() -> dict[str, Any]:
    """Where this process runs, and with which code."""
    devices = jax.devices()
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(masking.masked_command(sys.argv)),
        "directory": os.getcwd(),
        "git": _git(pathlib.Path.cwd()),
        "rljax_git": _git(pathlib.Path(rljax.__file__).parent),
        "versions": {"python": platform.python_version(), "rljax": rljax.__version__, **_versions()},
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "devices": {
            kind: sum(d.device_kind == kind for d in devices) for kind in sorted({d.device_kind for d in devices})
        },
        "processes": jax.process_count(),
    }


def differences(
    there: Mapping[str, Any] | None, here: Mapping[str, Any], may_change: Collection[str] = ()
) -> list[Change]:
    """[Change("loss.beta", "0.1", "0.2"), …]; [] where nothing was written before.

    Where both say what a path or a name stood for (`contents`), that is compared and not the path; where only one of
    them does, the path is.
    """
    if there is None:
        return []
    known = set(there.get("contents", {})) & set(here.get("contents", {}))
    old, new = _compared(there, known), _compared(here, known)
    names = [name for name in dict.fromkeys((*old, *new)) if name.split(".")[0] not in may_change]
    pairs = [(name, old.get(name, "absent"), new.get(name, "absent")) for name in names]
    return [Change(*pair) for pair in pairs if pair[1] != pair[2]]


def _compared(experiment: Mapping[str, Any], known: Collection[str]) -> dict[str, str]:
    """Settings by their dotted names, and contents by those of the settings that they stand behind."""
    settings = {name: value for name, value in experiment.items() if name != "contents"}
    settings = {name: value for name, value in settings.items() if not (name in known and isinstance(value, str))}
    contents = {name: value for name, value in experiment.get("contents", {}).items() if name in known}
    return {**flat(settings), **flat(contents)}


def flat(value: Any, name: str = "") -> dict[str, str]:
    """{"loss.beta": "0.1", …}: nested settings by their dotted names, the values as JSON."""
    if not isinstance(value, Mapping) or not value:
        return {name: json.dumps(value)}
    return {
        path: text for key, item in value.items() for path, text in flat(item, f"{name}.{key}" if name else key).items()
    }


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git(folder: pathlib.Path) -> dict[str, Any] | None:
    """The commit, and whether files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def read_json(path: pathlib.Path) -> Any:
    """None where there is no such file. Errors: UserError, naming the file, where it is not JSON."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): a run writes a file there") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, or restore it from a copy") from error


def read_object(path: pathlib.Path) -> dict[str, Any] | None:
    """The same of a file that holds a JSON object."""
    value = read_json(path)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path} is damaged (it holds a {type(value).__name__}); delete it, or restore it from a copy")
    return value


@contextlib.contextmanager
def as_written(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Records of a run are read inside; of another shape than a run writes, they are a UserError."""
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise UserError(
            f"the records in {folder} are not as a run writes them ({failures.described(error)}): experiment.json, "
            f"manifest.json or a .jsonl file there is damaged; restore it from a copy {failures.EVERYTHING}"
        ) from error


def write_json(path: pathlib.Path, value: Any) -> None:
    """The whole file or nothing: a kill leaves the old one."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(to_json(value, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)


def to_json(value: Any, indent: int | None = None) -> str:
    """Valid JSON with sorted keys; functions by their name, arrays as lists, paths and infinities as text."""
    return json.dumps(_plain(value), sort_keys=True, ensure_ascii=False, allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (str, int)):
        return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return repr(value)
