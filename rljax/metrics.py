"""What the numbers of a run mean: the names that people know from TRL, each with a definition, a unit and a direction.

`define` looks a logged name up, with or without its `eval/` prefix. A name that is not here is logged all the same;
reports show it without a definition.
"""

from __future__ import annotations

from typing import NamedTuple


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
        "Share of trained tokens that are the most likely one under the model", better="higher", group="accuracy"
    ),
    "accuracy": Definition(
        "Share of comparisons whose best response has the strictly highest score", "", "higher", "accuracy"
    ),
    "margin": Definition("Score of the best response minus the mean score of the others", "", "higher", "margin"),
    "reward/mean": Definition("Mean score that the reward model gives", group="reward"),
    "reward/std": Definition("Standard deviation of the reward model's scores", group="reward"),
    "reward/chosen": Definition("Mean score of the preferred responses", group="reward"),
    "reward/rejected": Definition("Mean score of the other responses", group="reward"),
    "rewards/chosen": Definition(f"{_REWARD}: its mean over preferred (KTO: desirable) responses", group="rewards"),
    "rewards/rejected": Definition(f"{_REWARD}: its mean over rejected (KTO: undesirable) responses", group="rewards"),
    "rewards/margins": Definition("Mean of the preferred response's reward minus the other's", "", "higher", "rewards"),
    "rewards/accuracies": Definition(
        "Share of pairs whose preferred response has the strictly higher reward", better="higher", group="accuracy"
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
    "completions/mean_length": Definition(
        "Mean length of the completions, the stop token included", "tokens", group="length"
    ),
}


def define(name: str) -> Definition | None:
    """The definition of a logged metric; `eval/x` is `x` on held-out data. None for a name of your own."""
    plain = name.removeprefix("eval/")
    definition = METRICS.get(plain)
    if definition is not None and plain != name:
        return definition._replace(text=f"{definition.text}; on held-out data")
    return definition
