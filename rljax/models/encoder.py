"""Encoders: BERT, DistilBERT and RoBERTa, which read a whole text at once. They judge texts; they do not write.

One module for all three; what differs are values of EncoderConfig. Shapes as in `transformer`, and y token types,
n labels. The layers are those of the decoder, with the norm after each sum.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from rljax.errors import UserError
from rljax.models.attention import Sight, biases, count_positions, visible
from rljax.models.config import ModelConfig
from rljax.models.transformer import ACTIVATIONS, INIT_STD, MLP, Attention, Context, Embed, Kind, Norm, split
from rljax.types import Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """An encoder-only transformer. Frozen and hashable, so it can be a static argument of `jit`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int  # tokens that a row can have
    max_tokens: int  # tokens that a text should be cut to: fewer where sentence-transformers says so
    position_offset: int = 0  # the table's row of the first token: RoBERTa's is its pad id + 1
    num_types: int = 2  # of tokens: first and second text; 0: no table (DistilBERT)
    norm_eps: float = 1e-12
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "gelu"

    # the classifier: linear(activation(dense(first token)))
    labels: tuple[str, ...] = ()  # id2label of config.json; empty: no classifier
    classifier_activation: Literal["tanh", "relu"] = "tanh"

    # the embedding of a text, as sentence-transformers stores it beside the model
    pooling: Literal["mean", "cls"] = "mean"
    normalize: bool = False  # to length 1

    compute_dtype: str = "float32"
    unroll: int = 1  # layers per step of the scan


class EncoderApply(Protocol):
    def __call__(self, params: Params, ids: Array, segments: Array, *, types: Array | None = None) -> Array: ...


class Encoder(NamedTuple):
    """A bundle of pure functions, in the manner of `types.LanguageModel`."""

    init: Callable[[Array], Params]  # key -> float32 params
    apply: EncoderApply  # (params, ids[b t], segments[b t], *, types=None) -> hidden[b t d]
    classify: EncoderApply  # (params, ids[b t], segments[b t], *, types=None) -> logits f32[b n]
    config: EncoderConfig


# --- the module -------------------------------------------------------------------------------------------------------


def block_config(config: EncoderConfig) -> ModelConfig:
    """The encoder as the layers of the decoder know it: learned positions, biases everywhere, no gate."""
    c = config
    return ModelConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_layers=c.num_layers,
        num_heads=c.num_heads,
        num_kv_heads=c.num_heads,
        head_dim=c.hidden_size // c.num_heads,
        max_positions=c.max_positions + c.position_offset,
        learned_positions=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        gated=False,
        norm="layer",
        norm_eps=c.norm_eps,
        activation=c.activation,
        compute_dtype=c.compute_dtype,
    )


class Block(nn.Module):
    """LN(x + attention(x)), then LN(x + MLP(x)): the norm comes after the sum (1706.03762, section 3.1)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array, context: Context) -> tuple[Array, None]:
        c = self.config
        attended, _ = Attention(c, both_ways=True, name="attention")(x, Kind(window=0, rope=0), context, None)
        x = Norm(c, (c.hidden_size,), c.norm, name="attention_norm")(x + attended)
        return split(Norm(c, (c.hidden_size,), c.norm, name="mlp_norm")(x + MLP(c, name="mlp")(x))), None


class Layers(nn.Module):
    config: EncoderConfig

    @nn.compact
    def __call__(self, ids: Array, segments: Array, types: Array | None) -> Array:
        """ids, segments, types i32[b t] -> hidden [b t d]."""
        c = block_config(self.config)
        positions = count_positions(visible(segments, segments))
        x = Embed(c, name="embed")(jnp.where(segments > 0, ids, 0), positions + self.config.position_offset)
        if self.config.num_types:
            table = self.param("types", nn.initializers.normal(INIT_STD), (self.config.num_types, c.hidden_size))
            chosen = jnp.zeros_like(ids) if types is None else types
            x += jnp.take(table, chosen, axis=0, mode="clip").astype(x.dtype)
        x = Norm(c, (c.hidden_size,), c.norm, name="embed_norm")(x)

        seen = (segments[:, :, None] == segments[:, None, :]) & (segments[:, :, None] > 0)
        unused = jnp.zeros(0)  # of rotation: the positions are learned
        sight = Sight(segments, segments, biases((0,), seen, positions, positions))
        context = Context((sight,), cos=unused, sin=unused, index=0)
        layers = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType]
            length=c.num_layers,
            unroll=self.config.unroll,
        )
        x, _ = layers(c, name="layers")(x, context)
        return x


# --- the functions ----------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str], *, mesh: Any = None, dtype: Any = None) -> tuple[Encoder, Params]:
    """An encoder and its params, from a folder or a name that `resolve` knows.

    Reads bare encoders, masked language models (whose head is left out) and …ForSequenceClassification of BERT,
    DistilBERT and RoBERTa. Its tokenizer: `rljax.models.resolve.load_tokenizer(path)`.

    mesh   places every leaf by `hf_encoder.RULES`. None: one device.
    dtype  what is held and computed in. None: float32, on every device, since what an encoder says is a score.

    UserError for anything that is not exactly such a checkpoint: unsupported architecture or feature, missing,
    unknown or misshaped tensors, damaged files, pickled weights, poolings of sentence-transformers other than mean
    and cls.
    """
    from rljax.models import hf_encoder

    return hf_encoder.load(path, mesh=mesh, dtype=dtype)


def embed(model: Encoder, params: Params, ids: Array, segments: Array, *, types: Array | None = None) -> Array:
    """The embedding of each row, f32[b d]: the mean of its tokens' states or that of its first, as config.pooling says.

    ids, segments i32[b t] (0: padding, on either side), one text per row. Of length 1 where config.normalize.
    A row of pads gives 0.
    """
    hidden = model.apply(params, ids, segments, types=types).astype(jnp.float32)
    real = segments > 0
    if model.config.pooling == "cls":
        pooled = first_token(hidden, real)
    else:
        total = jnp.where(real[:, :, None], hidden, 0.0).sum(axis=1)
        pooled = total / jnp.maximum(real.sum(axis=1, keepdims=True), 1)
    if not model.config.normalize:
        return pooled
    squares = jnp.square(pooled).sum(axis=1, keepdims=True)
    return pooled * jax.lax.rsqrt(jnp.maximum(squares, 1e-24))  # as torch's normalize: the length is at least 1e-12


def first_token(hidden: Array, real: Array) -> Array:
    """[b d] from [b t d]: the state of each row's first token that is not a pad; 0 for a row of pads."""
    first = jnp.argmax(real, axis=1)[:, None, None]
    return jnp.where(real.any(axis=1)[:, None], jnp.take_along_axis(hidden, first, axis=1)[:, 0], 0.0)


@functools.lru_cache
def build(config: EncoderConfig) -> Encoder:
    """The encoder as a bundle of pure functions. Equal configs give the same functions, so `jit` compiles once.

    init      key -> float32 params
    apply     (params, ids i32[b t], segments i32[b t], *, types=None) -> hidden [b t d] after the last norm
    classify  (params, ids i32[b t], segments i32[b t], *, types=None) -> logits f32[b n]

    types i32[b t] tell the second text of a pair (1) from the first (0); None: all are 0. A row of pads has the
    logits 0. UserError for rows longer than max_positions, types where the model has none, and `classify` without
    a classifier.
    """
    check(config)
    module, d, n = Layers(config), config.hidden_size, len(config.labels)

    @jax.jit
    def init(key: Array) -> Params:
        key, dense, classifier = jax.random.split(key, 3)
        token = jnp.ones((1, 1), jnp.int32)
        params = dict(module.init(key, token, token, None)["params"])
        heads = {"dense": linear_init(dense, d, d), "classifier": linear_init(classifier, d, n)}
        return params | (heads if n else {})

    def apply(params: Params, ids: Array, segments: Array, *, types: Array | None = None) -> Array:
        check_rows(config, ids, types)
        hidden = module.apply({"params": params}, ids, segments, types)
        assert isinstance(hidden, Array)  # as opposed to (hidden, collections that changed)
        return hidden

    def classify(params: Params, ids: Array, segments: Array, *, types: Array | None = None) -> Array:
        if not n:
            raise UserError(
                "this encoder has no classifier: load a …ForSequenceClassification checkpoint, or use encoder.embed"
            )
        real = segments > 0
        first = first_token(apply(params, ids, segments, types=types), real).astype(jnp.float32)
        dense = ACTIVATIONS_OF_HEADS[config.classifier_activation](linear(params["dense"], first))
        return jnp.where(real.any(axis=1)[:, None], linear(params["classifier"], dense), 0.0)

    return Encoder(init=init, apply=apply, classify=classify, config=config)


ACTIVATIONS_OF_HEADS = {"tanh": jnp.tanh, "relu": ACTIVATIONS["relu"]}


def linear(params: Params, x: Array) -> Array:
    """x kernel + bias of f32[b d], in float32 whatever the params are held in."""
    kernel, bias = params["kernel"].astype(jnp.float32), params["bias"].astype(jnp.float32)
    return jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST) + bias[None]


def linear_init(key: Array, into: int, out: int) -> Params:
    return {"kernel": jax.random.normal(key, (into, out), jnp.float32) * INIT_STD, "bias": jnp.zeros(out, jnp.float32)}


def check(config: EncoderConfig) -> None:
    """Raise UserError for a config that describes no encoder."""
    if config.hidden_size % config.num_heads:
        raise UserError(f"hidden_size={config.hidden_size} must be a multiple of num_heads={config.num_heads}")
    if config.unroll < 1 or config.num_layers % config.unroll:
        raise UserError(f"unroll={config.unroll} must divide num_layers={config.num_layers}")


def check_rows(config: EncoderConfig, ids: Array, types: Array | None) -> None:
    """Raise UserError for rows that the encoder has no positions or no token types for."""
    if ids.shape[1] > config.max_positions:
        raise UserError(
            f"rows of {ids.shape[1]} tokens, but this encoder has {config.max_positions} positions: truncate the texts "
            f"(tokenizer(…, truncation=True, max_length={config.max_positions}))"
        )
    if types is not None and config.num_types < 2:
        raise UserError(
            f"types tell two texts apart, but this encoder has {config.num_types} token types: leave them out"
        )
