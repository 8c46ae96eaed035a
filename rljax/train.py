"""The update step: a loss that returns sums, an optax optimizer, one jitted function from state to state.

The update is the only place that divides a loss by its weight. That is why k microbatches give the gradient of the
whole batch with any masks, and why the order in which devices add their shares does not change what is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rljax.types import LossFn, Mean, Metrics, Params, TrainState

Update = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update. `params` are copied: the update donates the state, and yours stay alive."""
    params = jax.tree.map(jnp.copy, params)
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))


def make_update(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    shardings: TrainState | None = None,
    microbatches: int = 1,
) -> Update:
    """(state, batch) -> (state, metrics): one optimizer step, jitted; the given state is donated (do not use it again).

    loss_fn: (params, batch) -> (Mean, Metrics). The gradient is that of total / weight over the whole batch.
    shardings: a TrainState of NamedShardings (from `sharding.shardings`); None leaves placement to the arguments.
    microbatches: the batch is cut along axis 0 into this many pieces whose sums are added one after the other; the
      result is the same up to the order of float additions, the memory of activations is that of one piece.
    metrics: those of the loss_fn, `loss` and `grad_norm` (before any clipping by the optimizer), as Mean.
    """
    if microbatches < 1:
        raise ValueError(f"microbatches must be at least 1, got {microbatches}")

    def update(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        loss, metrics, grads = _sum_over_microbatches(loss_fn, state.params, batch, microbatches)
        scale = 1.0 / jnp.where(loss.weight == 0, 1.0, loss.weight)
        grads = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), grads, state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params: Params = optax.apply_updates(state.params, updates)  # pyright: ignore[reportAssignmentType]
        norm = Mean(total=optax.tree.norm(grads), weight=jnp.ones(()))
        return (
            TrainState(step=state.step + 1, params=params, opt_state=opt_state),
            {**metrics, "loss": loss, "grad_norm": norm},
        )

    if shardings is None:
        return jax.jit(update, donate_argnums=0)
    return jax.jit(update, donate_argnums=0, in_shardings=(shardings, None), out_shardings=(shardings, None))


def make_evaluate(loss_fn: LossFn) -> Callable[[Params, Any], Metrics]:
    """(params, batch) -> metrics: the loss and its metrics without a gradient, jitted. Add batches up with `+`."""

    def evaluate(params: Params, batch: Any) -> Metrics:
        loss, metrics = loss_fn(params, batch)
        return {**metrics, "loss": loss}

    return jax.jit(evaluate)


def add_metrics(a: Metrics, b: Metrics) -> Metrics:
    """Merge the metrics of two batches as if they had been one."""
    return {name: a[name] + b[name] for name in a}


def _sum_over_microbatches(
    loss_fn: LossFn, params: Params, batch: Any, microbatches: int
) -> tuple[Mean, Metrics, Params]:
    """(loss, metrics, gradient of loss.total), all summed over the pieces of the batch."""

    def total(params: Params, piece: Any) -> tuple[Array, tuple[Mean, Metrics]]:
        loss, metrics = loss_fn(params, piece)
        return loss.total, (loss, metrics)

    def sums(piece: Any) -> tuple[Mean, Metrics, Params]:
        (_, (loss, metrics)), grads = jax.value_and_grad(total, has_aux=True)(params, piece)
        return loss, metrics, grads

    if microbatches == 1:
        return sums(batch)
    pieces = jax.tree.map(lambda x: _cut(x, microbatches), batch)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)),
        jax.eval_shape(sums, jax.tree.map(lambda x: x[0], pieces)),
    )

    def add(carry: Any, piece: Any) -> tuple[Any, None]:
        return jax.tree.map(lambda c, x: c + x.astype(c.dtype), carry, sums(piece)), None

    return jax.lax.scan(add, zeros, pieces)[0]


def _cut(x: Array, pieces: int) -> Array:
    """[b …] -> [pieces b/pieces …]. Piece i takes rows i, i + pieces, …: with rows sharded over devices none moves."""
    if x.ndim == 0 or x.shape[0] % pieces:
        raise ValueError(
            f"a batch leaf of shape {x.shape} cannot be cut into {pieces} microbatches: "
            f"choose a number of microbatches that divides the batch's rows"
        )
    return x.reshape(x.shape[0] // pieces, pieces, *x.shape[1:]).swapaxes(0, 1)


# Schedules: (peak, steps, *, warmup) -> optax schedule. All reach their end exactly at `steps`.


def constant(peak: float, steps: int, *, warmup: int = 0) -> optax.Schedule:
    """Linear warm-up from 0 to `peak`, then `peak`."""
    return _after_warmup(optax.constant_schedule(peak), peak, steps, warmup)


def linear(peak: float, steps: int, *, warmup: int = 0, end: float = 0.0) -> optax.Schedule:
    """Linear warm-up from 0 to `peak`, then a straight line to `end` at the last step."""
    return _after_warmup(optax.linear_schedule(peak, end, max(1, steps - warmup)), peak, steps, warmup)


def cosine(peak: float, steps: int, *, warmup: int = 0, end: float = 0.0) -> optax.Schedule:
    """Linear warm-up from 0 to `peak`, then half a cosine down to `end` at the last step."""
    decay = optax.cosine_decay_schedule(peak, max(1, steps - warmup), alpha=end / peak if peak else 0.0)
    return _after_warmup(decay, peak, steps, warmup)


def _after_warmup(schedule: optax.Schedule, peak: float, steps: int, warmup: int) -> optax.Schedule:
    if not 0 <= warmup < max(steps, 1):
        raise ValueError(f"warmup must be at least 0 and less than steps={steps}, got {warmup}")
    if warmup == 0:
        return schedule
    # Step 0 already learns a little: a first update at rate 0 would be a wasted batch.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, schedule], [warmup])
