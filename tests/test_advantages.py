"""Advantage estimators against plain loops, and the traps of padding, groups and normalisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import advantages

RNG = np.random.default_rng(0)
REWARDS, VALUES = RNG.normal(size=(2, 4, 7)).astype(np.float32)
MASK = np.asarray(
    [[0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1, 0], [0] * 7, [1, 0, 0, 0, 0, 0, 1]], bool
)  # a prompt; a tool call inside the response and padding after it; an empty row; a gap


def gae_loop(rewards, values, mask, gamma, lam):
    result = np.zeros_like(rewards)
    for row in range(len(rewards)):
        advantage = next_value = 0.0
        for t in reversed(np.flatnonzero(mask[row])):
            delta = rewards[row, t] + gamma * next_value - values[row, t]
            advantage = result[row, t] = delta + gamma * lam * advantage
            next_value = values[row, t]
    return result


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.9, 0.0), (0.9, 1.0), (0.0, 0.5)])
def test_gae_against_a_loop(gamma, lam):
    expected = gae_loop(REWARDS, VALUES, MASK, gamma, lam)
    got, returns = jax.jit(advantages.gae)(REWARDS, VALUES, MASK, gamma=gamma, lam=lam)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(returns, np.where(MASK, expected + VALUES, 0.0), rtol=1e-5, atol=1e-6)


def test_trap_10_gae_only_estimates():
    # no whitening; a pad after the response is no bootstrap; a tool token is no time step; left padding shifts nothing
    row = advantages.gae(np.ones((1, 3)), np.zeros((1, 3)), np.ones((1, 3), bool), gamma=0.5, lam=1.0)[0]
    np.testing.assert_allclose(row, [[1.75, 1.5, 1.0]])
    rewards, values = (np.insert(x[:1, 1:], (0, 0, 3, 6), 1e6, axis=1) for x in (REWARDS, VALUES))
    mask = np.insert(MASK[:1, 1:], (0, 0, 3, 6), False, axis=1)
    for wide, narrow in zip(
        advantages.gae(rewards, values, mask, gamma=0.9, lam=0.7),
        advantages.gae(REWARDS[:1, 1:], VALUES[:1, 1:], MASK[:1, 1:], gamma=0.9, lam=0.7),
        strict=True,
    ):
        np.testing.assert_allclose(np.asarray(wide)[mask], narrow[0], rtol=1e-6)
        assert not np.any(np.asarray(wide)[~mask])


def test_gae_at_lambda_one_ignores_the_critic():
    monte_carlo = advantages.discounted_returns(REWARDS, MASK, gamma=0.9)
    for values in (VALUES, 7 * VALUES, np.zeros_like(VALUES)):
        returns = advantages.gae(REWARDS, values, MASK, gamma=0.9, lam=1.0)[1]
        np.testing.assert_allclose(returns, monte_carlo, rtol=1e-4, atol=1e-5)


def test_gae_under_vmap_over_lambda():
    lams = jnp.asarray([0.0, 0.5, 1.0])
    sweep = jax.vmap(lambda lam: advantages.gae(REWARDS, VALUES, MASK, gamma=0.9, lam=lam)[0])(lams)
    for one, lam in zip(sweep, lams, strict=True):
        np.testing.assert_allclose(one, gae_loop(REWARDS, VALUES, MASK, 0.9, float(lam)), rtol=1e-4, atol=1e-5)


def test_trap_04_fractional_rewards_survive_and_integers_become_floats():
    mask = np.ones((1, 2), bool)
    for rewards in (np.asarray([[0, 1]]), jnp.asarray([[0, 1]], jnp.int32), np.asarray([[0.0, 1.0]])):
        returns = advantages.discounted_returns(rewards, mask, gamma=0.7)
        assert returns.dtype == jnp.float32
        np.testing.assert_allclose(returns, [[0.7, 1.0]], rtol=1e-6)
    shaped = advantages.shape_rewards(np.asarray([1]), np.zeros((1, 2)), np.full((1, 2), 0.3), mask, kl_coef=0.5)
    np.testing.assert_allclose(shaped, [[0.15, 1.15]], rtol=1e-6)
    np.testing.assert_allclose(advantages.leave_one_out(np.asarray([[0, 1]])), [[-1.0, 1.0]])
    np.testing.assert_allclose(advantages.group_relative(np.asarray([[0, 1]]), divide_by_std=False), [[-0.5, 0.5]])
    negative = advantages.shape_rewards(np.asarray([-0.7]), np.zeros((1, 2)), np.zeros((1, 2)), mask, kl_coef=0.0)
    np.testing.assert_allclose(negative, [[0.0, -0.7]])


def test_the_score_lands_on_the_last_trained_token():
    zero = np.zeros(MASK.shape)
    scores = np.asarray([1.0, 2.0, np.nan, 4.0])
    shaped = advantages.shape_rewards(scores, zero, zero, MASK, kl_coef=0.1)
    expected = zero.copy()
    expected[[0, 1, 3], [6, 5, 6]] = [1.0, 2.0, 4.0]
    np.testing.assert_array_equal(shaped, expected)


def test_shape_rewards_with_every_estimator():
    logps, ref = np.asarray([[-1.0, -1.0]]), np.asarray([[-1.5, -0.5]])
    mask = np.ones((1, 2), bool)
    for estimator, first in [("k1", 0.5), ("k2", 0.125), ("k3", np.exp(-0.5) - 0.5)]:
        shaped = advantages.shape_rewards(np.zeros(1), logps, ref, mask, kl_coef=2.0, estimator=estimator)
        assert shaped[0, 0] == pytest.approx(-2 * first, rel=1e-5)
    with pytest.raises(ValueError, match="Unknown KL estimator 'k9'"):
        advantages.shape_rewards(np.zeros(1), logps, ref, mask, kl_coef=2.0, estimator="k9")


GROUPS = np.asarray([[1.0, 2.0, 3.5, -4.0], [0.0, 0.0, 1.0, 0.0], [0.1, 0.1, 0.1, 0.1]], np.float32)


@pytest.mark.parametrize("divide", [True, False])
def test_a_constant_per_prompt_changes_no_group_advantage(divide):
    shifted = advantages.group_relative(GROUPS + np.asarray([[5.0], [-3.0], [0.0]], np.float32), divide_by_std=divide)
    np.testing.assert_allclose(shifted, advantages.group_relative(GROUPS, divide_by_std=divide), rtol=1e-4, atol=1e-6)


def test_scaling_rewards_leaves_grpo_and_not_dr_grpo():
    def grpo(x):
        return advantages.group_relative(x, divide_by_std=True, eps=0.0)

    def dr_grpo(x):
        return advantages.group_relative(x, divide_by_std=False)

    np.testing.assert_allclose(grpo(10 * GROUPS), grpo(GROUPS), rtol=1e-5)
    np.testing.assert_allclose(dr_grpo(10 * GROUPS), 10 * dr_grpo(GROUPS), rtol=1e-5)


def test_group_std_against_numpy():
    for ddof in (0, 1):
        got = advantages.group_relative(GROUPS[:2], divide_by_std=True, ddof=ddof, eps=1e-4)
        centred = GROUPS[:2] - GROUPS[:2].mean(1, keepdims=True)
        np.testing.assert_allclose(got, centred / (GROUPS[:2].std(1, ddof=ddof, keepdims=True) + 1e-4), rtol=1e-5)


def test_equal_rewards_and_single_samples_give_zero_for_any_eps():
    for eps in (1e-4, 0.0):
        for group in (GROUPS[2:], np.asarray([[7.0]]), np.asarray([[0.1, 0.1, 0.1]])):
            value, slope = jax.value_and_grad(
                lambda x, e=eps: jnp.abs(advantages.group_relative(x, divide_by_std=True, eps=e)).sum()
            )(group)
            assert value == 0.0
            assert np.isfinite(slope).all()


def test_rloo_is_a_multiple_of_dr_grpo():
    rloo, dr_grpo = advantages.leave_one_out(GROUPS), advantages.group_relative(GROUPS, divide_by_std=False)
    np.testing.assert_allclose(rloo, 4 / 3 * dr_grpo, rtol=1e-5, atol=1e-6)
    loop = [[x - np.delete(row, i).mean() for i, x in enumerate(row)] for row in GROUPS]
    np.testing.assert_allclose(rloo, loop, rtol=1e-5, atol=1e-6)


def test_trap_03_groups_do_not_see_each_other():
    for function in (lambda x: advantages.group_relative(x, divide_by_std=True), advantages.leave_one_out):
        one_by_one = np.concatenate([function(GROUPS[i : i + 1]) for i in range(3)])
        np.testing.assert_array_equal(function(GROUPS), one_by_one)
        permuted = function(GROUPS[:, ::-1])
        np.testing.assert_allclose(permuted[:, ::-1], function(GROUPS), rtol=1e-5, atol=1e-6)


def test_leave_one_out_needs_others():
    with pytest.raises(ValueError, match="sample 2 or more"):
        advantages.leave_one_out(np.ones((3, 1)))


def test_trap_07_zero_coefficients():
    ones, mask = np.ones((1, 2)), np.ones((1, 2), bool)
    assert advantages.gae(ones, ones, mask, gamma=0.0, lam=0.0)[0].tolist() == [[0.0, 0.0]]
    assert advantages.discounted_returns(ones, mask, gamma=0.0).tolist() == [[1.0, 1.0]]
    assert advantages.shape_rewards(np.ones(1), ones, 0 * ones, mask, kl_coef=0.0).tolist() == [[0.0, 1.0]]
    assert advantages.adaptive_kl(0.0, 9.0, target=6.0, horizon=10, batch_size=1) == 0.0
    for options in ({"target": 0.0, "horizon": 10}, {"target": 6.0, "horizon": 0}):
        with pytest.raises(ValueError, match="above 0"):
            advantages.adaptive_kl(0.2, 6.0, batch_size=1, **options)


def test_adaptive_kl_rests_at_its_target_and_steps_by_a_fifth_at_most():
    def step(kl):
        return float(advantages.adaptive_kl(0.15, kl, target=6.0, horizon=10_000, batch_size=10_000))

    assert step(6.0) == pytest.approx(0.15)
    assert step(600.0) == pytest.approx(0.18)
    assert step(0.0) == pytest.approx(0.12)
    assert step(6.6) == pytest.approx(0.165)


def test_greedy_baseline_and_reward_to_go_are_what_their_names_say():
    """ReMax knows its prompt's greedy score alone; rewards to come are a sum that whitening, not gamma, brings down."""
    rewards, greedy = RNG.normal(size=(3, 4)).astype(np.float32), RNG.normal(size=3).astype(np.float32)
    found = advantages.greedy_baseline(rewards, greedy)
    np.testing.assert_allclose(found, rewards - greedy[:, None], rtol=1e-6)
    moved = advantages.greedy_baseline(rewards + 7, greedy + 7)
    np.testing.assert_allclose(moved, found, atol=1e-5)
    for gamma in (1.0, 0.9, 0.0):
        expected = np.zeros_like(REWARDS)
        for row, where in enumerate(MASK):
            later = 0.0
            for t in np.flatnonzero(where)[::-1]:
                later = expected[row, t] = REWARDS[row, t] + gamma * later
        np.testing.assert_allclose(advantages.reward_to_go(REWARDS, MASK, gamma=gamma), expected, rtol=1e-5, atol=1e-6)


def test_adaptive_kl_with_a_traced_coefficient_and_no_kl():
    """TRAPS 7: a KL of 0 is a measurement, and a target of 0 is refused."""
    step = jax.jit(lambda coef, kl: advantages.adaptive_kl(coef, kl, target=6.0, horizon=100, batch_size=10))
    assert float(step(0.2, 0.0)) == pytest.approx(0.2 * (1 - 0.2 * 0.1))
    assert float(step(0.0, 12.0)) == 0.0
    with pytest.raises(ValueError, match="target is 0"):
        advantages.adaptive_kl(0.2, 1.0, target=0.0, horizon=100, batch_size=10)
