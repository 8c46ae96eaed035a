"""What a user must know of a run: said once when it starts, kept in its folder, and a section of its report."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence

import jax

from rljax.manifest import read_object, write_json

FILE = "notes.json"


def keep(
    folder: str | pathlib.Path, about: str, lines: Sequence[str], say: Callable[[str], None] = lambda _: None
) -> None:
    """Keep sentences about one thing ("data", "weights") in the run's folder, in place of those kept before, and say
    those that were not kept yet.
    """
    path = pathlib.Path(folder) / FILE
    kept = read(folder)
    for line in lines:
        if line not in kept.get(about, ()):
            say(f"note: {line}")
    if jax.process_index() == 0 and list(lines) != list(kept.get(about, ())):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**kept, about: list(lines)})


def read(folder: str | pathlib.Path) -> Mapping[str, Sequence[str]]:
    """{about: sentences}; empty where none were kept."""
    return read_object(pathlib.Path(folder) / FILE) or {}
