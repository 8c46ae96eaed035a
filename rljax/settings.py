"""The settings of online runs: what they share, and what each kind adds. Fields only, as in `program.Run`.

Defaults are those of the papers that `presets.py` names; where a preset exists, start from it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

from rljax import advantages, losses, objectives, ranges
from rljax.environments import Environment
from rljax.errors import UserError
from rljax.filters import Sampling
from rljax.objectives import tryouts
from rljax.program import Run
from rljax.ranges import Bias, Coefficient, Count, Decay, Mass, Natural, Positive, Rate, Score, Share
from rljax.sampling import GATHER

DPO = functools.partial(losses.dpo_loss, beta=0.1)
VALUE_CLIP = functools.partial(losses.value_clip_loss, clip=0.2)
Estimator = Literal["k1", "k2", "k3"]
Aggregate = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant"]
GRPO = functools.partial(advantages.group_relative, divide_by_std=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled(Run):
    """What every run shares whose data the policy writes. `batch` counts prompts; each is answered `group` times."""

    # a reward: (prompts, completions, **fields of the rows) -> numbers; several in a tuple (rljax.rewards); or an
    # environment, which gives its own rewards
    reward: Callable[..., Any] | tuple[Callable[..., Any], ...] | None = None
    environment: Environment | None = None  # a task of several turns, which gives its own rewards
    turn_tokens: Count | None = None  # of one action in an environment; None: max_completion, the row's budget
    reward_timeout: Positive | None = 600.0  # seconds for the rewards of one batch, or for one step of an environment

    group: Count = 1  # completions of each prompt
    share_prompts: bool = True  # compute a prompt once for its completions; changes speed and rounding only
    slots: Count | None = None  # rows written at a time, finished ones making room for the next; None: all at once
    gather: Coefficient = GATHER  # GiB of a device for weights that sampling gathers once, not at every token
    temperature: Coefficient = 1.0  # logits are divided by it, in sampling and in training
    top_k: Count | None = None  # only so many of the likeliest tokens may be drawn
    top_p: Mass | None = None  # only the likeliest tokens that reach this probability together
    min_p: Share | None = None  # only tokens at least this fraction as likely as the likeliest
    min_new_tokens: Natural = 0  # no end before so many tokens of a turn

    epochs: Count = 1  # passes over the rollouts of an iteration
    minibatches: Count = 1  # updates per pass
    old_logps: Literal["sampler", "trainer"] = "sampler"  # trainer: computed again before the update, by one more pass
    importance_cap: Positive | None = None  # with "trainer": weights min(π_old / π_sampler, cap), 2 say (2505.24034)

    kl_reward: Coefficient = 0.0  # coefficient of the KL penalty in the reward
    kl_estimator: Estimator = "k1"  # of the KL in the reward
    kl_loss: Coefficient = 0.0  # coefficient of the KL penalty in the loss
    kl_loss_estimator: Estimator = "k3"  # of the KL in the loss; k2 has the gradient of the reverse KL
    kl_target: Positive | None = None  # nats a sequence: both coefficients follow it (1909.08593); None: fixed
    kl_horizon: Count = 10_000  # episodes
    log_kl: bool = False  # measure the KL to the reference also where no penalty needs it

    missing_eos_score: Score | None = None  # takes the place of the score of a completion that did not end
    missing_eos_penalty: Coefficient | None = None  # is subtracted from it
    overlong_buffer: Count | None = None  # tokens before the budget's end over which a penalty rises to 1 (DAPO)
    score_clip: Positive | None = None  # scores are limited to ±score_clip
    normalize_running: bool = False  # divide scores by the running standard deviation
    normalize_reference: Natural = 0  # bring scores of so many samples of the initial policy to mean 0, std 1, once

    filter_groups: bool = False  # sample until the batch is full of groups with different rewards (DAPO)
    max_rounds: Count = 10  # of sampling for one batch
    lag: Natural = 0  # train on rollouts of so many iterations ago: their host rewards had an update's time
    max_age: Natural = 0  # with filter_groups: leftover groups may wait so many iterations

    evidence: Natural = 4  # rows whose tokens are kept at every evaluation, for `rljax inspect`


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPO(Sampled):
    """Proximal policy optimisation with a critic (1707.06347, as in 1909.08593 and 2403.17031)."""

    loss: Callable[..., Any] = losses.ppo_clip_loss  # (logps, old_logps, advantages, mask), by name -> [b t]
    aggregate: Aggregate = "token_mean"  # how tokens make a loss: see ops.aggregate
    entropy_coef: Coefficient = 0.0  # of an entropy bonus

    critic: str = "policy"  # where it starts: "policy" (its decoder), a reward model's folder or run, or "shared":
    # no decoder of its own, a value head on the policy's
    value_loss: Callable[..., Any] = VALUE_CLIP  # (values, old values, returns) -> [b t]
    value_coef: Coefficient = 0.1  # of the critic's loss beside the policy's
    gamma: Share = 1.0  # discount of later rewards
    lam: Share = 0.95  # λ of generalised advantage estimation
    whiten_rewards: bool = False  # without shifting the mean
    whiten_advantages: bool = True  # to mean 0 and variance 1
    whiten_over: Literal["batch", "minibatch"] = "batch"  # advantages; OpenAI's code does it in each update
    whiten_ddof: Bias = 1  # 0: OpenAI's biased variance
    target_kl: Positive | None = None  # skip an iteration's remaining updates once policy/approxkl_avg exceeds it

    kl_reward: Coefficient = 0.05
    epochs: Count = 4
    ema: Decay | None = None  # decay of an average of the policy's weights, which is what is evaluated and exported
    pretrain_data: str | None = None  # {"text"} rows: PPO-ptx
    pretrain_coef: Coefficient = 27.8  # of the negative log-likelihood of that text
    pretrain_batch: Count = 8  # rows of max_prompt + max_completion tokens beside the rollouts of an iteration


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradient(Sampled):
    """Policy gradients without a critic: REINFORCE, RLOO, ReMax, GRPO and their family."""

    loss: Callable[..., Any] = losses.ppo_clip_loss  # (logps, old_logps, advantages, mask), by name -> [b t]
    # (rewards [g n]) -> [g n]; with a parameter `greedy` [g] it gets the scores of greedy completions; with a
    # parameter `mask` it works on tokens, (rewards [b t], mask) -> [b t]
    advantage: Callable[..., Any] = GRPO
    aggregate: Aggregate = "seq_mean_token_mean"  # how tokens make a loss: see ops.aggregate
    entropy_coef: Coefficient = 0.0  # of an entropy bonus
    whiten_advantages: bool = False  # to mean 0 and variance 1
    whiten_over: Literal["batch", "minibatch"] = "batch"  # advantages; OpenAI's code does it in each update
    whiten_ddof: Bias = 1  # 0: OpenAI's biased variance
    target_kl: Positive | None = None  # skip an iteration's remaining updates once policy/approxkl_avg exceeds it
    ema: Decay | None = None  # decay of an average of the weights, which is what is evaluated and exported
    group: Count = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlinePreference(Sampled):
    """Direct preference learning on the policy's own samples: the best of each group against the worst (2402.04792)."""

    loss: Callable[..., Any] = DPO  # of [b] log-probabilities: chosen, rejected, then the reference's
    average: bool = False  # log-probabilities per token instead of summed
    group: Count = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imitation(Sampled):
    """Supervised fine-tuning on the best of each group: best-of-n, expert iteration, RAFT (2304.06767)."""

    learning_rate: Rate = 2e-5  # at the peak of the schedule
    threshold: Score | None = None  # only completions whose score exceeds it become demonstrations
    group: Count = 8


def sampling(run: Sampled, stop_ids: tuple[int, ...], absent: tuple[tuple[int, int], ...] = ()) -> Sampling:
    """The distribution that the run draws from, and is trained on. absent: ids without a token (`Policy.absent`)."""
    names = ("temperature", "top_k", "top_p", "min_p", "min_new_tokens")
    return Sampling(**{name: getattr(run, name) for name in names}, stop_ids=stop_ids, absent=absent)


def check(run: Sampled) -> None:
    """Raise UserError for settings of online runs that cannot work, before anything is loaded."""
    _check_unused(run)
    if run.environment is not None:
        ranges.check_one("environment.max_turns", Count, run.environment.max_turns)
    if run.normalize_reference == 1:
        raise UserError("normalize_reference=1: one sample has no deviation to scale by: take more, or 0 for none")
    if (run.reward is None) == (run.environment is None):
        raise UserError("give a reward, (prompts, completions, **fields) -> numbers, or an environment: one of the two")
    if run.slots is not None and (run.slots < 1 or run.slots % run.group or run.environment is not None):
        raise UserError(
            f"slots={run.slots} must be a positive multiple of group={run.group}, whose rows start together, and "
            "without an environment, whose episodes take turns: None writes all rows at once"
        )
    if run.temperature == 0:
        raise UserError("temperature=0 always writes the same, so that nothing can be learned from it: set it above 0")
    rows = run.batch if isinstance(run, OnlinePreference | Imitation) else run.batch * run.group
    if rows % (run.minibatches * run.microbatches):
        raise UserError(
            f"{rows} rows an iteration cannot be cut into minibatches={run.minibatches} × "
            f"microbatches={run.microbatches} equal parts: change batch={run.batch} or group={run.group}"
        )
    if run.group < 2 and isinstance(run, OnlinePreference):
        raise UserError(f"pairs are made of the completions of one prompt: group must be at least 2, got {run.group}")
    if run.group < 2 and run.filter_groups:
        raise UserError("filter_groups looks for different rewards within a group: set group to 2 or more")
    if run.lag and (run.filter_groups or run.max_age):
        raise UserError("lag lets all rollouts wait, filter_groups with max_age the leftover ones: set one of them")
    if run.importance_cap is not None and run.old_logps != "trainer":
        raise UserError("importance_cap weighs the trainer's old policy against the sampler's: set old_logps='trainer'")
    if run.kl_target is not None and not (run.kl_reward or run.kl_loss):
        raise UserError(f"kl_target={run.kl_target} adapts a coefficient that is 0: set kl_reward or kl_loss")
    turn = run.max_completion if run.turn_tokens is None else run.turn_tokens
    if run.min_new_tokens >= turn:
        raise UserError(
            f"min_new_tokens={run.min_new_tokens} leaves no room for an end: set it below the budget of {turn} tokens "
            f"({'max_completion' if run.turn_tokens is None else 'turn_tokens'})"
        )
    if run.overlong_buffer is not None and not 1 <= run.overlong_buffer < run.max_completion:
        raise UserError(
            f"overlong_buffer={run.overlong_buffer} must be 1 token or more and less than max_completion="
            f"{run.max_completion}, else every completion is punished (a fifth of it in the paper); None leaves it out"
        )
    if isinstance(run, PPO) and run.pretrain_data and run.pretrain_batch % (run.minibatches * run.microbatches):
        raise UserError(
            f"pretrain_batch={run.pretrain_batch} rows cannot be cut into minibatches={run.minibatches} × "
            f"microbatches={run.microbatches} equal parts, as the rollouts beside them are: change it"
        )
    if run.normalize_running and run.normalize_reference:
        raise UserError("normalize_running and normalize_reference are two ways to scale scores: set one of them")
    if run.environment is not None and "greedy" in _parameters(getattr(run, "advantage", None)):
        raise UserError("an environment has no greedy completions to compare with: choose another advantage")
    _try_functions(run)


def _try_functions(run: Sampled) -> None:
    """Raise UserError for a loss or an advantage of another shape, or one that nothing can be learned from."""
    if isinstance(run, PPO | PolicyGradient):
        tryouts.surrogate(run.loss, objectives.surrogate_inputs(run.loss))
    if isinstance(run, PPO):
        tryouts.value_loss(run.value_loss)
    if isinstance(run, PolicyGradient):
        tryouts.advantage(run.advantage, run.group)
    if isinstance(run, OnlinePreference):
        tryouts.pairs(run.loss)


def _parameters(function: Callable[..., Any] | None) -> tuple[str, ...]:
    return () if function is None else tuple(inspect.signature(function).parameters)


def _check_unused(run: Sampled) -> None:
    """Raise UserError for settings that nothing would come of."""
    kind = type(run).__name__
    if isinstance(run, OnlinePreference | Imitation):
        for name in ("kl_reward", "kl_loss", "kl_target", "importance_cap"):
            if getattr(run, name):
                raise UserError(f"{name}={getattr(run, name)} has no effect on {kind}, which has no policy gradient")
    if run.max_age and not run.filter_groups:
        raise UserError(f"max_age={run.max_age} is for groups that filter_groups leaves over: set that too")
    if run.turn_tokens is not None and run.environment is None:
        raise UserError(f"turn_tokens={run.turn_tokens} is for the turns of an environment: set max_completion")
    advantage = getattr(run, "advantage", None)
    if getattr(advantage, "func", advantage) is advantages.group_relative and run.group == 1 and not run.filter_groups:
        raise UserError("group=1: a completion alone in its group has the advantage 0, nothing would be learned")
