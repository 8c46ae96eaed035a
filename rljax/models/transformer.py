"""One decoder for every family: what differs between Llama, Qwen, Gemma, GPT-2, … are values of ModelConfig.

Shapes: b rows, t tokens, s key slots, d hidden, h query heads, g key heads, k head size, f feed-forward, v vocabulary,
L layers. Matrix products run in `compute_dtype`, norms, softmax and rotation in float32, and the residual stream is
kept in `compute_dtype`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rljax.errors import UserError
from rljax.models import kernels
from rljax.models.attention import Sight, attend_in_blocks, attend_shared, biases, count_positions, exact, visible
from rljax.models.cache import Cache, write
from rljax.models.config import ModelConfig
from rljax.models.product import RESULT, product
from rljax.models.rope import rotate, tables
from rljax.sharding import ROWS, constrain, in_device_memory
from rljax.types import LanguageModel, Output, Params

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}
REMAT = {"dots": kernels.keep(RESULT), "full": None}
INIT_STD = 0.02
SHALLOW = 8  # layers


class Context(NamedTuple):
    """What all layers share; the first axis of each table is indexed by the layer's `Kind`."""

    sights: tuple[Sight, ...]  # of whole rows; or, where completions share their prompt, of prompts and completions
    cos: Array  # f32[ropes b 1 t r/2]
    sin: Array
    index: Array | int  # the slot of the first token


class Kind(NamedTuple):
    """Which of the shared tables a layer reads: an integer, or i32[L] for all layers at once."""

    window: Any
    rope: Any


class Layout(NamedTuple):
    """Rows of a prompt followed by n completions of it, all equally long. The prompt is read once, and a completion
    sees it and itself. See `models.shared`.
    """

    prompt: int  # columns
    n: int


def weight(module: nn.Module, name: str, init: Any, shape: tuple[int, ...]) -> Array:
    """A parameter, brought to the device if it waits in host memory: inside the scan, so a layer at a time."""
    return in_device_memory(module.param(name, init, shape))


class Linear(nn.Module):
    """einsum(equation, x, kernel) + bias, where the bias has the trailing axes of the output."""

    equation: str
    shape: tuple[int, ...]
    bias_shape: tuple[int, ...] | None = None
    std: float = INIT_STD

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = weight(self, "kernel", nn.initializers.normal(self.std), self.shape)
        y: Array = product(self.equation, x, kernel.astype(x.dtype))  # pyright: ignore[reportAssignmentType]
        if self.bias_shape is not None:
            bias = weight(self, "bias", nn.initializers.zeros, self.bias_shape)
            y += trailing(bias.astype(y.dtype), y)
        return y


class Norm(nn.Module):
    """RMS or layer norm over the trailing axes `shape`, in float32: (x − μ) / √(σ² + ε) · (scale + offset) + bias."""

    config: ModelConfig
    shape: tuple[int, ...]
    kind: str = "rms"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c, axes = self.config, tuple(range(-len(self.shape), 0))
        scale = weight(self, "scale", nn.initializers.constant(1.0 - c.norm_offset), self.shape)
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y -= y.mean(axes, keepdims=True)
        y *= jax.lax.rsqrt(jnp.square(y).mean(axes, keepdims=True) + c.norm_eps)
        y *= trailing(scale.astype(jnp.float32) + c.norm_offset, y)
        if self.kind == "layer":
            bias = weight(self, "bias", nn.initializers.zeros, self.shape)
            y += trailing(bias.astype(jnp.float32), y)
        return y.astype(x.dtype)


class Attention(nn.Module):
    config: ModelConfig
    both_ways: bool = False  # a token sees later ones too: encoders

    @nn.compact
    def __call__(self, x: Array, kind: Kind, context: Context, memory: tuple[Array, Array] | None):
        """x [b t d], memory (keys, values) [b g s k] -> ([b t d], memory with the new tokens)."""
        c = self.config
        d, h, g, k = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim

        def heads(name: str, n: int) -> Array:
            return Linear("btd,dhk->bthk", (d, n, k), (n, k) if c.qkv_bias else None, name=name)(x)

        query, key, value = heads("query", h), heads("key", g), heads("value", g)
        if c.qk_norm != "none":
            query = Norm(c, (k,) if c.qk_norm == "head" else (h, k), name="query_norm")(query)
            key = Norm(c, (k,) if c.qk_norm == "head" else (g, k), name="key_norm")(key)
        query, key, value = (jnp.swapaxes(y, 1, 2) for y in (query, key, value))
        if not c.learned_positions:
            cos, sin = pick(context.cos, kind.rope), pick(context.sin, kind.rope)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if memory is not None:
            memory = write(memory[0], key, context.index, 2), write(memory[1], value, context.index, 2)
            key, value = (y.astype(x.dtype) for y in memory)

        def look(query: Array, key: Array, value: Array, sight: Sight) -> Array:
            scale = c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale
            how: dict[str, Any] = {"scale": scale, "softcap": c.attention_softcap}
            if sight.bias is not None:
                in_order = memory is None and not self.both_ways  # a cache has slots behind the last query
                blocks = kernels.blocks(query.shape[2]) if in_order else 1
                return attend_in_blocks(blocks, query, key, value, pick(sight.bias, kind.window), **how)
            kernel = kernels.choose(c, query.shape[2], key.shape[2])
            of = [functools.partial(kernels.attend, kernel, window=window, **how) for window in window_choices(c)]
            return switch(kind.window, of, query, key, value, sight.queries, sight.keys)

        match context.sights:
            case [sight]:
                mixed = look(query, key, value, sight)
            case [prompts, completions]:
                mixed = attend_shared(look, query, key, value, (prompts, completions))
            case _:
                raise UserError(f"{len(context.sights)} sights: one of whole rows, or two where prompts are shared")
        out = Linear("bhtk,hkd->btd", (h, k, d), (d,) if c.out_bias else None, residual_std(c), name="out")
        return out(mixed), memory


class MLP(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        d, f = c.hidden_size, c.intermediate_size
        activation = ACTIVATIONS[c.activation]
        y = Linear("btd,df->btf", (d, f), (f,) if c.mlp_bias else None, name="up")(x)
        if c.gated:
            y *= activation(Linear("btd,df->btf", (d, f), (f,) if c.mlp_bias else None, name="gate")(x))
        else:
            y = activation(y)
        return Linear("btf,fd->btd", (f, d), (d,) if c.mlp_bias else None, residual_std(c), name="down")(y)


class Block(nn.Module):
    """x + attention, then + MLP, each with a norm before, after, or both; in parallel both read the same x."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array, kind: Kind, context: Context, memory: tuple[Array, Array] | None = None):
        c = self.config

        def norm(wanted: bool, name: str, y: Array) -> Array:
            return Norm(c, (c.hidden_size,), c.norm, name=name)(y) if wanted else y

        attended, memory = Attention(c, name="attention")(norm(c.pre_norm, "attention_norm", x), kind, context, memory)
        attended = norm(c.post_norm, "attention_post_norm", attended)
        y = x if c.parallel_residual else x + attended
        fed = norm(c.post_norm, "mlp_post_norm", MLP(c, name="mlp")(norm(c.pre_norm, "mlp_norm", y)))
        return split(x + attended + fed if c.parallel_residual else y + fed), memory


class Embed(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, ids: Array, positions: Array) -> Array:
        c, normal = self.config, nn.initializers.normal(INIT_STD)
        dtype = jnp.dtype(c.compute_dtype)
        tokens = weight(self, "tokens", normal, (c.vocab_size, c.hidden_size))
        x = jnp.take(constrain(tokens, "tensor", None), ids, axis=0, mode="clip").astype(dtype)
        if c.embed_scale != 1.0:
            x *= jnp.asarray(c.embed_scale, dtype)  # Gemma rounds the scale to the dtype as well
        if c.learned_positions:
            table = weight(self, "positions", normal, (c.max_positions, c.hidden_size))
            x += jnp.take(table, positions, axis=0, mode="clip").astype(dtype)
        return split(x)


class Decoder(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, ids: Array, segments: Array, cache: Cache | None = None, layout: Layout | None = None) -> Output:
        """ids, segments i32[b t] -> hidden [b t d] after the final norm."""
        c = self.config
        if layout is None:
            context, positions, cache = look_around(c, segments, cache)
        else:
            context, positions = look_at_shared(c, segments, layout)
        x = Embed(c, name="embed")(jnp.where(segments > 0, ids, 0), positions)

        unroll = layers_at_once(c)
        block = Block if c.remat == "none" else nn.remat(Block, policy=REMAT[c.remat], prevent_cse=unroll > 1)
        if cache is None:
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]
                length=c.num_layers,
                unroll=unroll,
            )
            x, _ = layers(c, name="layers")(x, jax.tree.map(jnp.asarray, kinds(c)), context)
        else:
            x, cache = self.walk(x, context, cache)

        if not c.tied and self.is_initializing():
            Linear("btd,dv->btv", (c.hidden_size, c.vocab_size), name="unembed")(x)
        return Output(hidden=Norm(c, (c.hidden_size,), c.norm, name="final_norm")(x), cache=cache)

    @nn.nowrap
    def walk(self, x: Array, context: Context, cache: Cache) -> tuple[Array, Cache]:
        """The layers one after the other, unrolled: each has buffers of its own, which a loop updates in place."""
        c, kind = self.config, kinds(self.config)
        params = unstack(dict(self.variables["params"]))["layers"]
        memories = []
        for layer, memory in enumerate(zip(cache.keys, cache.values, strict=True)):
            here = Kind(window=kind.window[layer], rope=kind.rope[layer])
            x, memory = Block(c, parent=None).apply({"params": params[str(layer)]}, x, here, context, memory)
            memories.append(memory)
        keys, values = zip(*memories, strict=True)
        return x, dataclasses.replace(cache, keys=keys, values=values, index=cache.index + x.shape[1])


def look_around(config: ModelConfig, segments: Array, cache: Cache | None) -> tuple[Context, Array, Cache | None]:
    """From segments i32[b t]: what the layers share, the positions i32[b t], the cache with both written into it."""
    if cache is None:
        seen = visible(segments, segments)
        positions = key_positions = count_positions(seen)
        index = 0
    else:
        index = cache.index
        key_segments = write(cache.segments, segments, index, axis=1)
        seen = visible(segments, key_segments, index if segments.shape[1] > 1 else None)
        positions = count_positions(seen)
        key_positions = write(cache.positions, positions, index, axis=1)
        cache = dataclasses.replace(cache, segments=key_segments, positions=key_positions)
    length = segments.shape[1] if cache is None else cache.capacity
    cos, sin = tables(config, positions, length)
    keys = segments if cache is None else cache.segments
    filled = keys.shape[1] == segments.shape[1]  # rows as they are, or a cache as long as they, filled at once
    plain = not filled or kernels.choose(config, segments.shape[1], keys.shape[1]) == "xla"
    bias = biases(window_choices(config), seen, positions, key_positions) if plain else None
    context = Context((Sight(segments, keys, bias),), cos=cos, sin=sin, index=index)
    return once(context), positions, cache


def look_at_shared(config: ModelConfig, segments: Array, layout: Layout) -> tuple[Context, Array]:
    """`look_around` for rows of a prompt and n completions, segments i32[b p+n·m]: positions go on from the prompt's
    in each completion.
    """
    prompt, rest = segments[:, : layout.prompt], segments[:, layout.prompt :].reshape(len(segments) * layout.n, -1)
    again = functools.partial(jnp.repeat, repeats=layout.n, axis=0)
    keys = jnp.concatenate([again(prompt), rest], axis=1)
    seen = visible(prompt, prompt), visible(rest, keys, layout.prompt)
    at, later = map(count_positions, seen)

    def sight(queries: Array, keys: Array, *where: Array) -> Sight:
        plain = kernels.choose(config, queries.shape[1], keys.shape[1]) == "xla"
        return Sight(queries, keys, biases(window_choices(config), *where) if plain else None)

    sights = (
        sight(prompt, prompt, seen[0], at, at),
        sight(rest, keys, seen[1], later, jnp.concatenate([again(at), later], 1)),
    )
    positions = jnp.concatenate([at, later.reshape(len(segments), -1)], axis=1)
    cos, sin = tables(config, positions, keys.shape[1])
    return once(Context(sights, cos=cos, sin=sin, index=0)), positions


def once(context: Context) -> Context:
    """The same, computed before the layers: else every layer would compute it again."""
    return context._replace(
        **jax.lax.optimization_barrier(context._replace(index=0)._asdict()) | {"index": context.index}
    )


def window_choices(config: ModelConfig) -> tuple[int, ...]:
    """The distinct windows of a model, in order of appearance."""
    return tuple(dict.fromkeys(config.windows)) or (0,)


def kinds(config: ModelConfig) -> Kind:
    """For all layers i32[L]: which window and which rope."""
    choices, zeros = window_choices(config), (0,) * config.num_layers
    window = [choices.index(window) for window in config.windows] or zeros
    return Kind(window=np.array(window, np.int32), rope=np.array(config.rope_of_layer or zeros, np.int32))


def layers_at_once(config: ModelConfig) -> int:
    """Layers per step of the scan. A shallow model needs no loop: it compiles longer (about 1.3 times on CPUs) and runs
    faster, since nothing is stacked for the backward pass. Where memory is to be saved the loop stays: without one, XLA
    for CPUs merges what is computed again with what was computed first, and keeps it.
    """
    if config.unroll is not None:
        return config.unroll
    return config.num_layers if config.num_layers <= SHALLOW and config.remat != "full" else 1


def split(x: Array) -> Array:
    """The residual stream [b t d] on a mesh: rows and tokens are divided, the hidden size is whole."""
    return constrain(x, ROWS, "context", None)


def pick(table: Array, index: Any) -> Array:
    """table[index], without a gather where there is no choice."""
    return table[0] if table.shape[0] == 1 else table[index]


def switch(index: Any, branches: list[Any], *args: Array) -> Array:
    """branches[index](*args), without a conditional where there is no choice."""
    if len(branches) == 1 or isinstance(index, int | np.integer):
        return branches[int(index) if len(branches) > 1 else 0](*args)
    return jax.lax.switch(index, branches, *args)


def trailing(scale: Array, x: Array) -> Array:
    """Give `scale` the rank of x by adding axes in front: explicit broadcasting."""
    return jax.lax.expand_dims(scale, range(x.ndim - scale.ndim))


def residual_std(config: ModelConfig) -> float:
    """GPT-2: what is added to the residual stream starts smaller, by the root of the number of additions."""
    return INIT_STD / math.sqrt(2 * config.num_layers)


def unstack(params: Params) -> Params:
    """Params with layers/0, layers/1, … of their own instead of stacked: `apply` with a cache takes both forms.

    A decoding loop is faster when this is done before it (1.2 times on CPU): XLA copies the slice of a stacked weight
    at every step. It costs a second copy of the layers while the loop runs.
    """
    layers = params["layers"]
    if "0" in layers:
        return params
    layers = in_device_memory(layers)
    count = len(layers["attention"]["query"]["kernel"])
    return params | {"layers": {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(count)}}


@functools.lru_cache
def build(config: ModelConfig) -> LanguageModel:
    """The model as a bundle of pure functions. Equal configs give the same functions, so `jit` compiles once.

    init     key -> float32 params
    apply    (params, ids i32[b t], segments i32[b t], *, cache=None, layout=None) -> Output(hidden [b t d], cache)
    unembed  (params, hidden [… d]) -> float32 logits [… v]
    """
    check(config)
    module, blank = Decoder(config), Decoder(dataclasses.replace(config, attention="xla", unroll=1))

    @jax.jit
    def init(key: Array) -> Params:
        token = jnp.ones((1, 1), jnp.int32)
        return dict(blank.init(key, token, token)["params"])

    def apply(
        params: Params, ids: Array, segments: Array, *, cache: Cache | None = None, layout: Layout | None = None
    ) -> Output:
        out = module.apply({"params": params}, ids, segments, cache, layout)
        assert isinstance(out, Output)  # as opposed to (Output, collections that changed)
        return out

    def unembed(params: Params, hidden: Array) -> Array:
        if config.tied:
            equation, table, axes = "...d,vd->...v", params["embed"]["tokens"], ("tensor", None)
        else:
            equation, table, axes = "...d,dv->...v", params["unembed"]["kernel"], (None, "tensor")
        table = constrain(in_device_memory(table), *axes)
        dtype = jnp.dtype(config.compute_dtype)
        logits = jnp.einsum(
            equation,
            hidden.astype(dtype),
            table.astype(dtype),
            precision=exact(dtype),
            preferred_element_type=jnp.float32,
        )
        cap = config.final_softcap
        return logits if cap is None else jnp.tanh(logits / cap) * cap

    return LanguageModel(init=init, apply=apply, unembed=unembed, config=config)


def check(config: ModelConfig) -> None:
    """Raise UserError for a config that describes no model."""
    c, layers = config, config.num_layers
    rotary = c.rotary_dim or c.head_dim
    if c.num_heads % c.num_kv_heads:
        raise UserError(f"num_heads={c.num_heads} must be a multiple of num_kv_heads={c.num_kv_heads}")
    if rotary % 2 or rotary > c.head_dim:
        raise UserError(f"{rotary} rotated dimensions must be even and at most head_dim={c.head_dim}")
    for name in ("windows", "rope_of_layer"):
        if len(getattr(c, name)) not in (0, layers):
            raise UserError(f"{name} has {len(getattr(c, name))} entries: give one per layer ({layers}) or none")
    if not c.ropes or any(rope not in range(len(c.ropes)) for rope in c.rope_of_layer):
        raise UserError(f"rope_of_layer={c.rope_of_layer} must index into the {len(c.ropes)} ropes, at least one")
    if c.unroll is not None and (c.unroll < 1 or layers % c.unroll):
        raise UserError(f"unroll={c.unroll} must divide num_layers={layers}")
