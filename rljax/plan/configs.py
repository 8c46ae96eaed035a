"""A model's config.json, and nothing else of it: what a plan knows of a checkpoint."""

from __future__ import annotations

import json
import pathlib
from typing import NamedTuple

from rljax.manifest import read_json
from rljax.models import ModelConfig, hf_encoder, hf_read, resolve


class Described(NamedTuple):
    config: ModelConfig
    stop_ids: tuple[int, ...]


def describe(name: str) -> Described:
    """Of a folder, a run, a config.json, a GGUF file, or a name on the Hugging Face hub: no weights are read.

    UserError where there is none, or where it describes no decoder that rljax has.
    """
    path = _file(name)
    if path.suffix == ".gguf":
        from rljax.models import gguf

        source, _ = gguf.open_gguf(path)
    else:
        source = hf_read.read_json(path)
    generation = path.with_name("generation_config.json")
    ends = [source] + ([json.loads(generation.read_text())] if path.suffix != ".gguf" and generation.is_file() else [])
    ids = [end.get("eos_token_id") for end in ends]
    stop = {int(i) for given in ids for i in (given if isinstance(given, list) else [given]) if i is not None}
    return Described(hf_read.config_of(source, str(path)), tuple(sorted(stop)) or (0,))


def is_encoder(name: str) -> bool:
    """Whether it is one that `models.encoder` opens, as classifiers are. UserError where there is nothing."""
    path = _file(name)
    known = {family.model_type for family in hf_encoder.FAMILIES}
    return path.suffix != ".gguf" and hf_read.read_json(path).get("model_type") in known


def _file(name: str) -> pathlib.Path:
    """The config.json (or GGUF file) of a model."""
    local = pathlib.Path(name).expanduser()
    if local.is_file():
        return local
    if (local / "experiment.json").is_file():  # a run, whose model is that of the checkpoint where it began
        return _file(str((read_json(local / "experiment.json") or {}).get("model")))
    if not local.is_dir() and (fetched := _from_hub(name)):
        return fetched
    found = resolve.resolve(name)
    return found / "config.json" if found.is_dir() else found


def _from_hub(name: str) -> pathlib.Path | None:
    """One file of the hub, where the hub has it and can be reached."""
    from huggingface_hub import hf_hub_download

    try:
        return pathlib.Path(hf_hub_download(resolve.SHORT_NAMES.get(name.lower(), name), "config.json", etag_timeout=5))
    except Exception:  # errors of the HTTP client, of the hub and of the system: `resolve` says what to do
        return None
