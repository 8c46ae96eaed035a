"""Several processes read and write checkpoints. Process i leaves what it saw in FOLDER/seen.i.json, under the names of
the meshes.
"""

import json
import math
import pathlib

import jax
import numpy as np

from rljax import checkpoint, hosts, sharding
from rljax.models import RULES, hf, hf_read

MESHES = {"fsdp": {"fsdp": 4}, "both": {"fsdp": 2, "tensor": 2}, "tensor": {"fsdp": 1, "tensor": 4}}


class Counted:
    """Opens files like hf_read does, and counts the bytes that are read from them."""

    def __init__(self):
        self.open, self.bytes = hf_read.open_safetensors, 0

    def __call__(self, folder):
        return {name: tensor._replace(read=self.reader(tensor.read)) for name, tensor in self.open(folder).items()}

    def reader(self, read):
        def counted(box):
            block = read(box)
            self.bytes += block.nbytes
            return block

        return counted


def held(params) -> int:
    """The bytes of what this process's devices hold, replicas once."""

    def of(leaf) -> int:
        pieces = {str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}
        return sum(pieces.values())

    return sum(of(leaf) for leaf in jax.tree.leaves(params))


def main(source: str, folder: pathlib.Path) -> None:
    folder.mkdir(exist_ok=True)
    _, expected = hf.load(source)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(expected))
    seen = {"size": size}
    for name, axes in MESHES.items():
        mesh = hosts.connected(sharding.make_mesh(**axes))
        counted = hf_read.open_safetensors = Counted()
        model, params = hf.load(source, mesh=mesh)
        hf_read.open_safetensors = counted.open
        same = jax.tree.map(lambda a, b: np.array_equal(hosts.whole(a), b), params, expected)
        hf.save(folder / name, model, params, tokenizer=None)
        part = hosts.share(16, mesh)
        seen[name] = {"read": counted.bytes, "held": held(params), "same": all(jax.tree.leaves(same))}
        seen[name] |= {"rows": part.here.tolist(), "judged": part.mine.tolist()}
        with checkpoint.Checkpoints(folder / f"orbax_{name}") as checkpoints:
            checkpoints.save(1, params, {"mesh": axes})
    for name in MESHES:  # every checkpoint on the last mesh
        like = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            expected,
            sharding.shardings(expected, RULES, mesh),
        )
        with checkpoint.Checkpoints(folder / f"orbax_{name}") as checkpoints:
            restored, _ = checkpoints.restore(1, like)
        same = jax.tree.map(lambda a, b: np.array_equal(hosts.whole(a), b), restored, expected)
        seen[name]["restored"] = all(jax.tree.leaves(same)) and math.isclose(held(restored), seen["tensor"]["held"])
    (folder / f"seen.{jax.process_index()}.json").write_text(json.dumps(seen))
