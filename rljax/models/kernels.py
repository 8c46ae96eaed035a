"""Attention that never holds a row's scores: splash attention (Pallas) on TPUs, cuDNN's on NVIDIA GPUs.

Which of them, or plain XLA, computes a row is a matter of the mesh's platform, the model and the row's length, all of
them known when a program is traced. Kernels count windows in columns, XLA in tokens: the same where the tokens of a
document stand next to each other, as in all rows that `data` and the samplers make.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from rljax.errors import UserError
from rljax.models.config import ModelConfig
from rljax.models.product import RESULT
from rljax.sharding import ROWS, divisible, platform, ways_here

SHORT = 256  # queries; below, a kernel that computes blocks of 128 has little to save
BLOCK = 128  # columns: what TPUs lay along a vector register
LARGEST = 512  # columns of a block; larger ones are hardly faster and need more of the chip's memory
KERNELS = {"tpu": "splash", "gpu": "cudnn"}


def choose(config: ModelConfig, queries: int, keys: int) -> str:
    """xla, splash or cudnn for rows of so many queries and keys. UserError for a kernel by name that cannot do it."""
    wanted = config.attention
    kernel = KERNELS.get(platform(), "xla") if wanted == "auto" else wanted
    reason = objection(kernel, config, queries, keys)
    if wanted == "auto":
        return "xla" if reason or queries < SHORT else kernel
    if reason:
        raise UserError(f"attention={wanted!r} cannot be used here: {reason}; 'auto' takes what can")
    return wanted


def blocks(queries: int) -> int:
    """Into how many blocks XLA's attention cuts the queries of a row: more save less and less, and each is compiled."""
    return 1 if ways_here(("context",)) > 1 else min(max(queries // BLOCK, 1), 4)


def objection(kernel: str, config: ModelConfig, queries: int, keys: int) -> str | None:
    """Why a kernel cannot compute the attention of this model on the mesh that is set, or None."""
    where, dtype = platform(), config.compute_dtype
    if kernel == "xla":
        return None
    if kernel == "splash":
        if where not in ("tpu", "cpu"):
            return f"splash attention runs on TPUs (and, interpreted, on CPUs), and this is a {where}"
        if where == "tpu" and dtype != "bfloat16":
            return f"splash attention is exact to bfloat16 alone, and compute_dtype is {dtype}"
        return None
    generation = _generation()
    if where != "gpu" or generation < 8:
        return f"cuDNN's attention needs NVIDIA GPUs of compute capability 8.0 or later, and this is a {where}"
    if dtype not in ("bfloat16", "float16"):
        return f"cuDNN's attention computes in bfloat16 or float16, and compute_dtype is {dtype}"
    if config.attention_softcap is not None:
        return f"cuDNN's attention has no soft cap, and attention_softcap is {config.attention_softcap}"
    largest = 256 if generation >= 9 else 128
    if config.head_dim % 8 or config.head_dim > largest:
        return f"cuDNN's attention takes heads of a multiple of 8 up to {largest}, and head_dim is {config.head_dim}"
    if queries % 2 or keys % 2:
        return f"cuDNN's gradient takes even lengths, and a row has {queries} queries and {keys} keys"
    return None


def _generation() -> float:
    """Compute capability of the NVIDIA GPUs of this process; 0 for other devices."""
    found = re.fullmatch(r"\d+\.\d+", str(getattr(jax.local_devices()[0], "compute_capability", "")))
    return float(found[0]) if found else 0.0


def key_copies(heads: int, groups: int, tensor: int) -> int:
    """How often each of `groups` key heads is repeated so that the tensor axis splits them as it splits the heads.

    Heads that it does not split are all computed everywhere, as by XLA.
    """
    return 1 if heads % tensor else math.lcm(groups, tensor) // groups


def attend(
    kernel: str,
    query: Array,
    key: Array,
    value: Array,
    queries: Array,
    keys: Array,
    *,
    scale: float,
    softcap: float | None,
    window: int,
) -> Array:
    """What `attention.attend` gives for tokens: query [b h t k], key and value [b g s k], segments [b t] and [b s].

    Query i stands in column s − t + i of the keys. What a pad gets is finite, and nothing else: no token sees it.
    On a mesh, rows and heads are computed where they are; where rows are split over `context`, each device computes
    its queries with the keys of whole rows.
    """
    copies = key_copies(query.shape[1], key.shape[1], ways_here(("tensor",)))
    if copies > 1:
        key, value = (jnp.repeat(x, copies, axis=1) for x in (key, value))
    run = {"splash": _splash, "cudnn": _cudnn}[kernel]
    return run(query, key, value, queries, keys, scale=scale, softcap=softcap, window=window)


def keep(name: str) -> Callable[..., bool]:
    """A rematerialisation policy: what has this name is kept, and what cuDNN's attention made, which has no name."""
    named = jax.checkpoint_policies.save_only_these_names(name)

    def policy(primitive: Any, *args: Any, **params: Any) -> bool:
        return primitive.name.startswith("dot_product_attention_fwd") or named(primitive, *args, **params)

    return policy


def _places(query: Array, key: Array) -> tuple[Any, P, P, P, P]:
    """(the mesh or None, how queries and keys are split on it, and their segments)."""
    mesh = jax.sharding.get_abstract_mesh()
    known = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    if not known:
        return None, P(*[None] * 4), P(*[None] * 4), P(None, None), P(None, None)
    rows = tuple(name for name in ROWS if name in known)
    heads, columns = ("tensor" if "tensor" in known else None), ("context" if "context" in known else None)
    q = divisible(P(rows, heads, columns, None), query.shape, mesh)
    k = divisible(P(rows, heads, None, None), key.shape, mesh)
    return mesh, q, k, P(q[0], q[2]), P(k[0], None)


def _on_mesh(mesh: Any, fn: Callable[..., Array], places: tuple[Any, ...], out: P) -> Callable[..., Array]:
    """Kernels compute what a device has: the compiler cannot split them."""
    return fn if mesh is None else jax.shard_map(fn, mesh=mesh, in_specs=places, out_specs=out, check_vma=False)


# --- TPU --------------------------------------------------------------------------------------------------------------


def _splash(
    query: Array,
    key: Array,
    value: Array,
    queries: Array,
    keys: Array,
    *,
    scale: float,
    softcap: float | None,
    window: int,
) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, first = query.shape[2], key.shape[2] - query.shape[2]
    parts = ways_here(("context",))
    query, queries = _fill(query * scale, 2, BLOCK * parts), _fill(queries, 1, BLOCK * parts)
    # Every query, of those that only fill up too, finds itself among the keys: its softmax has something to sum.
    more = -(-(first + query.shape[2]) // BLOCK) * BLOCK
    key, value, keys = _fill(key, 2, more), _fill(value, 2, more), _fill(keys, 1, more)

    mesh, q, k, q_ids, k_ids = _places(query, key)
    shape, offset = (query.shape[2], key.shape[2]), first
    mask = masks.LocalMask(shape, (window - 1, 0), offset) if window else masks.CausalMask(shape, offset)
    heads = query.shape[1] // (1 if mesh is None else math.prod(mesh.shape[axis] for axis in _names(q[1])))
    blocks = _blocks(splash, shape[0] // parts, shape[1])
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        head_shards=1,
        q_seq_shards=parts,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=RESULT,
        interpret=platform() == "cpu",
    )

    scores = _scores(shape, offset, window, blocks, parts)

    def rows(kernel: Any, query: Array, key: Array, value: Array, queries: Array, keys: Array) -> Array:
        with jax.named_scope(f"scores_{scores}"):  # for who counts: the compiled kernel does not say it
            return jax.vmap(kernel)(query, key, value, splash.SegmentIds(queries, keys))

    masked = None if mesh is None else kernel.manual_sharding_spec(NamedSharding(mesh, P(None, q[2])))
    out = _on_mesh(mesh, rows, (masked, q, k, k, q_ids, k_ids), q)(kernel, query, key, value, queries, keys)
    return out[:, :, :length]


def _names(axes: Any) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _fill(x: Array, axis: int, multiple: int) -> Array:
    """x with zeros behind it on an axis, up to a multiple."""
    more = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)]) if more else x


def _blocks(splash: Any, queries: int, keys: int) -> Any:
    """The largest blocks that divide the lengths."""
    q, k = (next(n for n in range(LARGEST, 0, -BLOCK) if length % n == 0) for length in (queries, keys))
    return splash.BlockSizes(
        block_q=q,
        block_kv=k,
        block_q_dkv=q,
        block_kv_dkv=k,
        block_q_dq=q,
        block_kv_dq=k,
    )


def _scores(shape: tuple[int, int], offset: int, window: int, blocks: Any, parts: int) -> int:
    """How many scores of a head are computed, in whole blocks; of `parts` of the queries, by that with the most."""
    q, k = blocks.block_q, blocks.block_kv
    last = offset + np.arange(q, shape[0] + 1, q) - 1  # the column of the last query of each block
    first = np.maximum(last - q + 2 - window, 0) if window else np.zeros_like(last)
    counts = np.minimum(last, shape[1] - 1) // k - first // k + 1
    return int(counts.reshape(parts, -1).sum(1).max()) * q * k


# --- GPU --------------------------------------------------------------------------------------------------------------


def _cudnn(
    query: Array,
    key: Array,
    value: Array,
    queries: Array,
    keys: Array,
    *,
    scale: float,
    softcap: float | None,
    window: int,
) -> Array:
    """Its segments are a mask, [b 1 t s] without heads. Causal rows are told so as well: half of them is skipped."""
    assert softcap is None
    mesh, q, k, *_ = _places(query, key)
    start = key.shape[2] - query.shape[2]
    distance = start + jnp.arange(query.shape[2])[:, None] - jnp.arange(key.shape[2])[None, :]
    near = (distance >= 0) & (distance < window) if window else distance >= 0
    seen = (queries[:, None, :, None] == keys[:, None, None, :]) & near[None, None]
    causal = start == 0 and ways_here(("context",)) == 1
    limits: dict[str, Any] = {"local_window_size": (window - 1, 0)} if window and causal else {}

    def rows(query: Array, key: Array, value: Array, seen: Array) -> Array:
        tokens = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
        out = jax.nn.dot_product_attention(
            *tokens, mask=seen, scale=scale, is_causal=causal, implementation="cudnn", **limits
        )
        return jnp.swapaxes(out, 1, 2)

    return _on_mesh(mesh, rows, (q, k, k, P(q[0], None, q[2], None)), q)(query, key, value, seen)
