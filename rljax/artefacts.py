"""What comes out of a run: its weights, as a policy or as a Hugging Face checkpoint, and texts that it writes."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from rljax import policy
from rljax.checkpoint import Checkpoints
from rljax.errors import UserError
from rljax.manifest import read_json
from rljax.models import hf, resolve, scalar_head
from rljax.types import Params


def load_run(run: str | pathlib.Path, *, step: int | None = None) -> tuple[policy.Policy, Params, int]:
    """(the policy as it began, the run's parameters, their step): of the best checkpoint, or the last where none is
    best. Of an online run they are the policy's, averaged over the run where it keeps an average (`ema`).

    The parameters of a reward model are {"model": …, "head": …}. UserError for a folder that is no run, or has no
    checkpoint.
    """
    experiment = read_json(pathlib.Path(run) / "experiment.json")
    if experiment is None:
        raise UserError(f"{run} is not the folder of a run: it has no experiment.json")
    start = policy.load(experiment["model"], dtype=experiment["dtype"])
    where, params = _place(experiment, start.params)
    if experiment["kind"] == "RewardModel":
        params = {"model": params, "head": scalar_head(start.model.config.hidden_size).init(jax.random.key(0))}
    like: Any = jax.eval_shape(lambda: params)
    for name in reversed(where):
        like = {name: like}
    folder = pathlib.Path(run) / "checkpoints"
    ranked = {"best_metric": experiment["best"], "best_mode": experiment["best_mode"]}
    with Checkpoints(folder, read_only=True, **ranked) as checkpoints:
        found = [candidate for candidate in (step, checkpoints.best(), checkpoints.latest()) if candidate is not None]
        if not found:
            raise UserError(f"{folder} has no finished checkpoint yet")
        state, _ = checkpoints.restore(found[0], like, partial=True)
    for name in where:
        state = state[name]
    return start, state, found[0]


def _place(experiment: Mapping[str, Any], params: Params) -> tuple[tuple[str, ...], Params]:
    """(the path of the weights to export within a checkpoint, their shapes)."""
    if "group" not in experiment:
        return ("params",), params
    if experiment.get("ema") is not None:
        return ("learner", "ema"), params
    return ("learner", "train", "params", *(("policy",) if experiment["kind"] == "PPO" else ())), params


def export(run: str | pathlib.Path, folder: str | pathlib.Path, *, step: int | None = None) -> int:
    """Write a Hugging Face checkpoint of a run's best (or last, or `step`'s) weights: config, safetensors, tokenizer.

    A reward model becomes a …ForSequenceClassification checkpoint with one label. Returns the step that was written.
    """
    start, params, chosen = load_run(run, step=step)
    save = hf.save_reward if "head" in params else hf.save
    save(pathlib.Path(folder), start.model, params, tokenizer=start.tokenizer)
    return chosen


def sample(
    source: str,
    prompts: list[str],
    *,
    chat: bool,
    seed: int = 0,
    step: int | None = None,
    **sampling: Any,
) -> list[Mapping[str, str]]:
    """[{"prompt", "completion"}, …]: what a run, a checkpoint folder or a named model makes of some prompts."""
    if (pathlib.Path(source) / "experiment.json").is_file():
        start, params, _ = load_run(source, step=step)
        if "head" in params:
            raise UserError(f"{source} trained a reward model, which scores texts and does not write any")
        now = start._replace(params=params)
    else:
        now = policy.load(str(resolve.resolve(source)))
    if chat and not now.tokenizer.chat_template:
        raise UserError(f"{source} has no chat template: leave --chat out")
    asked = [[{"role": "user", "content": prompt}] if chat else prompt for prompt in prompts]
    texts = policy.complete(now, asked, jax.random.key(np.uint32(seed)), batch=len(asked), **sampling).texts
    return [{"prompt": p, "completion": t} for p, t in zip(prompts, texts, strict=True)]
