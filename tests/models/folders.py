"""Helpers of the checkpoint tests: what a folder holds, and ways to change a copy of a fixture."""

import json
import re

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from rljax.models import hf_read
from rljax.models.tensors import open_safetensors


def contents(folder):
    """name -> (type, shape, bytes) of every stored tensor."""
    store = open_safetensors(folder)
    return {name: (t.dtype.name, t.shape, hf_read.whole(t).tobytes()) for name, t in store.items()}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def edit(folder, *, drop=(), **changes):
    """Change config.json of a copied checkpoint."""
    config = {key: value for key, value in config_of(folder).items() if key not in drop}
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def rewrite(folder, tensors):
    save_file(tensors, folder / "model.safetensors")


def same(a, b):
    for (path, x), (_, y) in zip(jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b), strict=True):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=str(path))


def first_layers(source, folder, count):
    """A checkpoint of a Llama's first layers, at most nine, with its tokenizer."""
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    edit(folder, num_hidden_layers=count)
    tensors = load_file(source / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if not re.search(rf"layers\.[{count}-9]", name)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
