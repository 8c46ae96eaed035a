"""Stored tensors and how their axes become the axes of parameters: pure layout arithmetic, and safetensors files.

See `rljax.models.families` for the layout language. Nothing here knows a family, a config or a mesh.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from rljax.errors import UserError

Box = tuple[slice, ...]


class Stored(NamedTuple):
    """A tensor in a file: what it is, and how to read a box of it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Box], np.ndarray]
    where: str  # the file, for messages


Store = dict[str, Stored]

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}

# --- layouts: stored axes <-> leaf axes -------------------------------------------------------------------------------

_KERNELS = {
    "embed/tokens": "vd",
    "embed/positions": "pd",
    "unembed/kernel": "dv",
    "layers/attention/query/kernel": "dhk",
    "layers/attention/key/kernel": "dgk",
    "layers/attention/value/kernel": "dgk",
    "layers/attention/out/kernel": "hkd",
    "layers/mlp/gate/kernel": "df",
    "layers/mlp/up/kernel": "df",
    "layers/mlp/down/kernel": "fd",
}


def _term(word: str, part: int) -> str:
    """The axes of one part in one stored dimension, digits included."""
    terms = word.split("+")
    return terms[part] if len(terms) > 1 else word


def _size(term: str, sizes: Mapping[str, int]) -> int:
    return math.prod(int(axis) if axis.isdigit() else sizes[axis] for axis in term)


def axes_of(leaf: str, layout: str, part: int = 0) -> str:
    """The axes of a leaf, the layer axis left out: those of vectors are stored in their own order."""
    stored = "".join(_term(word, part) for word in layout.split())
    kernel = _KERNELS.get(leaf, "")
    if "g" not in stored:  # parts of one fused tensor have as many heads each
        kernel = kernel.replace("g", "h")
    return kernel or "".join(axis for axis in stored if not axis.isdigit())


def stored_shape(layout: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(sum(_size(term, sizes) for term in word.split("+")) for word in layout.split())


def _box(axes: Sequence[tuple[int, int, int]]) -> tuple[int, int, list[int], list[slice]]:
    """The shortest run of a stored dimension made of `axes` (size, low, high) that holds the wanted ranges.

    Gives its start and length, the shape of what is read and what to keep of it. Axes wanted at one index only move the
    start; the first that is wanted as a range is read contiguously; those inside it are read whole and cut afterwards.
    """
    start, shape, keep = 0, [], []
    for i, (_, low, high) in enumerate(axes):
        inner = [size for size, _, _ in axes[i + 1 :]]
        stride = math.prod(inner)
        start += low * stride
        if high - low != 1:
            shape += [high - low, *inner]
            keep += [slice(None), *(slice(a, b) for _, a, b in axes[i + 1 :])]
            return start, (high - low) * stride, shape, keep
        shape.append(1)
        keep.append(slice(None))
    return start, 1, shape, keep


def read_part(tensor: Stored, layout: str, part: int, axes: str, sizes: Mapping[str, int], index: Box) -> np.ndarray:
    """One leaf's share of a stored tensor, cut to `index` (slices over the leaf's `axes`) and reading little more."""
    wanted = {axis: range(sizes[axis])[cut] for axis, cut in zip(axes, index, strict=True)}
    boxes, shape, keep, order = [], [], [], ""
    for word in layout.split():
        terms, term = word.split("+"), _term(word, part)
        offset = sum(_size(earlier, sizes) for earlier in terms[:part]) if len(terms) > 1 else 0
        ranges = [
            (int(a), part, part + 1) if a.isdigit() else (sizes[a], wanted[a].start, wanted[a].stop) for a in term
        ]
        start, length, dims, cuts = _box(ranges)
        boxes.append(slice(offset + start, offset + start + length))
        shape, keep, order = shape + dims, keep + cuts, order + term
    block = tensor.read(tuple(boxes)).reshape(shape)[tuple(keep)]
    digits = tuple(i for i, axis in enumerate(order) if axis.isdigit())
    letters = "".join(axis for axis in order if not axis.isdigit())
    return block.squeeze(digits).transpose([letters.index(axis) for axis in axes])


def join_parts(parts: Sequence[np.ndarray], layout: str, axes: Sequence[str]) -> np.ndarray:
    """The stored tensor that `read_part` takes apart: its exact inverse."""
    words = layout.split()
    arrays = []
    for i, (part, names) in enumerate(zip(parts, axes, strict=True)):
        order = [axis for word in words for axis in _term(word, i) if not axis.isdigit()]
        arrays.append(part.transpose([names.index(axis) for axis in order]))
    sizes = {
        axis: n for part, names in zip(parts, axes, strict=True) for axis, n in zip(names, part.shape, strict=True)
    }
    shape = stored_shape(layout, sizes)
    digit = next((i for i, axis in enumerate("".join(words)) if axis.isdigit()), None)
    if digit is not None:
        return np.ascontiguousarray(np.stack(arrays, axis=digit)).reshape(shape)
    if len(arrays) == 1:
        return np.ascontiguousarray(arrays[0]).reshape(shape)
    split = next(i for i, word in enumerate(words) if "+" in word)
    flat = [a.reshape([_size(_term(word, i), sizes) for word in words]) for i, a in enumerate(arrays)]
    return np.ascontiguousarray(np.concatenate(flat, axis=split))  # numpy keeps the order of transposed inputs


# --- files ------------------------------------------------------------------------------------------------------------


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file; what is wrong with it is a UserError that names file and line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: a checkpoint folder holds config.json and *.safetensors.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); fetch the checkpoint again.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch the checkpoint again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__} where an object is expected.")
    return value


def _open_file(path: pathlib.Path) -> Store:
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(path, framework="np").__enter__()
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} cannot be read as safetensors ({error}): it is missing, truncated or damaged; fetch it again."
        ) from error
    store = {}
    for name in file.keys():  # noqa: SIM118 - not a mapping
        view = file.get_slice(name)
        if view.get_dtype() not in _DTYPES:
            raise UserError(f"tensor {name!r} in {path} has the unsupported type {view.get_dtype()}.")
        shape, dtype = tuple(view.get_shape()), np.dtype(_DTYPES[view.get_dtype()])

        def read(box: Box, name: str = name) -> np.ndarray:
            return file.get_slice(name)[box] if box else file.get_tensor(name)

        store[name] = Stored(shape, dtype, read, str(path))
    return store


def _refuse(folder: pathlib.Path) -> UserError:
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        return UserError(
            f"{folder} has only pickled weights ({pickles[0]}), which can run code when opened and are never read; "
            "convert them once with transformers: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)."
        )
    return UserError(f"{folder} has no model.safetensors and no model.safetensors.index.json.")


def open_safetensors(folder: pathlib.Path) -> Store:
    """All tensors of a checkpoint folder, none read yet: one file, or those that the index lists."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if not (folder / "model.safetensors").exists():
            raise _refuse(folder)
        return _open_file(folder / "model.safetensors")
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise UserError(f"{index} has no usable weight_map (an object from tensor names to file names).")
    store: Store = {}
    for file in sorted(set(listed.values())):
        if pathlib.PurePath(file).name != file:
            raise UserError(f"{index} points to {file!r}, which is outside its folder.")
        for name, tensor in _open_file(folder / file).items():
            if listed.get(name) != file:
                raise UserError(f"{index} places tensor {name!r} in {listed.get(name)!r}, but it is in {file!r}.")
            store[name] = tensor
    lost = sorted(set(listed) - set(store))
    if lost:
        raise UserError(f"{index} places tensor {lost[0]!r} in {listed[lost[0]]!r}, but it is not there.")
    return store
