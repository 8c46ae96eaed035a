"""One iteration as pure functions: whole equals its parts, exact at the start, all state moves as the papers say."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rljax import advantages, iteration, losses, methods, policy, rewards, selfchecks, settings, shaping
from rljax.filters import Sampling
from rljax.types import Mean
from tests import tiny

pytestmark = pytest.mark.slow

STOPS = (0, *range(5, 60, 5))  # the first is also the id that prompts are padded with
FILTERED = {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.001, "min_new_tokens": 2}
KEY = jax.random.key(3)


TRACES = []  # of the reward


def even(params, tokens):
    """A reward of single tokens, with a weight that can be poisoned: 0.5 for every even id, −0.25 for an odd one."""
    TRACES.append(tokens.ids.shape)
    return jnp.where(tokens.ids % 2 == 0, 0.5, -0.25) * params["worth"]


def worth(value: float = 1.0):
    return ({"worth": jnp.full((), value, jnp.float32)},)


def sharp(seed: int = 0):
    """A policy with opinions, that often writes the stop token."""
    return jax.tree.map(lambda x: x * 1.5, tiny.params(seed))


def prompts():
    """Four prompts of 2 to 6 tokens, left-padded."""
    rng = np.random.default_rng(8)
    ids = [rng.integers(1, 61, n).astype(np.int32) for n in (2, 6, 3, 5)]
    return jax.tree.map(jnp.asarray, policy.left_pad(ids, rows=4, width=6))


class Made(NamedTuple):
    run: Any
    method: methods.Method
    parts: iteration.Iteration
    learner: iteration.Learner
    sampling: Sampling
    optimizer: Any


def build(kind, **changes) -> Made:
    common = {"model": "", "data": "", "reward": len, "batch": 4, "max_completion": 5, "old_logps": "trainer"}
    run = kind(**common | changes)
    drawn, params = settings.sampling(run, STOPS), sharp()
    optimizer = optax.adam(1e-2)
    if kind is settings.PPO:
        method = methods.ppo(run, tiny.model(), params, None, drawn)
    else:
        method = methods.policy_gradient(run, tiny.model(), params, drawn)
    asked = (rewards.on_device(even, params={"worth": jnp.ones(())}, weight=2.0),)
    parts = iteration.build(run, tiny.model(), method, optimizer, asked, settings=drawn)
    learner = iteration.init_learner(method.params, optimizer, ema=run.ema is not None)
    return Made(run, method, parts, learner, drawn, optimizer)


def values(metrics):
    return {name: float(mean.value()) for name, mean in metrics.items()}


def test_fewer_slots_are_another_sampler():
    """Which writes the same, as tests/test_sampling.py has it."""

    def rollout(slots):
        made = build(settings.PolicyGradient, group=2, slots=slots)
        return jax.jit(made.parts.sample).trace(made.learner.train.params, prompts(), KEY)

    refilled, plain = rollout(4), rollout(None)
    assert refilled.out_info == plain.out_info
    assert str(refilled.jaxpr) != str(plain.jaxpr)


@pytest.mark.long
@pytest.mark.parametrize("alone", [False, True])
def test_coefficients_can_be_swept(alone):
    """The KL's coefficient and the entropy's are numbers like any other: a sweep over them is one program."""
    reference = sharp(1), sharp()  # kept before anything is traced

    def moved(kl, entropy):
        made = build(settings.PolicyGradient, group=2, kl_reward=kl, kl_loss=kl, entropy_coef=entropy)
        start = made.learner
        learner, metrics, _ = made.parts.whole(start, reference[0], worth(), prompts(), None, KEY)
        return metrics["objective/kl_coef"].value(), optax.tree.norm(
            optax.tree.sub(learner.train.params, start.train.params)
        )

    found, steps = jax.jit(jax.vmap(moved))(jnp.asarray([0.1, 0.1, 0.3]), jnp.asarray([0.01, 0.5, 0.01]))
    np.testing.assert_allclose(found, [0.1, 0.1, 0.3], rtol=1e-6)
    if alone:
        np.testing.assert_allclose(steps[1], jax.jit(lambda: moved(0.1, 0.5))()[1], rtol=1e-4)
    assert len(set(np.asarray(steps).tolist())) == 3


def test_a_kl_that_was_not_measured_moves_no_coefficient():
    """No reward applied to any row: the mean over no rows is 0, and says nothing about the KL."""
    run = settings.PPO(model="", data="", reward=len, kl_target=6.0)
    for weight, expected in ((0.0, 1.5), (8.0, 1.5 * (1 - 0.2 * 8 / run.kl_horizon))):
        metrics = {"objective/kl": Mean(total=jnp.zeros(()), weight=jnp.asarray(weight))}
        assert float(iteration._next_factor(run, jnp.asarray(1.5), metrics, 8)) == pytest.approx(expected, rel=1e-6)


# --- PPO with everything that has a state -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ppo() -> Made:
    return build(
        settings.PPO,
        critic="shared",
        epochs=2,
        minibatches=2,
        ema=0.9,
        kl_reward=0.2,
        kl_target=0.5,
        kl_horizon=40,
        normalize_running=True,
    )


@pytest.fixture(scope="module")
def whole(ppo):
    return jax.jit(ppo.parts.whole)


@pytest.fixture(scope="module")
def two(ppo, whole):
    """Two iterations: (learner, metrics, trace) after each."""
    found, learner = [], ppo.learner
    for number in range(2):
        found.append(whole(learner, sharp(), worth(), prompts(), None, jax.random.fold_in(KEY, number)))
        learner = found[-1][0]
    return found


def test_whole_equals_its_parts(ppo, two):
    """sample → annotate → judge → learn, each compiled alone, with the same key."""
    key = jax.random.fold_in(KEY, 0)
    rollout = jax.jit(ppo.parts.sample)(ppo.method.params, prompts(), key)
    notes = jax.jit(ppo.parts.annotate)(ppo.method.params, sharp(), rollout)
    mask = np.asarray(rollout.tokens.mask)
    single = np.where(mask, np.where(np.asarray(rollout.tokens.ids) % 2 == 0, 0.5, -0.25), 0).astype(np.float32)
    total = 2 * single.sum(1)
    verdict = iteration.Verdict(
        total=jnp.asarray(total), parts={"even": jnp.asarray(total / 2)}, per_token=jnp.asarray(2 * single)
    )
    learner, metrics, trace = jax.jit(ppo.parts.learn)(ppo.learner, rollout, notes, verdict, None, key)
    expected, expected_metrics, expected_trace = two[0]
    np.testing.assert_array_equal(rollout.tokens.ids, expected_trace.rollout.tokens.ids)
    chex.assert_trees_all_close(trace, expected_trace, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(learner, expected, rtol=1e-3, atol=1e-4)
    assert values(metrics) == pytest.approx(values(expected_metrics), rel=1e-3, abs=1e-5)


def test_everything_that_has_a_state_moves_by_its_formula(ppo, two):
    before = ppo.learner
    for number, (learner, metrics, trace) in enumerate(two, start=1):
        found, total = values(metrics), np.asarray(trace.verdict.total)
        assert int(learner.iterations) == number
        assert int(learner.train.step) == 4 * number
        assert found["policy/updates"] == 4
        # the controller sees this iteration's KL, and counts its episodes
        factor = advantages.adaptive_kl(before.kl_factor, found["objective/kl"], target=0.5, horizon=40, batch_size=4)
        assert float(learner.kl_factor) == pytest.approx(float(factor), rel=1e-6)
        assert found["objective/kl_coef"] == pytest.approx(0.2 * float(before.kl_factor), rel=1e-6)
        seen = shaping.update_moments(before.moments, jnp.asarray(total), jnp.ones(4, bool))
        chex.assert_trees_all_close(learner.moments, seen, rtol=1e-5)
        assert found["objective/scores"] == pytest.approx(total.mean() / np.sqrt(float(seen.variance())), rel=1e-4)
        average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, before.ema, learner.train.params["policy"])
        chex.assert_trees_all_close(learner.ema, average, rtol=1e-5, atol=1e-6)
        before = learner
    # no KL at first, so an error of −20% (at most), times 4 of 40 episodes
    assert float(two[0][0].kl_factor) == pytest.approx(0.98)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), two[0][0].train.params, ppo.learner.train.params)
    assert min(jax.tree.leaves(moved["policy"])) > 0
    assert float(jnp.abs(two[0][0].train.params["head"]["kernel"]).max()) > 0


def test_at_the_start_the_kl_is_exactly_zero_and_values_too(two):
    """The trainer computes both sides (TRAPS 20, 24); the critic starts at 0."""
    _, metrics, trace = two[0]
    assert values(metrics)["objective/kl"] == 0.0
    np.testing.assert_array_equal(trace.notes.logps, trace.notes.ref_logps)
    assert not np.asarray(trace.notes.values).any()
    assert values(two[1][1])["objective/kl"] != 0.0


def test_fractional_and_negative_rewards_of_single_tokens_survive(two):
    """TRAPS 4: each token's, twice its worth as the weight says, and the sum is the row's."""
    _, metrics, trace = two[0]
    mask, said = np.asarray(trace.rollout.tokens.mask), np.asarray(trace.verdict.per_token)
    assert set(np.unique(said[mask]).tolist()) == {1.0, -0.5}
    assert not said[~mask].any()
    np.testing.assert_allclose(trace.verdict.total, said.sum(1), rtol=1e-6)
    assert values(metrics)["rewards/even/mean"] == pytest.approx(said.sum(1).mean() / 2, rel=1e-5)
    assert values(metrics)["rewards/even/std"] == pytest.approx(said.sum(1).std() / 2, rel=1e-4)
    assert values(metrics)["rewards/none_ratio"] == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_reward_that_is_not_finite_changes_nothing(ppo, whole, value):
    """No weight, no moment, no counter: the iteration can be done again once the reward is mended."""
    learner, metrics, trace = whole(ppo.learner, sharp(), worth(value), prompts(), None, KEY)
    chex.assert_trees_all_equal(learner, ppo.learner)
    assert all(float(mean.weight) == 0 for mean in metrics.values())
    assert not np.isfinite(np.asarray(trace.verdict.total)).any()
    assert np.asarray(trace.rollout.tokens.mask).any(1).all()  # what was written is there to look at


def test_one_compile_for_all_iterations(whole, two):
    traced = len(TRACES)
    whole(two[1][0], sharp(1), worth(2.0), prompts(), None, jax.random.key(9))
    assert len(TRACES) == traced


# --- a group method under filters, with one update --------------------------------------------------------------------


@pytest.fixture(scope="module")
def group() -> Made:
    return build(settings.PolicyGradient, group=3, log_kl=True, importance_cap=2.0, **FILTERED)


@pytest.fixture(scope="module")
def step(group):
    return jax.jit(group.parts.whole)


@pytest.fixture(scope="module")
def once(group, step):
    """One iteration on the first learner."""
    return step(group.learner, sharp(), worth(), prompts(), None, KEY)


def test_sampler_and_trainer_see_one_distribution(once, group):
    """Temperature, top-k, top-p, min-p and a minimum length at once (TRAPS 20–22)."""
    _, metrics, trace = once
    found, mask = values(metrics), np.asarray(trace.rollout.tokens.mask)
    np.testing.assert_allclose(trace.notes.logps, trace.rollout.logps, atol=1e-4)
    assert found["sampling/logp_difference"] < 1e-5
    assert found["objective/kl"] == 0.0
    assert found["val/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert found["policy/approxkl_avg"] == pytest.approx(0.0, abs=1e-10)
    assert found["policy/clipfrac_avg"] == 0.0
    np.testing.assert_allclose(trace.batch.importance, mask, atol=1e-4)
    assert np.asarray(trace.rollout.logps)[mask].min() < -0.5  # there was something to draw
    wrong = jax.jit(methods.policy_gradient(group.run, tiny.model(), sharp(), Sampling()).annotate)
    assert np.abs(np.asarray(wrong(sharp(), None, trace.rollout).logps) - trace.rollout.logps).max() > 0.1


def test_the_self_check_is_exact_on_both_sides(once, group):
    """KL 0 and ratio 1, to the bit, at T ≠ 1 and with filters; another reference is found out."""
    rollout = jax.device_get(once[2].rollout)
    look = jax.jit(lambda params, tokens: group.method.look(params, tokens).logps)
    good = selfchecks.same_policy(look, sharp(), sharp(), rollout)
    assert good.passed
    assert "KL of a first rollout 0, ratios 1 to 1" in good.said
    assert not selfchecks.same_policy(look, sharp(), sharp(1), rollout).passed


def test_stop_tokens_are_trained_once_though_padding_has_their_id(once):
    """TRAPS 13, 16: pad is eos here. What was sampled is trained, up to the first stop, and not before 2 tokens."""
    tokens, finished = once[2].rollout.tokens, np.asarray(once[2].rollout.finished)
    ids, mask, segments = (np.asarray(x) for x in (tokens.ids, tokens.mask, tokens.segments))
    assert finished.any()
    assert not mask[:, :6].any()
    for row, done in zip(range(12), finished, strict=True):
        new, trained = ids[row, 6:], mask[row, 6:]
        length = int(trained.sum())
        assert trained.tolist() == [True] * length + [False] * (5 - length)
        stops = np.flatnonzero(np.isin(new, STOPS) & trained)
        assert stops.tolist() == ([length - 1] if done else [])
        assert length >= 2
        assert length == 5 or done
        assert not segments[row, 6 + length :].any()
    # padding has a stop token's id, before the prompts and after the ends
    assert (ids[segments == 0] == 0).all()
    assert (segments[:, 0] == 0).any()


def test_groups_stand_beside_their_prompt(once):
    """Distinct prompts: rows 3i, 3i + 1, 3i + 2 continue prompt i, and each is compared with those two (TRAPS 3)."""
    tokens, batch, total = once[2].rollout.tokens, once[2].batch, np.asarray(once[2].verdict.total)
    np.testing.assert_array_equal(np.asarray(tokens.ids)[:, :6], np.repeat(np.asarray(prompts().ids), 3, axis=0))
    groups = total.reshape(4, 3)
    expected = (groups - groups.mean(1, keepdims=True)) / (groups.std(1, ddof=1, keepdims=True) + 1e-4)
    first = np.asarray(batch.advantages)[:, 6]
    np.testing.assert_allclose(first, expected.ravel(), rtol=1e-4, atol=1e-5)
    assert len(np.unique(np.asarray(tokens.ids)[:3, 6:], axis=0)) > 1  # the n samples of a prompt differ


@pytest.mark.long
def test_vmap_over_seeds(group, step):
    """A sweep is one program: each seed gets what it gets alone."""
    keys = jax.random.split(KEY, 2)
    learners = [
        iteration.init_learner(jax.tree.map(lambda x, s=s: x * s, sharp()), group.optimizer) for s in (1.0, 1.1)
    ]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *learners)
    many = jax.jit(jax.vmap(group.parts.whole, in_axes=(0, None, None, None, None, 0)))
    together, metrics, _ = many(stacked, sharp(), worth(), prompts(), None, keys)
    for i, (learner, key) in enumerate(zip(learners, keys, strict=True)):
        expected, expected_metrics, _ = step(learner, sharp(), worth(), prompts(), None, key)
        found = jax.tree.map(lambda x, i=i: x[i], (together, metrics))
        assert values(found[1]) == pytest.approx(values(expected_metrics), rel=1e-3, abs=1e-4)
        chex.assert_trees_all_close(found[0].train.params, expected.train.params, atol=2e-3)


# --- the greedy baseline ----------------------------------------------------------------------------------------------


@pytest.mark.long
def test_remax_in_one_program():
    """The baseline of every row is the reward of its prompt's greedy completion."""
    made = build(
        settings.PolicyGradient,
        group=2,
        advantage=advantages.greedy_baseline,
        loss=losses.reinforce_loss,
        aggregate="seq_mean_token_sum",
    )
    learner, metrics, trace = jax.jit(made.parts.whole)(made.learner, None, worth(), prompts(), None, KEY)
    greedy = jax.jit(made.parts.sample_greedy)(made.method.params, prompts())
    scores = 2 * np.where(greedy.tokens.mask, np.where(np.asarray(greedy.tokens.ids) % 2 == 0, 0.5, -0.25), 0).sum(1)
    np.testing.assert_allclose(trace.verdict.greedy.total, np.repeat(scores, 2), rtol=1e-5)
    np.testing.assert_array_equal(trace.verdict.greedy.lengths, np.repeat(np.asarray(greedy.tokens.mask).sum(1), 2))
    first = np.asarray(trace.batch.advantages)[:, 6]
    np.testing.assert_allclose(first, np.asarray(trace.verdict.total) - np.repeat(scores, 2), rtol=1e-5, atol=1e-6)
    assert int(learner.iterations) == 1
    assert np.isfinite(values(metrics)["loss"])
