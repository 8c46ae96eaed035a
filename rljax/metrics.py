"""What the numbers of a run mean: the names that people know from TRL, each with a definition, a unit and a direction.

`define` looks a logged name up, with or without its `eval/` prefix. A name that is not here is logged all the same;
reports show it without a definition.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from rljax.errors import UserError


class Definition(NamedTuple):
    text: str  # one line
    unit: str = ""  # "" for plain numbers
    better: str = ""  # "higher", "lower", or "" where neither is better as such
    group: str = ""  # metrics of one group share a plot


_REWARD = "The reward of a response is β · (policy log-probability − reference log-probability)"

METRICS: dict[str, Definition] = {
    "loss": Definition("What is minimised: the sum over the batch divided by its weight", better="lower", group="loss"),
    "nll_loss": Definition("Negative log-likelihood per trained token", "nats/token", "lower", "loss"),
    "perplexity": Definition(
        "exp of the negative log-likelihood per trained token", better="lower", group="perplexity"
    ),
    "mean_token_accuracy": Definition(
        "Share of trained tokens that are the most likely one under the model",
        better="higher",
        group="token accuracy",
    ),
    "accuracy": Definition(
        "Share of comparisons whose best response has the strictly highest score", "", "higher", "accuracy"
    ),
    "margin": Definition("Score of the best response minus the highest of the others", "", "higher", "margin"),
    "reward/mean": Definition("Mean score that the experiment's own evaluation gives", group="reward"),
    "reward/std": Definition("Standard deviation of the scores", group="reward"),
    "reward/best": Definition("Mean score of the preferred responses", group="reward"),
    "reward/others": Definition("Mean over prompts of the highest score of the other responses", group="reward"),
    "rewards/chosen": Definition(f"{_REWARD}: its mean over preferred (KTO: desirable) responses", group="rewards"),
    "rewards/rejected": Definition(f"{_REWARD}: its mean over rejected (KTO: undesirable) responses", group="rewards"),
    "rewards/margins": Definition("Mean of the preferred response's reward minus the other's", "", "higher", "rewards"),
    "rewards/accuracies": Definition(
        "Share of pairs whose preferred response has the higher reward; a tie is half a pair, so about ½ at step 0",
        better="higher",
        group="accuracy",
    ),
    "logps/chosen": Definition(
        "Mean log-probability of the preferred response (sum over its tokens)", "nats", group="logps"
    ),
    "logps/rejected": Definition(
        "Mean log-probability of the rejected response (sum over its tokens)", "nats", group="logps"
    ),
    "logps/ref_chosen": Definition(
        "The same of the preferred response under the reference model", "nats", group="logps"
    ),
    "logps/ref_rejected": Definition(
        "The same of the rejected response under the reference model", "nats", group="logps"
    ),
    "log_odds_chosen": Definition(
        "ORPO: log odds of the preferred response minus those of the other", better="higher", group="odds"
    ),
    "log_odds_ratio": Definition("ORPO: log σ of the difference of the log odds", better="higher", group="odds"),
    "kl": Definition("Estimate of KL(policy ‖ reference); for KTO the reference point of its loss", "nats", group="kl"),
    "entropy": Definition("Mean entropy of the model's distribution at trained tokens", "nats/token", group="entropy"),
    "grad_norm": Definition("Norm of the gradient over all parameters, before clipping", group="grad_norm"),
    "learning_rate": Definition("Learning rate of the update", group="learning_rate"),
    "num_tokens": Definition("Tokens seen since the start, padding left out", "tokens", group="num_tokens"),
    "epoch": Definition("Passes over the training data since the start", "epochs", group="epoch"),
    # --- online ---
    "completions/mean_length": Definition(
        "Mean length of the completions, the stop token included", "tokens", group="length"
    ),
    "completions/clipped_ratio": Definition(
        "Share of completions that the budget cut before they ended by themselves", group="share"
    ),
    "objective/scores": Definition(
        "Mean score of the completions after shaping (overlong penalty, normalisation, clipping, missing end), "
        "before any KL penalty",
        better="higher",
        group="scores",
    ),
    "objective/rlhf_reward": Definition(
        "Mean over completions of score − KL coefficient · KL: what PPO maximises", better="higher", group="scores"
    ),
    "objective/non_score_reward": Definition(
        "Mean over completions of − KL coefficient · KL (its estimator summed over tokens)", group="scores"
    ),
    "objective/kl": Definition(
        "KL(policy ‖ reference) of whole completions: the log-ratio summed over a completion's tokens, averaged over "
        "completions (k1)",
        "nats",
        group="kl",
    ),
    "objective/kl_coef": Definition("Coefficient of the KL penalty, as the controller has it", group="kl_coef"),
    "objective/entropy": Definition(
        "− log-probability of whole completions, summed over tokens: an estimate of their entropy", "nats", group="kl"
    ),
    "policy/approxkl_avg": Definition(
        "½ (log π − log π_old)² per trained token, averaged over the updates of the iteration: how far they went",
        "nats/token",
        group="approxkl",
    ),
    "policy/clipfrac_avg": Definition(
        "Share of trained tokens whose surrogate is flat: no gradient (not |ratio − 1| > clip); GSPO's by sequences",
        group="share",
    ),
    "policy/entropy_avg": Definition(
        "Mean entropy of the distribution that trained tokens are drawn from (computed where entropy_coef is set)",
        "nats/token",
        group="entropy",
    ),
    "updates/skipped": Definition(
        "Updates that were left out, since loss, gradient or weights were not finite (on_nan='skip')", group="updates"
    ),
    "policy/updates": Definition("Updates made in the iteration; target_kl skips the rest", group="updates"),
    "loss/policy_avg": Definition(
        "The surrogate: about 0 while ratios are 1 and advantages have mean 0, whatever is learned; mind its gradient",
        group="loss",
    ),
    "loss/value_avg": Definition("The critic's loss per trained token, before value_coef", "", "lower", "value"),
    "loss/kl_avg": Definition("The KL penalty in the loss per trained token, before its coefficient", group="approxkl"),
    "loss/pretrain_avg": Definition(
        "Negative log-likelihood of the pretraining text per token (PPO-ptx)", "nats/token", "lower", "loss"
    ),
    "val/ratio": Definition(
        "Mean of π / π_old over trained tokens and updates; 1 before the first update", group="ratio"
    ),
    "val/mean": Definition("Mean value that the critic gives before trained tokens", group="value_mean"),
    "val/explained_variance": Definition(
        "1 − Var(returns − values) / Var(returns) over trained tokens, before the update: 1 is a perfect critic, 0 one "
        "that knows the mean only",
        better="higher",
        group="explained",
    ),
    "frac_reward_zero_std": Definition(
        "Share of prompts, of those with a reward, whose completions all score alike: group-relative advantages are 0",
        group="share",
    ),
    "rewards/none_ratio": Definition("Share of completions that no reward applies to: untrained", group="share"),
    "sampling/logp_difference": Definition(
        "Mean |log-probability by the trainer − by the sampler| of sampled tokens: rounding, and how old rollouts are",
        "nats/token",
        group="approxkl",
    ),
    "sampling/age": Definition(
        "Mean number of iterations between sampling a completion and training on it", "iterations", group="age"
    ),
    "sampling/rounds": Definition(
        "Rounds of sampling for the iteration: with filter_groups, all other metrics describe the groups that are left",
        "rounds",
        group="rounds",
    ),
    "pairs/tied": Definition("Share of prompts whose completions score alike, so that no pair is made", group="share"),
    "demonstrations/kept": Definition("Share of prompts whose best completion becomes a demonstration", group="share"),
    "demonstrations/score": Definition("Mean score of the demonstrations", better="higher", group="scores"),
    "reward": Definition("Mean weighted reward, before any shaping", better="higher", group="reward"),
}


def define(name: str, experiment: Mapping[str, Any] | None = None) -> Definition | None:
    """The definition of a logged metric; `eval/x` is `x` on held-out data. None for a name of your own.

    experiment: the record of the run (experiment.json), whose settings say what some numbers are.
    """
    plain = name.removeprefix("eval/")
    definition = METRICS.get(plain) or _of_reward(plain)
    if definition is not None:
        definition = _of_run(plain, definition, experiment or {})
    if definition is not None and plain != name:
        return definition._replace(text=f"{definition.text}; on held-out data")
    return definition


def _of_run(name: str, definition: Definition, experiment: Mapping[str, Any]) -> Definition:
    """What the settings of a run make of a definition: averages, no reference, a reward model."""
    text, unit = definition.text, definition.unit
    if experiment.get("average") is True and name.startswith("logps/"):
        text, unit = text.replace("(sum over its tokens)", "(mean over its tokens)"), "nats/token"
    if experiment.get("reference") is False and text.startswith(_REWARD):
        text = text.replace(_REWARD, "The reward of a response is β · policy log-probability (no reference)")
    if experiment.get("kind") == "RewardModel" and name == "reward/mean":
        text = "Mean score that the reward model gives"
    return definition._replace(text=text, unit=unit)


_BETTER = {"min": r"loss|nll|perplexity|ppl|kl|error|wer|cer|brier", "max": r"accurac|acc$|reward|score|win|margin|f1"}


def best_mode(best: str | None, mode: Literal["min", "max"] | None = None) -> Literal["min", "max"]:
    """Which way the metric `best` gets better: `mode`, or what its definition says, or its name. UserError for a name
    that does not say it.
    """
    if mode is not None or best is None:
        if mode not in ("min", "max", None):
            raise UserError(f"best_mode must be 'min' or 'max', or None, got {mode!r}")
        return mode or "max"
    known = define(best)
    if known is not None and known.better:
        return "min" if known.better == "lower" else "max"
    fits = [way for way, words in _BETTER.items() if re.search(words, best.lower().removeprefix("eval/"))]
    if len(fits) != 1:
        raise UserError(
            f"best={best!r}: nothing says whether more or less of it is better. Set best_mode to 'min' or 'max' "
            "(--best-mode min)"
        )
    return "min" if fits == ["min"] else "max"


def _of_reward(name: str) -> Definition | None:
    """rewards/NAME/mean and /std of a reward function called NAME."""
    parts = name.split("/")
    if len(parts) < 3 or parts[0] != "rewards" or parts[-1] not in ("mean", "std"):
        return None
    what, reward = "Mean" if parts[-1] == "mean" else "Standard deviation", "/".join(parts[1:-1])
    return Definition(f"{what} of the reward {reward}, unweighted and as its function gave it", group="each reward")
