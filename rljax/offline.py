"""The program whose batches come from a data set: supervised fine-tuning, reward models, preference learning.

`run` reads from top to bottom: set up, check, loop, report. What is trained on is a `Task` (tasks.py); everything
else here is the same for every kind of experiment.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from rljax import (
    data,
    hosts,
    losses,
    models,
    notes,
    policy,
    program,
    reference,
    report,
    resuming,
    selfchecks,
    tasks,
    tracking,
    train,
)
from rljax.checkpoint import Checkpoints
from rljax.errors import UserError
from rljax.filters import Sampling
from rljax.identity import base_kind
from rljax.objectives import tryouts
from rljax.program import Evaluation, Progress, Run
from rljax.progress import lossy_screen
from rljax.ranges import Coefficient, Natural, Rate
from rljax.types import TrainState

__all__ = ["SFT", "Evaluation", "Preference", "RewardModel", "Unpaired", "run", "selfcheck"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFT(Run):
    """Supervised fine-tuning on texts, prompts with completions, or chats (whichever the rows are)."""

    packing: bool = False  # several documents a row; attention does not cross them
    learning_rate: Rate = 2e-5  # at the peak of the schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModel(Run):
    """A scalar reward on comparisons: `loss` compares pairs, or picks the best of k."""

    loss: Callable[..., Any] = losses.bradley_terry_loss  # (chosen, rejected) or (scores [b k], best) -> [b]
    normalize: Natural = 0  # policy samples on which the reward gets mean 0 and std 1, before and after (1909.08593)
    learning_rate: Rate = 1e-5  # at the peak of the schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference(Run):
    """Learning from pairs. `loss` sees [b] log-probabilities: policy chosen and rejected, then the reference's."""

    # such as functools.partial(losses.dpo_loss, beta=0.1); its keywords with a default (margin) are filled from the
    # rows' fields of their names
    loss: Callable[..., Any]
    average: bool = False  # log-probabilities per token instead of summed (SimPO, ORPO)
    reference: bool = True  # False: the loss takes the policy's two arrays only (SimPO, ORPO, CPO, SLiC)
    share_prompts: bool = True  # compute a prompt once for chosen and rejected; changes speed and rounding only
    cache_reference: bool = True  # the reference's log-probabilities once, kept on disk; False: with every batch
    nll_weight: Coefficient = 0.0  # plus this much negative log-likelihood of the chosen (ORPO, CPO, RPO)
    nll_average: bool = True  # per token (RPO, ORPO) or summed (CPO)


KTO = functools.partial(losses.kto_loss, beta=0.1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unpaired(Run):
    """Learning from single completions marked good or bad (KTO); pairs are taken apart."""

    loss: Callable[..., Any] = KTO  # (log-probabilities, the reference's, desirable, KL point) -> [b]


class Setup(NamedTuple):
    """Everything that a run is made of, before its first step."""

    policy: policy.Policy  # where training starts, and the reference; without params where nobody asks for them again
    task: tasks.Task
    state: TrainState
    shardings: TrainState
    place: Callable[[Any, Any], Any]  # (this process's rows of a batch, params) -> global arrays, all fields filled in
    update: Callable[..., Any]  # compiled
    evaluate: Callable[..., Any]  # compiled
    schedule: optax.Schedule
    memory: Any  # the compiler's analysis of the update
    mesh: Mesh


def run(experiment: Run, file: str | pathlib.Path | None = None) -> int:
    """Train what the experiment describes, in its run folder; resume there if it was begun. Returns the exit status:
    0, or 128 + the number of the signal (Ctrl-C, SIGTERM, SIGHUP, SIGQUIT) that ended the run: saved, to be resumed by
    the same command.
    """
    check(experiment)
    folder, mesh = program.run_folder(experiment, file), program.make_mesh(experiment)
    with lossy_screen(), tracking.lock(folder), tracking.graceful_stop() as stop, jax.set_mesh(mesh):
        if not resuming.begin(experiment, folder):
            return 0
        with (
            Checkpoints(
                folder / "checkpoints",
                keep=experiment.keep,
                best_metric=experiment.best,
                best_mode=experiment.best_mode,
            ) as checkpoints,
            _tracker(experiment, folder, checkpoints.latest()) as tracker,
        ):
            setup = set_up(experiment, mesh, folder, tracker)
            state, progress = _begin(experiment, setup, checkpoints, tracker)
            _loop(experiment, setup, state, progress, checkpoints, tracker, stop)
    if stop.requested is not None:
        return 128 + signal.Signals[stop.requested].value
    if jax.process_index() == 0:
        print(f"\nreport: {report.write_report(folder)}\nexport: rljax export {folder} FOLDER")
    return 0


def selfcheck(experiment: Run, file: str | pathlib.Path | None = None) -> int:
    """Only what a run does before its first step: set everything up, check it, say what was found."""
    check(experiment)
    folder, mesh = program.run_folder(experiment, file), program.make_mesh(experiment)
    with (
        tracking.lock(folder),
        jax.set_mesh(mesh),
        tracking.Tracker(folder / "selfcheck", total_steps=experiment.steps, tensorboard=False) as tracker,
    ):
        setup = set_up(experiment, mesh, folder, tracker)
        written = _write(experiment, setup, setup.state, tracker)
        return (
            0
            if selfchecks.report(_checks(experiment, setup, written, tracker), tracker.status, experiment.waive)
            else 1
        )


def set_up(experiment: Run, mesh: Mesh, folder: pathlib.Path, tracker: tracking.Tracker) -> Setup:
    """Policy, data, state on its shardings, compiled functions: in this order, each needing the one before."""
    with tracker.phase(f"loading {experiment.model}"):
        start = program.load_policy(experiment, mesh)
    rows = program.read_rows(experiment, start, folder, tracker)
    here = hosts.share(experiment.batch, mesh).here
    task = tasks.part_of(_task(experiment, start, rows, mesh, tracker), here)
    optimizer, schedule = program.make_optimizer(experiment)
    state, shardings = program.place_state(train.init_state(task.params, optimizer), models.RULES, mesh)
    notes.keep(folder, "data", task.notes, tracker.status)
    task = task._replace(params={})
    if not keeps_initial(experiment):
        start = start._replace(params={})

    def place(batch: Any, params: Any) -> Any:
        batch = hosts.place(batch, mesh)
        return batch if task.prepare is None else task.prepare(params, batch)

    update = train.make_update(task.loss_fn, optimizer, shardings=shardings, microbatches=experiment.microbatches)
    with tracker.phase("compiling the update"):
        batch = place(task.batch(0), state.params)
        compiled = update.lower(state, batch).compile()
    with tracker.phase("compiling the evaluation"):
        evaluate = train.make_evaluate(task.loss_fn).lower(state.params, batch).compile()
    memory = compiled.memory_analysis()
    return Setup(start, task, state, shardings, place, compiled, evaluate, schedule, memory, mesh)


def keeps_initial(run: Run) -> bool:
    """Whether initial weights are looked at once training has begun. Cached log-probabilities stand for them."""
    fresh = isinstance(run, Preference) and run.reference and not run.cache_reference
    return fresh or run.evaluate is not None or (isinstance(run, RewardModel) and run.normalize > 0)


def check(experiment: Run) -> None:
    """Raise UserError for settings that cannot work, before anything is loaded."""
    _check_kind(experiment)
    program.check_settings(experiment)
    if isinstance(experiment, Preference):
        tryouts.pairs(experiment.loss, reference=experiment.reference)
    if isinstance(experiment, Unpaired):
        tryouts.unpaired(experiment.loss)
    if isinstance(experiment, RewardModel):
        tryouts.comparison(experiment.loss)


def _check_kind(experiment: Run) -> None:
    if not isinstance(experiment, SFT | RewardModel | Preference | Unpaired):
        raise UserError(
            "rljax.offline runs SFT, RewardModel, Preference and Unpaired, and what is derived from them, not "
            f"{type(experiment).__name__}"
        )


def _tracker(experiment: Run, folder: pathlib.Path, resumed: int | None) -> tracking.Tracker:
    return tracking.Tracker(
        folder,
        total_steps=experiment.steps,
        resumed=resumed,
        shown=HEADLINES[base_kind(type(experiment))],
        profile=experiment.profile,
        wandb="rljax" if experiment.wandb else None,
        config=program.describe(experiment),
    )


HEADLINES = {
    Preference: "rewards/accuracies",
    Unpaired: "rewards/chosen",  # its rewards have no pairs to take a margin of
    RewardModel: "accuracy",
    SFT: "mean_token_accuracy",
}


def _task(experiment: Run, start: policy.Policy, rows: tasks.Rows, mesh: Any, tracker: tracking.Tracker) -> tasks.Task:
    """What this kind of experiment trains on."""
    view = reference.view(start, experiment, mesh, tracker.phase)
    match experiment:
        case Preference():
            return tasks.preference(experiment, start, rows, view)
        case Unpaired():
            return tasks.unpaired(experiment, start, rows, view)
        case RewardModel():
            return tasks.reward(experiment, start, rows, jax.random.key(experiment.seed))
        case SFT():
            return tasks.supervised(experiment, start, rows)
    raise TypeError(type(experiment))


def _begin(
    experiment: Run, setup: Setup, checkpoints: Checkpoints, tracker: tracking.Tracker
) -> tuple[TrainState, Progress]:
    """From the last checkpoint, or checked and measured at the very beginning."""
    latest = checkpoints.latest()
    if latest is not None:
        like = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), setup.state, setup.shardings
        )
        state, progress = checkpoints.restore(latest, like)
        tracker.status(f"resumed at step {latest}")
        return state, program.resumed(experiment, latest, progress)
    state = _normalized(experiment, setup, setup.state, tracker)
    written = _write(experiment, setup, state, tracker)
    if experiment.checks:
        selfchecks.require(_checks(experiment, setup, written, tracker), tracker.status, experiment.waive)
    _evaluate(experiment, setup, state, Progress(), tracker, 0)
    _measure(experiment, setup, state, written, tracker, 0, "before")
    return state, Progress()


def _loop(
    experiment: Run,
    setup: Setup,
    state: TrainState,
    progress: Progress,
    checkpoints: Checkpoints,
    tracker: tracking.Tracker,
    stop: tracking.Stop,
) -> None:
    """Steps until the last, until `patience` runs out, or until a signal comes; saved in all three cases."""
    begin = experiment.steps if progress.done else int(state.step)
    everywhere = experiment.batch / len(hosts.share(experiment.batch, setup.mesh).here)  # over the rows read here
    for index, batch in data.prefetch(setup.task.batch, begin, experiment.steps):
        step, tokens = index + 1, np.count_nonzero(setup.task.tokens(batch).segments) * everywhere
        with jax.profiler.StepTraceAnnotation("step", step_num=step):
            state, metrics = setup.update(state, setup.place(batch, state.params))
        rate = program.learning_rate(setup.schedule, state)
        tracker.log(step, {**metrics, "learning_rate": rate}, tokens=tokens)

        due, leaving = step % experiment.eval_every == 0 or step == experiment.steps, stop.agreed(step) is not None
        measured = None
        if due:
            progress, measured = _evaluate(experiment, setup, state, progress, tracker, step)
        done = step == experiment.steps or progress.waited >= (experiment.patience or np.inf)
        if done:
            state = _normalized(experiment, setup, state, tracker)
            _measure(experiment, setup, state, _write(experiment, setup, state, tracker), tracker, step, "after")
            progress = progress._replace(done=True)
        better = due and experiment.best is not None and progress.waited == 0
        if done or leaving or better or step % experiment.save_every == 0:
            tracker.flush()
            with tracker.phase():
                checkpoints.save(step, state, progress._asdict(), measured)
        if done or leaving:
            return


def _evaluate(
    experiment: Run, setup: Setup, state: TrainState, progress: Progress, tracker: tracking.Tracker, step: int
) -> tuple[Progress, dict[str, float] | None]:
    """Log the metrics of all held-out rows; (progress, what ranks this state), where there is something to rank by."""
    with tracker.phase("evaluating held-out rows" if step == 0 else None):
        batches = (setup.evaluate(state.params, setup.place(batch, state.params)) for batch in setup.task.evals())
        metrics = functools.reduce(train.add_metrics, batches)
        tracker.log(step, metrics, prefix="eval/")
        found = {f"eval/{name}": value for name, value in tracking.values(metrics).items()} if experiment.best else {}
    return program.rank(experiment, found, progress)


def _write(experiment: Run, setup: Setup, state: TrainState, tracker: tracking.Tracker) -> policy.Completions | None:
    """What the policy makes of held-out prompts, where there are any and it can write."""
    if isinstance(experiment, RewardModel) or not setup.task.prompts:
        return None
    with tracker.phase(f"sampling {len(setup.task.prompts)} held-out prompts"):
        return policy.complete(
            setup.policy._replace(params=state.params),
            setup.task.prompts,
            jax.random.key(experiment.seed),
            max_new_tokens=experiment.sample_tokens,
            batch=experiment.samples,
            max_prompt=experiment.max_prompt,
        )


def _measure(
    experiment: Run,
    setup: Setup,
    state: TrainState,
    written: policy.Completions | None,
    tracker: tracking.Tracker,
    step: int,
    phase: str,
) -> None:
    """Show samples, and find out what the experiment itself wants to know: before and after training."""
    if written is not None:
        rows = [{"prompt": str(p), "completion": t} for p, t in zip(setup.task.prompts, written.raw, strict=True)]
        tracker.samples(step, [{"phase": phase, **row} for row in rows], title=f"{phase} training")
    now = setup.policy._replace(params=state.params)
    program.measure(experiment, now, setup.policy.params, tracker, step, phase)


def _normalized(experiment: Run, setup: Setup, state: TrainState, tracker: tracking.Tracker) -> TrainState:
    """A reward model with its head rescaled to mean 0 and std 1 on texts of the policy (Ziegler et al. 2019, section
    2.1).
    """
    if not isinstance(experiment, RewardModel) or not experiment.normalize:
        return state
    with tracker.phase(f"normalising the reward on {experiment.normalize} samples of the policy"):
        written = policy.complete(
            setup.policy,
            setup.task.prompts,
            jax.random.key(experiment.seed),
            max_new_tokens=experiment.max_completion,
            batch=min(32, experiment.normalize),
            max_prompt=experiment.max_prompt,
        )
        score = jax.jit(models.reward_model(setup.policy.model).scores)
        scores = np.concatenate([hosts.whole(score(state.params, rollout.tokens)) for rollout in written.rollouts])
        head = models.normalize_head(state.params["head"], mean=float(scores.mean()), std=float(scores.std()))
    tracker.status(f"reward before normalising: mean {scores.mean():.3f}, std {scores.std():.3f}")
    params = jax.device_put({**state.params, "head": head}, setup.shardings.params)
    return dataclasses.replace(state, params=params)


def _checks(
    experiment: Run, setup: Setup, written: policy.Completions | None, tracker: tracking.Tracker
) -> list[selfchecks.Check]:
    """What a run finds out about itself before its first step."""
    local, params = setup.task.batch(0), setup.state.params
    tokens = hosts.whole(hosts.place(setup.task.tokens(local), setup.mesh))
    decoder = params["model"] if isinstance(experiment, RewardModel) else params
    now = setup.policy._replace(params=decoder)
    checks = [
        selfchecks.trained_tokens(tokens, now.tokenizer, now.stop_ids, budget=experiment.max_completion),
        selfchecks.learning_rate(setup.schedule, experiment.steps),
        selfchecks.memory(setup.memory),
        *selfchecks.positions(now.model.config, program.longest_row(experiment)),
    ]
    with tracker.phase("checking log-probabilities"):
        checks.append(selfchecks.companions(now, tokens))
        checks += _contrast(experiment, local, setup.mesh)
        if isinstance(experiment, Preference):
            batch = setup.place(local, params)
            checks.append(selfchecks.first_loss(experiment, setup.evaluate(params, batch), batch))
        if written is not None:
            checks.append(selfchecks.sampler(now, written.rollouts[0], Sampling(absent=now.absent)))
    return checks


def _contrast(experiment: Run, batch: Any, mesh: Mesh) -> list[selfchecks.Check]:
    """Whether the first batch has something to compare: the same for all processes."""
    match experiment:
        case Preference():
            pairs = hosts.whole(hosts.place((batch.chosen, batch.rejected), mesh))
            return [selfchecks.contrast(jax.tree.map(lambda *x: np.stack(x, 1), *pairs))]
        case RewardModel():
            return [selfchecks.contrast(hosts.whole(hosts.place(batch.tokens, mesh)))]
        case Unpaired():
            return [selfchecks.labels(*hosts.whole(hosts.place((batch[0].desirable, batch[0].tokens), mesh)))]
    return []
