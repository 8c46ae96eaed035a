"""A model with its weights and its tokenizer: what experiments are handed when they make data or measure."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rljax import decoding, hosts, sharding
from rljax.data import chat, prompt_ids
from rljax.errors import UserError
from rljax.models import hf, resolve
from rljax.sampling import generate
from rljax.types import LanguageModel, Params, Rollout, Tokens

OTHER_MODALITY = re.compile(r"<\W*(image|audio|video|img)\w*\W*>", re.IGNORECASE)  # Gemma 3's text model lacks its row
BUCKET = 16  # prompt lengths are rounded up to a multiple of this, so that `generate` compiles for few shapes


class Policy(NamedTuple):
    model: LanguageModel
    params: Params
    tokenizer: Any  # transformers.PreTrainedTokenizerFast
    stop_ids: tuple[int, ...]
    absent: tuple[tuple[int, int], ...] = ()  # ranges of ids without a token, which are never drawn


class Completions(NamedTuple):
    texts: list[str]  # what was written, special tokens left out
    raw: list[str]  # with them, but for the one that a text stopped at
    rollouts: list[Rollout]  # as sampled, on every host, in batches; rows that only fill up the last one are cut off


def load(name: str, *, mesh: Any = None, dtype: Any = None) -> Policy:
    """Read a checkpoint folder, or a name that resolves to one (see `models.resolve`), with its tokenizer.

    mesh: None is the mesh that is set, as in a run, or one device where none is.
    """
    path = resolve.resolve(name)
    model, params = hf.load(path, mesh=sharding.mesh_here() if mesh is None else mesh, dtype=dtype)
    return _with_tokenizer(path, model, params)


def abstract(name: str, *, mesh: Any = None, dtype: Any) -> Policy:
    """The same without its weights: of those it has shapes, with the shardings that a mesh implies."""
    path = resolve.resolve(name)
    return _with_tokenizer(path, *hf.abstract(path, mesh=mesh, dtype=dtype))


def _with_tokenizer(path: pathlib.Path, model: LanguageModel, params: Params) -> Policy:
    tokenizer = resolve.load_tokenizer(path)
    absent = absent_ids(tokenizer, model.config.vocab_size, str(path))
    return Policy(model, params, tokenizer, stop_ids(path, tokenizer), absent)


def stop_ids(path: str | os.PathLike[str], tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a text of a checkpoint: its own, and where its chat template ends a turn.

    A base checkpoint may come with a template that ends turns in another token than its eos.
    """
    return tuple(sorted({*resolve.generation_stop_ids(path, tokenizer), *chat.stop_ids(tokenizer)}))


def named_stops(texts: Sequence[str], tokenizer: Any) -> tuple[int, ...]:
    """The ids of texts at which a completion is to end; a UserError for one that is not one token."""
    found = []
    for text in texts:
        known = tokenizer.get_vocab().get(text)
        ids = tokenizer.encode(text, add_special_tokens=False) if known is None else [known]
        if len(ids) != 1:
            raise UserError(
                f"stop={text!r} is {len(ids)} tokens to this tokenizer ({tokenizer.convert_ids_to_tokens(ids)}), and a "
                "completion ends at one: name one of them as it stands there"
            )
        found.append(ids[0])
    return tuple(found)


def stopping(policy: Policy, texts: Sequence[str]) -> Policy:
    """The policy, which also stops at these texts."""
    return policy._replace(stop_ids=tuple(dict.fromkeys((*policy.stop_ids, *named_stops(texts, policy.tokenizer)))))


def absent_ids(tokenizer: Any, vocab: int, where: str) -> tuple[tuple[int, int], ...]:
    """Ranges (first, behind the last) of the ids below `vocab` that no token has: rows that only pad the embedding.

    UserError for tokens beyond the embedding, whose rows would be the last one's.
    """
    known = tokenizer.get_vocab()
    beyond = {text: i for text, i in known.items() if i >= vocab and not OTHER_MODALITY.fullmatch(text)}
    if beyond:
        first = min(beyond, key=lambda text: beyond[text])
        raise UserError(
            f"the tokenizer of {where} has {len(beyond)} tokens beyond the {vocab} rows of its embedding "
            f"({first!r} is {beyond[first]}), which would all read the last row: resize the embedding (transformers: "
            "model.resize_token_embeddings(len(tokenizer)), then save both), or take these tokens out of the tokenizer"
        )
    has = np.zeros(vocab + 2, bool)
    has[[i + 1 for i in known.values() if i < vocab]] = True
    has[[0, -1]] = True
    edges = np.flatnonzero(np.diff(has)).tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def complete(
    policy: Policy,
    prompts: Sequence[Any],
    key: jax.Array,
    *,
    max_new_tokens: int,
    batch: int = 32,
    max_prompt: int | None = None,
    **sampling: Any,
) -> Completions:
    """Let the policy continue `prompts` (texts, or message lists for its chat template), `batch` at a time.

    Prompts longer than `max_prompt` tokens keep their end. `sampling` goes to `generate` (temperature, top_k, top_p).
    Rows are spread over the mesh that the parameters are on; of several processes all ask for the same and get all.
    The i-th prompt draws with fold_in(key, i // batch), so results do not depend on how many prompts follow.
    """
    ids = [prompt_ids(prompt, policy.tokenizer, max_prompt=max_prompt) for prompt in prompts]
    width = -(-max(map(len, ids), default=1) // BUCKET) * BUCKET
    mesh, rollouts = hosts.mesh_of(policy.params), []
    texts: tuple[list[str], list[str]] = ([], [])
    for start in range(0, len(ids), batch):
        some = ids[start : start + batch]
        rows = len(some)
        rollout = generate(
            policy.model,
            policy.params,
            on_mesh(left_pad(some, rows=full(batch, mesh), width=width), mesh),
            jax.random.fold_in(key, start // batch),
            max_new_tokens=max_new_tokens,
            stop_ids=policy.stop_ids,
            absent=policy.absent,
            **sampling,
        )
        rollout = jax.tree.map(lambda x, n=rows: x[:n], hosts.whole(rollout))
        rollouts.append(rollout)
        for special, found in enumerate(texts):
            found += decoding.texts(policy.tokenizer, rollout.tokens, special=bool(special), stop_ids=policy.stop_ids)
    return Completions(*texts, rollouts)


def full(rows: int, mesh: Mesh | None) -> int:
    """The least number of rows, at least so many, that can be spread evenly over the mesh."""
    ways = 1 if mesh is None else sharding.ways(sharding.ROWS, mesh)
    return -(-rows // ways) * ways


def on_mesh(rows: Any, mesh: Mesh | None) -> Any:
    """Rows that all processes have, spread over the mesh."""
    return rows if mesh is None else hosts.spread_rows(rows, mesh)


def left_pad(ids: Sequence[np.ndarray], *, rows: int, width: int) -> Tokens:
    """Prompts that end in the same column, as Tokens [rows width]; rows beyond the prompts are empty."""
    out = np.zeros((rows, width), np.int32)
    segments = np.zeros((rows, width), np.int32)
    for row, prompt in enumerate(ids):
        out[row, width - len(prompt) :] = prompt
        segments[row, width - len(prompt) :] = 1
    arrays: dict[str, Any] = {"ids": out, "segments": segments, "mask": np.zeros((rows, width), bool)}
    return Tokens(**arrays)
