"""What an experiment compiles, from a model's config alone: the functions of a run, with shapes in place of arrays."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rljax import (
    collect,
    critics,
    data,
    iteration,
    models,
    offline,
    online_setup,
    policy,
    program,
    reference,
    rewards,
    settings,
    sharding,
    tasks,
    train,
)
from rljax.errors import UserError
from rljax.plan.configs import Described, describe, is_encoder
from rljax.rewards import checkpoints
from rljax.sampling import REFILL
from rljax.types import LossFn, Params, PreferenceBatch, Tokens, UnpairedBatch

BEST_OF = 4  # completions that a reward model's `best_of_k_loss` compares, as in 1909.08593: the data have the number


class Program(NamedTuple):
    """One compiled function."""

    name: str
    function: Any  # jitted
    args: tuple[Any, ...]  # shapes with shardings
    loops: dict[str, float] = {}  # noqa: RUF012 - by named scope: rounds, in the longest case, of loops that data end
    note: str = ""


class Programs(NamedTuple):
    held: dict[str, Any]  # what a device holds all the time, by name: shapes with shardings
    programs: list[Program]
    notes: list[str]  # what is assumed


def programs(run: Any, mesh: Mesh, described: Described) -> Programs:
    """Those of an experiment of `offline` or `online` on this mesh (which has to be set: `jax.set_mesh`)."""
    config = program.configured(run, described.config, mesh)
    start = policy.Policy(models.build(config), {}, None, described.stop_ids)
    params = placed(cast(jax.eval_shape(start.model.init, jax.random.key(0)), run.dtype), mesh)
    start = start._replace(params=waiting(params) if run.offload_reference else params)
    if isinstance(run, settings.Sampled):
        return _online(run, mesh, start)
    return _offline(run, mesh, start)


def cast(params: Any, dtype: str) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), params)


def waiting(params: Any) -> Any:
    """Shapes of what `sharding.in_host_memory` makes."""
    away = functools.partial(NamedSharding.with_memory_kind, kind="pinned_host")
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=away(x.sharding)), params)


def placed(tree: Any, mesh: Mesh) -> Any:
    """Shapes of a state with the shardings that a run gives it."""
    shape = jax.eval_shape(lambda: tree)
    places = sharding.shardings(shape, models.RULES, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shape, places)


# --- batches from a data set ------------------------------------------------------------------------------------------


def _offline(run: Any, mesh: Mesh, start: policy.Policy) -> Programs:
    optimizer, _ = program.make_optimizer(run)
    params, loss_fn, batch = _objective(run, start)
    batch = collect.placed(batch, mesh)
    if isinstance(run, offline.Unpaired):  # one number, which a function made that all devices run alike
        whole = jax.ShapeDtypeStruct(batch.kl.shape, batch.kl.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
        batch = dataclasses.replace(batch, kl=whole)
    state = placed(jax.eval_shape(lambda params: train.init_state(params, optimizer), params), mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    more: Any = {"microbatches": run.microbatches, "on_nan": run.on_nan}
    update = train.make_update(loss_fn, optimizer, shardings=shardings, **more)
    found = [Program("update", update, (state, batch))]
    if isinstance(run, offline.Preference) and run.reference and not run.cache_reference:
        found.insert(0, _fresh_reference(run, mesh, start, batch))
    if isinstance(run, offline.Unpaired):
        pairs = (batch, batch.tokens, batch.ref_logps)
        estimate = tasks.kl_estimate(start.model, run.max_completion)
        found.insert(0, Program("KL point", estimate, (state.params, pairs)))
    held = {"parameters": state.params, "optimizer": state.opt_state}
    if offline.keeps_initial(run):
        held["initial weights"] = start.params
    return Programs(held, found, _notes(run))


def _objective(run: Any, start: policy.Policy) -> tuple[Params, LossFn, Any]:
    """(where training starts, the loss, a batch of rows that only fill up): the shapes are those of any batch."""
    rows, length, model = [None] * run.batch, run.max_prompt + run.max_completion, start.model
    match run:
        case offline.Preference():
            chosen, rejected = data.collate_preference(rows, length, prompt=run.max_prompt)
            refs: Any = np.zeros((2, run.batch), np.float32)
            batch = PreferenceBatch(
                chosen=chosen, rejected=rejected, ref_chosen_logps=refs[0], ref_rejected_logps=refs[1]
            )
            return start.params, tasks.preference_loss(run, model), batch
        case offline.Unpaired():
            zeros: Any = np.zeros(run.batch, np.float32)
            tokens, flags = data.pad(rows, length), zeros.astype(bool)
            batch = UnpairedBatch(tokens=tokens, desirable=flags, ref_logps=zeros, kl=zeros)
            return start.params, tasks.unpaired_loss(run, model), batch
        case offline.RewardModel():
            head = models.scalar_head(model.config.hidden_size).init(jax.random.key(0))
            batch = data.collate_comparison(rows, length, BEST_OF if _listwise(run) else 2)
            return {"model": start.params, "head": head}, tasks.reward_loss(run, model), batch
        case offline.SFT():
            return start.params, tasks.supervised_loss(model), data.collate_supervised(rows, length)
    raise UserError(f"plan knows the experiments of rljax.offline and rljax.online, not {type(run).__name__}")


def _fresh_reference(run: Any, mesh: Mesh, start: policy.Policy, batch: Any) -> Program:
    """The reference's log-probabilities of a batch."""

    def look(params: Params, *rows: Tokens) -> Any:
        seen = reference.view(start._replace(params=params), run, mesh, lambda _: contextlib.nullcontext())
        return seen.logps(*rows, average=run.average)

    return Program("reference", jax.jit(look), (start.params, batch.chosen, batch.rejected))


def _listwise(run: Any) -> bool:
    return "best" in inspect.signature(run.loss).parameters


def _notes(run: Any) -> list[str]:
    if isinstance(run, offline.RewardModel) and _listwise(run):
        return [f"{BEST_OF} completions a comparison are assumed; the data decide"]
    if isinstance(run, offline.SFT) and not run.packing:
        return ["every token of a row may be trained, as in texts and chats; where rows have prompts fewer are"]
    return []


# --- batches from the policy ------------------------------------------------------------------------------------------


def _online(run: settings.Sampled, mesh: Mesh, start: policy.Policy) -> Programs:
    settings.check(run)
    stops = start.stop_ids + tuple(range(len(run.stop)))  # which tokens end a text changes no shape
    drawn = settings.sampling(run, stops)
    critic = _critic(run, start, mesh)
    method = online_setup.method_of(
        run, start.model, start.params, critic, drawn, shards=sharding.ways(sharding.ROWS, mesh)
    )
    asked, notes = _rewards(run, start, mesh)
    optimizer, _ = program.make_optimizer(run, run.steps * run.epochs * run.minibatches)
    ema = getattr(run, "ema", None) is not None
    learner = placed(jax.eval_shape(lambda p: iteration.init_learner(p, optimizer, ema=ema), method.params), mesh)
    shardings = jax.tree.map(lambda x: x.sharding, learner)
    parts = iteration.build(run, start.model, method, optimizer, asked, settings=drawn, on_nan=run.on_nan)
    width = -(-run.max_prompt // policy.BUCKET) * policy.BUCKET
    base = start.params if method.reference else None
    params = rewards.device_params(asked)
    example = (learner, base, params, collect.abstract_prompts(run, width, mesh), _pretrain(run, mesh))
    names = [one.name for one in asked] if run.environment is None else ["environment"]
    whole = online_setup.is_whole(run, asked)
    found = online_setup.jitted(run, parts, method, shardings, example, names, whole=whole)
    if run.environment is not None:
        turn = online_setup.Part(jax.jit(parts.sample), (learner.train.params, example[3], jax.random.key(0)))
        found = {"sample": turn, **found}
        notes.append("episodes take turns; the sampler is shown as one turn that writes the whole row")
    keeps = online_setup.keeps_initial(run, method)
    held = {
        **{name: learner.train.params[name] for name in ("policy", "critic") if name in learner.train.params},
        **({} if "policy" in learner.train.params else {"policy": learner.train.params}),
        "optimizer": learner.train.opt_state,
        **({"average of weights": learner.ema} if ema else {}),
        **({"reference" if method.reference else "initial weights": start.params} if keeps else {}),
        **{f"reward {one.name}": one.params for one in asked if one.params is not None},
    }
    loops = _loops(run)
    made = [
        Program(TITLES[name], part.function, part.args, loops, LONGEST.get(name, "")) for name, part in found.items()
    ]
    return Programs(held, made, notes)


TITLES = {
    "whole": "iteration",
    "sample": "sampler",
    "greedy": "greedy sampler",
    "annotate": "notes (reference, values)",
    "learn": "update",
}
ENDLESS = "the longest case: every row is written to its last token"
LONGEST: dict[str, str] = {"whole": ENDLESS, "sample": ENDLESS, "greedy": ENDLESS}


def _loops(run: settings.Sampled) -> dict[str, float]:
    """Rounds of the sampler's loops where no row ends early."""
    rows, steps = run.batch * run.group, run.max_completion - 1  # the first token comes from reading the prompt
    if run.slots is None or run.slots >= rows:
        return {"decode": steps}
    refills = _refills(run)
    return {"refill": refills, "decode": -(-rows // run.slots) * steps / refills}


def _refills(run: settings.Sampled) -> int:
    """How often finished slots are given new prompts."""
    assert run.slots is not None
    return -(-run.batch // max(1, run.slots // run.group // REFILL))


def _critic(run: Any, start: policy.Policy, mesh: Mesh) -> critics.Critic | None:
    """The critic of a run, of a reward model's config where it starts from one."""
    if not isinstance(run, settings.PPO):
        return None
    if run.critic in ("policy", "shared"):
        return critics.load(run, start, mesh)
    how = {name: getattr(start.model.config, name) for name in models.COMPUTED}
    model, params = _scored(run.critic, run.dtype, mesh, how)
    if "unembed" in start.params:
        params["model"]["unembed"] = start.params["unembed"]
    return critics.Critic(model, params)


def _scored(path: str, dtype: str, mesh: Mesh, how: dict[str, Any]) -> tuple[Any, Params]:
    """(decoder, {"model", "head"}) of a reward model."""
    model = models.build(dataclasses.replace(describe(path).config, **how))
    shape = jax.eval_shape(models.reward_model(model).init, jax.random.key(0))
    decoder = {name: leaf for name, leaf in cast(shape["model"], dtype).items() if name != "unembed"}
    return model, placed({"model": decoder, "head": shape["head"]}, mesh)


def _rewards(run: settings.Sampled, start: policy.Policy, mesh: Mesh) -> tuple[Sequence[rewards.Reward], list[str]]:
    """(the rewards of a run, those of decoders as on the devices, what is assumed)."""
    found, notes = [], []
    for one in () if run.reward is None else rewards.as_rewards(run.reward):
        if isinstance(one.fn, checkpoints.Checkpoint):
            one, note = _judge(one, one.fn.path, run, start, mesh)
            notes.append(note)
        elif one.params is not None:
            whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), one.params)
            one = dataclasses.replace(one, params=whole)
        found.append(one)
    return tuple(found), notes


def _judge(
    one: rewards.Reward, path: str, run: settings.Sampled, start: policy.Policy, mesh: Mesh
) -> tuple[rewards.Reward, str]:
    """(a checkpoint's reward as on the devices where it is a decoder, what is assumed)."""
    try:
        if is_encoder(path):
            return one, f"the reward {one.name}, an encoder, judges texts between the programs: not counted"
        model, params = _scored(path, run.dtype, mesh, {"compute_dtype": start.model.config.compute_dtype})
    except ValueError as error:
        return one, f"the reward {one.name} is left out: {error}"
    read = checkpoints.on_tokens(one, models.reward_model(model), params)
    return read, f"the reward {one.name} reads the policy's tokens on the devices, if its tokenizer is theirs"


def _pretrain(run: Any, mesh: Mesh) -> Tokens | None:
    if getattr(run, "pretrain_data", None) is None:
        return None
    return collect.placed(data.pad([None] * run.pretrain_batch, run.max_prompt + run.max_completion), mesh)
