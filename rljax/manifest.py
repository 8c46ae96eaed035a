"""What a run was: `experiment.json` (its settings) and `manifest.json` (code, versions, devices, per start)."""

from __future__ import annotations

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
from collections.abc import Collection, Mapping
from typing import Any

import jax

import rljax
from rljax.errors import UserError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "grain", "numpy")


def write_manifest(
    folder: str | os.PathLike[str],
    *,
    experiment: Mapping[str, Any],
    seed: int | None,
    may_change: Collection[str] = (),
) -> None:
    """Write experiment.json, and append this start to the sessions of manifest.json. Process 0 only.

    Errors: UserError where the directory holds a run of another experiment; fields named in `may_change` (the
    top-level ones that do not change results, such as where to log) are not compared.
    """
    if jax.process_index() != 0:
        return
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    now = json.loads(to_json(dict(experiment)))
    changed = differences(read_json(folder / "experiment.json"), now, may_change)
    if changed:
        raise UserError(
            f"{folder} holds a run of another experiment ({'; '.join(changed[:5])}). Give this run another name, or "
            f"undo the change; delete the directory to start over."
        )
    write_json(folder / "experiment.json", now)
    sessions = (read_json(folder / "manifest.json") or {}).get("sessions", [])
    write_json(folder / "manifest.json", {"seed": seed, "sessions": [*sessions, environment()]})


def environment() -> dict[str, Any]:
    """Where this process runs, and with which code."""
    devices = jax.devices()
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
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
) -> list[str]:
    """["loss.beta was 0.1 and is 0.2", …]; [] where nothing was written before."""
    if there is None:
        return []
    old, new = flat(there), flat(here)
    names = [name for name in dict.fromkeys((*old, *new)) if name.split(".")[0] not in may_change]
    return [f"{n} was {old.get(n, 'absent')} and is {new.get(n, 'absent')}" for n in names if old.get(n) != new.get(n)]


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
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete it, or restore it from a copy") from error


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
