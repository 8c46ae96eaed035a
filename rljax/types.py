"""The data that flows through rljax: frozen pytrees of arrays, and the protocols of the functions between them.

Shapes are written `[b t]`: b rows, t tokens, d hidden, v vocabulary. Everything per token is indexed by the token
that it
describes: `logps[:, t]` is the log-probability of `ids[:, t]` given `ids[:, :t]`, and position 0 holds 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax import Array

Params = dict[str, Any]  # nested dicts of arrays, as Flax's `init` returns them
T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def pytree(cls: type[T]) -> type[T]:
    """A frozen, keyword-only dataclass whose fields are all pytree children."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True, kw_only=True)(cls))


@pytree
class Tokens:
    """Rows of tokens. Padding is where `segments` is 0, never where an id equals the pad id (pad is often eos)."""

    ids: Array  # i32[b t]
    segments: Array  # i32[b t]; 0 padding, 1, 2, … the documents of a packed row: attention never crosses them
    mask: Array  # bool[b t]; the trained tokens, a subset of segments > 0


@pytree
class Mean:
    """A mean that is still a sum: merge microbatches, devices and hosts with `+`, divide once at the end."""

    total: Array  # f[]
    weight: Array  # f[]; how many (or how much) `total` sums over

    def __add__(self, other: Mean) -> Mean:
        return Mean(total=self.total + other.total, weight=self.weight + other.weight)

    def value(self) -> Array:
        """total / weight, and 0 (with zero gradient) where the weight is 0."""
        empty = self.weight == 0
        return jnp.where(empty, 0.0, self.total / jnp.where(empty, 1.0, self.weight))


Metrics = dict[str, Mean]


@pytree
class PreferenceBatch:
    """Pairs of responses to one prompt, with the frozen reference's view of them."""

    chosen: Tokens
    rejected: Tokens
    ref_chosen_logps: Array  # f32[b]; sums over the response (means where the objective averages)
    ref_rejected_logps: Array  # f32[b]
    fields: dict[str, Array] = dataclasses.field(default_factory=dict)  # f32[b] each: of the data, that the loss names


@pytree
class UnpairedBatch:
    """Single responses with a thumb up or down (KTO), and the mismatched pairs that estimate its KL point."""

    tokens: Tokens
    desirable: Array  # bool[b]
    ref_logps: Array  # f32[b]
    kl: Array  # f32[b]; one estimate for the whole batch, repeated: it is data, computed before the update


@pytree
class ComparisonBatch:
    """k responses to each prompt and which is best: k = 2 for pairwise reward modelling."""

    tokens: Tokens  # arrays are [b k t]
    best: Array  # i32[b]
    margin: Array  # f32[b]; 0 where the data gives none


@pytree
class Rollout:
    """What a policy wrote: prompts and responses in one row, with the log-probabilities it was sampled with."""

    tokens: Tokens  # mask: the sampled tokens, the stop token included
    logps: Array  # f32[b t]; under the distribution really sampled from (temperature, top-k and top-p applied)
    finished: Array  # bool[b]; a stop token was written, as opposed to the budget running out


@pytree
class PolicyBatch:
    """What a policy-gradient loss sees: a rollout and everything computed from it that is not differentiated."""

    tokens: Tokens
    old_logps: Array  # f32[b t]; at untrained positions 0, as everywhere below
    advantages: Array  # f32[b t]
    ref_logps: Array | None = None  # f32[b t], with a KL penalty in the loss
    old_values: Array | None = None  # f32[b t], with a critic
    returns: Array | None = None  # f32[b t], with a critic
    importance: Array | None = None  # f32[b t]: weights of tokens that another policy than the old one sampled
    kl_coef: Array | None = None  # f32[b], one number repeated: the coefficient of the KL penalty in the loss
    pretrain: Tokens | None = None  # [p t]: pretraining text beside the rollout (PPO-ptx)
    rewards: Array | None = None  # f32[b t]: what the advantages were made of, for those who look; no loss reads it


@pytree
class TrainState:
    """All that training changes. `apply` and the optimizer are code, not state."""

    step: Array  # i32[]
    params: Params
    opt_state: Any


class Output(NamedTuple):
    hidden: Array  # [b t d], after the final norm: `unembed` turns it into logits
    cache: Any  # the updated KV cache, or None


class Apply(Protocol):
    def __call__(self, params: Params, ids: Array, segments: Array, *, cache: Any = None) -> Output: ...


class LanguageModel(NamedTuple):
    """A model is a bundle of pure functions, as an optax optimizer is; nothing outside `rljax.models` sees Flax."""

    init: Callable[[Array], Params]  # key -> params
    apply: Apply  # (params, ids[b t], segments[b t], *, cache=None) -> Output
    unembed: Callable[[Params, Array], Array]  # (params, hidden[… d]) -> logits[… v], the final soft-cap included
    config: Any  # models.ModelConfig: frozen, hashable


class LossFn(Protocol):
    """An objective: the loss as a sum with its weight, and metrics of the same kind. Sees params and batch, nothing
    else.
    """

    def __call__(self, params: Params, batch: Any, /) -> tuple[Mean, Metrics]: ...


class RewardFn(Protocol):
    """Judges a batch of texts; extra fields of the data rows arrive by name."""

    def __call__(self, prompts: list[str], completions: list[str], /, **fields: Any) -> Any: ...
