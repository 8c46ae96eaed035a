"""Objectives on data sets: preferences, comparisons, demonstrations.

Each builder takes the model (code) and a loss (mathematics) and returns `(params, batch) -> (Mean, Metrics)`. Rows
that the data layer added to fill a batch (no real token) weigh nothing, in the loss and in every metric.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rljax import losses, ops
from rljax.errors import UserError
from rljax.filters import Sampling
from rljax.logprobs import map_logits, token_logps
from rljax.models import share_prompts as sharing_prompts
from rljax.models.heads import ScalarModel
from rljax.objectives.tryouts import check_form, name_of
from rljax.types import (
    ComparisonBatch,
    LanguageModel,
    LossFn,
    Mean,
    Metrics,
    Params,
    PreferenceBatch,
    Tokens,
    UnpairedBatch,
)


def real_rows(tokens: Tokens) -> Array:
    """bool[…]: rows that hold at least one token, as opposed to those that only fill up a batch."""
    return jnp.any(tokens.segments > 0, axis=-1)


def sequence_logps(
    model: LanguageModel, params: Params, tokens: Tokens, *, average: bool = False, max_trained: int | None = None
) -> Array:
    """f32[b]: log-probability of each row's trained tokens, summed, or averaged over them."""
    logps = token_logps(model, params, tokens, max_trained=max_trained)
    return (ops.sequence_mean if average else ops.sequence_sum)(logps, tokens.mask)


def pair_logps(
    model: LanguageModel,
    params: Params,
    chosen: Tokens,
    rejected: Tokens,
    *,
    max_trained: int | None = None,
    sampling: Sampling | None = None,
    share_prompts: bool = False,
) -> tuple[Array, Array]:
    """f32[b t] each: log-probabilities of the trained tokens of pairs, in one pass.

    share_prompts: chosen and rejected have the same prompt in the same columns, all but the last `max_trained`, and it
      is computed once for both (`models.share_prompts`). The numbers are the same ones to rounding.
    """
    if share_prompts and max_trained is None:
        raise UserError("share_prompts takes the last max_trained columns for the completion: give max_trained")
    if share_prompts:
        model = sharing_prompts(model, n=2, completion=max_trained or 0)
    # A pair's rows are neighbours, so that on a mesh both are on the same device.
    both = jax.tree.map(lambda *x: jnp.stack(x, axis=1).reshape(-1, x[0].shape[1]), chosen, rejected)
    logps = token_logps(model, params, both, max_trained=max_trained, sampling=sampling)
    logps = logps.reshape(*chosen.ids.shape[:1], 2, -1)
    return logps[:, 0], logps[:, 1]


def supervised(model: LanguageModel, *, max_trained: int | None = None) -> LossFn:
    """Next-token prediction of the trained tokens: the mean negative log-likelihood per token."""

    def per_token(logits: Array, ids: Array) -> tuple[Array, Array]:
        return ops.aligned_logps(logits, ids), (jnp.argmax(logits, axis=-1) == ids).astype(jnp.float32)

    def loss_fn(params: Params, tokens: Tokens) -> tuple[Mean, Metrics]:
        logps, correct = map_logits(model, params, tokens, per_token, max_trained=max_trained)
        nll = ops.masked_mean(losses.nll_loss(logps), tokens.mask)
        return nll, {"mean_token_accuracy": ops.masked_mean(correct, tokens.mask)}

    return loss_fn


def preference(
    model: LanguageModel,
    loss: Callable[..., Array],
    *,
    average: bool = False,
    reference: bool = True,
    nll_weight: float = 0.0,
    nll_average: bool = True,
    max_trained: int | None = None,
    sampling: Sampling | None = None,
    share_prompts: bool = False,
) -> LossFn:
    """A loss on pairs of sequence log-probabilities.

    loss: with `reference`, (policy_chosen, policy_rejected, ref_chosen, ref_rejected) -> [b]; without,
      (chosen, rejected) -> [b]. Further keywords are filled from the batch's `fields` (a margin, a weight) by name.
    average: hand the loss log-probabilities averaged over the response (SimPO, ORPO, IPO as its authors ran it)
      instead of summed. The batch's reference log-probabilities must then be averages too.
    nll_weight: adds that much negative log-likelihood of the chosen response: 1 with `orpo_loss` and `cpo_loss`,
      RPO's α (2404.19733) with `dpo_loss`. nll_average: its mean per token of a response (RPO, ORPO, TRL) or its sum
      (CPO, Eq. 5).
    sampling: the temperature and filters that the responses were drawn with, where the reference's log-probabilities
      are those of what they leave (online DPO).
    share_prompts: see `pair_logps`.
    """
    scale = reward_scale(loss)

    def loss_fn(params: Params, batch: PreferenceBatch) -> tuple[Mean, Metrics]:
        settings = {"max_trained": max_trained, "sampling": sampling, "share_prompts": share_prompts}
        logps = pair_logps(model, params, batch.chosen, batch.rejected, **settings)
        reduce = ops.sequence_mean if average else ops.sequence_sum
        chosen, rejected = reduce(logps[0], batch.chosen.mask), reduce(logps[1], batch.rejected.mask)
        ref = (batch.ref_chosen_logps, batch.ref_rejected_logps)
        real = real_rows(batch.chosen)
        values = loss(chosen, rejected, *(ref if reference else ()), **batch.fields)
        check_form("loss", name_of(loss), values, chosen)
        metrics = {}
        if nll_weight:
            reduce = ops.sequence_mean if nll_average else ops.sequence_sum
            nll = -reduce(logps[0], batch.chosen.mask)
            values = values + nll_weight * nll
            metrics["nll_loss"] = ops.masked_mean(nll, real)
        better, worse = (scale * (x - r) if reference else scale * x for x, r in ((chosen, ref[0]), (rejected, ref[1])))
        return ops.masked_mean(values, real), {
            **metrics,
            **_reward_metrics(better, worse, real),
            "logps/chosen": ops.masked_mean(chosen, real),
            "logps/rejected": ops.masked_mean(rejected, real),
        }

    return loss_fn


def unpaired(
    model: LanguageModel, loss: Callable[..., Array] = losses.kto_loss, *, max_trained: int | None = None
) -> LossFn:
    """A loss on single responses marked desirable or not: (policy_logps, ref_logps, desirable, kl) -> [b] (KTO)."""
    scale = reward_scale(loss)

    def loss_fn(params: Params, batch: UnpairedBatch) -> tuple[Mean, Metrics]:
        logps = sequence_logps(model, params, batch.tokens, max_trained=max_trained)
        real = real_rows(batch.tokens)
        values = loss(logps, batch.ref_logps, batch.desirable, batch.kl[0])
        check_form("loss", name_of(loss), values, logps)
        rewards = scale * (logps - batch.ref_logps)
        good, bad = real & batch.desirable, real & ~batch.desirable
        return ops.masked_mean(values, real), {
            "rewards/chosen": ops.masked_mean(rewards, good),
            "rewards/rejected": ops.masked_mean(rewards, bad),
            "logps/chosen": ops.masked_mean(logps, good),
            "logps/rejected": ops.masked_mean(logps, bad),
            "kl": ops.masked_mean(batch.kl, real),
        }

    return loss_fn


def comparison(model: ScalarModel, loss: Callable[..., Array] = losses.bradley_terry_loss) -> LossFn:
    """A reward-model loss on k scored responses a prompt.

    loss: either `(chosen[b], rejected[b], *, margin) -> [b]` for pairs, given the data's margins where it takes them,
      or `(scores[b k], best[b]) -> [b]` for any k; which of the two is read off its parameter names.
    """
    listwise = "best" in inspect.signature(loss).parameters
    margins = "margin" in inspect.signature(loss).parameters

    def loss_fn(params: Params, batch: ComparisonBatch) -> tuple[Mean, Metrics]:
        rows, k, length = batch.tokens.ids.shape
        flat = jax.tree.map(lambda x: x.reshape(rows * k, length), batch.tokens)
        scores = model.scores(params, flat).reshape(rows, k)
        real = real_rows(batch.tokens)[:, 0]
        best = jnp.take_along_axis(scores, batch.best[:, None], axis=1)[:, 0]
        others = jnp.where(jax.nn.one_hot(batch.best, k, dtype=bool), -jnp.inf, scores)
        runner_up = jnp.max(others, axis=1)
        if listwise:
            values = loss(scores, batch.best)
        elif k == 2:
            values = loss(best, runner_up, **({"margin": batch.margin} if margins else {}))
        else:
            raise UserError(
                f"{getattr(loss, '__name__', loss)} compares two responses, this data has {k} a prompt: "
                f"use rljax.losses.best_of_k_loss"
            )
        check_form("loss", name_of(loss), values, best)
        return ops.masked_mean(values, real), {
            "accuracy": ops.masked_mean((best > runner_up).astype(jnp.float32), real),
            "margin": ops.masked_mean(best - runner_up, real),
            "reward/best": ops.masked_mean(best, real),
            "reward/others": ops.masked_mean(runner_up, real),
        }

    return loss_fn


def reward_scale(loss: Callable[..., Any]) -> float:
    """What implicit rewards are multiplied by: the loss's `beta`, or 1 where it has none."""
    beta = inspect.signature(loss).parameters.get("beta")
    return 1.0 if beta is None or beta.default is inspect.Parameter.empty else float(beta.default)


def _reward_metrics(chosen: Array, rejected: Array, real: Array) -> Metrics:
    return {
        "rewards/chosen": ops.masked_mean(chosen, real),
        "rewards/rejected": ops.masked_mean(rejected, real),
        "rewards/margins": ops.masked_mean(chosen - rejected, real),
        "rewards/accuracies": ops.masked_mean(0.5 * (1 + jnp.sign(chosen - rejected)), real),
    }
