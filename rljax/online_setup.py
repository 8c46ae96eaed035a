"""What an online run is made of before its first iteration: everything loaded, placed and compiled."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from rljax import (
    collect,
    critics,
    data,
    groups,
    hosts,
    iteration,
    judges,
    methods,
    models,
    notes,
    policy,
    program,
    prompts,
    rewards,
    settings,
    sharding,
    tracking,
    views,
)
from rljax.errors import UserError
from rljax.filters import Sampling
from rljax.iteration import Learner
from rljax.settings import PPO, Imitation, OnlinePreference, PolicyGradient, Sampled
from rljax.types import LanguageModel, Params, Tokens


class Setup(NamedTuple):
    """Everything that a run is made of, before its first iteration."""

    start: policy.Policy  # where training starts, and the reference; without params where nobody asks for them again
    method: methods.Method
    sampler: collect.Sampler
    held_out: data.Rows
    learner: Learner
    shardings: Learner
    reference: Params | None
    reward_params: tuple[Any, ...]
    annotate: Callable[..., methods.Notes]  # compiled, as are the next two; None where `whole` does it
    learn: Callable[..., Any] | None
    whole: Callable[..., Any] | None  # where all rewards are JAX functions
    pretrain: Callable[[int], Tokens | None]  # iteration -> pretraining text
    look: Callable[[Params, Tokens], jax.Array]  # compiled: f32[b t] log-probabilities
    schedule: optax.Schedule
    memory: Any  # the compiler's analysis of the update


def set_up(run: Sampled, mesh: Mesh, folder: pathlib.Path, tracker: tracking.Tracker, stop: tracking.Stop) -> Setup:
    """Policy, prompts, rewards, state on its shardings, compiled functions: each needs those before it."""
    with tracker.phase(f"loading {run.model}"):
        start = program.load_policy(run, mesh)
        critic = critics.load(run, start, mesh) if isinstance(run, PPO) else None
    train_rows, held_out = program.read_rows(run, start, folder, tracker)
    for rows in (train_rows, held_out):
        data.check(rows, data.prompt_row if run.environment is None else dict)
    train_rows, held_out, lines = prompts.tried(run, start, (train_rows, held_out))
    notes.keep(folder, "data", lines, tracker.status)
    asked = () if run.reward is None else rewards.as_rewards(run.reward)
    rewards.check_fields(asked, prompts.fields(train_rows))
    asked = rewards.opened(asked, start.tokenizer, mesh=mesh)
    drawn = settings.sampling(run, start.stop_ids, start.absent)
    method = method_of(run, start.model, start.params, critic, drawn, shards=sharding.ways(sharding.ROWS, mesh))
    optimizer, schedule = program.make_optimizer(run, run.steps * run.epochs * run.minibatches)
    learner = iteration.init_learner(method.params, optimizer, ema=getattr(run, "ema", None) is not None)
    learner, shardings = program.place_state(learner, models.RULES, mesh)
    base = start.params if method.reference else None
    method = method._replace(params={})
    if not keeps_initial(run, method):
        start = start._replace(params={})
    parts = iteration.build(run, start.model, method, optimizer, asked, settings=drawn, on_nan=run.on_nan)
    here = None if run.environment is not None else hosts.share(run.batch, mesh).here
    source = prompts.prompts(run, start.tokenizer, train_rows, here)
    pretrain = _pretrain(run, start, mesh, lambda lines: notes.keep(folder, "pretraining text", lines, tracker.status))
    reward_params = rewards.device_params(asked)
    example = (learner, base, reward_params, collect.abstract_prompts(run, source.width, mesh), pretrain(0))
    compiled = _compile(run, parts, method, shardings, example, asked, tracker)
    judging: dict[str, Any] = {"tokenizer": start.tokenizer, "stop_ids": start.stop_ids, "timeout": run.reward_timeout}
    judging |= {"stop": stop, "say": tracker.status}
    sampler = collect.Sampler(
        run=run,
        mesh=mesh,
        start=start,
        judges=judges.make(asked, mesh=mesh, **judging),
        source=source,
        sample=compiled["sample"],
        greedy=compiled["greedy"],
        queue=compiled["queue"],
    )
    plain = views.of_policy(start.model, sampling=drawn, max_trained=run.max_completion)
    return Setup(
        start=start,
        method=method,
        sampler=sampler,
        held_out=held_out,
        learner=learner,
        shardings=shardings,
        reference=base,
        reward_params=reward_params,
        annotate=compiled["annotate"],
        learn=compiled["learn"],
        whole=compiled["whole"],
        pretrain=pretrain,
        look=jax.jit(lambda params, tokens: plain(params, tokens).logps),
        schedule=schedule,
        memory=(compiled["whole"] or compiled["learn"]).memory_analysis(),
    )


def keeps_initial(run: Sampled, method: methods.Method) -> bool:
    """Whether initial weights are looked at once training has begun."""
    return method.reference or run.evaluate is not None


def _compile(
    run: Sampled,
    parts: iteration.Iteration,
    method: methods.Method,
    shardings: Learner,
    example: tuple[Any, ...],
    asked: Sequence[rewards.Reward],
    tracker: tracking.Tracker,
) -> dict[str, Any]:
    """Each function once, before the first iteration; another shape would be an error then, not a recompile."""
    names = [one.name for one in asked] if run.environment is None else ["environment"]
    found: dict[str, Any] = dict.fromkeys((*PHASES, "queue"))
    if collect.queued(run):
        rolled = jax.eval_shape(parts.sample, example[0].train.params, example[3], jax.random.key(0))
        found["queue"] = collect.empty_queue(rolled, names, method.greedy, rows=run.batch * run.group * (run.lag or 1))
    for name, part in jitted(run, parts, method, shardings, example, names, whole=is_whole(run, asked)).items():
        with tracker.phase(f"compiling {PHASES[name]}"):
            found[name] = part.function.lower(*part.args).compile()
    return found


PHASES = {
    "whole": "the iteration",
    "sample": "the sampler",
    "greedy": "the greedy sampler",
    "annotate": "what notes a rollout",
    "learn": "the update",
}


class Part(NamedTuple):
    """A function of an iteration, and what it is compiled for."""

    function: Any  # jitted
    args: tuple[Any, ...]  # arrays, or their shapes and shardings


def is_whole(run: Sampled, asked: Sequence[rewards.Reward]) -> bool:
    """Whether an iteration is one compiled function: all its rewards are JAX functions, and nothing waits."""
    return bool(asked) and all(one.on_device for one in asked) and not collect.queued(run)


def jitted(
    run: Sampled,
    parts: iteration.Iteration,
    method: methods.Method,
    shardings: Learner,
    example: tuple[Any, ...],
    names: Sequence[str],
    *,
    whole: bool,
) -> dict[str, Part]:
    """The functions that an iteration of this run calls, in that order, by their names in `PHASES`.

    example: (learner, reference, parameters of rewards, prompts, pretraining text), which may be shapes with shardings.
    names: of the rewards. whole: see `is_whole`.
    """
    learner, base, _, prompt, text = example
    mesh, key, params = prompt.ids.sharding.mesh, jax.random.key(0), learner.train.params
    away = run.offload_reference and method.reference
    if whole:
        return {"whole": Part(_jit(parts.whole, (shardings, None, None), away, donate_argnums=0), (*example, key))}
    rollout = collect.placed(jax.eval_shape(parts.sample, params, prompt, key), mesh)
    notes = collect.placed(jax.eval_shape(parts.annotate, params, base, rollout), mesh)
    verdict = collect.abstract_verdict(rollout, names, method.greedy, mesh)
    rows, noted = jax.tree.map(lambda x: x.sharding, (rollout, notes))
    found = {}
    if run.environment is None:
        found["sample"] = Part(jax.jit(parts.sample, out_shardings=rows), (params, prompt, key))
    if method.greedy:
        found["greedy"] = Part(jax.jit(parts.sample_greedy), (params, prompt))
    found["annotate"] = Part(_jit(parts.annotate, noted, away), (params, base, rollout))
    # With a lag rewards are awaited after the update: if they fail, it has to be as if it had not been made.
    learn = _jit(parts.learn, (shardings, None, None), donate_argnums=() if run.lag else 0)
    found["learn"] = Part(learn, (learner, rollout, notes, verdict, text, key))
    return found


def _jit(function: Any, out: Any, away: bool = False, **options: Any) -> Any:
    """`jax.jit` with `out` as shardings of the results, None where they are free. away: an argument lies in host
    memory, beside which the compiler takes no `out_shardings`, only constraints.
    """
    if not away:
        return jax.jit(function, out_shardings=out, **options)

    def place(where: Any, x: Any) -> Any:
        return x if where is None else jax.lax.with_sharding_constraint(x, where)

    def constrained(*args: Any) -> Any:
        return jax.tree.map(place, out, function(*args), is_leaf=lambda where: where is None)

    return jax.jit(constrained, **options)


def method_of(
    run: Sampled, model: LanguageModel, params: Params, critic: Any, drawn: Sampling, *, shards: int
) -> methods.Method:
    """What the run learns by. shards: over how many devices rows are split."""
    shares = groups.shares(run, shards)
    match run:
        case PPO():
            return methods.ppo(run, model, params, critic, drawn, shares)
        case PolicyGradient():
            return methods.policy_gradient(run, model, params, drawn, shares)
        case OnlinePreference():
            return methods.preference(run, model, params, drawn, shares)
        case Imitation():
            return methods.imitation(run, model, params, drawn, shares)
    raise UserError(f"rljax.online runs PPO, PolicyGradient, OnlinePreference and Imitation, not {type(run).__name__}")


def _pretrain(
    run: Sampled, start: policy.Policy, mesh: Mesh, note: Callable[[list[str]], None]
) -> Callable[[int], Tokens | None]:
    """iteration -> packed rows of pretraining text (PPO-ptx), where the run wants some."""
    source = getattr(run, "pretrain_data", None)
    if source is None:
        return lambda _: None
    assert isinstance(run, PPO)
    rows, length = data.read(source, split=run.split), run.max_prompt + run.max_completion
    data.check(rows, data.text_row)
    example = functools.partial(data.text_example, tokenizer=start.tokenizer, max_length=length)
    texts = data.survey(rows, example, name="pretraining", overlong=run.overlong, tokenizer=start.tokenizer)
    note(texts.lines)
    packed = data.pack([texts.get(i) for i in range(len(texts.rows))], length)
    batches = data.Batches(
        lambda indices: data.pad([packed[i] for i in indices], length),
        len(packed),
        run.pretrain_batch,
        run.seed,
        hosts.share(run.pretrain_batch, mesh).here,
    )
    return lambda number: hosts.place(batches(number), mesh)
