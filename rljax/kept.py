"""What a run keeps of the model that it began with, so that its weights open without it: config and tokenizer."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from rljax import models
from rljax.errors import UserError
from rljax.manifest import as_written, read_json, read_object, write_json
from rljax.models import hf, hf_read, hf_write, resolve, tokenizer_files
from rljax.policy import Policy, absent_ids, stop_ids

FOLDER, RECORD = "model", "rljax.json"


def keep(run: pathlib.Path, name: str, content: Mapping[str, Any]) -> None:
    """Write the folder `model` of a run, a megabyte or so; process 0 only. content: hashes of what it holds."""
    folder = run / FOLDER
    if jax.process_index() != 0 or (read_json(folder / RECORD) or {}).get("content") == dict(content):
        return
    path = resolve.resolve(name)
    config = hf.abstract(path, dtype="float32")[0].config
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    plain = {key: value for key, value in json.loads(config.source).items() if key != hf_read.NOTE}
    hf_write.write_json(folder / "config.json", plain)
    if path.is_dir() and (path / "generation_config.json").is_file():
        shutil.copy(path / "generation_config.json", folder)
    tokenizer_files.write_tokenizer(folder, path if path.is_dir() else resolve.load_tokenizer(path))
    record = {"name": name, "path": str(path.resolve()), "content": dict(content), "source": config.source}
    write_json(folder / RECORD, record)  # last: without it, the folder is not whole


def begun(run: str | pathlib.Path, *, mesh: Any, dtype: str) -> Policy | None:
    """The policy that a run began with, as far as it was kept: its weights are shapes, placed on a mesh if there is
    one. None for a run that kept nothing.
    """
    folder = pathlib.Path(run) / FOLDER
    record = read_object(folder / RECORD)
    if record is None:
        return None
    with as_written(folder):
        config = hf_read.config_of(json.loads(record["source"]), str(folder))
    model = models.build(dataclasses.replace(config, source=record["source"], compute_dtype=jnp.dtype(dtype).name))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), shapes)
    tokenizer = resolve.load_tokenizer(folder)
    absent = absent_ids(tokenizer, model.config.vocab_size, str(folder))
    return Policy(model, hf.placed(shapes, mesh), tokenizer, stop_ids(folder, tokenizer), absent)


def where(run: str | pathlib.Path, name: str) -> str:
    """The model of a run that kept nothing: as it was named, from here or from where the run was started."""
    with as_written(run):
        sessions = (read_object(pathlib.Path(run) / "manifest.json") or {}).get("sessions") or [{}]
        starts = [pathlib.Path(session.get("directory", ".")) for session in sessions]
    for folder in (pathlib.Path("."), *starts):
        if (pathlib.Path(folder) / pathlib.Path(name).expanduser()).exists():
            return str(pathlib.Path(folder) / pathlib.Path(name).expanduser())
    try:
        return str(resolve.resolve(name))
    except UserError as error:
        raise UserError(
            f"{run} began with the model {name!r}, which is needed to open its weights and is not there ({error}): put "
            f"it there again, or write its place into {pathlib.Path(run) / 'experiment.json'}"
        ) from error
