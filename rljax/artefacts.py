"""What comes out of a run: its weights, as a policy or as a Hugging Face checkpoint, and texts that it writes."""

from __future__ import annotations

import contextlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rljax import filters, hosts, kept, policy, sharding
from rljax.checkpoint import Checkpoints
from rljax.data import prompt_ids
from rljax.errors import UserError
from rljax.manifest import flat, read_json, read_object
from rljax.metrics import best_mode
from rljax.models import folders, hf, hf_write, normalize_head, resolve, scalar_head
from rljax.types import Params

SCORES = "scores"  # in what goes with a reward model's checkpoint: (mean, std) by which its scores are normalised


def load_run(
    run: str | pathlib.Path, *, step: int | None = None, mesh: Mesh | None = None
) -> tuple[policy.Policy, Params, int]:
    """(the policy as it began, the run's parameters, their step): of the best checkpoint, or the last where none is
    best. Of an online run they are the policy's, averaged over the run where it keeps an average (`ema`).

    The parameters of a reward model are {"model": …, "head": …}. mesh: where all of them go, by `models.RULES`; every
    process of it calls this. None is the mesh that is set, as in a run, or one device of this process where none is.
    UserError for a folder that is no run, or has no checkpoint.
    """
    start, params, found = open_run(run, step=step, mesh=mesh)
    experiment = _record(run)
    initial = policy.load(kept.where(run, experiment["model"]), mesh=mesh, dtype=experiment["dtype"]).params
    return start._replace(params=initial), params, found


def open_run(
    run: str | pathlib.Path, *, step: int | None = None, mesh: Mesh | None = None
) -> tuple[policy.Policy, Params, int]:
    """As `load_run`, with only the run's own parameters read: of those that it began with there are shapes."""
    experiment = _record(run)
    folder = pathlib.Path(run) / "checkpoints"
    if not folder.is_dir():
        raise UserError(f"{folder} has no finished checkpoint yet")
    mesh = sharding.mesh_here() if mesh is None else mesh
    start = kept.begun(run, mesh=mesh, dtype=experiment["dtype"])
    if start is None:
        start = policy.abstract(kept.where(run, experiment["model"]), mesh=mesh, dtype=experiment["dtype"])
    start = policy.stopping(start, experiment.get("stop") or ())
    where, like = _place(experiment, start.params)
    if experiment["kind"] == "RewardModel":
        head = jax.eval_shape(scalar_head(start.model.config.hidden_size).init, jax.random.key(0))
        like = hf.placed({"model": like, "head": head}, mesh)
    plain = like
    if "ema" in where:  # an average is kept in float32
        like = jax.tree.map(_wide, like)
    for name in reversed(where):
        like = {name: like}
    way = best_mode(experiment["best"], experiment["best_mode"])
    ranked: Any = {"best_metric": experiment["best"], "best_mode": way}
    with Checkpoints(folder, read_only=True, alone=mesh is None, **ranked) as checkpoints:
        found = [candidate for candidate in (step, checkpoints.best(), checkpoints.latest()) if candidate is not None]
        if not found:
            raise UserError(f"{folder} has no finished checkpoint yet")
        state, extra = checkpoints.restore(found[0], like, partial=True)
    for name in where:
        state = state[name]
    if extra.get(SCORES) is not None:
        mean, std = extra[SCORES]
        state = {**state, "head": normalize_head(state["head"], mean=mean, std=std)}
    return start, jax.tree.map(lambda x, p: x if x.dtype == p.dtype else x.astype(p.dtype), state, plain), found[0]


def _wide(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, jnp.promote_types(x.dtype, jnp.float32), sharding=x.sharding)


def _record(run: str | pathlib.Path) -> dict[str, Any]:
    """experiment.json, as far as it is needed here."""
    path = pathlib.Path(run) / "experiment.json"
    experiment = read_object(path)
    if experiment is None:
        raise UserError(f"{run} is not the folder of a run: it has no experiment.json")
    wanted = {"model": str, "dtype": str, "kind": str, "best_mode": str | None, "best": str | None}
    wrong = [k for k, v in wanted.items() if not isinstance(experiment.get(k, 0), v)]
    if wrong:
        raise UserError(f"{path} is damaged (no {wrong[0]}); restore it from a copy")
    return experiment


def _everywhere() -> Mesh | None:
    """A mesh of all devices, over which weights are split that one device need not have room for; None for one."""
    return hosts.connected(sharding.make_mesh()) if len(jax.devices()) > 1 else None


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
    Of several processes all call it, and the first writes.
    """
    path, experiment = pathlib.Path(folder), _record(run)
    folders.check_target(path, hf_write.OWN_FILES, reads=_folders_read(experiment, run))
    start, params, chosen = open_run(run, step=step, mesh=_everywhere())
    check_finite(params, f"step {chosen} of {run}")
    save = hf.save_reward if "head" in params else hf.save
    save(path, start.model, params, tokenizer=start.tokenizer, stop_ids=start.stop_ids)
    return chosen


def _folders_read(experiment: Mapping[str, Any], run: str | pathlib.Path) -> dict[str, pathlib.Path]:
    """{"model": folder, …}: every folder that a run was begun with, and its own."""
    texts = {name: json.loads(text) for name, text in flat(experiment).items()}
    found = {
        name: pathlib.Path(text) for name, text in texts.items() if isinstance(text, str) and text and name != "out"
    }
    found = {name: path for name, path in found.items() if len(str(path)) < 4000 and "\0" not in str(path)}
    with contextlib.suppress(UserError):  # a model that is gone is not in the way
        found["model"] = pathlib.Path(kept.where(run, experiment["model"]))
    return {**found, "own folder": pathlib.Path(run)}


def remark(folder: str | pathlib.Path) -> str:
    """What has to be known of an exported reward model in other programs; "" where there is nothing."""
    bias = ((read_json(pathlib.Path(folder) / "config.json") or {}).get("rljax") or {}).get("reward_bias")
    if not bias:
        return ""
    return (
        f". transformers has no place for the bias of its score ({bias:.6g}, from normalising): its scores lack "
        "it, in the same order; config.json keeps it as rljax.reward_bias"
    )


def check_finite(params: Params, whose: str) -> None:
    """UserError for weights of which some are not finite: a model that answers nothing but NaN."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        wrong = int(jnp.count_nonzero(~jnp.isfinite(leaf)))
        if wrong:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise UserError(
                f"the weights of {whose} are not finite: {wrong} of the {leaf.size} of {name} are NaN or infinite. "
                "Export an earlier checkpoint (--step N), or train again with a lower learning rate"
            )


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
    new = sampling["max_new_tokens"]
    for name, value, least in (("seed", seed, 0), ("max_new_tokens", new, 1), ("n", len(prompts), 1)):
        if not least <= value < 2**32:
            raise UserError(f"{name} is {value}: give a whole number from {least} to {2**32 - 1}")
    filters.Sampling(**{name: value for name, value in sampling.items() if name != "max_new_tokens"})
    if (pathlib.Path(source) / "experiment.json").is_file():
        start, params, _ = open_run(source, step=step, mesh=_everywhere())
        if "head" in params:
            raise UserError(f"{source} trained a reward model, which scores texts and does not write any")
        now = start._replace(params=params)
    else:
        now = policy.load(str(resolve.resolve(source)), mesh=_everywhere())
    if chat and not now.tokenizer.chat_template:
        raise UserError(f"{source} has no chat template: leave --chat out")
    positions = now.model.config.max_positions
    if new > positions:
        raise UserError(f"max_new_tokens is {new}, and {source} has {positions} positions: ask for fewer tokens")
    asked: list[Any] = [[{"role": "user", "content": prompt}] if chat else prompt for prompt in prompts]
    if not all(map(len, (prompt_ids(prompt, now.tokenizer) for prompt in asked))):
        raise UserError("an empty prompt is no token to this tokenizer: give it something to continue")
    texts = policy.complete(now, asked, jax.random.key(np.uint32(seed)), batch=len(asked), **sampling).raw
    return [{"prompt": p, "completion": t} for p, t in zip(prompts, texts, strict=True)]
