"""The completions of a prompt share it: the same numbers, with the prompt computed once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rljax import environments, groups, iteration, methods, rewards, settings
from rljax.types import Rollout, Tokens
from tests import tiny
from tests.test_iteration import KEY, even, prompts, sharp, worth

GRPO = functools.partial(settings.PolicyGradient, model="", data="", reward=len, max_completion=5)
ASKED = environments.question_answering(rewards.token_f1)


@pytest.mark.parametrize(
    ("changes", "shards", "expected", "together"),
    [
        ({}, 1, (4, 4), 4),
        ({"share_prompts": False}, 1, (1, 1), 4),
        ({"minibatches": 2, "microbatches": 2}, 2, (4, 4), 4),
        ({"minibatches": 2, "microbatches": 2}, 4, (4, 1), 4),  # no device has whole groups in a microbatch
        ({"minibatches": 16}, 1, (4, 1), 1),  # minibatches of half a group
        ({"environment": ASKED}, 1, (4, 4), 4),  # the copies of an episode begin alike
    ],
)
def test_what_is_shared(changes, shards, expected, together):
    """Sharing depends on the mesh and on microbatches; which rows a minibatch has does not."""
    run = GRPO(batch=8, group=4, **changes)
    assert groups.shares(run, shards) == expected
    assert groups.together(run) == together


def test_what_else_stands_beside_the_completions_is_not_shared():
    ptx = settings.PPO(model="", data="", reward=len, batch=8, group=4, pretrain_data="x.jsonl", pretrain_batch=8)
    assert groups.shares(ptx, 1) == (4, 1)


def made(kind, shares, **changes):
    """(run, what is sampled from, method) of four prompts with three completions each."""
    run = kind(
        **{"model": "", "data": "", "reward": len, "batch": 4, "group": 3, "max_completion": 5, "kl_loss": 0.1}
        | {"old_logps": "trainer", "minibatches": 2, "microbatches": 2, "epochs": 2, "missing_eos_penalty": 1.0}
        | changes
    )
    drawn = settings.sampling(run, (0, *range(5, 60, 5)))
    if kind is settings.PPO:
        head = {"kernel": jnp.linspace(-1, 1, tiny.model().config.hidden_size), "bias": jnp.ones(())}
        critic = (tiny.model(), {"model": sharp(2), "head": head}) if run.critic == "policy" else None
        method = methods.ppo(run, tiny.model(), sharp(), critic, drawn, shares)
    elif kind is settings.OnlinePreference:
        method = methods.preference(run, tiny.model(), sharp(), drawn, shares)
    else:
        method = methods.policy_gradient(run, tiny.model(), sharp(), drawn, shares)
    return run, drawn, method


def learned(kind, shares, **changes):
    """An iteration: metrics, parameters, what was made on the way."""
    run, drawn, method = made(kind, shares, **changes)
    optimizer = optax.sgd(0.1)
    asked = (rewards.on_device(even, params={"worth": jnp.ones(())}),)
    parts = iteration.build(run, tiny.model(), method, optimizer, asked, settings=drawn)
    whole = jax.jit(parts.whole).lower(
        iteration.init_learner(method.params, optimizer), sharp(1), worth(), prompts(), None, KEY
    )
    learner, metrics, trace = (compiled := whole.compile())(
        iteration.init_learner(method.params, optimizer), sharp(1), worth(), prompts(), None, KEY
    )
    assert compiled.cost_analysis()["flops"] > 0
    return {name: float(mean.value()) for name, mean in metrics.items()}, learner.train.params, trace


CASES = {
    "grpo": (settings.PolicyGradient, {"entropy_coef": 0.01}),
    "ppo": (settings.PPO, {}),
    "shared trunk": (settings.PPO, {"critic": "shared"}),
    "pairs": (settings.OnlinePreference, {"kl_loss": 0.0, "microbatches": 1}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_is_noted_of_completions_is_equal(name):
    """Log-probabilities of policy and reference, values: operation by operation, since each program runs once."""
    kind, changes = CASES[name]
    _, _, plain = made(kind, groups.NONE, **changes)
    asked = prompts()
    repeated = jax.tree.map(lambda x: np.repeat(np.asarray(x), 3, axis=0), asked)
    width, new = repeated.ids.shape[1], np.random.default_rng(0).integers(0, 61, (12, 5)).astype(np.int32)
    written = np.arange(5) < np.asarray([5, 1, 3, 0, 5, 5, 2, 4, 5, 1, 2, 3])[:, None]
    tokens = Tokens(
        ids=jnp.asarray(np.concatenate([repeated.ids, new], 1)),
        segments=jnp.asarray(np.concatenate([repeated.segments, written], 1).astype(np.int32)),
        mask=jnp.asarray(np.concatenate([np.zeros((12, width), bool), written], 1)),
    )
    rollout = Rollout(tokens=tokens, logps=jnp.zeros(tokens.ids.shape), finished=jnp.ones(12, bool))
    with jax.disable_jit():
        notes, same = (m.annotate(m.params, sharp(1), rollout) for m in (plain, made(kind, THREE, **changes)[2]))
    assert np.abs(np.asarray(notes.logps)).max() > 1
    assert (notes.values is None) == (kind is not settings.PPO)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4), notes, same)


THREE = groups.Shares(3, 3)


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_an_iteration_is_equal(name):
    kind, changes = CASES[name]
    plain, before, trace = learned(kind, groups.NONE, **changes)
    shared, after, same = learned(kind, THREE, **changes)
    np.testing.assert_array_equal(trace.rollout.tokens.ids, same.rollout.tokens.ids)
    assert plain.keys() == shared.keys()
    for metric, value in plain.items():
        np.testing.assert_allclose(shared[metric], value, rtol=2e-3, atol=2e-5, err_msg=metric)
    for a, b, start in zip(*map(jax.tree.leaves, (before, after)), jax.tree.leaves(before), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-5)
        assert start.shape == a.shape
    assert plain["grad_norm"] > 1e-3
