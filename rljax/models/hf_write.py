"""Writing a checkpoint's files: the stored tensors from the leaves, in shards.

Leaves are gathered one layer at a time; with several processes all of them gather and the first one writes.
"""

from __future__ import annotations

import base64
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from rljax.models.folders import MARK
from rljax.models.hf_read import Target, causal, flat
from rljax.models.tensors import axes_of, join_parts
from rljax.models.tokenizer_files import TOKENIZER_FILES
from rljax.types import Params

SHARD_BYTES = 5_000_000_000
OWN_FILES = (*TOKENIZER_FILES, "config.json", "generation_config.json", "model.safetensors.index.json")
Tensor = tuple[str, int, Callable[[], np.ndarray]]  # name, bytes, and how to get it


def gather(array: Any) -> np.ndarray:
    """A host copy of an array that may be spread over devices and processes."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def stored_tensors(params: Params, wanted: Mapping[str, Target], derived: Mapping[str, Any]) -> Iterator[Tensor]:
    """Every tensor of the file, weights first; `derived` are the buffers that the checkpoint came with."""
    leaves = flat(params)

    def weight(target: Target) -> np.ndarray:
        parts = [gather(leaves[x] if target.layer is None else leaves[x][target.layer]) for x in target.leaves]
        axes = [axes_of(leaf, target.layout, part) for part, leaf in enumerate(target.leaves)]
        return join_parts(parts, target.layout, axes)

    def buffer(note: Any) -> np.ndarray:
        if note == "tied":
            return gather(leaves["embed/tokens"])
        shape, dtype = tuple(note["shape"]), jax.numpy.dtype(note["dtype"])
        if note["value"] == "causal":
            return np.ascontiguousarray(causal(shape, dtype))
        return np.frombuffer(base64.b64decode(note["value"]), dtype).reshape(shape)

    for name, target in wanted.items():
        size = sum(leaves[x].nbytes // (1 if target.layer is None else len(leaves[x])) for x in target.leaves)
        yield name, size, lambda target=target: weight(target)
    for name, note in derived.items():
        value = leaves["embed/tokens"] if note == "tied" else buffer(note)
        yield name, value.nbytes, lambda note=note: buffer(note)


def _shards(tensors: list[Tensor], limit: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(size for _, size, _ in shards[-1]) + tensor[1] > limit:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def write_tensors(folder: pathlib.Path | None, tensors: list[Tensor]) -> None:
    """model.safetensors, or numbered shards with an index. A folder of None only takes part in the gathering."""
    from safetensors.numpy import save_file

    shards = _shards(tensors, SHARD_BYTES)
    places: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        arrays = {name: np.asarray(get(), order="C") for name, _, get in shard}  # safetensors 0.8 ignores strides
        places |= dict.fromkeys(arrays, file)
        if folder:
            save_file(arrays, folder / file, metadata=MARK)
            (folder / file).chmod(0o644)  # safetensors writes files that only their owner can read
    if folder and len(shards) > 1:
        total = sum(size for _, size, _ in tensors)
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
