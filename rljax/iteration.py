"""One iteration of an online run as pure functions: sample, judge, shape, learn; and all of it as one.

`build` gives the parts, for a program whose rewards are on the host, and `whole`, their composition, which is what is
compiled when the reward is a JAX function. `whole` can be put under `vmap`: a sweep over seeds is one program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rljax import advantages, ops, sampling, shaping, train
from rljax.filters import Sampling
from rljax.methods import Judged, Method, Notes, share, whitening
from rljax.rewards import Reward, judge_on_device, sound
from rljax.shaping import Moments
from rljax.types import LanguageModel, Mean, Metrics, Params, PolicyBatch, Rollout, Tokens, TrainState, pytree
from rljax.views import decoder_params


@pytree
class Learner:
    """All that an online run changes, but for what waits to be trained on (`collect.Experience`)."""

    iterations: Array  # i32[]
    train: TrainState  # policy and critic: one tree, one optimizer
    kl_factor: Array  # f32[]; the KL coefficients are multiplied by it: the adaptive controller's state
    moments: Moments  # of the scores so far, or of the reference's samples
    ema: Params | None = None  # moving average of the policy's weights


@pytree
class Greedy:
    """What rewards said of greedy completions, each repeated for all rows of its prompt."""

    total: Array  # f32[b]; NaN where no reward applies
    lengths: Array  # i32[b]; tokens
    finished: Array  # bool[b]


@pytree
class Verdict:
    """What rewards said of a rollout, before shaping."""

    total: Array  # f32[b]: the weighted sum; NaN where no reward applies
    parts: dict[str, Array]  # f32[b] each, unweighted; NaN where it does not apply
    per_token: Array | None = None  # f32[b t], weighted, within the total
    greedy: Greedy | None = None  # where the advantage compares with it


class Trace(NamedTuple):
    """What an iteration went through, to look at."""

    rollout: Rollout
    verdict: Verdict
    notes: Notes
    batch: Any  # what was trained on


class Iteration(NamedTuple):
    """Pure functions; nothing is jitted yet."""

    sample: Callable[[Params, Tokens, Array], Rollout]  # (the run's params, prompts [g p], key) -> n rows a prompt
    sample_greedy: Callable[[Params, Tokens], Rollout]
    annotate: Callable[[Params, Params | None, Rollout], Notes]
    learn: Callable[..., tuple[Learner, Metrics, Trace]]  # (learner, rollout, notes, verdict, pretrain, key)
    whole: Callable[..., tuple[Learner, Metrics, Trace]]  # (learner, reference, reward params, prompts, pretrain, key)


def init_learner(params: Params, optimizer: optax.GradientTransformation, *, ema: bool = False) -> Learner:
    """Before the first iteration."""
    state = train.init_state(params, optimizer)
    average = jax.tree.map(jnp.copy, train.wide(decoder_params(state.params))) if ema else None
    return Learner(
        iterations=jnp.zeros((), jnp.int32),
        train=state,
        kl_factor=jnp.ones(()),
        moments=shaping.init_moments(),
        ema=average,
    )


def build(
    run: Any,
    model: LanguageModel,
    method: Method,
    optimizer: optax.GradientTransformation,
    rewards: Sequence[Reward] = (),
    *,
    settings: Sampling,
    on_nan: train.OnNan | None = None,
) -> Iteration:
    """The iteration of a run (an experiment of `online`) with its method (methods.py). on_nan: `train.update_step`."""
    pieces: dict[str, Any] = {"microbatches": run.microbatches, "together": method.shared}
    update = train.update_step(method.loss_fn, optimizer, on_nan=on_nan, **pieces)
    epochs = train.epochs_step(
        update,
        epochs=run.epochs,
        minibatches=run.minibatches,
        target_kl=getattr(run, "target_kl", None),
        together=method.together,
        prepare=whitening(run),
    )
    draw = dataclasses.asdict(settings) | {"max_new_tokens": run.max_completion}

    @jax.named_scope("sample")
    def sample(params: Params, prompts: Tokens, key: Array) -> Rollout:
        here = {"n": run.group, "slots": run.slots, "gather": run.gather, **draw}
        return sampling.generate(model, decoder_params(params), prompts, jax.random.fold_in(key, 0), **here)

    @jax.named_scope("sample_greedy")
    def sample_greedy(params: Params, prompts: Tokens) -> Rollout:
        greedy = draw | {"temperature": 0.0, "top_k": None, "top_p": None, "min_p": None}
        return sampling.generate(model, decoder_params(params), prompts, jax.random.key(0), gather=run.gather, **greedy)

    @jax.named_scope("annotate")
    def annotate(params: Params, reference: Params | None, rollout: Rollout) -> Notes:
        return method.annotate(params, reference, rollout)

    @jax.named_scope("learn")
    def learn(
        learner: Learner, rollout: Rollout, notes: Notes, verdict: Verdict, pretrain: Tokens | None, key: Array
    ) -> tuple[Learner, Metrics, Trace]:
        judged, moments = shape(run, learner.moments, rollout, verdict)
        found = {**completion_metrics(rollout), **reward_metrics(verdict)}
        trained = _untrained_where(rollout, ~judged.applies)
        batch, metrics = method.batch(trained, notes, judged, learner.kl_factor)
        if isinstance(batch, PolicyBatch):
            batch = dataclasses.replace(batch, pretrain=pretrain)
        state, updates = epochs(learner.train, batch, jax.random.fold_in(key, 1))
        learner = Learner(
            iterations=learner.iterations + 1,
            train=state,
            kl_factor=_next_factor(run, learner.kl_factor, metrics, len(judged.scores)),
            moments=moments,
            ema=_average(run, learner.ema, state.params),
        )
        return learner, {**found, **metrics, **updates}, Trace(rollout, verdict, notes, batch)

    whole = functools.partial(_whole, run, method, rewards, sample, sample_greedy, annotate, learn)
    return Iteration(sample, sample_greedy, annotate, learn, whole)


def _whole(
    run: Any,
    method: Method,
    rewards: Sequence[Reward],
    sample: Callable[..., Rollout],
    sample_greedy: Callable[..., Rollout],
    annotate: Callable[..., Notes],
    learn: Callable[..., tuple[Learner, Metrics, Trace]],
    learner: Learner,
    reference: Params | None,
    reward_params: Sequence[Any],
    prompts: Tokens,
    pretrain: Tokens | None,
    key: Array,
) -> tuple[Learner, Metrics, Trace]:
    """Sample, judge, learn, for rewards that are JAX functions. Where one of them is not finite, or too large for
    a variance (`sound`), nothing is learned: the learner stays as it is, its number of iterations too.
    """
    params = learner.train.params
    rollout = sample(params, prompts, key)
    with jax.named_scope("judge"):
        total, per_token, said = judge_on_device(rewards, reward_params, rollout.tokens)
    greedy = None
    if method.greedy:
        answers = sample_greedy(params, prompts)
        alone, _, _ = judge_on_device(rewards, reward_params, answers.tokens)
        greedy = greedy_verdict(alone, answers, run.group)
    verdict = Verdict(total=total, parts=said, per_token=per_token, greedy=greedy)
    notes = annotate(params, reference, rollout)
    finite = jnp.stack([sound(values).all() for values in (total, *said.values())]).all()
    learner, metrics, trace = _where(
        finite, lambda learner: learn(learner, rollout, notes, verdict, pretrain, key), learner
    )
    return learner, metrics, Trace(rollout, verdict, notes, trace.batch)


def _where(
    good: Array, learn: Callable[[Learner], tuple[Learner, Metrics, Trace]], learner: Learner
) -> tuple[Learner, Metrics, Trace]:
    """What has been learned where `good` holds; else the learner as it is, and zeros.

    A loop of one round or none: XLA updates the state of a loop in place, where a branch would copy it.
    """
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(learn, learner)[1:])
    learner, metrics, trace, _ = jax.lax.while_loop(
        lambda carry: carry[3], lambda carry: (*learn(carry[0]), jnp.zeros((), bool)), (learner, *nothing, good)
    )
    return learner, metrics, trace


def exported(learner: Learner) -> Params:
    """The policy's weights that are evaluated and exported: their average, where the run keeps one."""
    params = decoder_params(learner.train.params)
    if learner.ema is None:
        return params
    return jax.tree.map(lambda a, p: a if a.dtype == p.dtype else a.astype(p.dtype), learner.ema, params)


def greedy_verdict(total: Any, rollout: Rollout, group: int) -> Greedy:
    """Of totals [g] of a greedy rollout, for groups of that many rows; numpy or jax arrays."""
    lengths = rollout.tokens.mask.sum(1).astype("int32")
    return Greedy(total=total.repeat(group), lengths=lengths.repeat(group), finished=rollout.finished.repeat(group))


def shape(run: Any, moments: Moments, rollout: Rollout, verdict: Verdict) -> tuple[Judged, Moments]:
    """Scores as the method sees them: overlong penalty, normalisation, clipping, then what a missing end costs. A
    greedy completion's score goes the same way, and a row applies only where it can be compared.
    """
    applies, greedy = ~jnp.isnan(verdict.total), verdict.greedy
    if greedy is not None:
        applies &= ~jnp.isnan(greedy.total)
    scores = shortened(run, jnp.where(applies, verdict.total, 0.0), rollout.tokens.mask.sum(1))
    if run.normalize_running:
        moments = shaping.update_moments(moments, scores, applies)
    alone, scale = None, (_scaled(run, moments, jnp.ones(1)) - _scaled(run, moments, jnp.zeros(1)))[0]
    if greedy is not None:
        alone = _scaled(run, moments, shortened(run, greedy.total, greedy.lengths))
        alone = _limited(run, alone, greedy.finished)
        # By its own verdict: the first row of a group, whose baseline stands for all, may be one without a reward.
        alone = jnp.where(jnp.isnan(greedy.total), 0.0, alone)
    judged = Judged(
        scores=jnp.where(applies, _limited(run, _scaled(run, moments, scores), rollout.finished), 0.0),
        applies=applies,
        per_token=None if verdict.per_token is None else verdict.per_token * scale,
        greedy=alone,
    )
    return judged, moments


def shortened(run: Any, scores: Any, lengths: Any) -> Any:
    """Scores [b] after the penalty for overlong completions, where the run has one: what normalisation is about."""
    if run.overlong_buffer is None:
        return scores
    return scores + shaping.overlong_penalty(lengths, max_length=run.max_completion, buffer=run.overlong_buffer)


def _scaled(run: Any, moments: Moments, scores: Array) -> Array:
    if run.normalize_running:
        return shaping.running_normalize(scores, moments)
    if run.normalize_reference:
        return shaping.standardize(scores, mean=moments.mean, std=jnp.sqrt(moments.variance()))
    return scores


def _limited(run: Any, scores: Array, finished: Array) -> Array:
    if run.score_clip is not None:
        scores = shaping.clip_scores(scores, low=-run.score_clip, high=run.score_clip)
    if run.missing_eos_score is not None:
        scores = shaping.replace_unfinished(scores, finished, value=run.missing_eos_score)
    if run.missing_eos_penalty is not None:
        scores = shaping.penalize_unfinished(scores, finished, penalty=run.missing_eos_penalty)
    return scores


def completion_metrics(rollout: Rollout) -> Metrics:
    """Of all completions that there are, those that no reward applies to among them."""
    lengths, rows = rollout.tokens.mask.sum(1), jnp.any(rollout.tokens.segments > 0, axis=1)
    return {
        "completions/mean_length": ops.masked_mean(lengths, rows),
        "completions/clipped_ratio": share(~rollout.finished, rows),
    }


def reward_metrics(verdict: Verdict) -> Metrics:
    """Every reward apart, as its function gave it: rewards/NAME/mean and /std; and how many rows none applied to."""
    found = {}
    for name, values in verdict.parts.items():
        here = ~jnp.isnan(values)
        mean = ops.masked_mean(values, here)
        spread = ops.masked_mean(jnp.square(jnp.where(here, values - mean.value(), 0.0)), here)
        found[f"rewards/{name}/mean"] = mean
        found[f"rewards/{name}/std"] = ops.masked_mean(jnp.sqrt(spread.value()), here.any())
    none = jnp.isnan(verdict.total)
    return {**found, "rewards/none_ratio": share(none)}


def _untrained_where(rollout: Rollout, rows: Array) -> Rollout:
    """These rows become padding, which weighs nothing."""
    keep, tokens = ~rows[:, None], rollout.tokens
    tokens = dataclasses.replace(tokens, segments=jnp.where(keep, tokens.segments, 0), mask=tokens.mask & keep)
    return dataclasses.replace(rollout, tokens=tokens)


def _next_factor(run: Any, factor: Array, metrics: Metrics, rows: int) -> Array:
    if run.kl_target is None:
        return factor
    kl: Mean = metrics["objective/kl"]
    moved = advantages.adaptive_kl(factor, kl.value(), target=run.kl_target, horizon=run.kl_horizon, batch_size=rows)
    return jnp.where((kl.weight > 0) & jnp.isfinite(moved), moved, factor)  # no row was measured: nothing is known


def _average(run: Any, ema: Params | None, params: Params) -> Params | None:
    decay = getattr(run, "ema", None)
    return ema if ema is None or decay is None else train.average_weights(ema, decoder_params(params), decay=decay)
