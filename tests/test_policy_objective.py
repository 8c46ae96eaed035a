"""The objective on rollouts: every term by hand, its gradient by finite differences, metrics without padding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import losses, models, objectives, views
from rljax.filters import Sampling
from rljax.objectives.online import clipped_tokens, is_ratio_loss, surrogate_inputs
from tests import tiny

LOOK = {"sampling": Sampling(), "max_trained": 12}


def batch(**changes):
    """Rollouts with a reference, a critic's numbers and importance weights; row 5 is empty."""
    made, rng = tiny.rollouts(empty=(5,)), np.random.default_rng(9)
    mask = made.tokens.mask
    ref, old_values, returns, weights = (jnp.where(mask, x, 0.0) for x in rng.normal(0, 1, (4, *mask.shape)))
    return dataclasses.replace(
        made,
        ref_logps=made.old_logps + 0.3 * ref,
        old_values=old_values,
        returns=returns,
        importance=jnp.exp(0.2 * weights) * mask,
        kl_coef=jnp.full(len(mask), 0.05),
        pretrain=tiny.tokens(4, 12, seed=5),
        **changes,
    )


def params():
    head = models.scalar_head(61).init(jax.random.key(2))
    return {"policy": tiny.bigram_params(), "head": head | {"bias": jnp.asarray(0.3)}}


def objective(look=None, **options):
    look = look or views.with_value_head(tiny.bigram(), **LOOK, entropy=True)
    settings = {
        "entropy_coef": 0.02,
        "value_loss": functools.partial(losses.value_clip_loss, clip=0.3),
        "value_coef": 0.5,
        "pretrain": (tiny.bigram(), 2.0),
    }
    return objectives.policy(look, losses.ppo_clip_loss, **settings | options)


def by_hand(tree, data, aggregate):
    """(objective, metrics) in numpy, a token at a time."""
    table, head = np.asarray(tree["policy"]["table"], np.float64), tree["head"]
    ids, mask = np.asarray(data.tokens.ids), np.asarray(data.tokens.mask)
    terms, rows = {}, [[] for _ in ids]
    for i, t in zip(*np.nonzero(mask), strict=True):
        logits = table[ids[i, t - 1]]
        logps = logits - np.log(np.exp(logits).sum())
        logp, entropy = logps[ids[i, t]], -(np.exp(logps) * logps).sum()
        value = logits @ np.asarray(head["kernel"], np.float64) + float(head["bias"])
        old, a, ref = (float(x[i, t]) for x in (data.old_logps, data.advantages, data.ref_logps))
        ratio = np.exp(logp - old)
        plain, clipped = -a * ratio, -a * np.clip(ratio, 0.8, 1.2)
        surrogate = max(plain, clipped) * float(data.importance[i, t])
        kl = np.exp(ref - logp) - 1 - (ref - logp)
        before, goal = float(data.old_values[i, t]), float(data.returns[i, t])
        near = before + np.clip(value - before, -0.3, 0.3)
        value_loss = 0.5 * max((value - goal) ** 2, (near - goal) ** 2)
        rows[i].append(surrogate + 0.05 * kl - 0.02 * entropy + 0.5 * value_loss)
        for name, number in {
            "loss/policy_avg": surrogate,
            "loss/kl_avg": kl,
            "policy/entropy_avg": entropy,
            "loss/value_avg": value_loss,
            "policy/approxkl_avg": 0.5 * (logp - old) ** 2,
            "val/ratio": ratio,
            "policy/clipfrac_avg": clipped > plain,
        }.items():
            terms.setdefault(name, []).append(number)
    flat = np.concatenate(rows)
    real = np.asarray(data.tokens.segments).any(axis=1)
    rows = [row for row, there in zip(rows, real, strict=True) if there]  # padding is no row, an empty response is one
    assert len(rows) == 7
    total = {
        "token_mean": flat.mean(),
        "seq_mean_token_mean": np.mean([np.mean(row) if row else 0.0 for row in rows]),
        "seq_mean_token_sum": flat.sum() / len(rows),
        "constant": flat.sum() / (len(rows) * 9),
    }[aggregate]
    return total, {name: np.mean(numbers) for name, numbers in terms.items()}


@pytest.mark.slow
@pytest.mark.parametrize("aggregate", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant"])
def test_every_term_by_hand(aggregate):
    """surrogate · importance + kl_coef · k3 − 0.02 H + 0.5 value loss, per token; PPO-ptx beside it."""
    data = batch()
    (rollouts, text), metrics = objective(aggregate=aggregate, length=9)(params(), data)
    expected, terms = by_hand(params(), data, aggregate)
    assert float(rollouts.value()) == pytest.approx(expected, rel=1e-4)
    found = {name: float(mean.value()) for name, mean in metrics.items()}
    nll, _ = objectives.supervised(tiny.bigram())(tiny.bigram_params(), data.pretrain)
    assert found.pop("loss/pretrain_avg") == pytest.approx(float(nll.value()), rel=1e-5)
    assert found == pytest.approx(terms, rel=1e-4)
    assert float(text.value()) == pytest.approx(2.0 * float(nll.value()), rel=1e-5)
    assert float(text.weight) == float(data.pretrain.mask.sum())


@pytest.mark.slow
def test_the_gradient_is_that_of_finite_differences():
    """In the directions of 5 random changes of all parameters, in float64 (which a value head is not)."""

    def look(tree, tokens):
        before = tree["policy"]["table"][tokens.ids][:, :-1] @ tree["head"]["kernel"] + tree["head"]["bias"]
        values = jnp.where(tokens.mask, jnp.pad(before, ((0, 0), (1, 0))), 0.0)
        return views.of_policy(tiny.bigram(), **LOOK, entropy=True)(tree, tokens)._replace(values=values)

    with jax.enable_x64(True):
        tree, data = jax.tree.map(
            lambda x: jnp.asarray(x, jnp.float64) if x.dtype == jnp.float32 else jnp.asarray(x), (params(), batch())
        )

        @jax.jit
        def total(tree):
            parts, _ = objective(look)(tree, data)
            return sum(part.value() for part in parts)

        slope, step = jax.jit(jax.grad(total))(tree), 1e-6
        for seed in range(5):
            rng = np.random.default_rng(seed)
            way = jax.tree.map(lambda x, rng=rng: jnp.asarray(rng.normal(0, 1, x.shape)), tree)
            up, down = (float(total(jax.tree.map(lambda x, d, s=s: x + s * step * d, tree, way))) for s in (1, -1))
            along = sum(jax.tree.leaves(jax.tree.map(lambda g, d: float(jnp.sum(g * d)), slope, way)))
            assert along == pytest.approx((up - down) / (2 * step), rel=1e-5)


@pytest.mark.slow
def test_padding_moves_nothing():
    """Other ids, and numbers of any size, where nothing is trained (TRAPS 9, 12)."""
    data, rng = batch(), np.random.default_rng(1)
    padded = np.asarray(data.tokens.segments) == 0
    garbage = dataclasses.replace(
        data,
        tokens=dataclasses.replace(data.tokens, ids=jnp.where(padded, rng.integers(0, 61), data.tokens.ids)),
        **{
            name: jnp.where(data.tokens.mask, getattr(data, name), 1e6)
            for name in ("advantages", "returns", "ref_logps", "importance")
        },
    )

    def look(data):
        def total(tree):
            parts, metrics = objective()(tree, data)
            return sum(part.value() for part in parts), metrics

        (value, metrics), slope = jax.value_and_grad(total, has_aux=True)(params())
        return value, {name: mean.value() for name, mean in metrics.items()}, slope

    for one, other in zip(jax.tree.leaves(look(data)), jax.tree.leaves(look(garbage)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_loss_gets_what_its_parameters_are_named_after():
    def mine(advantages, mask, *, power: float = 1.0):
        return -advantages * mask * power

    assert surrogate_inputs(mine) == ("advantages", "mask")
    assert surrogate_inputs(losses.reinforce_loss) == ("logps", "advantages")
    assert surrogate_inputs(functools.partial(losses.ppo_clip_loss, clip_low=0.1)) == (
        "logps",
        "old_logps",
        "advantages",
    )
    data = tiny.rollouts()
    made = objectives.policy(views.of_policy(tiny.bigram(), **LOOK), mine, aggregate="seq_mean_token_sum")
    loss, _ = made(tiny.bigram_params(), data)
    assert float(loss.value()) == pytest.approx(-float(data.advantages.sum()) / 8, rel=1e-5)
    with pytest.raises(ValueError, match="loss wrong takes logits, advantages"):
        objectives.policy(views.of_policy(tiny.bigram(), **LOOK), lambda_named("wrong"))
    with pytest.raises(ValueError, match="takes nothing"):
        objectives.policy(views.of_policy(tiny.bigram(), **LOOK), lambda: jnp.zeros(()))


def lambda_named(name):
    def loss(logits, advantages):
        return logits * advantages

    loss.__name__ = name
    return loss


def test_clip_fractions_only_where_tokens_are_clipped():
    """With the bounds that are set; GSPO's by sequences; not for losses that drop no gradient, or are unknown."""
    logps, old = jnp.log(jnp.asarray([[1.25, 1.0, 3.5]])), jnp.zeros((1, 3))
    gained, mask = jnp.asarray([[1.0, 1.0, -1.0]]), jnp.ones((1, 3), bool)

    def flat(loss, **options):
        return clipped_tokens(functools.partial(loss, **options))(logps, old, gained, mask).tolist()

    assert flat(losses.ppo_clip_loss) == [[1, 0, 0]]
    assert flat(losses.ppo_clip_loss, clip_high=0.28) == [[0, 0, 0]]
    assert flat(losses.ppo_clip_loss, dual_clip=3.0) == [[1, 0, 1]]
    assert flat(losses.gspo_loss, clip_low=3e-4, clip_high=4e-4) == [[1, 1, 0]]  # one ratio, 1.6
    assert clipped_tokens(functools.partial(losses.cispo_loss, clip_low=1.0, clip_high=4.0)) is None
    assert clipped_tokens(losses.reinforce_loss) is None
    assert not is_ratio_loss(functools.partial(losses.cispo_loss, clip_low=1.0, clip_high=4.0))
    assert is_ratio_loss(functools.partial(losses.ppo_clip_loss, clip_low=0.1))
    for loss, there in ((losses.reinforce_loss, False), (losses.ppo_clip_loss, True)):
        _, metrics = objectives.policy(views.of_policy(tiny.bigram(), **LOOK), loss)(
            tiny.bigram_params(), tiny.rollouts()
        )
        assert ("policy/clipfrac_avg" in metrics) is there


def test_an_empty_batch_is_zero_and_finite():
    data = jax.tree.map(jnp.asarray, batch())
    tokens = dataclasses.replace(data.tokens, mask=jnp.zeros_like(data.tokens.mask))
    nothing = dataclasses.replace(
        data, tokens=tokens, pretrain=dataclasses.replace(data.pretrain, mask=data.pretrain.mask & False)
    )
    for aggregate in ("token_mean", "seq_mean_token_mean"):
        made = objective(aggregate=aggregate)
        slope = jax.grad(lambda tree, made=made: sum(part.value() for part in made(tree, nothing)[0]))(params())
        assert all(not np.asarray(x).any() for x in jax.tree.leaves(slope))
