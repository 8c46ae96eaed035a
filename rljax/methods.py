"""What the online program learns from a scored rollout: settings and a policy to a `Method`, one function per kind.

PPO and the critic-free family make a `PolicyBatch` of it, online DPO pairs, expert iteration demonstrations; the
program around them (sample, judge, update) is the same. Rows stand in groups: the n completions of a prompt are
neighbours, so `[b]` is `[g n]` in another shape.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from rljax import advantages, groups, losses, models, objectives, ops, views
from rljax.filters import Sampling
from rljax.groups import NONE, Shares
from rljax.objectives.tryouts import check_form, name_of
from rljax.types import (
    LanguageModel,
    LossFn,
    Mean,
    Metrics,
    Params,
    PolicyBatch,
    PreferenceBatch,
    Rollout,
    Tokens,
    pytree,
)


@pytree
class Notes:
    """What is computed of a rollout before the update and not differentiated; None where the method needs none."""

    logps: Array | None = None  # f32[b t]: the trainer's, under the policy that is about to be updated
    ref_logps: Array | None = None  # f32[b t]
    values: Array | None = None  # f32[b t]


@pytree
class Judged:
    """Rewards after shaping. A row whose reward said None trains nothing: its mask is False."""

    scores: Array  # f32[b], the rewards of single tokens included; 0 for rows that train nothing
    applies: Array  # bool[b]
    per_token: Array | None = None  # f32[b t]: the part of the score that is not for the last token
    greedy: Array | None = None  # f32[b]: of each prompt's greedy completion, where the advantage asks for it


class Method(NamedTuple):
    """Code only; `params` is where training starts."""

    params: Params
    loss_fn: LossFn
    annotate: Callable[[Params, Params | None, Rollout], Notes]  # (params, reference, rollout)
    batch: Callable[[Rollout, Notes, Judged, Array], tuple[Any, Metrics]]  # (…, KL coefficient's factor)
    look: views.Look
    reference: bool  # whether `annotate` reads the reference
    greedy: bool = False  # whether every prompt is answered greedily as well
    together: int = 1  # neighbouring rows of a batch that stay together in minibatches: the completions of a prompt
    shared: int = 1  # neighbouring rows whose prompt the update computes once: they stay together in microbatches


def ppo(
    run: Any,
    model: LanguageModel,
    params: Params,
    critic: tuple[LanguageModel, Params] | None,
    sampling: Sampling,
    shares: Shares = NONE,
) -> Method:
    """Actor and critic. critic: a decoder of its own with {"model", "head"}, or None: a head on the policy's trunk."""
    notes, learned = shares.models(run)
    settings: dict[str, Any] = {
        "sampling": sampling,
        "max_trained": run.max_completion,
        "entropy": used(run.entropy_coef),
    }
    if critic is None:
        head = models.scalar_head(model.config.hidden_size).init(jax.random.key(run.seed))
        tree = {"policy": params, "head": jax.tree.map(jnp.zeros_like, head)}
        view, values = views.with_value_head(learned(model), **settings), views.values(notes(model))
    else:
        tree = {"policy": params, "critic": critic[1]}
        view = views.with_critic(learned(model), learned(critic[0]), **settings)
        values = views.values(notes(critic[0]))

    def batch(rollout: Rollout, notes: Notes, judged: Judged, kl_factor: Array) -> tuple[PolicyBatch, Metrics]:
        mask = rollout.tokens.mask
        assert notes.values is not None
        rewards, metrics = _token_rewards(run, rollout, notes, judged, kl_factor)
        if run.whiten_rewards:
            rewards = ops.masked_whiten(rewards, mask, shift_mean=False, ddof=run.whiten_ddof)
        gained, returns = advantages.gae(rewards, notes.values, mask, gamma=run.gamma, lam=run.lam)
        metrics |= {
            "val/mean": ops.masked_mean(notes.values, mask),
            "val/explained_variance": _explained(returns, notes.values, mask),
        }
        made = _policy_batch(run, rollout, notes, gained, kl_factor)
        return dataclasses.replace(made, rewards=rewards, old_values=notes.values, returns=returns), metrics

    return Method(
        params=tree,
        loss_fn=_policy_objective(run, view, model, value_loss=run.value_loss, value_coef=run.value_coef),
        annotate=_annotate(run, notes(model), sampling, values=values),
        batch=batch,
        look=view,
        reference=_wants_reference(run),
        together=groups.together(run),
        shared=shares.update,
    )


def policy_gradient(
    run: Any, model: LanguageModel, params: Params, sampling: Sampling, shares: Shares = NONE
) -> Method:
    """No critic: `run.advantage` compares completions of a prompt, or adds up what is still to come."""
    notes, learned = shares.models(run)
    settings: dict[str, Any] = {"max_trained": run.max_completion, "entropy": used(run.entropy_coef)}
    view = views.of_policy(learned(model), sampling=sampling, **settings)
    names = inspect.signature(run.advantage).parameters

    def batch(rollout: Rollout, notes: Notes, judged: Judged, kl_factor: Array) -> tuple[PolicyBatch, Metrics]:
        mask = rollout.tokens.mask
        rewards, metrics = _token_rewards(run, rollout, notes, judged, kl_factor)
        if "mask" in names:
            gained = run.advantage(rewards, mask)
            check_form("advantage", name_of(run.advantage), gained, rewards)
        else:
            whole = jnp.where(mask.any(1), ops.sequence_sum(rewards, mask), judged.scores)
            gained = jnp.where(mask, _compare(run, names, whole, judged)[:, None], 0.0)
        return dataclasses.replace(_policy_batch(run, rollout, notes, gained, kl_factor), rewards=rewards), metrics

    return Method(
        params=params,
        loss_fn=_policy_objective(run, view, model),
        annotate=_annotate(run, notes(model), sampling),
        batch=batch,
        look=view,
        reference=_wants_reference(run),
        greedy="greedy" in names,
        together=groups.together(run),
        shared=shares.update,
    )


def preference(run: Any, model: LanguageModel, params: Params, sampling: Sampling, shares: Shares = NONE) -> Method:
    """Online DPO (Guo et al. 2024, arXiv:2402.04792): of each prompt's completions the best against the worst."""
    view = views.of_policy(model, sampling=sampling, max_trained=run.max_completion)

    def batch(rollout: Rollout, notes: Notes, judged: Judged, kl_factor: Array) -> tuple[PreferenceBatch, Metrics]:
        del kl_factor
        assert notes.ref_logps is not None
        group = judged.scores.reshape(-1, run.group)
        applies = judged.applies.reshape(-1, run.group)
        best = jnp.argmax(jnp.where(applies, group, -jnp.inf), axis=1)
        worst = jnp.argmin(jnp.where(applies, group, jnp.inf), axis=1)
        rows = jnp.arange(len(group)) * run.group
        tied = group[jnp.arange(len(group)), best] == group[jnp.arange(len(group)), worst]
        real = ~tied & (applies.sum(1) > 1)  # a pair without a winner only fills up the batch
        reduce = ops.sequence_mean if run.average else ops.sequence_sum
        ref = reduce(notes.ref_logps, rollout.tokens.mask)
        pairs = PreferenceBatch(
            chosen=_rows(rollout.tokens, rows + best, real),
            rejected=_rows(rollout.tokens, rows + worst, real),
            ref_chosen_logps=ref[rows + best],
            ref_rejected_logps=ref[rows + worst],
        )
        return pairs, _rollout_metrics(rollout, notes, judged, run) | {"pairs/tied": share(~real)}

    return Method(
        params=params,
        loss_fn=objectives.preference(
            model,
            run.loss,
            average=run.average,
            max_trained=run.max_completion,
            sampling=sampling,
            share_prompts=shares.notes > 1,
        ),
        annotate=_annotate(run, shares.models(run)[0](model), sampling),
        batch=batch,
        look=view,
        reference=True,
    )


def imitation(run: Any, model: LanguageModel, params: Params, sampling: Sampling, shares: Shares = NONE) -> Method:
    """Best-of-n fine-tuning, expert iteration, RAFT (Dong et al. 2023, arXiv:2304.06767): each prompt's best completion
    becomes a demonstration, if its score exceeds `run.threshold`.
    """
    view = views.of_policy(model, sampling=sampling, max_trained=run.max_completion)

    def batch(rollout: Rollout, notes: Notes, judged: Judged, kl_factor: Array) -> tuple[Tokens, Metrics]:
        del kl_factor
        group = jnp.where(judged.applies, judged.scores, -jnp.inf).reshape(-1, run.group)
        best = jnp.argmax(group, axis=1)
        good = jnp.max(group, axis=1) > (-jnp.inf if run.threshold is None else run.threshold)
        chosen = _rows(rollout.tokens, jnp.arange(len(group)) * run.group + best, good)
        return chosen, _rollout_metrics(rollout, notes, judged, run) | {
            "demonstrations/kept": share(good),
            "demonstrations/score": ops.masked_mean(jnp.max(group, axis=1), good),
        }

    return Method(
        params=params,
        loss_fn=objectives.supervised(model, max_trained=run.max_completion),
        annotate=_annotate(run, shares.models(run)[0](model), sampling),
        batch=batch,
        look=view,
        reference=_wants_reference(run),
    )


# --- what they share --------------------------------------------------------------------------------------------------


def used(coefficient: Any) -> bool:
    """Whether there is anything to multiply: not for the number 0, but for one that is traced (a sweep by `vmap`)."""
    return not (isinstance(coefficient, int | float) and coefficient == 0)


def _wants_reference(run: Any) -> bool:
    return used(run.kl_reward) or used(run.kl_loss) or run.log_kl


def _policy_objective(run: Any, view: views.Look, model: LanguageModel, **critic: Any) -> LossFn:
    return objectives.policy(
        view,
        run.loss,
        aggregate=run.aggregate,
        length=run.max_completion,
        entropy_coef=run.entropy_coef,
        kl_estimator=run.kl_loss_estimator,
        pretrain=(model, run.pretrain_coef) if getattr(run, "pretrain_data", None) else None,
        **critic,
    )


def _annotate(
    run: Any, model: LanguageModel, sampling: Sampling, values: Callable[..., Array] | None = None
) -> Callable[[Params, Params | None, Rollout], Notes]:
    """Reference and policy are looked at by one function, so that equal weights give equal bits."""
    plain = views.of_policy(model, sampling=sampling, max_trained=run.max_completion)

    def annotate(params: Params, reference: Params | None, rollout: Rollout) -> Notes:
        own = run.old_logps == "trainer"
        return Notes(
            logps=plain(views.decoder_params(params), rollout.tokens).logps if own else None,
            ref_logps=None if reference is None else plain(reference, rollout.tokens).logps,
            values=None if values is None else values(params, rollout.tokens),
        )

    return annotate


def _token_rewards(run: Any, rollout: Rollout, notes: Notes, judged: Judged, kl_factor: Array) -> tuple[Array, Metrics]:
    """(f32[b t]: the score on the last token, per-token rewards, minus the KL penalty where the reward holds it;
    metrics)."""
    mask = rollout.tokens.mask
    old = old_logps(rollout, notes)
    ref = old if notes.ref_logps is None else notes.ref_logps
    coef = run.kl_reward * kl_factor
    last = judged.scores if judged.per_token is None else judged.scores - ops.sequence_sum(judged.per_token, mask)
    rewards = advantages.shape_rewards(last, old, ref, mask, kl_coef=coef, estimator=run.kl_estimator)
    if judged.per_token is not None:
        rewards = jnp.where(mask, rewards + judged.per_token, 0.0)
    metrics = _rollout_metrics(rollout, notes, judged, run)
    if used(run.kl_reward):
        penalty = ops.sequence_sum(losses.kl_penalty(old, ref, estimator=run.kl_estimator), mask)
        real = judged.applies
        metrics |= {
            "objective/non_score_reward": ops.masked_mean(-coef * penalty, real),
            "objective/rlhf_reward": ops.masked_mean(judged.scores - coef * penalty, real),
            "objective/kl_coef": ops.masked_mean(coef, jnp.ones((), bool)),
        }
    elif used(run.kl_loss):
        metrics["objective/kl_coef"] = ops.masked_mean(run.kl_loss * kl_factor, jnp.ones((), bool))
    return rewards, metrics


def old_logps(rollout: Rollout, notes: Notes) -> Array:
    """f32[b t]: of the policy before the update, by the trainer where it computed them, else by the sampler."""
    return jnp.where(rollout.tokens.mask, rollout.logps if notes.logps is None else notes.logps, 0.0)


def _policy_batch(run: Any, rollout: Rollout, notes: Notes, gained: Array, kl_factor: Array) -> PolicyBatch:
    mask, old = rollout.tokens.mask, old_logps(rollout, notes)
    if run.whiten_advantages and run.whiten_over == "batch":
        gained = ops.masked_whiten(gained, mask, ddof=run.whiten_ddof)
    importance = None
    if notes.logps is not None and run.importance_cap is not None:
        ratio = jnp.exp(jnp.where(mask, notes.logps - rollout.logps, 0.0))
        importance = jnp.where(mask, jnp.minimum(ratio, run.importance_cap), 0.0)
    return PolicyBatch(
        tokens=rollout.tokens,
        old_logps=old,
        advantages=gained,
        ref_logps=notes.ref_logps if used(run.kl_loss) else None,
        kl_coef=jnp.full(len(mask), run.kl_loss * kl_factor) if used(run.kl_loss) else None,
        importance=importance,
    )


def whitening(run: Any) -> Callable[[PolicyBatch], PolicyBatch] | None:
    """What makes the advantages of a minibatch those of its update, where the run whitens them there."""
    if getattr(run, "whiten_over", "batch") != "minibatch" or not run.whiten_advantages:
        return None

    def whiten(batch: PolicyBatch) -> PolicyBatch:
        gained = ops.masked_whiten(batch.advantages, batch.tokens.mask, ddof=run.whiten_ddof)
        return dataclasses.replace(batch, advantages=gained)

    return whiten


def _compare(run: Any, names: Any, rewards: Array, judged: Judged) -> Array:
    """Advantages [b] by comparing the rewards of each group. An advantage function that does not ask which rows apply
    (`applies`) sees one that does not as its group's mean.
    """
    groups, applies = rewards.reshape(-1, run.group), judged.applies.reshape(-1, run.group)
    mean = jnp.sum(jnp.where(applies, groups, 0.0), axis=1, keepdims=True) / jnp.maximum(
        applies.sum(1, keepdims=True), 1
    )
    groups = jnp.where(applies, groups, mean)
    more = {"applies": applies} if "applies" in names else {}
    if judged.greedy is not None and "greedy" in names:
        more["greedy"] = judged.greedy.reshape(-1, run.group)[:, 0]
    given = run.advantage(groups, **more)
    check_form("advantage", name_of(run.advantage), given, groups)
    return jnp.where(applies, given, 0.0).reshape(-1)


def _rollout_metrics(rollout: Rollout, notes: Notes, judged: Judged, run: Any) -> Metrics:
    """The familiar names; see metrics.py for what each means."""
    mask, real, old = rollout.tokens.mask, judged.applies, old_logps(rollout, notes)
    found = {
        "objective/scores": ops.masked_mean(judged.scores, real),
        "objective/entropy": ops.masked_mean(-ops.sequence_sum(old, mask), real),
    }
    if notes.ref_logps is not None:
        found["objective/kl"] = ops.masked_mean(ops.sequence_sum(old - notes.ref_logps, mask), real)
    if notes.logps is not None:
        moved = jnp.where(mask, notes.logps - rollout.logps, 0.0)
        found["sampling/logp_difference"] = ops.masked_mean(jnp.abs(moved), mask)
    if run.group > 1:
        groups, applies = (x.reshape(-1, run.group) for x in (judged.scores, real))
        high, low = jnp.where(applies, groups, -jnp.inf).max(1), jnp.where(applies, groups, jnp.inf).min(1)
        found["frac_reward_zero_std"] = share(high <= low, applies.any(1))
    return found


def share(of: Array, among: Array | None = None) -> Mean:
    """How many of some truth values hold (bool arrays): among all of them, or those where `among` does."""
    return ops.masked_mean(of.astype(jnp.float32), jnp.ones_like(of) if among is None else among)


def _explained(returns: Array, values: Array, mask: Array) -> Mean:
    """1 − Var(returns − values) / Var(returns) over the trained tokens, as a Mean of weight 1."""
    n = jnp.maximum(mask.sum(), 1)

    def variance(x: Array) -> Array:
        x = jnp.where(mask, x, 0.0)
        return jnp.sum(jnp.where(mask, x - x.sum() / n, 0.0) ** 2) / n

    spread = variance(returns)
    share = 1.0 - variance(returns - values) / jnp.where(spread > 0, spread, 1.0)
    return ops.masked_mean(share, spread > 0)


def _rows(tokens: Tokens, rows: Array, real: Array) -> Tokens:
    """Some rows; those that are not real become padding, which weighs nothing."""
    some: Tokens = jax.tree.map(lambda x: jnp.take(x, rows, axis=0), tokens)
    keep = real[:, None]
    return dataclasses.replace(some, segments=jnp.where(keep, some.segments, 0), mask=some.mask & keep)
