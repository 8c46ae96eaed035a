"""Where a critic starts: from the policy's decoder, from a reward model, or as a head on the policy's own trunk."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rljax import artefacts, models, policy
from rljax.errors import UserError
from rljax.models import hf, resolve
from rljax.types import LanguageModel, Params


class Critic(NamedTuple):
    model: LanguageModel  # its decoder
    params: Params  # {"model", "head"}


def load(run: Any, start: policy.Policy, mesh: Mesh) -> Critic | None:
    """The critic that `run.critic` names; None for a value head on the policy's trunk ("shared").

    A reward model makes a critic with its own head, so that values begin as scores (Stiennon et al. 2020,
    arXiv:2009.01325; 2403.17031, detail 17); the policy's decoder gets a head of zeros (1909.08593's code), so that all
    values begin at 0. UserError for a reward model that does not share the policy's vocabulary.
    """
    if run.critic == "shared":
        return None
    if run.critic == "policy":
        head = models.scalar_head(start.model.config.hidden_size).init(jax.random.key(run.seed))
        return Critic(start.model, {"model": start.params, "head": jax.tree.map(jnp.zeros_like, head)})
    if (pathlib.Path(run.critic) / "experiment.json").is_file():
        begun, params, _ = artefacts.open_run(run.critic, mesh=mesh)
        model = begun.model
        if "head" not in params:
            raise UserError(f"critic={run.critic!r} is a run that trained no reward model")
    else:
        model, params = hf.load_reward(resolve.resolve(run.critic), mesh=mesh, dtype=jnp.dtype(run.dtype))
    theirs, ours = model.config, start.model.config
    if theirs.vocab_size != ours.vocab_size:
        raise UserError(
            f"critic={run.critic!r} has a vocabulary of {theirs.vocab_size} tokens, the policy one of {ours.vocab_size}"
            ": a critic reads the policy's tokens, so both need the same tokenizer"
        )
    how = {name: getattr(ours, name) for name in models.COMPUTED}
    unembed = {"unembed": start.params["unembed"]} if "unembed" in start.params and "unembed" in params["model"] else {}
    return Critic(
        models.build(dataclasses.replace(theirs, **how)),
        {"model": {**params["model"], **unembed}, "head": params["head"]},
    )
