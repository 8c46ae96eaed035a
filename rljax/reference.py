"""The frozen reference: its log-probabilities once per row, kept on disk under a hash of everything they depend on."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rljax import data, hosts, objectives, ops, sharding
from rljax.logprobs import token_logps
from rljax.models.resolve import cache_folder
from rljax.policy import Policy
from rljax.types import Params, Tokens

Collate = Callable[[np.ndarray], tuple[Tokens, ...]]  # indices, -1 for none -> as many Tokens as numbers per row


class View(NamedTuple):
    """How the reference sees token rows: (*tokens, average) -> f32[b] each, and the same for a data set, cached."""

    logps: Callable[..., tuple[jax.Array, ...]]
    cached_logps: Callable[..., np.ndarray]


def view(policy: Policy, run: Any, mesh: Mesh, phase: Callable[[str], AbstractContextManager[None]]) -> View:
    """The reference is `policy` as it is now. `phase` announces what takes time."""

    pairs = getattr(run, "share_prompts", False)

    @functools.partial(jax.jit, static_argnames="average")
    def row_logps(params: Params, rows: tuple[Tokens, ...], *, average: bool) -> tuple[jax.Array, ...]:
        if pairs:
            found = objectives.pair_logps(
                policy.model, params, *rows, max_trained=run.max_completion, share_prompts=True
            )
        else:
            found = [token_logps(policy.model, params, tokens, max_trained=run.max_completion) for tokens in rows]
        reduce = ops.sequence_mean if average else ops.sequence_sum
        return tuple(reduce(logps, tokens.mask) for logps, tokens in zip(found, rows, strict=True))

    def logps(*rows: Tokens, average: bool = False) -> tuple[jax.Array, ...]:
        return row_logps(policy.params, rows, average=average)

    def cached_logps(rows: data.Rows, collate: Collate, *, average: bool = False) -> np.ndarray:
        """f32[k n] for the k token rows that `collate` makes of each of n rows."""
        path = cache_folder() / "reference" / f"{_key(policy, run, rows, average)}.npy"
        if hosts.told(np.asarray(path.exists())):  # only the first process needs to see the file
            kept = jax.process_index() == 0
            return hosts.told(np.load(path, allow_pickle=False) if kept else _nothing(collate, len(rows)))
        found, here = [], hosts.share(run.batch, mesh).here
        with phase(f"reference log-probabilities of {len(rows)} rows"):
            for indices in data.eval_batches(len(rows), run.batch, here):
                batch = hosts.place(collate(indices), mesh)
                found.append(hosts.whole(logps(*batch, average=average)))
        result = np.concatenate(found, axis=1)[:, : len(rows)]
        if jax.process_index() == 0:
            _save(path, result)
        return result

    return View(logps, cached_logps)


def _nothing(collate: Collate, rows: int) -> np.ndarray:
    return np.zeros((len(collate(np.asarray([-1]))), rows), np.float32)


def _key(policy: Policy, run: Any, rows: data.Rows, average: bool) -> str:
    """Weights, text, tokenizer and settings: what the numbers depend on, all of it and nothing else."""
    tokenizer = policy.tokenizer
    parts = [
        weights(policy.params),
        data.fingerprint(rows),
        hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        str(tokenizer.chat_template),
        type(run).__name__,
        [run.max_prompt, run.max_completion, run.batch, average, policy.model.config.compute_dtype],
        getattr(run, "share_prompts", False),
        [jax.default_backend(), jax.__version__],  # the last bits
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def weights(params: Params) -> str:
    """A hash of the weights' content that does not depend on how they are sharded."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} {hosts.whole(_sums(leaf))}\n".encode())
    return digest.hexdigest()


@jax.jit
def _sums(leaf: jax.Array) -> jax.Array:
    """u32[2]: sums over an array's bits, each mixed with its place; whole numbers, so their order does not matter."""
    leaf = sharding.in_device_memory(leaf)
    bits = jax.lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize])
    bits = bits.astype(jnp.uint32).ravel()
    place = jnp.arange(bits.size, dtype=jnp.uint32)
    mix = (bits ^ (place * jnp.uint32(2654435761))) * jnp.uint32(2246822519)
    mix = (mix ^ (mix >> 15)) * jnp.uint32(3266489917)
    return jnp.stack([jnp.sum(mix ^ (mix >> 13)), jnp.sum((mix ^ (mix >> 16)) * (2 * place + 1))])


def _save(path: Any, array: np.ndarray) -> None:
    """Whole or not at all, whoever else writes the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".npy")
    with os.fdopen(handle, "wb") as file:
        np.save(file, array, allow_pickle=False)
    os.replace(draft, path)
