"""The objective on rollouts: a policy-gradient loss, and what PPO and GRPO add to it, from one look at the tokens."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from rljax import losses, ops
from rljax.errors import UserError
from rljax.objectives.offline import real_rows, supervised
from rljax.objectives.tryouts import check_form, name_of
from rljax.types import LanguageModel, LossFn, Mean, Metrics, Params, PolicyBatch
from rljax.views import Look, View, decoder_params

SURROGATE_INPUTS = ("logps", "old_logps", "advantages", "mask")


def policy(
    look: Look,
    loss: Callable[..., Array] = losses.ppo_clip_loss,
    *,
    aggregate: str = "token_mean",
    length: int | None = None,
    entropy_coef: float = 0.0,
    kl_estimator: str = "k3",
    value_loss: Callable[..., Array] = losses.value_clip_loss,
    value_coef: float = 0.1,
    pretrain: tuple[LanguageModel, float] | None = None,
) -> LossFn:
    """surrogate + kl_coef · KL − entropy_coef · H + value_coef · value loss, per token, then `ops.aggregate`.

    look: (params, tokens) -> the log-probabilities, entropies and values of the trained tokens (see `views`).
    loss: a surrogate `(logps, old_logps, advantages) -> [b t]`; it gets what its parameters are named after, out of
      logps, old_logps, advantages, mask (so `reinforce_loss(logps, advantages)` fits, and `gspo_loss` with its mask).
    aggregate, length: see `ops.aggregate`; rows without any token (no reward applies to them) do not count.
    kl_estimator: of the penalty in the loss (GRPO), where the batch has `ref_logps` and `kl_coef`.
    value_loss: `(values, old_values, returns) -> [b t]`, where the batch has returns.
    pretrain: (model, γ) adds γ · negative log-likelihood per token of `batch.pretrain` (PPO-ptx, InstructGPT Eq. 2).
    """
    wanted = surrogate_inputs(loss)
    clipped = clipped_tokens(loss)

    def loss_fn(params: Params, batch: PolicyBatch) -> tuple[Any, Metrics]:
        view, mask = look(params, batch.tokens), batch.tokens.mask
        given = {"logps": view.logps, "old_logps": batch.old_logps, "advantages": batch.advantages, "mask": mask}
        surrogate = loss(*(given[name] for name in wanted))
        check_form("loss", name_of(loss), surrogate, view.logps)
        if batch.importance is not None:
            surrogate = surrogate * batch.importance
        per_token, metrics = surrogate, {"loss/policy_avg": ops.masked_mean(surrogate, mask)}
        if batch.kl_coef is not None and batch.ref_logps is not None:
            kl = losses.kl_penalty(view.logps, batch.ref_logps, estimator=kl_estimator)
            per_token += batch.kl_coef[0] * kl
            metrics["loss/kl_avg"] = ops.masked_mean(kl, mask)
        if view.entropy is not None:
            per_token -= entropy_coef * view.entropy
            metrics["policy/entropy_avg"] = ops.masked_mean(view.entropy, mask)
        if batch.returns is not None and batch.old_values is not None and view.values is not None:
            value = value_loss(view.values, batch.old_values, batch.returns)
            check_form("value_loss", name_of(value_loss), value, view.values)
            per_token += value_coef * value
            metrics["loss/value_avg"] = ops.masked_mean(value, mask)
        metrics |= _distance(view, batch, clipped)
        real = real_rows(batch.tokens)
        objective = ops.aggregate(per_token, mask, mode=aggregate, length=length, rows=real)
        if pretrain is None:
            return objective, metrics
        model, coef = pretrain
        nll, _ = supervised(model)(decoder_params(params), batch.pretrain)
        metrics["loss/pretrain_avg"] = nll
        return (objective, Mean(total=coef * nll.total, weight=nll.weight)), metrics

    return loss_fn


def _distance(view: View, batch: PolicyBatch, clipped: Callable[..., Array] | None) -> Metrics:
    """How far the policy is from the one that sampled."""
    mask, moved = batch.tokens.mask, view.logps - batch.old_logps
    metrics = {
        "policy/approxkl_avg": ops.masked_mean(0.5 * moved**2, mask),
        "val/ratio": ops.masked_mean(jnp.exp(moved), mask),
    }
    if clipped is not None:
        flat = clipped(view.logps, batch.old_logps, batch.advantages, mask)
        metrics["policy/clipfrac_avg"] = ops.masked_mean(flat, mask)
    return metrics


def surrogate_inputs(loss: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a surrogate's positional parameters. UserError for a name that no rollout can fill."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(loss).parameters.values()
    names = tuple(p.name for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty)
    unknown = [name for name in names if name not in SURROGATE_INPUTS]
    if unknown or not names:
        raise UserError(
            f"the loss {getattr(loss, '__name__', loss)} takes {', '.join(names) or 'nothing'}: its positional "
            f"parameters must be named after what a rollout has ({', '.join(SURROGATE_INPUTS)}), options keyword-only"
        )
    return names


def is_ratio_loss(loss: Callable[..., Any]) -> bool:
    """Whether a surrogate is a clipped ratio times the advantage: PPO's or GSPO's, with any options."""
    return _function(loss) in (losses.ppo_clip_loss, losses.gspo_loss)


def clipped_tokens(loss: Callable[..., Any]) -> Callable[..., Array] | None:
    """(logps, old_logps, advantages, mask) -> [b t], 1 where the surrogate is flat: for PPO's token by token, for
    GSPO's by sequences; None for surrogates that drop no gradient, or are not known to.
    """
    parameters = inspect.signature(loss).parameters
    bounds = {name: parameters[name].default for name in ("clip_low", "clip_high", "dual_clip") if name in parameters}
    if _function(loss) is losses.ppo_clip_loss:
        return lambda logps, old_logps, advantages, mask: losses.clip_fraction(logps, old_logps, advantages, **bounds)
    if _function(loss) is losses.gspo_loss:
        return functools.partial(losses.gspo_clip_fraction, **bounds)
    return None


def _function(loss: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(loss, functools.partial):
        loss = loss.func
    return loss
