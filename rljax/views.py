"""What the parameters of an online run say about tokens: log-probabilities, entropies, values, in one look.

A run's parameters are one tree: the decoder's own, or {"policy": …} with {"critic": {"model", "head"}} (a critic of its
own) or {"head": …} (a value head on the policy's trunk) beside it. Everything that trains or exports finds the decoder
by `decoder_params`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from rljax.filters import Sampling
from rljax.logprobs import token_logps, token_logps_and_entropy
from rljax.models import reward_model, scalar_head
from rljax.models.heads import before_tokens
from rljax.types import LanguageModel, Params, Tokens


class View(NamedTuple):
    """All f32[b t], 0 where the mask is False."""

    logps: Array  # under the distribution that is sampled from
    entropy: Array | None = None
    values: Array | None = None  # what is expected from the moment before each token on


Look = Callable[[Params, Tokens], View]


def decoder_params(params: Params) -> Params:
    """The policy's decoder within the parameters of a run."""
    return params.get("policy", params)


def of_policy(
    model: LanguageModel, *, sampling: Sampling, max_trained: int | None = None, entropy: bool = False
) -> Look:
    """A policy without a critic."""

    def look(params: Params, tokens: Tokens) -> View:
        settings: dict[str, Any] = {"sampling": sampling, "max_trained": max_trained}
        if entropy:
            return View(*token_logps_and_entropy(model, decoder_params(params), tokens, **settings))
        return View(token_logps(model, decoder_params(params), tokens, **settings))

    return look


def values(model: LanguageModel) -> Callable[[Params, Tokens], Array]:
    """(params, tokens) -> f32[b t]: what the critic expects before each trained token, whichever critic there is."""
    scored = reward_model(model)

    def critic(params: Params, tokens: Tokens) -> Array:
        parts = params["critic"] if "critic" in params else {"model": params["policy"], "head": params["head"]}
        return before_tokens(scored.values(parts, tokens), tokens.mask)

    return critic


def with_critic(model: LanguageModel, critic_model: LanguageModel, **settings: Any) -> Look:
    """A policy and a critic that is a decoder of its own. The settings are those of `of_policy`."""
    critic, policy = values(critic_model), of_policy(model, **settings)

    def look(params: Params, tokens: Tokens) -> View:
        return policy(params, tokens)._replace(values=critic(params, tokens))

    return look


def with_value_head(model: LanguageModel, **settings: Any) -> Look:
    """A policy with a value head on its own hidden states: one pass through the trunk for both."""
    head = scalar_head(model.config.hidden_size)

    def look(params: Params, tokens: Tokens) -> View:
        out = model.apply(params["policy"], tokens.ids, tokens.segments)
        seen = model._replace(apply=lambda *_, **__: out)
        expected = before_tokens(head.apply(params["head"], out.hidden), tokens.mask)
        return of_policy(seen, **settings)(params, tokens)._replace(values=expected)

    return look
