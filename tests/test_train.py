"""The update: exact with microbatches, donated, compiled once, the same on any mesh."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rljax import losses, models, objectives, sharding, train
from rljax.types import Mean, TrainState
from tests import tiny

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))


def preference_loss(**kwargs):
    return objectives.preference(tiny.model(), functools.partial(losses.dpo_loss, beta=0.1), **kwargs)


def step(loss_fn, batch, **kwargs):
    state = train.init_state(tiny.params(), OPTIMIZER)
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


@pytest.mark.parametrize("microbatches", [2, 4])
@pytest.mark.parametrize("objective", ["preference", "supervised"])
def test_microbatches_are_exact(objective, microbatches):
    """Uneven masks, unequal lengths, distinct prompts, one empty row: loss, gradient and every metric (TRAPS 3, 5)."""
    if objective == "preference":
        loss_fn, batch = preference_loss(nll_weight=0.5), tiny.pairs(empty=(5,))
    else:
        loss_fn, batch = objectives.supervised(tiny.model()), tiny.tokens(empty=(5,))
    whole, whole_metrics = step(loss_fn, batch)
    cut, cut_metrics = step(loss_fn, batch, microbatches=microbatches)
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
    state = train.init_state(tiny.params(), OPTIMIZER)
    kernel = state.params["embed"]["tokens"]
    train.make_update(preference_loss(), OPTIMIZER)(state, tiny.pairs())
    assert kernel.is_deleted()
    chex.assert_tree_all_finite(tiny.params())


def test_one_compile_for_many_steps():
    chex.clear_trace_counter()
    loss_fn = chex.assert_max_traces(preference_loss(), n=1)
    update = train.make_update(loss_fn, OPTIMIZER)
    state = train.init_state(tiny.params(), OPTIMIZER)
    for seed in range(3):
        state, _ = update(state, tiny.pairs(seed=seed))
    assert int(state.step) == 3


def test_unequal_microbatches_are_refused():
    with pytest.raises(ValueError, match="cannot be cut into 3"):
        step(preference_loss(), tiny.pairs(), microbatches=3)
    with pytest.raises(ValueError, match="at least 1"):
        train.make_update(preference_loss(), OPTIMIZER, microbatches=0)


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"tensor": 4, "fsdp": 2}])
def test_same_update_on_any_mesh(axes):
    loss_fn, batch = preference_loss(), tiny.pairs(empty=(3,))
    expected, expected_metrics = step(loss_fn, batch, microbatches=1)
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
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params())
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
