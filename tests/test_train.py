"""The update: exact with microbatches, donated, compiled once, the same on any mesh."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rljax import finite, losses, models, objectives, sharding, train, views
from rljax.filters import Sampling
from rljax.types import Mean, TrainState
from tests import tiny

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))


def preference_loss(model=tiny.bigram, **kwargs):
    return objectives.preference(model(), functools.partial(losses.dpo_loss, beta=0.1), **kwargs)


def step(loss_fn, batch, params=tiny.bigram_params, **kwargs):
    state = train.init_state(params(), OPTIMIZER)
    return train.make_update(loss_fn, OPTIMIZER, **kwargs)(state, batch)


def values(metrics):
    return {name: float(mean.value()) for name, mean in metrics.items()}


def test_update_by_hand():
    """One weight, SGD: loss Σ (w x)² / n, so w ← w − lr · 2 w Σx² / n."""

    def loss_fn(params, x):
        return Mean(total=jnp.sum((params["w"] * x) ** 2), weight=jnp.asarray(x.shape[0], jnp.float32)), {}

    sgd = optax.sgd(0.1)
    state = train.init_state({"w": jnp.asarray(3.0)}, sgd)
    state, metrics = train.make_update(loss_fn, sgd)(state, jnp.asarray([1.0, 2.0]))
    np.testing.assert_allclose(float(state.params["w"]), 3.0 - 0.1 * 2 * 3.0 * 5.0 / 2, rtol=1e-6)
    assert values(metrics) == pytest.approx({"loss": 22.5, "grad_norm": 15.0})
    assert int(state.step) == 1


def test_nothing_to_learn_from_moves_nothing():
    """No token is trained (every pair tied, no demonstration kept): no momentum, no weight decay, no moments."""
    optimizer = optax.adamw(0.1, weight_decay=0.5)
    update = train.make_update(objectives.supervised(tiny.bigram()), optimizer)
    state, _ = update(train.init_state(tiny.bigram_params(), optimizer), tiny.tokens())
    before = jax.tree.map(np.asarray, state)
    empty = dataclasses.replace(tiny.tokens(), mask=jnp.zeros_like(tiny.tokens().mask))
    state, metrics = update(state, empty)
    chex.assert_trees_all_equal((state.params, state.opt_state), (before.params, before.opt_state))
    assert int(state.step) == 2
    assert values(metrics)["grad_norm"] == 0.0


DECODER, TABLE = (tiny.model, tiny.params), (tiny.bigram, tiny.bigram_params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "microbatches", "whole"),
    [("preference", 2, DECODER), ("preference", 4, TABLE), ("supervised", 2, TABLE), ("supervised", 4, TABLE)],
    ids=lambda x: None if isinstance(x, tuple) else str(x),
)
def test_microbatches_are_exact(objective, microbatches, whole):
    """Uneven masks, unequal lengths, distinct prompts, one empty row: loss, gradient and every metric (TRAPS 3, 5)."""
    model, params = whole
    if objective == "preference":
        loss_fn, batch = preference_loss(model, nll_weight=0.5), tiny.pairs(empty=(5,))
    else:
        loss_fn, batch = objectives.supervised(model()), tiny.tokens(empty=(5,))
    whole, whole_metrics = step(loss_fn, batch, params)
    cut, cut_metrics = step(loss_fn, batch, params, microbatches=microbatches)
    chex.assert_trees_all_close(whole.params, cut.params, atol=2e-5)
    chex.assert_trees_all_close(values(whole_metrics), values(cut_metrics), rtol=1e-5, atol=1e-6)


def test_duplicating_the_batch_changes_nothing():
    loss_fn, batch = preference_loss(), tiny.pairs()
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), batch)
    (one, one_metrics), (two, two_metrics) = step(loss_fn, batch), step(loss_fn, twice)
    chex.assert_trees_all_close(one.params, two.params, atol=2e-5)
    chex.assert_trees_all_close(values(one_metrics), values(two_metrics), rtol=1e-5, atol=1e-6)


def test_all_empty_batch_gives_zero_gradient():
    state, metrics = step(preference_loss(), tiny.pairs(empty=tuple(range(8))))
    assert values(metrics)["grad_norm"] == 0.0
    assert values(metrics)["loss"] == 0.0
    chex.assert_tree_all_finite(state.params)


def test_the_state_is_donated_and_the_callers_params_live():
    state = train.init_state(tiny.bigram_params(), OPTIMIZER)
    table = state.params["table"]
    train.make_update(preference_loss(), OPTIMIZER)(state, tiny.pairs())
    assert table.is_deleted()
    chex.assert_tree_all_finite(tiny.bigram_params())


def test_one_compile_for_many_steps():
    chex.clear_trace_counter()
    loss_fn = chex.assert_max_traces(preference_loss(), n=1)
    update = train.make_update(loss_fn, OPTIMIZER)
    state = train.init_state(tiny.bigram_params(), OPTIMIZER)
    for seed in range(3):
        state, _ = update(state, tiny.pairs(seed=seed))
    assert int(state.step) == 3


def test_unequal_microbatches_are_refused():
    with pytest.raises(ValueError, match="cannot be cut into 3"):
        step(preference_loss(), tiny.pairs(), microbatches=3)
    with pytest.raises(ValueError, match="at least 1"):
        train.make_update(preference_loss(), OPTIMIZER, microbatches=0)


@functools.cache
def on_one_device():
    return step(preference_loss(tiny.model), tiny.pairs(empty=(3,)), tiny.params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes",
    [
        pytest.param({"fsdp": 8}, marks=pytest.mark.long),
        {"data": 2, "fsdp": 2, "tensor": 2},
        pytest.param({"tensor": 4, "fsdp": 2}, marks=pytest.mark.long),
    ],
)
def test_same_update_on_any_mesh(axes):
    loss_fn, batch = preference_loss(tiny.model), tiny.pairs(empty=(3,))
    expected, expected_metrics = on_one_device()
    mesh = sharding.make_mesh(**axes)
    state = train.init_state(tiny.params(), OPTIMIZER)
    shardings = sharding.shardings(state, models.RULES, mesh)
    state = jax.device_put(state, shardings)
    batch = jax.device_put(batch, sharding.batch_shardings(batch, mesh))
    state, metrics = train.make_update(loss_fn, OPTIMIZER, shardings=shardings)(state, batch)
    assert state.params["layers"]["mlp"]["up"]["kernel"].sharding.is_equivalent_to(
        shardings.params["layers"]["mlp"]["up"]["kernel"], 3
    )
    chex.assert_trees_all_close(jax.device_get(state.params), jax.device_get(expected.params), atol=2e-5)
    chex.assert_trees_all_close(values(metrics), values(expected_metrics), rtol=1e-4, atol=1e-5)


def test_bfloat16_parameters_accumulate_in_float32():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.bigram_params())
    state = train.init_state(params, optax.sgd(1e-2))
    state, _ = train.make_update(preference_loss(), optax.sgd(1e-2), microbatches=4)(state, tiny.pairs())
    assert isinstance(state, TrainState)
    chex.assert_trees_all_equal_dtypes(state.params, params)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (functools.partial(train.constant, warmup=4), [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 1.0]),
        (functools.partial(train.linear, warmup=0), [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4]),
        (functools.partial(train.linear, warmup=2, end=0.2), [1 / 3, 2 / 3, 1.0, 0.9, 0.8, 0.7, 0.6]),
        (functools.partial(train.cosine, warmup=0), [(1 + np.cos(np.pi * i / 10)) / 2 for i in range(7)]),
    ],
)
def test_schedules(schedule, expected):
    made = schedule(1.0, 10)
    np.testing.assert_allclose([float(made(i)) for i in range(7)], expected, rtol=1e-6)


def test_schedules_end_at_the_last_step_and_refuse_a_long_warmup():
    assert float(train.linear(1e-3, 50, warmup=5)(50)) == pytest.approx(0.0, abs=1e-9)
    assert float(train.cosine(1e-3, 50, warmup=5, end=1e-4)(50)) == pytest.approx(1e-4)
    with pytest.raises(ValueError, match="warmup"):
        train.linear(1.0, 10, warmup=10)


# --- epochs of minibatches --------------------------------------------------------------------------------------------

KEY = jax.random.key(7)


def ppo_loss(**kwargs):
    return objectives.policy(views.of_policy(tiny.bigram(), sampling=Sampling()), **kwargs)


def bigram_step(loss_fn, batch, **kwargs):
    return train.make_update(loss_fn, OPTIMIZER, **kwargs)(train.init_state(tiny.bigram_params(), OPTIMIZER), batch)


def recorder(rows: int = 8):
    """An update that learns nothing and writes down, one row an update, which rows it saw: state.params[u] counts."""

    def update(state, batch):
        seen = jnp.zeros(rows).at[batch["row"]].add(1.0)
        metrics = {
            "rows": Mean(total=jnp.sum(batch["row"] * 1.0), weight=jnp.asarray(float(len(batch["row"])))),
            "same": Mean(total=jnp.sum(jnp.abs(batch["row"] - batch["copy"][:, 0])), weight=jnp.ones(())),
            "policy/approxkl_avg": Mean(total=jnp.max(batch["kl"]), weight=jnp.ones(())),
        }
        params = jax.lax.dynamic_update_index_in_dim(state.params, seen, state.step, 0)
        return TrainState(step=state.step + 1, params=params, opt_state=()), metrics

    row = jnp.arange(rows)
    batch = {"row": row, "copy": jnp.stack([row, row], axis=1), "other": jnp.arange(4), "kl": jnp.zeros(rows)}
    state = TrainState(step=jnp.zeros((), jnp.int32), params=jnp.zeros((12, rows)), opt_state=())
    return update, state, batch


def test_each_epoch_is_a_fresh_permutation_of_all_rows():
    update, state, batch = recorder()
    after, metrics = jax.jit(train.epochs_step(update, epochs=3, minibatches=4))(state, batch, KEY)
    assert int(after.step) == 12
    assert values(metrics)["policy/updates"] == 12
    assert values(metrics)["same"] == 0  # all leaves of a row move together
    assert float(metrics["rows"].total) == 3 * sum(range(8))  # metrics of all updates are added up
    assert float(metrics["rows"].weight) == 24
    seen = np.asarray(after.params).reshape(3, 4, 8)  # epoch, minibatch, row
    np.testing.assert_array_equal(seen.sum(1), np.ones((3, 8)))  # every row once an epoch
    np.testing.assert_array_equal(seen.sum(2), np.full((3, 4), 2))
    assert not (seen[0] == seen[1]).all()
    assert not (seen[1] == seen[2]).all()
    other, _ = train.epochs_step(update, epochs=3, minibatches=4)(state, batch, jax.random.key(8))
    assert not (np.asarray(other.params) == np.asarray(after.params)).all()


def test_epochs_without_minibatches_see_the_whole_batch_each_time():
    update, state, batch = recorder()
    after, metrics = train.epochs_step(update, epochs=2, minibatches=1)(state, batch, KEY)
    np.testing.assert_array_equal(after.params[:2], np.ones((2, 8)))
    assert values(metrics)["policy/updates"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "made"), [(0.0, 1), (0.5, 3), (2.0, 8)])
def test_target_kl_stops_the_updates_that_are_left(limit, made):
    """The third update's approxkl is 1: the one that sees it is the last, and the state stays as it left it."""
    update, state, batch = recorder()

    def drifting(state, batch):
        kl = jnp.where(state.step >= 2, 1.0, 0.4 if limit else 0.1)
        state, metrics = update(state, batch)
        return state, metrics | {"policy/approxkl_avg": Mean(total=kl, weight=jnp.ones(()))}

    step = jax.jit(train.epochs_step(drifting, epochs=2, minibatches=4, target_kl=limit))
    after, metrics = step(state, batch, KEY)
    assert int(after.step) == made
    assert values(metrics)["policy/updates"] == made
    assert float(np.asarray(after.params)[made:].sum()) == 0.0  # nothing was written any more
    assert float(metrics["rows"].weight) == 2 * made  # and what was skipped is in no metric
    free, _ = train.epochs_step(drifting, epochs=2, minibatches=4)(state, batch, KEY)
    np.testing.assert_array_equal(free.params[:made], after.params[:made])  # the limit changes no permutation


def test_one_epoch_of_one_minibatch_is_the_update_itself():
    """Bit for bit, and no row is moved."""
    batch = tiny.rollouts()
    expected, expected_metrics = bigram_step(ppo_loss(), batch)
    epochs = train.epochs_step(train.update_step(ppo_loss(), OPTIMIZER), epochs=1, minibatches=1)
    state, metrics = jax.jit(epochs)(train.init_state(tiny.bigram_params(), OPTIMIZER), batch, KEY)
    chex.assert_trees_all_equal(state, expected)
    assert values(metrics).pop("policy/updates") == 1
    chex.assert_trees_all_equal({k: v for k, v in metrics.items() if k != "policy/updates"}, expected_metrics)


def test_epochs_equal_a_loop_of_updates_on_minibatches_cut_by_hand():
    batch, epochs, minibatches = tiny.rollouts(), 2, 2
    made = train.epochs_step(train.update_step(ppo_loss(), OPTIMIZER), epochs=epochs, minibatches=minibatches)
    state, metrics = jax.jit(made)(train.init_state(tiny.bigram_params(), OPTIMIZER), batch, KEY)

    update, expected, sums = (
        train.make_update(ppo_loss(), OPTIMIZER),
        train.init_state(tiny.bigram_params(), OPTIMIZER),
        [],
    )
    for epoch in range(epochs):
        order = jax.random.permutation(jax.random.fold_in(KEY, epoch), 8)
        for rows in np.asarray(order).reshape(minibatches, 4):
            expected, found = update(expected, jax.tree.map(lambda x, rows=rows: x[rows], batch))
            sums.append(found)
    chex.assert_trees_all_close(state.params, expected.params, atol=1e-6)
    assert int(state.step) == int(expected.step) == 4
    merged = functools.reduce(train.add_metrics, sums)
    assert values(metrics) == pytest.approx(values(merged) | {"policy/updates": 4}, rel=1e-4, abs=1e-6)


def test_rows_that_cannot_be_cut_into_minibatches_are_refused():
    update, state, batch = recorder()
    with pytest.raises(ValueError, match="8 rows cannot be cut into minibatches=3"):
        train.epochs_step(update, epochs=1, minibatches=3)(state, batch, KEY)
    with pytest.raises(ValueError, match="epochs=0"):
        train.epochs_step(update, epochs=0, minibatches=1)


# --- several means (PPO-ptx) ------------------------------------------------------------------------------------------


def ptx_loss(coef: float = 3.0):
    return ppo_loss(pretrain=(tiny.bigram(), coef))


def ptx_batch():
    return dataclasses.replace(tiny.rollouts(), pretrain=tiny.tokens(4, 12, seed=5, empty=(2,)))


@pytest.mark.slow
@pytest.mark.parametrize("microbatches", [2, 4])
def test_microbatches_are_exact_for_several_means(microbatches):
    """Each mean is divided by its own weight in the whole batch: uneven masks on both sides (TRAPS 3, 5)."""
    whole, whole_metrics = bigram_step(ptx_loss(), ptx_batch())
    cut, cut_metrics = bigram_step(ptx_loss(), ptx_batch(), microbatches=microbatches)
    chex.assert_trees_all_close(whole.params, cut.params, atol=2e-5)
    chex.assert_trees_all_close(values(whole_metrics), values(cut_metrics), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_several_means_without_weight_move_nothing(microbatches):
    """As one Mean of weight 0 does: momentum from earlier updates stays where it is."""

    def loss_fn(params, batch):
        loss = Mean(total=(params["w"] * batch).sum(), weight=jnp.abs(batch).sum())
        return (loss, loss), {}

    optimizer = optax.sgd(0.1, momentum=0.9)
    update = train.make_update(loss_fn, optimizer, microbatches=microbatches)
    moved, _ = update(train.init_state({"w": jnp.ones(())}, optimizer), jnp.ones(2))
    assert moved.params["w"] == pytest.approx(0.8)
    before = jax.tree.map(np.asarray, (moved.params, moved.opt_state))
    after, _ = update(moved, jnp.zeros(2))
    chex.assert_trees_all_equal(before, (after.params, after.opt_state))


def test_the_gradient_of_several_means_is_the_sum_of_their_gradients():
    """∇ (policy loss + 3 · mean pretraining loss), computed apart and added by hand."""
    batch, params = ptx_batch(), tiny.bigram_params()
    sgd = optax.sgd(1.0)
    state, metrics = train.make_update(ptx_loss(), sgd, microbatches=2)(train.init_state(params, sgd), batch)

    def mean(loss_fn, data):
        return jax.jit(jax.value_and_grad(lambda p: loss_fn(p, data)[0].value()))(params)

    policy_loss, policy = mean(ppo_loss(), batch)
    text_loss, text = mean(objectives.supervised(tiny.bigram()), batch.pretrain)
    expected = jax.tree.map(lambda p, a, b: p - (a + 3.0 * b), params, policy, text)
    chex.assert_trees_all_close(state.params, expected, atol=5e-5)
    assert values(metrics)["loss"] == pytest.approx(float(policy_loss + 3.0 * text_loss), rel=1e-5)
    assert values(metrics)["loss/pretrain_avg"] == pytest.approx(float(text_loss), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("aggregate", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant"])
def test_duplicating_rollouts_changes_nothing(aggregate):
    """In any aggregation, beside pretraining text (TRAPS 5)."""
    loss_fn = ppo_loss(aggregate=aggregate, length=9, pretrain=(tiny.bigram(), 3.0))
    batch = ptx_batch()
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), batch)
    (one, one_metrics), (two, two_metrics) = bigram_step(loss_fn, batch), bigram_step(loss_fn, twice)
    chex.assert_trees_all_close(one.params, two.params, atol=2e-5)
    chex.assert_trees_all_close(values(one_metrics), values(two_metrics), rtol=1e-5, atol=1e-6)


# --- optimizers -------------------------------------------------------------------------------------------------------


def test_tf1_adam_by_hand():
    """Two steps of θ ← θ − lr √(1 − b2ᵗ)/(1 − b1ᵗ) m/(√v + ε), in numpy."""
    grads, theta, m, v = [0.5, -0.02], 1.0, 0.0, 0.0
    optimizer = train.tf1_adam(0.1, b1=0.9, b2=0.99, eps=1e-2)
    params = {"w": jnp.asarray(1.0)}
    state = optimizer.init(params)
    for t, g in enumerate(grads, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        theta -= 0.1 * np.sqrt(1 - 0.99**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-2)
        updates, state = optimizer.update({"w": jnp.asarray(g)}, state, params)
        params = optax.apply_updates(params, updates)
        assert float(params["w"]) == pytest.approx(theta, rel=1e-5)


@pytest.mark.parametrize(("gradient", "ratio"), [(1.0, 1.0), (1e-6, 29.0)])
def test_tf1_adam_first_step_against_optax(gradient, ratio):
    """TRAPS 30. For g ≪ ε the first steps are lr g/ε and lr √(1 − b2) g/ε, 1/√0.001 = 32 apart; at g = 1e-6, ε = 1e-5:
    (g/(g + ε)) / (√.001 g / (√.001 g + ε)) = 0.0909 / 0.003152 = 28.8. For g ≫ ε they agree."""

    def first(optimizer):
        return float(optimizer.update(jnp.asarray(gradient), optimizer.init(jnp.asarray(0.0)))[0])

    assert first(optax.adam(1e-3, eps=1e-5)) / first(train.tf1_adam(1e-3, eps=1e-5)) == pytest.approx(ratio, rel=0.01)


def test_tf1_adam_takes_a_schedule():
    optimizer = train.tf1_adam(optax.linear_schedule(1.0, 0.0, 2))
    state, params = optimizer.init(jnp.asarray(1.0)), jnp.asarray(1.0)
    sizes = []
    for _ in range(3):
        update, state = optimizer.update(jnp.asarray(1.0), state, params)
        sizes.append(abs(float(update)))
    assert sizes == pytest.approx([1.0, 0.5, 0.0], abs=1e-3)


def test_average_weights_by_hand():
    """0.75 · 4 + 0.25 · 8 = 5, then 0.75 · 5 + 0.25 · 0 = 3.75; decay 0 is the weights themselves (TRAPS 7)."""
    average, new = {"w": jnp.asarray([4.0])}, {"w": jnp.asarray([8.0])}
    average = train.average_weights(average, new, decay=0.75)
    assert float(average["w"][0]) == 5.0
    assert float(train.average_weights(average, {"w": jnp.zeros(1)}, decay=0.75)["w"][0]) == 3.75
    assert float(train.average_weights(average, new, decay=0.0)["w"][0]) == 8.0


def test_every_leaf_of_tf1_adams_state_can_be_donated():
    """mu and nu have buffers of their own: a donated state must not hold one twice."""
    optimizer = train.tf1_adam(1e-3)
    update = train.make_update(
        lambda params, x: (Mean(total=(params["w"] * x).sum(), weight=jnp.ones(())), {}), optimizer
    )
    state, _ = update(train.init_state({"w": jnp.ones(3)}, optimizer), jnp.ones(3))
    assert int(state.step) == 1


# --- bfloat16 parameters ----------------------------------------------------------------------------------------------


def test_small_updates_of_bfloat16_weights_add_up():
    """Updates of 1e-5 of weights near 1, whose neighbours in bfloat16 are 2^-7 apart: kept on average."""
    optimizer = optax.sgd(1e-5)
    start = jnp.full(20_000, 1.25, jnp.bfloat16)
    update = train.make_update(lambda params, batch: (Mean(total=params["w"].sum(), weight=batch.sum()), {}), optimizer)
    state = train.init_state({"w": start}, optimizer)
    for _ in range(100):
        state, _ = update(state, jnp.ones(1))
    moved = float(jnp.mean(state.params["w"].astype(jnp.float32) - 1.25))
    assert state.params["w"].dtype == jnp.bfloat16
    assert moved == pytest.approx(-100 * 1e-5, rel=0.15)  # ± 4 standard deviations of 20,000 roundings
    spacings = (1.25 - np.asarray(state.params["w"], np.float32)) / 2**-7
    assert np.isin(spacings, range(6)).all()


def test_bfloat16_rounding_is_a_function_of_the_key_and_leaves_what_needs_none():
    x = jnp.asarray([1.25, -3.0, 0.0, np.inf, -np.inf, np.nan, 1 + 2**-9, -1 - 2**-9], jnp.float32)
    like = x.astype(jnp.bfloat16)
    once, again = (train.rounded(x, like, jax.random.key(1)) for _ in range(2))
    np.testing.assert_array_equal(np.asarray(once, np.float32), np.asarray(again, np.float32))
    np.testing.assert_array_equal(np.asarray(once, np.float32)[:5], x[:5])
    assert np.isnan(once[5])
    many = jnp.broadcast_to(x[6], 8000)
    up = np.asarray(train.rounded(many, many.astype(jnp.bfloat16), jax.random.key(0)), np.float32)
    assert np.mean(up == 1 + 2**-7) == pytest.approx(0.25, abs=0.02)
    assert train.rounded(x, x, jax.random.key(0)) is x


def test_moments_and_averages_of_bfloat16_weights_are_float32():
    """b2 = 0.999 would leave a bfloat16 moment as it is, and so would an average with decay 0.999."""
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    state = train.init_state(params, optax.adamw(1e-3))
    kinds = {x.dtype for x in jax.tree.leaves(state.opt_state) if x.ndim}
    assert kinds == {jnp.dtype(jnp.float32)}
    average = train.average_weights(train.wide(params), {"w": jnp.full(3, 1.5, jnp.bfloat16)}, decay=0.999)
    np.testing.assert_allclose(average["w"], 1.0005, rtol=1e-6)


# --- what is not finite -----------------------------------------------------------------------------------------------

WEIGHTS = {"a": np.ones(2, np.float32), "b": np.full(3, 2.0, np.float32)}


def faulty(params, batch):
    """A loss of which the batch says what is wrong with it."""
    wrong = batch["wrong"].sum()  # 0: nothing, 1: the loss, 2: the gradient of b alone
    total = (params["a"] ** 2).sum() + jnp.where(wrong == 1, jnp.nan, 0.0)
    total += (params["b"] ** 2 + jnp.sqrt(jnp.where(wrong == 2, params["b"] * 0, 1.0))).sum()  # a slope of ∞ · 0
    return Mean(total=total, weight=batch["rows"].sum()), {}


def wrong(kind: float, rows: int = 4):
    return {"wrong": jnp.zeros(rows).at[0].set(kind), "rows": jnp.ones(rows)}


def breaking(learning_rate=0.1):
    """An optimizer whose second update divides by zero, as Adam's ε does in float16."""

    def update(grads, count, params=None):
        return jax.tree.map(lambda g: -learning_rate * g / jnp.where(count == 1, 0.0, 1.0) * 0, grads), count + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("rule", ["stop", "skip"])
def test_an_update_that_meets_what_is_not_finite_is_left_out_and_says_where(rule, microbatches):
    update = train.make_update(faulty, OPTIMIZER, microbatches=microbatches, on_nan=rule)
    plain = train.make_update(faulty, OPTIMIZER, microbatches=microbatches)
    state, same = (train.init_state(WEIGHTS, OPTIMIZER) for _ in range(2))
    for kind, expected in ((0, []), (1, [0]), (2, [2]), (0, [])):
        before = jax.tree.map(np.asarray, (state.params, state.opt_state))
        state, metrics = update(state, wrong(kind))
        faults = metrics.pop(train.FAULTS)
        assert np.flatnonzero(faults.leaves)[: len(expected)].tolist() == expected
        assert (float(faults.updates), float(faults.left_out)) == (1.0, float(bool(expected)))
        if expected:
            jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), before)
            same = dataclasses.replace(same, step=same.step + 1)
        else:
            same, other = plain(same, wrong(kind))
            assert values(metrics) == values(other)
    jax.tree.map(np.testing.assert_array_equal, state, same)  # the optimizer's count as well
    assert int(state.step) == 4


@pytest.mark.parametrize("rule", ["stop", "skip"])
def test_weights_that_would_not_be_finite(rule):
    optimizer = breaking()
    update = train.make_update(faulty, optimizer, on_nan=rule)
    state, _ = update(train.init_state(WEIGHTS, optimizer), wrong(0))
    state, metrics = update(state, wrong(0))
    faults = metrics[train.FAULTS]
    assert np.flatnonzero(faults.leaves).tolist() == [3, 4]  # the weights of a and b; loss and gradient are well
    assert float(faults.left_out) == float(rule == "skip")
    assert bool(np.isfinite(state.params["a"]).all()) == (rule == "skip")


def test_a_minibatch_that_is_left_out_does_not_end_the_others():
    """Its KL, which is not finite either, is not above the target."""

    def loss(params, batch):
        total, metrics = faulty(params, batch)
        return total, {**metrics, "policy/approxkl_avg": Mean(total=total.total * 0, weight=jnp.ones(()))}

    step = train.epochs_step(train.update_step(loss, OPTIMIZER, on_nan="stop"), epochs=2, minibatches=2, target_kl=0.1)
    state, metrics = jax.jit(step)(train.init_state(WEIGHTS, OPTIMIZER), wrong(1), jax.random.key(0))
    faults = metrics[train.FAULTS]
    assert (float(faults.updates), float(faults.left_out)) == (4.0, 2.0)  # one row of four, in one of two minibatches
    assert faults.leaves.tolist() == [2.0, 0.0, 0.0, 0.0, 0.0]
    assert np.isfinite(state.params["a"]).all()


@pytest.mark.parametrize("rule", ["stop", "skip"])
def test_the_watch_reads_one_step_late_and_says_step_and_leaf(rule):
    def faults(*leaves, left_out=1.0):
        flags = np.zeros(5, np.float32)
        flags[list(leaves)] = 1.0
        return {train.FAULTS: train.Faults(updates=np.float32(1), left_out=np.float32(left_out), leaves=flags)}

    watch = finite.Watch(rule, WEIGHTS, total=40, in_a_row=0, latest=lambda: 6)
    good = {"loss": Mean(total=1.0, weight=1.0)}
    logged = watch.take(7, good | faults(left_out=0.0))
    assert set(logged) == ({"loss", "updates/skipped"} if rule == "skip" else {"loss"})
    watch.take(8, good | faults(2, 4))
    watch.check()  # step 7, which is well
    if rule == "stop":
        watch.take(9, good | faults(left_out=0.0))
        with pytest.raises(finite.NotFiniteError) as error:
            watch.check()
        said = (
            "step 8: the gradient of b and the weights b are not finite. .* the checkpoint of step 6 is the last good"
        )
        assert re.match(said, str(error.value))
        return
    for step in range(9, 17):
        watch.take(step, good | faults(0, 1, 2))
    watch.settle()
    assert watch.in_a_row == 9
    watch.take(17, good | faults(0))
    with pytest.raises(finite.NotFiniteError, match=r"step 17: the loss is not finite, and the last 10 steps") as error:
        watch.settle()
    assert error.value.good
    watch.take(18, good | faults(left_out=0.0))
    watch.settle()
    assert watch.in_a_row == 0
