"""Reading a checkpoint: which stored tensor goes where, and filling (sharded) device arrays from the files.

Abstract shapes first, shardings second, arrays last: every process reads the slices that its own devices hold, one
leaf at a time, so the model is never in memory twice.
"""

from __future__ import annotations

import base64
import json
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from rljax.errors import UserError
from rljax.models.config import ModelConfig
from rljax.models.families import FAMILIES, Family, Layout, family_of, model_config
from rljax.models.tensors import Box, Store, Stored, axes_of, open_safetensors, read_json, read_part, stored_shape
from rljax.types import Params

NOTE = "rljax"  # the key of config.json (and of ModelConfig.source) that holds what only rljax needs
SCORE: Layout = ("1 d", ("head/kernel",))  # transformers' reward head: Linear(d, 1) without bias
_LARGEST_BUFFER = 1 << 16


class Checkpoint(NamedTuple):
    family: Family
    source: dict[str, Any]  # config.json
    store: Store
    where: str


class Target(NamedTuple):
    """What one stored tensor holds: parts of leaves, of one layer where `layer` is a number."""

    layout: str
    leaves: tuple[str, ...]
    layer: int | None


# --- config.json ------------------------------------------------------------------------------------------------------


def open_checkpoint(path: pathlib.Path) -> Checkpoint:
    """A checkpoint folder or GGUF file, its tensors unread. A Gemma 3 with vision gives its text model."""
    if path.suffix == ".gguf":
        from rljax.models.gguf import open_gguf

        source, store = open_gguf(path)
        return Checkpoint(family_of(source["architectures"][0]), source, store, str(path))
    family, source = described(read_json(path / "config.json"), str(path / "config.json"))
    return Checkpoint(family, source, open_safetensors(path), str(path))


def described(source: dict[str, Any], where: str) -> tuple[Family, dict[str, Any]]:
    """(family, the config of its text decoder) of a config.json."""
    _refuse_quantised(source, where)
    try:
        family = family_of(_architecture(source))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if "text_config" in source:
        text = {**source["text_config"], "architectures": [_text_twin(family).architecture]}
        source = {"model_type": family.model_type, **text, NOTE: source.get(NOTE, {})}
    return family, source


def _refuse_quantised(source: Mapping[str, Any], where: str) -> None:
    """What is trained and exported here are the stored tensors; with such a config transformers opens others."""
    for config in (source, source.get("text_config")):
        given = config.get("quantization_config") if isinstance(config, Mapping) else None
        if given:
            method = given.get("quant_method", "no quant_method") if isinstance(given, Mapping) else given
            raise UserError(
                f"{where} has a quantization_config ({method}): weights are read as they are stored, float32, bfloat16 "
                "or float16. Use the unquantised checkpoint; if these tensors are its weights, delete that entry, or "
                "transformers would quantise what is exported from them."
            )


def config_of(source: dict[str, Any], where: str) -> ModelConfig:
    """The model that a config.json describes."""
    family, source = described(source, where)
    try:
        return model_config(family, {key: value for key, value in source.items() if key != NOTE})
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _architecture(source: Mapping[str, Any]) -> str:
    listed = source.get("architectures") or []
    if not isinstance(listed, list):
        raise UserError(f"architectures is a list of names, not {listed!r:.80}")
    if listed:
        return str(listed[0])
    for family in FAMILIES:
        if source.get("model_type") == family.model_type:
            return family.architecture
    return f"model_type {source.get('model_type')}"


def _text_twin(family: Family) -> Family:
    """The family that a composite model's text decoder is saved as."""
    return next(other for other in FAMILIES if other.model_type == family.model_type)


# --- names ------------------------------------------------------------------------------------------------------------


def sizes_of(config: ModelConfig) -> dict[str, int]:
    """The axis letters of `rljax.models.families` in numbers."""
    return {
        "v": config.vocab_size,
        "p": config.max_positions,
        "d": config.hidden_size,
        "f": config.intermediate_size,
        "h": config.num_heads,
        "g": config.num_kv_heads,
        "k": config.head_dim,
    }


def flat(tree: Params) -> dict[str, Any]:
    """The leaves of nested dicts, by their path: "layers/mlp/up/kernel"."""
    leaves: Any = flatten_dict(tree, sep="/")
    return leaves


def targets(family: Family, leaves: set[str], layers: int, prefix: str) -> dict[str, Target]:
    """Every tensor that the tree's leaves come from, by its full stored name."""
    found = {}
    if "unembed/kernel" in leaves:
        found[family.unembed] = Target("v d", ("unembed/kernel",), None)
    if "head/kernel" in leaves:
        found["score.weight"] = Target(*SCORE, None)
    for name, (layout, sources) in family.tensors.items():
        if leaves.issuperset(sources):
            numbers: list[int | None] = list(range(layers)) if "*" in name else [None]
            for layer in numbers:
                found[prefix + name.replace("*", str(layer))] = Target(layout, sources, layer)
    covered = {leaf for target in found.values() for leaf in target.leaves}
    if covered != leaves:
        raise UserError(
            f"{family.architecture} has no tensor for {', '.join(sorted(leaves - covered))}: this model has parts "
            "that the family does not know."
        )
    return found


def _prefix(family: Family, store: Store) -> str:
    """The prefix that a checkpoint uses, told by its embedding matrix."""
    first = next(iter(family.tensors))
    return next((p for p in family.prefixes if p + first in store), family.prefixes[0])


def account(checkpoint: Checkpoint, config: ModelConfig, leaves: set[str]) -> tuple[dict[str, Target], dict[str, Any]]:
    """Match every stored tensor with its leaves, exactly once, or say which one does not fit.

    Gives the targets and the note that `save` needs to write the same names again.
    """
    family, store = checkpoint.family, checkpoint.store
    prefix = _prefix(family, store)
    wanted = targets(family, leaves, config.num_layers, prefix)
    missing = [name for name in wanted if name not in store]
    if missing:
        raise UserError(
            f"{checkpoint.where} lacks {len(missing)} of the {len(wanted)} tensors that its config.json asks for: "
            f"{missing[0]!r}; {len(store)} are there. Fetch it again, or correct config.json (layers, biases, tying)."
        )
    sizes, derived = sizes_of(config), {}
    for name, tensor in store.items():
        if name in wanted:
            _check(name, tensor, stored_shape(wanted[name].layout, sizes))
            continue
        kept = _derived(family, prefix, name, tensor, store, config)
        if kept is not None:
            derived |= kept
        else:
            raise UserError(
                f"{tensor.where} holds the tensor {name!r} {list(tensor.shape)}, which a {family.architecture} with "
                "this config.json does not have. Correct config.json (architecture, layers, biases, tying), or remove "
                "the tensor."
            )
    usual = _text_twin(family).prefixes[0]
    composite = bool(family.ignored)
    note: dict[str, Any] = {} if composite or prefix == usual else {"prefix": prefix}
    return wanted, note | ({"derived": derived} if derived and not composite else {})


def _check(name: str, tensor: Stored, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise UserError(
            f"{tensor.where}: tensor {name!r} has the shape {list(tensor.shape)}, but config.json says {list(shape)}; "
            "one of the two is wrong."
        )
    if not jax.numpy.issubdtype(tensor.dtype, np.floating) or tensor.dtype.itemsize < 2:
        raise UserError(
            f"{tensor.where}: tensor {name!r} is stored as {tensor.dtype} (quantised?); only float64, float32, "
            "bfloat16 and float16 weights are read. Use the unquantised checkpoint, or a GGUF file."
        )


# --- buffers that are not weights -------------------------------------------------------------------------------------


def _derived(
    family: Family, prefix: str, name: str, tensor: Stored, store: Store, config: ModelConfig
) -> dict[str, Any] | None:
    """What to remember of a stored tensor that is no parameter, to write it again; None for an unknown tensor."""
    if any(re.fullmatch(pattern, name) for pattern in family.ignored):
        return {}
    if any(re.fullmatch(pattern, name.removeprefix(prefix)) for pattern in family.derived):
        return {name: _describe(name, tensor)}
    if config.tied and name.split(".", name.count(".") - 1)[-1] == family.unembed:
        embedding = store[prefix + next(iter(family.tensors))]
        if tensor.shape != embedding.shape or not np.array_equal(_bytes(tensor), _bytes(embedding)):
            raise UserError(
                f"{tensor.where}: {name!r} differs from the input embedding, but config.json says that they are tied; "
                'set "tie_word_embeddings": false in config.json to use both.'
            )
        return {name: "tied"}
    return None


def whole(tensor: Stored) -> np.ndarray:
    return tensor.read(tuple(slice(0, n) for n in tensor.shape))


def _bytes(tensor: Stored) -> np.ndarray:
    return np.ascontiguousarray(whole(tensor)).reshape(-1).view(np.uint8)


def causal(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.broadcast_to(np.tril(np.ones(shape[-2:], dtype)), shape)


def _describe(name: str, tensor: Stored) -> dict[str, Any]:
    note: dict[str, Any] = {"dtype": tensor.dtype.name, "shape": list(tensor.shape)}
    value = whole(tensor)
    if len(tensor.shape) >= 2 and np.array_equal(value, causal(tensor.shape, tensor.dtype)):
        return note | {"value": "causal"}
    if value.nbytes > _LARGEST_BUFFER:
        raise UserError(
            f"{tensor.where}: the buffer {name!r} {list(tensor.shape)} is not the causal mask it should be."
        )
    return note | {"value": base64.b64encode(value.tobytes()).decode()}


# --- arrays -----------------------------------------------------------------------------------------------------------


def fill(
    checkpoint: Checkpoint,
    config: ModelConfig,
    abstract: Params,
    wanted: Mapping[str, Target],
    *,
    shardings: Params | None,
    dtype: np.dtype | None,
) -> Params:
    """Params of the abstract tree's shapes, read from the files; on the default device without shardings."""
    parts: dict[str, list[tuple[int | None, str, str, int]]] = {}
    for name, target in wanted.items():
        for part, leaf in enumerate(target.leaves):
            parts.setdefault(leaf, []).append((target.layer, name, target.layout, part))
    places = flat(shardings) if shardings else {}
    filled, sizes = {}, sizes_of(config)
    for leaf, shape in ((leaf, array.shape) for leaf, array in flat(abstract).items()):
        _, _, layout, part = parts[leaf][0]
        axes = tuple(sizes[axis] for axis in axes_of(leaf, layout, part))
        if shape[len(shape) - len(axes) :] != axes:
            raise UserError(
                f"{leaf} is {shape} in the model but {axes} in {checkpoint.family.architecture}: a wrong table."
            )
        kind = dtype or _stored_dtype(leaf, {checkpoint.store[name].dtype for _, name, _, _ in parts[leaf]})
        if jax.dtypes.canonicalize_dtype(kind) != kind:
            raise UserError(f'{leaf} is stored as {kind}, which JAX cannot hold; load it with dtype="float32".')
        read = _reader(leaf, checkpoint.store, parts[leaf], sizes, shape, kind)
        if shardings:
            filled[leaf] = jax.make_array_from_callback(shape, places[leaf], read)
        else:
            filled[leaf] = jax.device_put(read(tuple(slice(0, n) for n in shape)))
    return unflatten_dict(filled, sep="/")


def _stored_dtype(leaf: str, dtypes: set[np.dtype]) -> np.dtype:
    if len(dtypes) > 1:
        raise UserError(
            f"the layers of {leaf} are stored in different types ({', '.join(sorted(d.name for d in dtypes))}), but "
            'are one array here; say which to use, for example load(path, dtype="float32").'
        )
    return dtypes.pop()


def _reader(
    leaf: str,
    store: Store,
    parts: list[tuple[int | None, str, str, int]],
    sizes: Mapping[str, int],
    shape: tuple[int, ...],
    dtype: np.dtype,
) -> Callable[[Any], np.ndarray]:
    """index -> that box of a leaf. Boxes are kept while the leaf is filled: replicas share one reading."""
    kept: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
    stacked = {layer: (name, layout, part) for layer, name, layout, part in parts if layer is not None}

    def one(name: str, layout: str, part: int, box: Box) -> np.ndarray:
        return read_part(store[name], layout, part, axes_of(leaf, layout, part), sizes, box)

    def read(index: Any) -> np.ndarray:
        box = tuple(slice(*cut.indices(n)) for cut, n in zip(index, shape, strict=True))
        key = tuple((cut.start, cut.stop) for cut in box)
        if key not in kept:
            value = np.empty([high - low for low, high in key], dtype)
            if not stacked:
                value[...] = one(*parts[0][1:], box)
            for row, layer in enumerate(range(*key[0]) if stacked else ()):
                value[row] = one(*stacked[layer], box[1:])
            kept[key] = value
        return kept[key]

    return read


def source_text(source: Mapping[str, Any], note: Mapping[str, Any]) -> str:
    """ModelConfig.source: config.json as read, with the note under its own key."""
    old = source.get(NOTE) or {}
    rest = {key: value for key, value in source.items() if key != NOTE}
    both = {**old, **note}
    return json.dumps(rest | ({NOTE: both} if both else {}))
