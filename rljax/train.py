"""The update step: a loss that returns sums, an optax optimizer, one jitted function from state to state.

The update is the only place that divides a loss by its weight. That is why k microbatches give the gradient of the
whole batch with any masks, and why the order in which devices add their shares does not change what is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rljax.errors import UserError
from rljax.sharding import in_device_memory
from rljax.types import LossFn, Mean, Metrics, Params, TrainState, pytree

Update = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
OnNan = Literal["stop", "skip"]
FAULTS = "faults"  # the entry of an update's metrics that is no metric


@pytree
class Faults:
    """Where updates met what is not finite; of several updates the sum, as with a `Mean`."""

    updates: Array  # f32[]; how many were made or left out
    left_out: Array  # f32[]; how many were left out
    leaves: Array  # f32[1 + 2n]; in how many it was the loss, the gradient of each of n leaves, the weights of each

    def __add__(self, other: Faults) -> Faults:
        return jax.tree.map(jnp.add, self, other)


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update. `params` are copied: the update donates the state, and yours stay alive."""
    params = jax.tree.map(jnp.copy, in_device_memory(params))
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(wide(params)))


def wide(params: Params) -> Params:
    """Parameters in float32 at least: bfloat16 would freeze an optimizer's moments, and averages of weights."""
    return jax.tree.map(lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)), params)


def rounded(params: Params, like: Params, key: Array) -> Params:
    """Parameters in the dtypes of `like`; into bfloat16 they are rounded up or down at random, with the probability
    that makes their mean exact (Gupta et al. 2015, arXiv:1502.02551, section 3). To the nearest, an update of less than
    half a step of bfloat16 (1/512 of the weight) would always be lost.
    """
    leaves, tree = jax.tree.flatten(params)
    kinds = [p.dtype for p in jax.tree.leaves(like)]
    made = [
        x if x.dtype == kind else _at_random(x, jax.random.fold_in(key, i)) if kind == jnp.bfloat16 else x.astype(kind)
        for i, (x, kind) in enumerate(zip(leaves, kinds, strict=True))
    ]
    return jax.tree.unflatten(tree, made)


def _at_random(x: Array, key: Array) -> Array:
    """float32 to bfloat16, its upper half: a random number below the lower half's weight decides about the next one."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    up = bits + jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    near = jax.lax.bitcast_convert_type(up & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), near, x).astype(jnp.bfloat16)


def make_update(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    shardings: TrainState | None = None,
    microbatches: int = 1,
    on_nan: OnNan | None = None,
) -> Update:
    """(state, batch) -> (state, metrics): one optimizer step, jitted; the given state is donated (do not use it again).

    loss_fn: (params, batch) -> (Mean, Metrics). The gradient is that of total / weight over the whole batch. Several
      Means in a tuple are divided each by its own weight, then added (PPO-ptx: rollouts and pretraining text).
    shardings: a TrainState of NamedShardings (from `sharding.shardings`); None leaves placement to the arguments.
    microbatches: the batch is cut along axis 0 into this many pieces whose sums are added one after the other; the
      result is the same up to the order of float additions, the memory of activations is that of one piece.
    on_nan: see `update_step`.
    metrics: those of the loss_fn, `loss` and `grad_norm` (before any clipping by the optimizer), as Mean.
    """
    update = update_step(loss_fn, optimizer, microbatches=microbatches, on_nan=on_nan)
    if shardings is None:
        return jax.jit(update, donate_argnums=0)
    return jax.jit(update, donate_argnums=0, in_shardings=(shardings, None), out_shardings=(shardings, None))


def update_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    microbatches: int = 1,
    together: int = 1,
    on_nan: OnNan | None = None,
) -> Update:
    """`make_update` before `jit`: for use inside a larger compiled function.

    on_nan: an update whose loss or gradient is not finite leaves parameters and optimizer as they were, its count too,
      and the metrics have an entry `FAULTS` that says so (a `Faults`). With "skip" so does one after which weights
      would not be finite: its old and new weights are then alive at once. "stop" only tells of those. None: every
      update is made, and nothing is said.
    """
    if microbatches < 1:
        raise UserError(f"microbatches must be at least 1, got {microbatches}")

    def update(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        loss, metrics, grads = _sum_over_microbatches(loss_fn, state.params, batch, microbatches, together)
        scale = 1.0 / jnp.where(loss.weight == 0, 1.0, loss.weight)
        weights = wide(state.params)
        grads = jax.tree.map(lambda g, p: (g * scale).astype(p.dtype), grads, weights)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.opt_state, weights)
            params: Any = optax.apply_updates(weights, updates)
            params = rounded(params, state.params, jax.random.fold_in(jax.random.key(0), state.step))
        # Nothing to learn from (no token is trained): momentum and weight decay must not move the weights either.
        learns, wrong, broken = loss.weight != 0, _wrong(loss, grads), None
        if on_nan is not None:
            learns &= ~wrong.any()
        if on_nan == "skip":
            broken = _broken(params)
            learns &= ~broken.any()
        params, opt_state = jax.tree.map(
            functools.partial(jnp.where, learns), (params, opt_state), (state.params, state.opt_state)
        )
        norm = Mean(total=optax.tree.norm(grads), weight=jnp.ones(()))
        found: Metrics = {**metrics, "loss": loss, "grad_norm": norm}
        if on_nan is not None:
            broken = _broken(params) if broken is None else broken
            found |= {FAULTS: _faults(wrong, broken, left_out=(loss.weight != 0) & ~learns)}  # pyright: ignore
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), found

    return update


def _wrong(loss: Mean, grads: Params) -> Array:
    """bool[1 + n]: whether the loss is not finite, and which leaves of the gradient are not. Their norms are those that
    the norm of the whole is made of, so nothing is computed twice.
    """
    norms = [optax.tree.norm(g) for g in jax.tree.leaves(grads)]
    return ~jnp.isfinite(jnp.stack([x.astype(jnp.float32) for x in (loss.value(), *norms)]))


def _broken(params: Any) -> Array:
    """bool[n]: which leaves of the weights are not finite."""
    return jnp.stack([~jnp.isfinite(x).all() for x in jax.tree.leaves(params)])


def _faults(wrong: Array, broken: Array, *, left_out: Array) -> Faults:
    leaves = jnp.concatenate([wrong, broken]).astype(jnp.float32)
    return Faults(updates=jnp.ones(()), left_out=left_out.astype(jnp.float32), leaves=leaves)


def epochs_step(
    update: Update,
    *,
    epochs: int,
    minibatches: int,
    target_kl: float | None = None,
    together: int = 1,
    prepare: Callable[[Any], Any] | None = None,
) -> Callable[[TrainState, Any, Array], tuple[TrainState, Metrics]]:
    """(state, batch, key) -> (state, metrics): `epochs` passes over the batch, each in a fresh permutation of its rows
    cut into `minibatches` updates (Schulman et al. 2017, Algorithm 1; Huang et al. 2022, "37 details", 6).

    update: from `update_step`. Metrics are merged over all updates. target_kl: once a minibatch's
      `policy/approxkl_avg` (measured before its own update) exceeds it, the updates that are left are skipped; the
      metric `policy/updates` counts those that were made.
    together: neighbouring rows that stay so, the completions of a prompt: permuted as one, and in one minibatch.
    prepare: what is done to a minibatch before its update (`methods.whitening`).
    All leaves of the batch with the same number of rows are permuted alike. A batch used whole is not permuted.
    """
    if epochs < 1 or minibatches < 1:
        raise UserError(f"epochs={epochs} and minibatches={minibatches} must be at least 1")

    def counted(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        state, metrics = update(state, batch if prepare is None else prepare(batch))
        return state, {**metrics, "policy/updates": Mean(total=jnp.ones(()), weight=jnp.zeros(()))}

    def run(state: TrainState, batch: Any, key: Array) -> tuple[TrainState, Metrics]:
        if epochs == minibatches == 1:
            state, metrics = counted(state, batch)
            return state, _count(metrics)
        pieces = functools.partial(_minibatch, batch, minibatches, together)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(counted, state, pieces(key, 0, 0))[1]
        )

        def step(carry: Any, index: Array) -> tuple[Any, None]:
            state, sums, going = carry
            piece = pieces(key, index // minibatches, index % minibatches)
            if target_kl is None:
                state, metrics = counted(state, piece)
                return (state, add_metrics(sums, metrics), going), None
            state, metrics = jax.lax.cond(going, counted, lambda state, _: (state, zeros), state, piece)
            going &= ~(metrics["policy/approxkl_avg"].value() > target_kl)  # one that was left out may have none
            return (state, add_metrics(sums, metrics), going), None

        start = (state, zeros, jnp.ones((), bool))
        (state, sums, _), _ = jax.lax.scan(step, start, jnp.arange(epochs * minibatches))
        return state, _count(sums)

    return run


def _count(metrics: Metrics) -> Metrics:
    updates = metrics["policy/updates"]
    return {**metrics, "policy/updates": Mean(total=updates.total, weight=jnp.ones(()))}


def _minibatch(batch: Any, minibatches: int, together: int, key: Array, epoch: Array | int, index: Array | int) -> Any:
    """Minibatch `index` of an epoch: a slice of that epoch's permutation of the rows."""
    order = jax.random.fold_in(key, epoch)

    def take(x: Array) -> Array:
        if minibatches == 1:
            return x
        if x.shape[0] % (minibatches * together):
            raise UserError(
                f"{x.shape[0]} rows cannot be cut into minibatches={minibatches} equal parts"
                + (f" with {together} neighbours together" if together > 1 else "")
            )
        size, units = x.shape[0] // minibatches // together, x.shape[0] // together
        chosen = jax.lax.dynamic_slice_in_dim(jax.random.permutation(order, units), index * size, size)
        return jnp.take(x, (chosen[:, None] * together + jnp.arange(together)[None]).ravel(), axis=0)

    return jax.tree.map(take, batch)


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
    loss_fn: LossFn, params: Params, batch: Any, microbatches: int, together: int
) -> tuple[Mean, Metrics, Params]:
    """(loss, metrics, gradient of loss.total), all summed over the pieces of the batch."""
    pieces = batch if microbatches == 1 else jax.tree.map(lambda x: _cut(x, microbatches, together), batch)
    if microbatches == 1:
        loss_fn = _divided(loss_fn)
    elif isinstance(jax.eval_shape(loss_fn, params, batch)[0], tuple):
        loss_fn = _divided(loss_fn, _weights(loss_fn, params, pieces, microbatches), share=1.0 / microbatches)

    @jax.named_scope("loss")
    def total(params: Params, piece: Any) -> tuple[Array, tuple[Mean, Metrics]]:
        loss, metrics = loss_fn(params, piece)
        return loss.total, (loss, metrics)

    def sums(piece: Any) -> tuple[Mean, Metrics, Params]:
        (_, (loss, metrics)), grads = jax.value_and_grad(total, has_aux=True)(params, piece)
        return loss, metrics, grads

    return _accumulate(sums, pieces, microbatches)


def _accumulate(sums: Callable[[Any], Any], pieces: Any, microbatches: int) -> Any:
    """The sum of sums(piece) over pieces stacked along axis 0 (or over the one piece that there is)."""
    if microbatches == 1:
        return sums(pieces)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)),
        jax.eval_shape(sums, jax.tree.map(lambda x: x[0], pieces)),
    )

    def add(carry: Any, piece: Any) -> tuple[Any, None]:
        return jax.tree.map(lambda c, x: c + x.astype(c.dtype), carry, sums(piece)), None

    return jax.lax.scan(add, zeros, pieces)[0]


def _divided(loss_fn: Any, weights: Any = None, *, share: float = 1.0) -> LossFn:
    """Several Means as one: each total over its weight, of the whole batch or else its own; the weights of all pieces
    sum to 1, or to 0 where none of the Means has any weight. A single Mean stays what it is.
    """

    def divided(params: Params, piece: Any) -> tuple[Mean, Metrics]:
        parts, metrics = loss_fn(params, piece)
        if isinstance(parts, Mean):
            return parts, metrics
        whole = [jax.lax.stop_gradient(part.weight) for part in parts] if weights is None else weights
        total = sum((part.total / _nonzero(weight) for part, weight in zip(parts, whole, strict=True)), jnp.zeros(()))
        trained = functools.reduce(jnp.logical_or, [weight != 0 for weight in whole])
        return Mean(total=total, weight=jnp.where(trained, share, 0.0)), metrics

    return divided


def _weights(loss_fn: Any, params: Params, pieces: Any, microbatches: int) -> list[Array]:
    """Those of several Means in the whole batch. They do not depend on the parameters, so the pass that adds them up
    costs nothing: the compiler drops the rest.
    """
    weights = _accumulate(lambda piece: [part.weight for part in loss_fn(params, piece)[0]], pieces, microbatches)
    return [jax.lax.stop_gradient(weight) for weight in weights]


def _nonzero(weight: Array) -> Array:
    return jnp.where(weight == 0, 1.0, weight)


def _cut(x: Array, pieces: int, together: int) -> Array:
    """[b …] -> [pieces b/pieces …], never through `together` neighbouring rows. Piece i takes every pieces-th of what
    stays together, from the i-th on: with rows sharded over devices none moves.
    """
    if x.ndim == 0 or x.shape[0] % (pieces * together):
        raise UserError(
            f"a batch leaf of shape {x.shape} cannot be cut into {pieces} microbatches, {together} rows together: "
            "choose a number of microbatches that divides the batch's rows"
        )
    rest = x.shape[1:]
    return x.reshape(-1, pieces, together, *rest).swapaxes(0, 1).reshape(pieces, x.shape[0] // pieces, *rest)


def adamw(learning_rate: optax.ScalarOrSchedule, *, eps: float = 1e-8, weight_decay: float = 0.0) -> Any:
    """`optax.adamw`, without weight decay unless asked."""
    return optax.adamw(learning_rate, eps=eps, weight_decay=weight_decay)


def tf1_adam(
    learning_rate: optax.ScalarOrSchedule, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-5
) -> optax.GradientTransformation:
    """Adam as TensorFlow 1 has it, ε before the bias correction: what OpenAI's runs of 2019 and 2020 used.

        θ ← θ − lr · √(1 − b2ᵗ) / (1 − b1ᵗ) · m / (√v + ε)

    Kingma & Ba's own second form (arXiv:1412.6980, end of section 2). optax and torch add ε after correcting v, so for
    gradients smaller than ε this one's first steps are up to 1 / √(1 − b2) = 32 times smaller (Huang et al. 2024,
    arXiv:2403.17031; eps 1e-5 as there).
    """

    def scale(count: Array) -> Array:
        t = count.astype(jnp.float32) + 1.0
        return jnp.sqrt(1.0 - b2**t) / (1.0 - b1**t)

    def init(params: Any) -> optax.ScaleByAdamState:
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))  # two buffers: both are donated
        return optax.ScaleByAdamState(count=jnp.zeros((), jnp.int32), mu=mu, nu=nu)  # pyright: ignore

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, updates)
        step = jax.tree.map(lambda m, v: (scale(state.count) * m / (jnp.sqrt(v) + eps)).astype(m.dtype), mu, nu)
        return step, optax.ScaleByAdamState(count=state.count + 1, mu=mu, nu=nu)  # pyright: ignore

    return optax.chain(optax.GradientTransformation(init, update), optax.scale_by_learning_rate(learning_rate))


def average_weights(average: Params, params: Params, *, decay: float) -> Params:
    """Exponential moving average of weights: decay · average + (1 − decay) · params (InstructGPT: 0.992)."""
    return jax.tree.map(lambda a, p: (decay * a + (1 - decay) * p.astype(a.dtype)).astype(a.dtype), average, params)


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
        raise UserError(f"warmup={warmup} must be at least 0 and less than the {steps} updates of the run")
    if warmup == 0:
        return schedule
    # Step 0 already learns a little: a first update at rate 0 would be a wasted batch.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, schedule], [warmup])
