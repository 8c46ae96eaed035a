"""Rewards that are JAX functions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import rewards
from rljax.types import Tokens

TOKENS = Tokens(
    ids=jnp.asarray([[3, 5, 7, 9], [2, 4, 6, 8]]),
    segments=jnp.asarray([[1, 1, 1, 0], [1, 1, 1, 1]]),
    mask=jnp.asarray([[False, True, True, False], [False, False, True, True]]),
)


@rewards.on_device
def count(tokens):
    return tokens.mask.sum(1)


def test_weights_sums_and_per_token_rewards():
    each = rewards.on_device(lambda tokens: tokens.ids / 10, weight=-2.0, name="each")
    total, per_token, parts = rewards.judge_on_device([count, each], (None, None), TOKENS)
    np.testing.assert_allclose(parts["count"], [2.0, 2.0])
    np.testing.assert_allclose(parts["each"], [1.2, 1.4], rtol=1e-6)  # trained tokens only
    np.testing.assert_allclose(per_token, [[0, -1.0, -1.4, 0], [0, 0, -1.2, -1.6]], rtol=1e-6)
    np.testing.assert_allclose(total, [2 - 2.4, 2 - 2.8], rtol=1e-5)
    assert total.dtype == parts["count"].dtype == jnp.float32
    assert rewards.judge_on_device([count], (None,), TOKENS)[1] is None


def test_params_are_an_argument_of_the_program():
    table = rewards.on_device(lambda params, tokens: params["w"][tokens.ids].sum(1), params={"w": jnp.ones(100_000)})
    given = rewards.as_rewards(table)
    judge = jax.jit(functools.partial(rewards.judge_on_device, given))
    params = rewards.device_params(given)
    np.testing.assert_allclose(judge(params, TOKENS)[0], [4.0, 4.0])
    np.testing.assert_allclose(judge(jax.tree.map(lambda x: 2 * x, params), TOKENS)[0], [8.0, 8.0])
    assert len(judge.lower(params, TOKENS).as_text()) < 20_000  # a constant of 100 000 numbers would be in it


def test_a_wrong_shape_is_named():
    bad = rewards.on_device(lambda tokens: tokens.ids[:, :2], name="bad")
    with pytest.raises(ValueError, match=r"on-device reward bad returned an array of shape \(2, 2\).*\(2,\).*\(2, 4\)"):
        rewards.judge_on_device([bad], (None,), TOKENS)


def test_host_and_device_rewards_together():
    each = rewards.on_device(lambda tokens: tokens.ids / 10, weight=-2.0, name="each")
    judged = jax.device_get(rewards.judge_on_device([count, each], (None, None), TOKENS))
    nan = np.nan
    host = rewards.Scores(np.float32([0.5, nan]), None, {"host": np.float32([0.5, nan])})
    merged = rewards.merge(host, *judged, np.asarray(TOKENS.mask))
    np.testing.assert_allclose(merged.total, [0.5 + 2 - 2.4, 2 - 2.8], rtol=1e-5)
    assert merged.total.dtype == np.float32
    assert list(merged.parts) == ["host", "count", "each"]
    wanted = [[-1.0, -1.4], [-1.2, -1.6]]
    np.testing.assert_allclose(merged.per_token, wanted, rtol=1e-6)
    host = host._replace(per_token=[np.float32([1, 1]), np.float32([0, 2])])
    np.testing.assert_allclose(
        rewards.merge(host, *judged, np.asarray(TOKENS.mask)).per_token, np.add(wanted, [[1, 1], [0, 2]]), rtol=1e-6
    )
    alone = jax.device_get(rewards.judge_on_device([count], (None,), TOKENS))
    assert rewards.merge(host._replace(per_token=None), *alone, np.asarray(TOKENS.mask)).per_token is None


def test_a_monitor_on_the_device_does_not_make_a_row_count():
    def merged(host_weight, device_weight):
        seen = rewards.on_device(lambda tokens: tokens.mask.sum(1), weight=device_weight, name="seen")
        judged = jax.device_get(rewards.judge_on_device([seen], (None,), TOKENS))
        host = rewards.reward(lambda prompts, completions: [0.5, None], weight=host_weight, name="host")
        said = np.asarray([0.5, np.nan], np.float32)
        scores = rewards.Scores(host_weight * said, None, {"host": said})
        return rewards.merge(scores, *judged, np.asarray(TOKENS.mask), [host, seen]).total

    np.testing.assert_array_equal(merged(1.0, 0.0), [0.5, np.nan])
    np.testing.assert_array_equal(merged(1.0, 2.0), [4.5, 4.0])
    np.testing.assert_array_equal(merged(0.0, 2.0), [4.0, 4.0])
    np.testing.assert_array_equal(merged(0.0, 0.0), [0.0, 0.0])  # where all are monitors all decide
