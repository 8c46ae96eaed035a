"""The frozen reference: its log-probabilities once per row, kept on disk under a hash of everything they depend on."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import rljax
from rljax import data, hosts, objectives, ops, sharding
from rljax.data.progress import track
from rljax.identity import base_kind, describe, digest
from rljax.logprobs import token_logps
from rljax.models import ModelConfig
from rljax.models.resolve import cache_folder
from rljax.policy import Policy
from rljax.types import Params, Tokens

log = logging.getLogger("rljax")
AHEAD = 2  # batches that are made, or come back, while the device computes one

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
        shape = (len(collate(np.asarray([-1]))), len(rows))
        kept = _load(path, shape) if jax.process_index() == 0 else None
        if hosts.told(np.asarray(kept is not None)):  # only the first process needs to see the file
            return hosts.told(np.zeros(shape, np.float32) if kept is None else kept)
        found, waiting = [], collections.deque()
        batches = data.eval_batches(len(rows), run.batch, hosts.share(run.batch, mesh).here)
        label = f"reference log-probabilities of {len(rows)} rows"
        with phase(label):
            made = data.prefetch(lambda number: collate(batches[number]), 0, len(batches), ahead=AHEAD)
            for _, batch in track(made, f"{label}, batches", len(batches)):
                waiting.append(logps(*hosts.place(batch, mesh), average=average))
                if len(waiting) > AHEAD:  # the device has the next ones while these come back
                    found.append(hosts.whole(waiting.popleft()))
            found += map(hosts.whole, waiting)
        result = np.concatenate(found, axis=1)[:, : len(rows)]
        if jax.process_index() == 0:
            _save(path, result)
        return result

    return View(logps, cached_logps)


def _load(path: pathlib.Path, shape: tuple[int, int]) -> np.ndarray | None:
    """None where nothing is kept, or something else: it is computed again then."""
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and found.dtype == np.float32 else None


def _key(policy: Policy, run: Any, rows: data.Rows, average: bool) -> str:
    """What the numbers depend on, all of it and nothing else: the model, the text, how the one is made into tokens and
    batches for the other, and the code that does it.
    """
    parts = [
        [weights(policy.params), model_key(policy.model.config)],
        data.fingerprint(track(rows, "hashing rows", len(rows))),
        tokenizer_key(policy.tokenizer),
        base_kind(type(run)).__name__,
        [run.max_prompt, run.max_completion, run.batch, average, getattr(run, "share_prompts", False)],
        [jax.default_backend(), jax.devices()[0].device_kind, jax.__version__, _code()],  # the last bits, too
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def model_key(config: ModelConfig) -> str:
    """A model's config without what changes memory alone: rotations, windows, norms, how attention is computed."""
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("remat", "unroll", "source")}
    return digest(describe(fields))


def tokenizer_key(tokenizer: Any) -> str:
    """All that makes tokens of rows: vocabulary and rules, special tokens, what is added by itself, the template."""
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    added = {
        name: getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token", "split_special_tokens")
    }
    parts = [tokenizer.backend_tokenizer.to_str(), special, ids, added, str(tokenizer.chat_template)]
    return hashlib.sha256(json.dumps([*parts, type(tokenizer).__name__]).encode()).hexdigest()


@functools.cache
def _code() -> str:
    """The sources of rljax that stand between a row and its log-probability."""
    package = pathlib.Path(rljax.__file__).parent
    files = [file for room in ("data", "models", "objectives") for file in sorted((package / room).glob("*.py"))]
    files += [package / f"{name}.py" for name in ("logprobs", "ops", "tasks", "reference", "types")]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()


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


def _save(path: pathlib.Path, array: np.ndarray) -> None:
    """Whole or not at all, whoever else writes the same file. A cache that cannot be written is done without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".npy")
        try:
            with os.fdopen(handle, "wb") as file:
                np.save(file, array, allow_pickle=False)
            os.replace(draft, path)
        except OSError:
            pathlib.Path(draft).unlink(missing_ok=True)
            raise
    except OSError as error:
        log.warning("Reference log-probabilities are not kept: %s. RLJAX_CACHE may name another folder.", error)
