"""The program whose batches come from the policy: PPO, GRPO and their families, online DPO, expert iteration.

`run` reads from top to bottom: set up, check, loop, report. An iteration is

    sample      the policy completes a batch of prompts, `group` times each
    annotate    reference log-probabilities and values, while the host's rewards judge
    learn       rewards are shaped, a batch is made of all that (methods.py), the weights are updated on it

and nothing else. Where the rewards are JAX functions the three are one compiled function. Everything an iteration does
is a function of (seed, iteration, state), and the state is what a checkpoint holds: a run that was killed goes on to
the same bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rljax import (
    collect,
    evaluation,
    evidence,
    hosts,
    judges,
    loop,
    objectives,
    program,
    resuming,
    sampling,
    selfchecks,
    settings,
    tracking,
    views,
)
from rljax.checkpoint import Checkpoints
from rljax.iteration import Learner, Trace
from rljax.metrics import best_mode
from rljax.online_setup import Setup, set_up
from rljax.program import Evaluation, Progress
from rljax.progress import lossy_screen
from rljax.settings import PPO, Imitation, OnlinePreference, PolicyGradient, Sampled
from rljax.types import Mean, Metrics

__all__ = ["PPO", "Evaluation", "Imitation", "OnlinePreference", "PolicyGradient", "Sampled", "run", "selfcheck"]

HEADLINE = "objective/scores"


class State(NamedTuple):
    """What a checkpoint holds, beside `Progress`."""

    learner: Learner
    queue: collect.Experience | None  # judged rollouts that wait to be trained on


def run(experiment: Sampled, file: str | pathlib.Path | None = None) -> int:
    """Train what the experiment describes, in its run folder; resume there if it was begun. Returns the exit status:
    0, or 128 + the number of the signal (Ctrl-C, SIGTERM, SIGHUP, SIGQUIT) that ended the run: saved, to be resumed by
    the same command.
    """
    program.check_settings(experiment)
    settings.check(experiment)
    folder, mesh = program.run_folder(experiment, file), program.make_mesh(experiment)
    way = best_mode(experiment.best, experiment.best_mode)
    ranked: dict[str, Any] = {"best_metric": experiment.best, "best_mode": way}
    with lossy_screen(), tracking.lock(folder), tracking.graceful_stop() as stop, jax.set_mesh(mesh):
        if not resuming.begin(experiment, folder):
            return 0
        with (
            Checkpoints(folder / "checkpoints", keep=experiment.keep, **ranked) as checkpoints,
            _tracker(experiment, folder, checkpoints.latest()) as tracker,
        ):
            setup, whole = set_up(experiment, mesh, folder, tracker, stop), True
            with contextlib.suppress(judges.Leaving):  # before anything was learned, there is nothing to save
                state, progress = _begin(experiment, setup, checkpoints, tracker)
                parts, more = _parts(experiment, setup, tracker), {"tracker": tracker, "stop": stop}
                whole = loop.Loop(experiment, parts, state, progress, checkpoints=checkpoints, **more).steps()
    return loop.leave(folder, stop, whole)


def selfcheck(experiment: Sampled, file: str | pathlib.Path | None = None) -> int:
    """Only what a run does before its first iteration: set everything up, check it, say what was found."""
    program.check_settings(experiment)
    settings.check(experiment)
    folder, mesh = program.run_folder(experiment, file), program.make_mesh(experiment)
    with (
        tracking.lock(folder),
        tracking.graceful_stop() as stop,
        jax.set_mesh(mesh),
        tracking.Tracker(folder / "selfcheck", total_steps=experiment.steps, tensorboard=False) as tracker,
    ):
        setup = set_up(experiment, mesh, folder, tracker, stop)
        return 0 if selfchecks.report(_checks(experiment, setup, tracker), tracker.status, experiment.waive) else 1


def _tracker(run: Sampled, folder: pathlib.Path, resumed: int | None) -> tracking.Tracker:
    return tracking.Tracker(
        folder,
        total_steps=run.steps,
        resumed=resumed,
        shown=HEADLINE,
        profile=run.profile,
        wandb="rljax" if run.wandb else None,
        config=program.describe(run),
    )


def _begin(run: Sampled, setup: Setup, checkpoints: Checkpoints, tracker: tracking.Tracker) -> tuple[State, Progress]:
    """From the last checkpoint, or checked and measured at the very beginning."""
    latest = checkpoints.latest()
    if latest is not None:
        like = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), setup.learner, setup.shardings
        )
        state, progress = checkpoints.restore(latest, _saved(setup, State(like, None)))
        tracker.status(f"resumed at step {latest}")
        queue, progress = hosts.whole(state.get("queue")), program.resumed(run, latest, progress)
        if progress.owed is not None:
            tracker.take_back(latest, progress.owed)
        return State(state["learner"], queue), progress
    learner = setup.learner
    if run.checks:
        selfchecks.require(_checks(run, setup, tracker), tracker.status, run.waive)
    if run.normalize_reference:
        learner = evaluation.reference_moments(run, setup, learner, tracker)
    with tracker.phase(f"completing {len(setup.held_out)} held-out prompts"):
        written = evaluation.write(run, setup, learner, setup.held_out, run.seed)
    evaluation.log(run, written, Progress(), tracker, 0)
    evaluation.show(run, written, tracker, 0, "before")
    evaluation.measure(run, setup, learner, tracker, 0, "before")
    return State(learner, None), Progress()


def _saved(setup: Setup, state: State) -> dict[str, Any]:
    """The pytree of a checkpoint: the queue in its fixed shape, where the run has one."""
    saved = {"learner": state.learner}
    if setup.sampler.queue is not None:
        saved["queue"] = hosts.spread(collect.padded(state.queue, setup.sampler.queue), setup.sampler.mesh)
    return saved


def _parts(run: Sampled, setup: Setup, tracker: tracking.Tracker) -> loop.Parts[State]:
    """What the loop calls."""

    def advance(state: State, progress: Progress, at: int) -> loop.Made[State]:
        state, progress, metrics, trace = _advance(run, setup, state, progress, at)
        return loop.Made(
            state,
            progress,
            metrics,
            _tokens(trace),
            check=lambda: collect.check_on_device(setup.sampler, trace),
            evidence=lambda: _evidence(run, setup, state.learner, trace),
        )

    def evaluate(state: State, progress: Progress, at: int) -> tuple[Progress, dict[str, float] | None]:
        with tracker.phase():
            written = evaluation.write(run, setup, state.learner, setup.held_out, run.seed)
            progress, measured = evaluation.log(run, written, progress, tracker, at)
            over = at == run.steps or program.patient(run, progress)
            evaluation.show(run, written, tracker, at, "after" if over else "during")
        return progress, measured

    return loop.Parts(
        advance=advance,
        evaluate=evaluate,
        finish=lambda state, at: evaluation.measure(run, setup, state.learner, tracker, at, "after"),
        train=lambda state: state.learner.train,
        saved=lambda state: _saved(setup, state),
        extra=lambda _: {},
        made=lambda state: int(state.learner.iterations),
        schedule=setup.schedule,
    )


def _tokens(trace: Trace) -> jax.Array:
    """Tokens read and written in an iteration."""
    return jnp.count_nonzero(trace.rollout.tokens.segments)


def _advance(
    run: Sampled, setup: Setup, state: State, progress: Progress, at: int
) -> tuple[State, Progress, Metrics, Trace]:
    """One iteration, after `at` of them: the heart of the program."""
    learner, sampler, draws = state.learner, setup.sampler, progress.draws
    key, text = jax.random.fold_in(jax.random.key(run.seed), at), setup.pretrain(at)
    if setup.whole is not None:
        asked = collect.place_prompts(sampler, draws)
        learner, metrics, trace = setup.whole(learner, setup.reference, setup.reward_params, asked, text, key)
        return State(learner, None), progress._replace(draws=draws + 1), metrics, trace

    assert setup.learn is not None
    queue, params = None, learner.train.params
    if sampler.queue is not None:  # rollouts that wait, or are filtered
        now, rest, drawn = collect.collect(sampler, params, state.queue, draws, at)
        rounds, draws = drawn - draws, drawn
        rollout, verdict = hosts.spread((now.rollout, now.verdict), sampler.mesh)
        notes = setup.annotate(params, setup.reference, rollout)
        learner, metrics, trace = setup.learn(learner, rollout, notes, verdict, text, key)
        age = np.asarray(at - now.born, np.float32)
        metrics["sampling/age"] = Mean(total=jnp.asarray(age.sum()), weight=jnp.asarray(float(len(age))))
        metrics["sampling/rounds"] = Mean(total=jnp.asarray(float(rounds)), weight=jnp.ones(()))
        queue = rest()
    else:
        a_round, draws = collect.begin(sampler, params, draws), draws + 1
        notes = setup.annotate(params, setup.reference, a_round.rollout)  # the device works while the host judges
        verdict = a_round.judge()()
        learner, metrics, trace = setup.learn(learner, a_round.rollout, notes, verdict, text, key)
    return State(learner, queue), progress._replace(draws=draws), metrics, trace


def _evidence(run: Sampled, setup: Setup, learner: Learner, trace: Trace) -> list[dict[str, Any]]:
    """Records of the first rows of an iteration, with their tokens' ratios after it."""
    if not run.evidence:
        return []
    after = setup.look(views.decoder_params(learner.train.params), trace.rollout.tokens)
    trace, after = hosts.first((trace, after), run.evidence)
    return evidence.rows_of(trace, after, setup.start.tokenizer, run.evidence, getattr(run, "loss", None))


def _checks(run: Sampled, setup: Setup, tracker: tracking.Tracker) -> list[selfchecks.Check]:
    """What a run finds out about itself before its first iteration."""
    initial = views.decoder_params(setup.learner.train.params)
    now = setup.start._replace(params=initial)
    checks = [selfchecks.learning_rate(setup.schedule, run.steps * run.epochs * run.minibatches)]
    checks.append(selfchecks.memory(setup.memory))
    checks += selfchecks.positions(setup.start.model.config, program.longest_row(run))
    if (decay := getattr(run, "ema", None)) is not None:
        checks.append(selfchecks.moving_average(decay, run.steps))
    if run.kl_target is not None:
        share = 0.2 * run.batch * run.group / run.kl_horizon
        checks.append(selfchecks.kl_controller((1 + share) ** run.steps))
    with tracker.phase("checking a first rollout"):
        rollout = _first_rollout(run, setup)
        alone = run.environment is None
        checks.append(selfchecks.sampled_tokens(rollout, now.tokenizer, now.stop_ids, single_turn=alone))
        checks.append(selfchecks.companions(now, rollout.tokens))
        checks.append(selfchecks.sampler(now, rollout, settings.sampling(run, now.stop_ids, now.absent)))
        reference = setup.start.params or initial
        checks.append(selfchecks.same_policy(setup.look, initial, reference, rollout))
        checks.append(selfchecks.same_ratios(now, setup.look, setup.method.look, setup.learner.train.params, rollout))
        if isinstance(run, PPO | PolicyGradient) and objectives.is_ratio_loss(run.loss):
            checks.append(selfchecks.first_surrogate(run))
    return checks


def _first_rollout(run: Sampled, setup: Setup) -> Any:
    """What the untrained policy makes of the first prompts, on the host."""
    if setup.whole is None:
        return hosts.whole(collect.begin(setup.sampler, setup.learner.train.params, 0).rollout)
    asked = collect.place_prompts(setup.sampler, 0)
    drawn = dataclasses.asdict(settings.sampling(run, setup.start.stop_ids, setup.start.absent))
    made = sampling.generate(
        setup.start.model,
        views.decoder_params(setup.learner.train.params),
        asked,
        jax.random.key(run.seed),
        n=run.group,
        max_new_tokens=run.max_completion,
        **drawn,
    )
    return hosts.whole(made)
