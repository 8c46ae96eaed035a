"""Objectives: losses bound to a model, against the same numbers computed by hand from log-probabilities."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import UserError, logprobs, losses, models, objectives, offline, online, ops, settings
from rljax.types import ComparisonBatch, UnpairedBatch
from tests import tiny


def sums(tokens, average=False):
    logps = logprobs.token_logps(tiny.model(), tiny.params(), tokens)
    return (ops.sequence_mean if average else ops.sequence_sum)(logps, tokens.mask)


def value(mean):
    return float(mean.value())


@pytest.mark.slow
def test_preference_is_the_loss_of_the_sums():
    batch, loss = tiny.pairs(empty=(6,)), functools.partial(losses.dpo_loss, beta=0.3)
    mean, metrics = objectives.preference(tiny.model(), loss)(tiny.params(), batch)
    chosen, rejected = sums(batch.chosen), sums(batch.rejected)
    real = np.arange(8) != 6  # the row without any token fills up the batch and weighs nothing
    expected = loss(chosen, rejected, batch.ref_chosen_logps, batch.ref_rejected_logps)[real].mean()
    assert value(mean) == pytest.approx(float(expected), rel=1e-5)
    assert float(mean.weight) == 7
    margins = 0.3 * ((chosen - batch.ref_chosen_logps) - (rejected - batch.ref_rejected_logps))
    assert value(metrics["rewards/margins"]) == pytest.approx(float(margins[real].mean()), rel=1e-4)
    assert value(metrics["rewards/accuracies"]) == pytest.approx(float((margins[real] > 0).mean()))
    assert value(metrics["logps/chosen"]) == pytest.approx(float(chosen[real].mean()), rel=1e-5)


def test_a_tie_is_half_a_pair():
    """Before training all rewards are 0: neither response is preferred, an accuracy of one half."""
    batch = tiny.pairs()
    same = dataclasses.replace(batch, rejected=batch.chosen, ref_rejected_logps=batch.ref_chosen_logps)
    _, metrics = objectives.preference(tiny.model(), functools.partial(losses.dpo_loss, beta=0.3))(tiny.params(), same)
    assert value(metrics["rewards/accuracies"]) == 0.5


def test_average_reference_free_and_nll():
    batch, loss = tiny.pairs(), functools.partial(losses.simpo_loss, beta=2.0, gamma=0.5)
    build = functools.partial(objectives.preference, tiny.model(), loss, average=True, reference=False)
    plain, _ = build()(tiny.params(), batch)
    expected = loss(sums(batch.chosen, average=True), sums(batch.rejected, average=True)).mean()
    assert value(plain) == pytest.approx(float(expected), rel=1e-5)
    for average in (True, False):
        added, metrics = build(nll_weight=0.7, nll_average=average)(tiny.params(), batch)
        nll = -float(sums(batch.chosen, average=average).mean())
        assert value(added) == pytest.approx(float(expected) + 0.7 * nll, rel=1e-5)
        assert value(metrics["nll_loss"]) == pytest.approx(nll, rel=1e-5)


def test_supervised_is_the_mean_over_tokens():
    tokens = tiny.tokens(empty=(1,))
    mean, metrics = objectives.supervised(tiny.model())(tiny.params(), tokens)
    total = -float(sums(tokens).sum())
    assert value(mean) == pytest.approx(total / float(tokens.mask.sum()), rel=1e-5)
    hidden = tiny.model().apply(tiny.params(), tokens.ids, tokens.segments).hidden
    guesses = jnp.argmax(tiny.model().unembed(tiny.params(), hidden), -1)[:, :-1] == tokens.ids[:, 1:]
    expected = float(guesses[tokens.mask[:, 1:]].mean())
    assert value(metrics["mean_token_accuracy"]) == pytest.approx(expected)


def test_unpaired_uses_the_batch_s_kl_and_marks():
    tokens = tiny.tokens()
    desirable = jnp.arange(8) % 3 == 0
    ref = jnp.linspace(-30, -20, 8)
    batch = UnpairedBatch(tokens=tokens, desirable=desirable, ref_logps=ref, kl=jnp.full(8, 0.4))
    loss = functools.partial(losses.kto_loss, beta=0.1)
    mean, metrics = objectives.unpaired(tiny.model(), loss)(tiny.params(), batch)
    assert value(mean) == pytest.approx(float(loss(sums(tokens), ref, desirable, 0.4).mean()), rel=1e-5)
    rewards = 0.1 * (sums(tokens) - ref)
    assert value(metrics["rewards/chosen"]) == pytest.approx(float(rewards[desirable].mean()), rel=1e-4)
    assert value(metrics["rewards/rejected"]) == pytest.approx(float(rewards[~desirable].mean()), rel=1e-4)
    assert value(metrics["kl"]) == pytest.approx(0.4)


def test_comparison_pairwise_listwise_and_margins():
    model = models.reward_model(tiny.model())
    params = {"model": tiny.params(), "head": models.scalar_head(16).init(jax.random.key(1))}
    flat = tiny.tokens(rows=8)
    tokens = jax.tree.map(lambda x: x.reshape(4, 2, -1), flat)
    best, margin = jnp.array([0, 1, 1, 0]), jnp.array([0.0, 0.5, 1.0, 0.0])
    batch = ComparisonBatch(tokens=tokens, best=best, margin=margin)
    scores = np.asarray(model.scores(params, flat)).reshape(4, 2)
    gap = scores[np.arange(4), best] - scores[np.arange(4), 1 - best]

    pairwise, metrics = objectives.comparison(model)(params, batch)
    assert value(pairwise) == pytest.approx(float(np.log1p(np.exp(-(gap - margin))).mean()), rel=1e-5)
    assert value(metrics["accuracy"]) == pytest.approx((gap > 0).mean())
    listwise, _ = objectives.comparison(model, losses.best_of_k_loss)(params, batch)
    assert value(listwise) == pytest.approx(float(np.log1p(np.exp(-gap)).mean()), rel=1e-5)


def test_rewards_are_scaled_by_the_losss_beta():
    assert objectives.reward_scale(functools.partial(losses.dpo_loss, beta=0.25)) == 0.25
    assert objectives.reward_scale(losses.slic_loss) == 1.0
    assert objectives.reward_scale(lambda chosen, rejected, *, beta=2.0: chosen) == 2.0


def mean_loss(chosen, rejected, ref_chosen, ref_rejected):
    return jnp.mean(rejected - chosen)


PAIR_LOSSES = {
    "a scalar": (
        mean_loss,
        r"loss=mean_loss must return one number a row, \[b\].*it returned float32\[\], which would",
    ),
    "a column": (lambda a, b, c, d: (b - a)[:, None], r"it returned float32\[3, 1\]"),
    "integers": (lambda a, b, c, d: (b > a).astype(int), r"it returned int32\[3\]"),
    "a constant": (lambda a, b, c, d: d - c, "does not depend on the policy: its gradient is exactly 0"),
    "stopped": (lambda a, b, c, d: jax.lax.stop_gradient(b - a), "does not depend on the policy"),
    "NaN": (lambda a, b, c, d: jnp.log(a - b), "gives numbers that are not finite"),
}


@pytest.mark.parametrize("case", PAIR_LOSSES)
def test_a_loss_that_would_be_broadcast_or_learns_nothing_is_refused_before_loading(case):
    loss, message = PAIR_LOSSES[case]
    with pytest.raises(UserError, match=message):
        offline.check(offline.Preference(model="none", data="none.jsonl", loss=loss))


def test_functions_of_other_kinds_are_tried_too():
    common = {"model": "none", "data": "none.jsonl"}
    judged = {**common, "reward": lambda prompts, completions: [0.0]}
    for run, message in (
        (
            offline.Unpaired(**common, loss=lambda x, ref, good, kl: (x - ref).mean()),
            r"for \(3,\) it returned float32\[\]",
        ),
        (offline.RewardModel(**common, loss=lambda scores, best: scores), r"it returned float32\[3, 2\]"),
        (online.PolicyGradient(**judged, loss=lambda logps, advantages: -(logps * advantages).sum(1)), r"float32\[2\]"),
        (online.PolicyGradient(**judged, loss=lambda advantages: -advantages), "does not depend on the policy"),
        (online.PPO(**judged, value_loss=lambda values, old, returns: (old - returns) ** 2), "value_loss=.*exactly 0"),
        (online.PolicyGradient(**judged, advantage=lambda rewards: rewards.mean(1)), r"advantage=.* for \(2, 8\) it"),
        (
            online.PolicyGradient(**judged, advantage=lambda r: r / r.std(1, keepdims=True) - 1e9 * (r - r) / 0),
            "finite",
        ),
    ):
        with pytest.raises(UserError, match=message):
            settings.check(run) if isinstance(run, online.Sampled) else offline.check(run)
    fine = online.PolicyGradient(**judged, advantage=lambda rewards, applies: rewards - rewards.mean(1, keepdims=True))
    settings.check(dataclasses.replace(fine, loss=lambda logps, advantages, mask: -logps * advantages))
    broken = offline.Preference(
        **common, loss=lambda a, b, c, d: a[:100].reshape(100)
    )  # its own error, at its own line
    offline.check(broken)


@pytest.mark.slow
def test_objectives_check_the_form_of_a_loss_themselves():
    objective = objectives.preference(tiny.model(), lambda a, b, c, d: (b - a)[:, None])
    with pytest.raises(UserError, match=r"must return one number a row"):
        jax.eval_shape(objective, tiny.params(), tiny.pairs())
