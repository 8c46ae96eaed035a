"""What a method makes of a scored rollout, against plain numpy loops that follow the papers' formulas."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import advantages, iteration, losses, methods, models, objectives, settings, shaping
from rljax.filters import Sampling
from rljax.iteration import Verdict
from rljax.methods import Judged, Notes
from rljax.types import PolicyBatch
from tests import tiny

NAN = float("nan")
COMMON = {"model": "", "data": "", "reward": len, "batch": 3, "group": 2, "max_completion": 6}
PLAIN = Sampling()
TOTAL = np.asarray([0.7, -1.5, NAN, 3.0, 0.0, 0.25], np.float32)  # no reward applies to row 2, row 4 wrote nothing


def notes(rollout, seed=0, *, values=True) -> Notes:
    """What was computed of a rollout, with garbage wherever nothing is trained (TRAPS 9, 12)."""
    rng = np.random.default_rng(seed + 1)
    noise = rng.normal(0, 0.5, (3, *rollout.logps.shape)).astype(np.float32)
    mask = np.asarray(rollout.tokens.mask)
    own, ref = (np.where(mask, np.asarray(rollout.logps) + x, 1e6) for x in noise[:2])
    expected = np.where(mask, noise[2], np.nan)
    return Notes(logps=jnp.asarray(own), ref_logps=jnp.asarray(ref), values=jnp.asarray(expected) if values else None)


def verdict(total=TOTAL, per_token=None) -> Verdict:
    return Verdict(total=jnp.asarray(total), parts={"r": jnp.asarray(total)}, per_token=per_token)


def learn_from(method, run, rollout, about, said, *, factor=1.0, moments=None):
    """(batch, metrics, moments): as `iteration.learn` goes from a verdict to what is trained on."""
    judged, moments = iteration.shape(run, moments or shaping.init_moments(), rollout, said)
    metrics = iteration.completion_metrics(rollout)
    rollout = iteration._untrained_where(rollout, ~judged.applies)
    batch, found = method.batch(rollout, about, judged, jnp.asarray(factor))
    metrics |= found
    return batch, {name: float(mean.value()) for name, mean in metrics.items() if float(mean.weight)}, moments


def ppo_run(**changes):
    return settings.PPO(**COMMON | {"old_logps": "trainer"} | changes)


def ppo_method(run):
    return methods.ppo(run, tiny.bigram(), tiny.bigram_params(), None, PLAIN)


# --- PPO, written out -------------------------------------------------------------------------------------------------


def shaped(run, total, lengths, finished, scale=(0.0, 1.0)):
    """The score of a completion after penalties, normalisation, clipping and what a missing end costs; NaN stays."""
    out = []
    for score, length, ended in zip(total, lengths, finished, strict=True):
        if run.overlong_buffer is not None:
            score += min(0.0, max(-1.0, (run.max_completion - run.overlong_buffer - length) / run.overlong_buffer))
        score = (score - scale[0]) / scale[1]
        if run.score_clip is not None:
            score = min(max(score, -run.score_clip), run.score_clip) if score == score else score
        if not ended and run.missing_eos_score is not None and score == score:
            score = run.missing_eos_score
        if not ended and run.missing_eos_penalty is not None:
            score -= run.missing_eos_penalty
        out.append(score)
    return out


def kl_of(d, estimator):
    return {"k1": d, "k2": d * d / 2, "k3": np.exp(-d) - 1 + d}[estimator]


def whitened(rows, ddof, *, shift):
    """Over all trained tokens of the batch."""
    flat = np.asarray([x for row in rows for x in row])
    mean, std = flat.mean(), np.sqrt(flat.var(ddof=ddof) + 1e-8)
    return [[(x - mean) / std + (0 if shift else mean) for x in row] for row in rows]


def ppo_by_hand(run, rollout, about, total, *, per_token=None, factor=1.0, scale=(0.0, 1.0)):
    """(advantages, returns), lists of the trained tokens of each row: PAPERS 1.1 step by step."""
    mask = np.asarray(rollout.tokens.mask)
    scores = shaped(run, total, mask.sum(1), np.asarray(rollout.finished), scale)
    old, ref, values = (np.asarray(x) for x in (about.logps, about.ref_logps, about.values))
    rewards, where = [], []
    for i, score in enumerate(scores):
        at = [] if score != score else list(np.flatnonzero(mask[i]))
        single = np.zeros(mask.shape[1]) if per_token is None else np.asarray(per_token)[i] / scale[1]
        row = [-run.kl_reward * factor * kl_of(old[i, t] - ref[i, t], run.kl_estimator) + single[t] for t in at]
        if at:
            row[-1] += score - sum(single[t] for t in at)
        rewards.append(row)
        where.append(at)
    if run.whiten_rewards:
        rewards = whitened(rewards, run.whiten_ddof, shift=False)
    gained, returns = [], []
    for i, (row, at) in enumerate(zip(rewards, where, strict=True)):
        advantage, after, found = 0.0, 0.0, []
        for reward, t in zip(row[::-1], at[::-1], strict=True):
            advantage = reward + run.gamma * after - values[i, t] + run.gamma * run.lam * advantage
            after = values[i, t]
            found.insert(0, advantage)
        gained.append(found)
        returns.append([a + values[i, t] for a, t in zip(found, at, strict=True)])
    return (whitened(gained, run.whiten_ddof, shift=True) if run.whiten_advantages else gained), returns


def assert_rows(array, rollout, expected):
    """[b t] has these numbers at its rows' trained tokens, and 0 everywhere else."""
    full = np.zeros(array.shape)
    for i, row in enumerate(expected):
        full[i, np.flatnonzero(np.asarray(rollout.tokens.mask)[i])[: len(row)]] = row
    np.testing.assert_allclose(np.asarray(array), full, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"whiten_advantages": False},
        {"whiten_advantages": False, "kl_reward": 0.3, "kl_estimator": "k2", "gamma": 0.9, "lam": 0.5},
        {"whiten_advantages": False, "kl_estimator": "k3", "gamma": 0.0},
        {"whiten_rewards": True, "whiten_ddof": 0},
        {"whiten_rewards": True, "whiten_advantages": False},
        {"missing_eos_score": -1.0, "whiten_advantages": False},
        {"missing_eos_score": 0.0, "missing_eos_penalty": 0.5, "whiten_advantages": False},
        {"overlong_buffer": 3, "score_clip": 1.0, "whiten_advantages": False},
        {"kl_reward": 0.0, "lam": 0.0, "missing_eos_penalty": 0.0, "score_clip": 0.0, "whiten_advantages": False},
    ],
    ids=lambda changes: ",".join(changes) or "default",
)
def test_ppo_by_hand(changes):
    """Score at the last trained token, the KL on every one, shaping, whitening, GAE: uneven lengths, an empty response,
    a row that no reward applies to."""
    run, rollout = ppo_run(**changes), tiny.rollout()
    about = notes(rollout)
    batch, metrics, _ = learn_from(ppo_method(run), run, rollout, about, verdict(), factor=1.7)
    gained, returns = ppo_by_hand(run, rollout, about, TOTAL.tolist(), factor=1.7)
    assert_rows(batch.advantages, rollout, gained)
    assert_rows(batch.returns, rollout, returns)
    assert not np.asarray(batch.tokens.mask)[2].any()  # nothing is trained where no reward applies
    np.testing.assert_array_equal(
        np.asarray(batch.tokens.mask)[[0, 1, 3, 5]], np.asarray(rollout.tokens.mask)[[0, 1, 3, 5]]
    )
    np.testing.assert_array_equal(batch.old_logps, np.where(batch.tokens.mask, about.logps, 0))
    assert all(np.isfinite(value) for value in metrics.values()), metrics


def test_ppo_with_rewards_of_single_tokens():
    """Fractional and negative ones survive, the score counts them once, and an unfinished row keeps its total."""
    run, rollout = ppo_run(whiten_advantages=False, missing_eos_penalty=1.0), tiny.rollout()
    about, mask = notes(rollout), np.asarray(tiny.rollout().tokens.mask)
    single = np.where(mask, np.random.default_rng(5).normal(0, 1, mask.shape), 0).astype(np.float32)
    total = np.where(np.isnan(TOTAL), np.nan, TOTAL + single.sum(1)).astype(np.float32)
    batch, _, _ = learn_from(ppo_method(run), run, rollout, about, verdict(total, jnp.asarray(single)))
    gained, returns = ppo_by_hand(run, rollout, about, total.tolist(), per_token=single)
    assert_rows(batch.advantages, rollout, gained)
    assert_rows(batch.returns, rollout, returns)


def test_running_normalisation():
    """Scores over the standard deviation of all scores so far, this batch's among them; None rows are no scores."""
    run, rollout = ppo_run(whiten_advantages=False, normalize_running=True, score_clip=1.2), tiny.rollout()
    about, seen = notes(rollout), [2.0, -1.0, 0.5]
    before = shaping.update_moments(shaping.init_moments(), jnp.asarray(seen), jnp.ones(3, bool))
    batch, _, after = learn_from(ppo_method(run), run, rollout, about, verdict(), moments=before)
    everything = [*seen, *TOTAL[~np.isnan(TOTAL)].tolist()]
    assert float(after.count) == 8
    assert float(after.mean) == pytest.approx(np.mean(everything), rel=1e-5)
    assert float(after.variance()) == pytest.approx(np.var(everything), rel=1e-5)
    gained, _ = ppo_by_hand(run, rollout, about, TOTAL.tolist(), scale=(0.0, np.std(everything)))
    assert_rows(batch.advantages, rollout, gained)


def test_reference_normalisation_leaves_the_moments_alone():
    run, rollout = ppo_run(whiten_advantages=False, normalize_reference=4), tiny.rollout()
    about, seen = notes(rollout), [2.0, -1.0, 0.5]
    before = shaping.update_moments(shaping.init_moments(), jnp.asarray(seen), jnp.ones(3, bool))
    batch, _, after = learn_from(ppo_method(run), run, rollout, about, verdict(), moments=before)
    assert after is before
    gained, _ = ppo_by_hand(run, rollout, about, TOTAL.tolist(), scale=(np.mean(seen), np.std(seen)))
    assert_rows(batch.advantages, rollout, gained)


def test_metrics_of_ppo_by_hand():
    """Means over the rows that a reward applies to; lengths and ends over all completions that there are."""
    run, rollout = ppo_run(kl_reward=0.1), tiny.rollout()
    about, real, mask = notes(rollout), [0, 1, 3, 4, 5], np.asarray(tiny.rollout().tokens.mask)
    _, found, _ = learn_from(ppo_method(run), run, rollout, about, verdict(), factor=2.0)
    own, ref = (np.where(mask, np.asarray(x), 0) for x in (about.logps, about.ref_logps))
    kl = (own - ref).sum(1)[real].mean()
    assert found["objective/scores"] == pytest.approx(TOTAL[real].mean())
    assert found["objective/kl"] == pytest.approx(kl, rel=1e-5)
    assert found["objective/entropy"] == pytest.approx(-own.sum(1)[real].mean(), rel=1e-5)
    assert found["objective/kl_coef"] == pytest.approx(0.2)
    assert found["objective/non_score_reward"] == pytest.approx(-0.2 * kl, rel=1e-5)
    assert found["objective/rlhf_reward"] == pytest.approx(TOTAL[real].mean() - 0.2 * kl, rel=1e-5)
    assert found["completions/mean_length"] == pytest.approx((6 + 1 + 3 + 6 + 4) / 5)
    assert found["completions/clipped_ratio"] == pytest.approx(2 / 5)
    logged = np.where(mask, np.asarray(about.logps - rollout.logps), 0)[[0, 1, 3, 5]]
    assert found["sampling/logp_difference"] == pytest.approx(np.abs(logged).sum() / 17, rel=1e-5)
    values, (_, returns) = np.asarray(about.values), ppo_by_hand(run, rollout, about, TOTAL.tolist(), factor=2.0)
    flat = np.concatenate([values[i][mask[i]] for i in (0, 1, 3, 5)])
    goal = np.concatenate([returns[i] for i in (0, 1, 3, 5)])
    assert found["val/mean"] == pytest.approx(flat.mean(), rel=1e-5)
    assert found["val/explained_variance"] == pytest.approx(1 - np.var(goal - flat) / np.var(goal), rel=1e-4)


def test_a_value_is_read_before_its_token():
    """V of token t is the head on the state that predicts t: shared trunk, and a critic of its own."""
    rollout, head = tiny.rollout(), models.scalar_head(61).init(jax.random.key(3))
    critic = {"model": tiny.bigram_params(4), "head": head}
    shared = {"policy": tiny.bigram_params(), "head": head}
    cases = [
        (methods.ppo(ppo_run(), tiny.bigram(), tiny.bigram_params(), None, PLAIN), shared, shared["policy"]),
        (
            methods.ppo(ppo_run(), tiny.bigram(), tiny.bigram_params(), (tiny.bigram(), critic), PLAIN),
            {"policy": tiny.bigram_params(), "critic": critic},
            critic["model"],
        ),
    ]
    ids, mask = np.asarray(rollout.tokens.ids), np.asarray(rollout.tokens.mask)
    for method, params, table in cases:
        assert jax.tree.structure(method.params) == jax.tree.structure(params)
        expected = np.zeros(ids.shape)
        for i, t in zip(*np.nonzero(mask), strict=True):
            expected[i, t] = np.asarray(table["table"])[ids[i, t - 1]] @ np.asarray(head["kernel"]) + head["bias"]
        found = method.annotate(params, None, rollout)
        np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(method.look(params, rollout.tokens).values, expected, rtol=1e-4, atol=1e-5)


def test_a_critic_on_the_policys_trunk_begins_at_zero():
    method = ppo_method(ppo_run())
    assert not np.asarray(method.annotate(method.params, None, tiny.rollout()).values).any()
    assert not np.asarray(method.params["head"]["kernel"]).any()


# --- the critic-free family -------------------------------------------------------------------------------------------

GROUPS = np.asarray([[1.0, 2.0, 3.0, 6.0], [0.5, 0.5, 0.5, 0.5], [-1.0, 0.7, 0.0, 0.1]], np.float32)
# distinct prompts, uneven lengths
LENGTHS, PROMPTS = (6, 1, 3, 6, 2, 4, 5, 6, 1, 1, 6, 2), (4, 4, 4, 4, 1, 1, 1, 1, 2, 2, 2, 2)


def group_run(**changes):
    return settings.PolicyGradient(**COMMON | {"group": 4, "old_logps": "trainer"} | changes)


def group_method(run):
    return methods.policy_gradient(run, tiny.bigram(), tiny.bigram_params(), PLAIN)


def group_batch(total=GROUPS, *, greedy=None, factor=1.0, **changes):
    """greedy: scores of greedy completions of 6, 2 and 4 tokens, the first of which did not end."""
    run, rollout = group_run(**changes), tiny.rollout(LENGTHS, PROMPTS)
    about, said = notes(rollout, values=False), verdict(np.ravel(total))
    if greedy is not None:
        said = dataclasses.replace(said, greedy=iteration.greedy_verdict(greedy, tiny.rollout((6, 2, 4), (4, 1, 2)), 4))
    batch, metrics, _ = learn_from(group_method(run), run, rollout, about, said, factor=factor)
    return batch, metrics, rollout, about


def per_row(batch, rollout):
    """The one advantage of each row, which stands at all its trained tokens and nowhere else."""
    mask, found = np.asarray(rollout.tokens.mask), []
    for row, where in zip(np.asarray(batch.advantages), mask, strict=True):
        assert len(set(row[where].tolist())) == 1
        assert not row[~where].any()
        found.append(row[where][0])
    return np.asarray(found).reshape(-1, 4)


GRPO = functools.partial(advantages.group_relative, divide_by_std=True)
DR_GRPO = functools.partial(advantages.group_relative, divide_by_std=False)


def test_advantages_of_groups_by_hand():
    """Each completion against its own prompt's others (TRAPS 3)."""
    found = {
        name: per_row(*group_batch(advantage=advantage)[::2])
        for name, advantage in {"grpo": GRPO, "dr": DR_GRPO, "rloo": advantages.leave_one_out}.items()
    }
    deviations = GROUPS - GROUPS.mean(1, keepdims=True)
    std = GROUPS.std(1, ddof=1, keepdims=True)
    np.testing.assert_allclose(found["dr"], deviations, atol=1e-6)
    np.testing.assert_allclose(found["grpo"], deviations / (std + 1e-4), rtol=1e-5, atol=1e-6)
    others = (GROUPS.sum(1, keepdims=True) - GROUPS) / 3
    np.testing.assert_allclose(found["rloo"], GROUPS - others, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["rloo"], 4 / 3 * found["dr"], rtol=1e-5, atol=1e-6)  # G/(G − 1) · Dr. GRPO
    assert not found["grpo"][1].any()  # a group without contrast teaches nothing


@pytest.mark.parametrize("advantage", [GRPO, DR_GRPO, advantages.leave_one_out], ids=["grpo", "dr_grpo", "rloo"])
def test_a_constant_per_prompt_changes_nothing(advantage):
    moved = GROUPS + np.asarray([[10.0], [-3.0], [0.5]], np.float32)
    one, other = (per_row(*group_batch(total, advantage=advantage)[::2]) for total in (GROUPS, moved))
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_rloo_with_the_kl_in_the_reward_of_the_sequence():
    """r_i − β Σ_t log π/π_ref, then leave one out (2402.14740)."""
    batch, metrics, rollout, about = group_batch(advantage=advantages.leave_one_out, kl_reward=0.2, factor=0.5)
    mask = np.asarray(rollout.tokens.mask)
    kl = np.where(mask, np.asarray(about.logps) - np.asarray(about.ref_logps), 0).sum(1).reshape(3, 4)
    whole = GROUPS - 0.1 * kl
    expected = whole - (whole.sum(1, keepdims=True) - whole) / 3
    np.testing.assert_allclose(per_row(batch, rollout), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.asarray(batch.rewards).sum(1).reshape(3, 4), whole, rtol=1e-4, atol=1e-5)
    assert metrics["objective/kl"] == pytest.approx(kl.mean(), rel=1e-5)


def test_remax_compares_with_the_greedy_completion():
    greedy = jnp.asarray([2.0, 0.0, -1.0])
    batch, _, rollout, _ = group_batch(advantage=advantages.greedy_baseline, greedy=greedy)
    np.testing.assert_allclose(per_row(batch, rollout), GROUPS - np.asarray(greedy)[:, None], rtol=1e-6)
    assert group_method(group_run(advantage=advantages.greedy_baseline)).greedy
    assert not group_method(group_run()).greedy


def test_a_greedy_completion_that_no_reward_applies_to_trains_nothing_of_its_prompt():
    batch, metrics, _, _ = group_batch(advantage=advantages.greedy_baseline, greedy=jnp.asarray([2.0, NAN, -1.0]))
    assert not np.asarray(batch.tokens.mask)[4:8].any()
    assert np.isfinite(np.asarray(batch.advantages)).all()
    assert np.asarray(batch.tokens.mask)[:4].any(1).all()
    assert all(np.isfinite(value) for value in metrics.values())


def test_the_baseline_is_the_greedy_completions_whether_or_not_a_reward_applies_to_the_groups_first_row():
    greedy, total = jnp.asarray([2.0, 0.0, -1.0]), np.array(GROUPS)
    total[0, 0] = total[2, 3] = NAN
    batch, _, _, _ = group_batch(total, advantage=advantages.greedy_baseline, greedy=greedy)
    found = np.asarray(batch.advantages).sum(1) / np.maximum(np.asarray(batch.tokens.mask).sum(1), 1)
    wanted = np.nan_to_num(total - np.asarray(greedy)[:, None])
    np.testing.assert_allclose(found.reshape(-1, 4), wanted, rtol=1e-6)


def test_the_greedy_score_is_shaped_like_the_others():
    """Clipped, over the same running standard deviation, without its end, as long as it is."""
    batch, _, rollout, _ = group_batch(
        advantage=advantages.greedy_baseline, greedy=jnp.asarray([9.0, 0.0, -1.0]), score_clip=2.0
    )
    clipped = np.clip(GROUPS, -2, 2) - np.asarray([[2.0], [0.0], [-1.0]])
    np.testing.assert_allclose(per_row(batch, rollout), clipped, rtol=1e-5, atol=1e-6)
    batch, _, rollout, _ = group_batch(
        advantage=advantages.greedy_baseline, greedy=jnp.asarray([2.0, 0.0, -1.0]), normalize_running=True
    )
    expected = (GROUPS - np.asarray([[2.0], [0.0], [-1.0]])) / GROUPS.std()
    np.testing.assert_allclose(per_row(batch, rollout), expected, rtol=1e-4, atol=1e-5)
    batch, _, rollout, _ = group_batch(
        advantage=advantages.greedy_baseline, greedy=jnp.asarray([2.0, 0.0, -1.0]), missing_eos_score=-4.0
    )
    ended = np.asarray(rollout.finished).reshape(3, 4)
    expected = np.where(ended, GROUPS, -4.0) - np.asarray([[-4.0], [0.0], [-1.0]])
    np.testing.assert_allclose(per_row(batch, rollout), expected, rtol=1e-5, atol=1e-6)
    batch, _, rollout, _ = group_batch(
        advantage=advantages.greedy_baseline, greedy=jnp.asarray([2.0, 0.0, -1.0]), overlong_buffer=4
    )
    late = np.minimum(0, (2 - np.asarray(LENGTHS).reshape(3, 4)) / 4) - np.asarray([[-1.0], [0.0], [-0.5]])
    expected = GROUPS - np.asarray([[2.0], [0.0], [-1.0]]) + late
    np.testing.assert_allclose(per_row(batch, rollout), expected, rtol=1e-5, atol=1e-6)


def test_reinforce_plus_plus_adds_up_what_is_to_come_and_whitens_over_the_batch():
    batch, _, rollout, about = group_batch(advantage=advantages.reward_to_go, kl_reward=0.3, whiten_advantages=True)
    mask, rows = np.asarray(rollout.tokens.mask), []
    own, ref = np.asarray(about.logps), np.asarray(about.ref_logps)
    for i, score in enumerate(np.ravel(GROUPS)):
        rewards = [-0.3 * (own[i, t] - ref[i, t]) for t in np.flatnonzero(mask[i])]
        rewards[-1] += score
        rows.append(np.cumsum(rewards[::-1])[::-1].tolist())
    assert_rows(batch.advantages, rollout, whitened(rows, 1, shift=True))


@pytest.mark.slow
def test_rows_without_a_reward_leave_their_group_to_the_others():
    """None moves nothing and trains nothing; to a function that does not ask, it counts as the mean of the others."""
    total = GROUPS.copy()
    total[0, 3] = total[2, :3] = np.nan
    batch, metrics, _, _ = group_batch(total, advantage=DR_GRPO)
    mask = np.asarray(batch.tokens.mask)
    assert mask.any(1).tolist() == [True, True, True, False, True, True, True, True, False, False, False, True]
    rows = np.asarray([row[where][0] if where.any() else 0 for row, where in zip(batch.advantages, mask, strict=True)])
    np.testing.assert_allclose(rows, [-1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0], atol=1e-6)
    for advantage in (GRPO, advantages.leave_one_out, lambda rewards: rewards - rewards.mean(1, keepdims=True)):
        some, _, _, _ = group_batch(total, advantage=advantage)
        firsts = np.asarray(
            [row[where][0] if where.any() else 0 for row, where in zip(some.advantages, mask, strict=True)]
        )
        three = advantage(jnp.asarray(total[:1, :3]))[0]
        np.testing.assert_allclose(firsts, [*three, *[0] * 9], rtol=1e-5, atol=1e-6)
    assert np.isfinite(np.asarray(batch.advantages)).all()
    # lengths are those of all completions; the one reward of the third group has nothing to differ from
    assert metrics["completions/mean_length"] == pytest.approx(sum(LENGTHS) / 12)
    assert metrics["frac_reward_zero_std"] == pytest.approx(2 / 3)
    total[2] = np.nan  # a group that no reward applies to is not one of equal scores: the first differs, the second not
    assert group_batch(total, advantage=DR_GRPO)[1]["frac_reward_zero_std"] == pytest.approx(1 / 2)
    for mode in ("seq_mean_token_mean", "seq_mean_token_sum"):  # means over the rows that are trained
        method = group_method(group_run(aggregate=mode))
        assert float(method.loss_fn(method.params, batch)[0].weight) == 8


def test_all_rows_without_a_reward_are_zeros_and_no_nans():
    batch, metrics, _, _ = group_batch(np.full((3, 4), np.nan, np.float32))
    assert not np.asarray(batch.tokens.mask).any()
    assert not np.asarray(batch.advantages).any()
    assert all(np.isfinite(value) for value in metrics.values())


def test_importance_weights_are_capped_ratios_of_the_trainers_old_policy():
    batch, _, rollout, about = group_batch(importance_cap=1.3)
    mask = np.asarray(rollout.tokens.mask)
    ratio = np.exp(np.where(mask, np.asarray(about.logps) - np.asarray(rollout.logps), 0))
    np.testing.assert_allclose(batch.importance, np.where(mask, np.minimum(ratio, 1.3), 0), rtol=1e-5)
    assert (np.asarray(batch.importance) == np.float32(1.3)).any()
    assert group_batch()[0].importance is None
    plain, weighted = (losses_of(b) for b in (group_batch()[0], batch))
    np.testing.assert_allclose(weighted, plain * np.asarray(batch.importance), rtol=1e-4, atol=1e-6)


def losses_of(batch: PolicyBatch) -> np.ndarray:
    """The surrogate at every token, [b t], as the objective sees it: one token's advantage at a time."""
    total, _ = objectives.policy(lambda _, tokens: _look(tokens), aggregate="constant", length=1)({}, batch)
    assert np.isfinite(float(total.total))
    view = _look(batch.tokens)
    surrogate = losses.ppo_clip_loss(view.logps, batch.old_logps, batch.advantages)
    weight = 1.0 if batch.importance is None else batch.importance
    assert float(total.total) == pytest.approx(float(jnp.sum(surrogate * weight)), rel=1e-4)
    return np.asarray(surrogate * weight)


def _look(tokens):
    method = group_method(group_run())
    return method.look(method.params, tokens)


# --- what the losses have in common -----------------------------------------------------------------------------------


def gradient(loss, batch, **options):
    method = group_method(group_run(loss=loss, **options))
    return jax.grad(lambda params: method.loss_fn(params, batch)[0].value())(method.params)["table"]


def on_policy(batch):
    """The batch with the log-probabilities of the policy that is trained: every ratio is 1."""
    method = group_method(group_run())
    return dataclasses.replace(batch, old_logps=method.look(method.params, batch.tokens).logps)


def test_ppo_with_one_update_is_reinforce():
    """At ratio 1 the clipped surrogate has the gradient of −A log π, and so has CISPO's."""
    batch = on_policy(group_batch()[0])
    expected = gradient(losses.reinforce_loss, batch)
    assert np.abs(np.asarray(expected)).max() > 1e-3
    for loss in (losses.ppo_clip_loss, functools.partial(losses.cispo_loss, clip_low=1.0, clip_high=4.0)):
        np.testing.assert_allclose(gradient(loss, batch), expected, rtol=1e-4, atol=1e-6)


def test_gspo_is_grpo_where_completions_have_one_token():
    run, rollout = group_run(), tiny.rollout((1,) * 12, PROMPTS)
    about = notes(rollout, values=False)
    batch, _, _ = learn_from(group_method(run), run, rollout, about, verdict(np.ravel(GROUPS)))
    clip = {"clip_low": 0.2, "clip_high": 0.3}
    one, other = (
        gradient(functools.partial(loss, **clip), batch, aggregate="seq_mean_token_mean")
        for loss in (losses.ppo_clip_loss, losses.gspo_loss)
    )
    assert np.abs(np.asarray(one)).max() > 1e-3
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_the_kl_in_the_loss_follows_the_controller():
    """coef · factor · k3, per token; its gradient at π = π_ref is 0."""
    batch, metrics, _, about = group_batch(kl_loss=0.04, factor=3.0)
    np.testing.assert_allclose(batch.kl_coef, np.full(12, 0.12), rtol=1e-6)
    assert metrics["objective/kl_coef"] == pytest.approx(0.12)
    np.testing.assert_array_equal(batch.ref_logps, about.ref_logps)
    method = group_method(group_run(kl_loss=0.04))
    silent = dataclasses.replace(on_policy(batch), advantages=jnp.zeros_like(batch.advantages))
    same = dataclasses.replace(silent, ref_logps=silent.old_logps)
    slope = jax.grad(lambda params: method.loss_fn(params, same)[0].value())(method.params)["table"]
    np.testing.assert_allclose(slope, np.zeros((61, 61)), atol=1e-7)
    _, found = method.loss_fn(
        method.params, dataclasses.replace(silent, ref_logps=silent.old_logps - 0.5 * batch.tokens.mask)
    )
    assert float(found["loss/kl_avg"].value()) == pytest.approx(np.exp(-0.5) - 1 + 0.5, rel=1e-5)


# --- pairs and demonstrations -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pairs_are_the_best_against_the_worst():
    """Of four prompts: an ordinary one; a tie; one row judged; one where the best and worst stand around a None."""
    total = np.asarray([[1.0, 3.0, -2.0, 0.0], [1, 1, 1, 1], [NAN, 5, NAN, NAN], [NAN, -1.0, 2.0, NAN]], np.float32)
    run = settings.OnlinePreference(**COMMON | {"group": 4, "batch": 4, "old_logps": "trainer"})
    method = methods.preference(run, tiny.bigram(), tiny.bigram_params(), PLAIN)
    rollout = tiny.rollout((*LENGTHS, 3, 2, 5, 6), (*PROMPTS, 3, 3, 3, 3))
    about = notes(rollout, values=False)
    pairs, metrics, _ = learn_from(method, run, rollout, about, verdict(np.ravel(total)))
    ids, mask = np.asarray(rollout.tokens.ids), np.asarray(rollout.tokens.mask)
    ref = np.where(mask, np.asarray(about.ref_logps), 0).sum(1)
    for pair, (best, worst) in {0: (1, 2), 3: (14, 13)}.items():
        for side, row in ((pairs.chosen, best), (pairs.rejected, worst)):
            np.testing.assert_array_equal(side.ids[pair], ids[row])
            np.testing.assert_array_equal(side.mask[pair], mask[row])
        assert float(pairs.ref_chosen_logps[pair]) == pytest.approx(ref[best], rel=1e-5)
        assert float(pairs.ref_rejected_logps[pair]) == pytest.approx(ref[worst], rel=1e-5)
    assert not np.asarray(pairs.chosen.segments)[[1, 2]].any()
    assert not np.asarray(pairs.rejected.segments)[[1, 2]].any()
    assert metrics["pairs/tied"] == 0.5
    # the two pairs without a winner weigh nothing: the loss is the mean over the other two
    loss, found = method.loss_fn(method.params, pairs)
    assert float(loss.weight) == 2
    kept = jax.tree.map(lambda x: x[np.asarray([0, 3])], pairs)
    alone, _ = method.loss_fn(method.params, kept)
    assert float(loss.total) == pytest.approx(float(alone.total), rel=1e-5)
    assert all(np.isfinite(float(mean.total)) for mean in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [{"temperature": 0.5}, {"top_k": 20}, {"top_p": 0.9}, {"min_new_tokens": 3}])
def test_pairs_are_seen_through_the_distribution_that_they_were_drawn_from(drawn):
    """Policy = reference, so log-ratios are 0 and the loss is ln 2, at any temperature, with any filter (TRAPS 20)."""
    run = settings.OnlinePreference(**COMMON | {"batch": 2, "old_logps": "trainer"} | drawn)
    method = methods.preference(run, tiny.bigram(), tiny.bigram_params(), settings.sampling(run, (0,)))
    rollout = tiny.rollout((6, 2, 3, 4), (4, 4, 1, 1))
    about = method.annotate(method.params, method.params, rollout)
    pairs, _, _ = learn_from(method, run, rollout, about, verdict([1.0, 2.0, 0.5, 0.0]))
    loss, metrics = method.loss_fn(method.params, pairs)
    assert float(loss.value()) == pytest.approx(np.log(2), abs=1e-6)
    assert float(metrics["rewards/margins"].value()) == pytest.approx(0, abs=1e-6)


def test_advantages_may_be_whitened_in_each_minibatch():
    """OpenAI's code does: mean 0, variance 1 over the tokens of an update, not of the batch."""
    run = ppo_run(whiten_over="minibatch", kl_reward=0.0)
    rollout, about = tiny.rollout(), notes(tiny.rollout())
    batch, _, _ = learn_from(ppo_method(run), run, rollout, about, verdict())
    plain, _, _ = learn_from(
        ppo_method(ppo_run(whiten_advantages=False, kl_reward=0.0)), run, rollout, about, verdict()
    )
    np.testing.assert_array_equal(batch.advantages, plain.advantages)
    half = jax.tree.map(lambda x: x[:2], batch)
    made = methods.whitening(run)(half)
    inside = np.asarray(made.advantages)[np.asarray(half.tokens.mask)]
    assert inside.mean() == pytest.approx(0, abs=1e-5)
    assert inside.std(ddof=1) == pytest.approx(1, rel=1e-4)
    assert methods.whitening(ppo_run()) is None
    assert methods.whitening(settings.Imitation(**COMMON)) is None


def test_pairs_with_averaged_log_probabilities():
    run = settings.OnlinePreference(**COMMON | {"average": True, "batch": 2, "old_logps": "trainer"})
    method = methods.preference(run, tiny.bigram(), tiny.bigram_params(), PLAIN)
    rollout = tiny.rollout((6, 2, 3, 4), (4, 4, 1, 1))
    about = notes(rollout, values=False)
    pairs, _, _ = learn_from(method, run, rollout, about, verdict([1.0, 2.0, 0.5, 0.0]))
    ref = np.where(rollout.tokens.mask, about.ref_logps, 0).sum(1) / np.asarray([6, 2, 3, 4])
    np.testing.assert_allclose(pairs.ref_chosen_logps, ref[[1, 2]], rtol=1e-5)
    np.testing.assert_allclose(pairs.ref_rejected_logps, ref[[0, 3]], rtol=1e-5)


@pytest.mark.parametrize(
    ("threshold", "kept"),
    [(None, [True, True, False, True]), (0.0, [True, False, False, True]), (2.5, [True] + [False] * 3)],
)
def test_demonstrations_are_the_best_of_each_group_above_the_threshold(threshold, kept):
    """Strictly above (a score of 0 is no success); a group that no reward applies to gives none."""
    total = np.asarray([[1.0, 3.0, -2.0, 0.0], [-1, 0, -1, -1], [NAN] * 4, [NAN, -1.0, 2.0, NAN]], np.float32)
    run = settings.Imitation(**COMMON | {"group": 4, "batch": 4, "threshold": threshold})
    method = methods.imitation(run, tiny.bigram(), tiny.bigram_params(), PLAIN)
    rollout = tiny.rollout((*LENGTHS, 3, 2, 5, 6), (*PROMPTS, 3, 3, 3, 3))
    chosen, metrics, _ = learn_from(method, run, rollout, Notes(), verdict(np.ravel(total)))
    best = np.asarray([1, 5, 8, 14])
    np.testing.assert_array_equal(np.asarray(chosen.mask).any(1), kept)
    for i in np.flatnonzero(kept):
        np.testing.assert_array_equal(chosen.ids[i], rollout.tokens.ids[best[i]])
        np.testing.assert_array_equal(chosen.mask[i], rollout.tokens.mask[best[i]])
    assert metrics["demonstrations/kept"] == pytest.approx(sum(kept) / 4)
    scores = np.asarray([3.0, 0.0, np.nan, 2.0])[kept]
    assert metrics["demonstrations/score"] == pytest.approx(scores.mean())
    loss, _ = method.loss_fn(method.params, chosen)
    assert float(loss.weight) == np.asarray(rollout.tokens.mask)[best[kept]].sum()


def test_a_judged_row_that_is_not_trained_changes_no_statistic_of_the_loss():
    """A None row is padding in what is trained on: it may hold anything, and counts as no row."""
    judged = Judged(scores=jnp.zeros(6), applies=jnp.asarray([True] * 5 + [False]))
    rollout = iteration._untrained_where(tiny.rollout(), ~judged.applies)
    assert not np.asarray(rollout.tokens.mask)[5].any()
    assert not np.asarray(rollout.tokens.segments)[5].any()
    np.testing.assert_array_equal(np.asarray(rollout.tokens.mask)[:5], np.asarray(tiny.rollout().tokens.mask)[:5])
