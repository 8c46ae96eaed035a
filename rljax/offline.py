"""The program whose batches come from a data set: supervised fine-tuning, reward models, preference learning.

`run` reads from top to bottom: set up, check, loop, report. What is trained on is a `Task` (tasks.py); everything
else here is the same for every kind of experiment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from rljax import (
    artefacts,
    data,
    hosts,
    loop,
    losses,
    models,
    notes,
    policy,
    program,
    reference,
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
from rljax.metrics import best_mode
from rljax.objectives import tryouts
from rljax.passes import Passing, in_steps
from rljax.program import Evaluation, Progress, Run
from rljax.progress import lossy_screen
from rljax.ranges import Coefficient, Natural, Rate
from rljax.types import Params, TrainState

__all__ = ["SFT", "Evaluation", "Preference", "RewardModel", "Unpaired", "run", "selfcheck"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFT(Passing):
    """Supervised fine-tuning on texts, prompts with completions, or chats (whichever the rows are)."""

    packing: bool = False  # several documents a row; attention does not cross them
    learning_rate: Rate = 2e-5  # at the peak of the schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardModel(Passing):
    """A scalar reward on comparisons: `loss` compares pairs, or picks the best of k."""

    loss: Callable[..., Any] = losses.bradley_terry_loss  # (chosen, rejected) or (scores [b k], best) -> [b]
    normalize: Natural = 0  # policy samples on which the reward gets mean 0 and std 1, before and after (1909.08593)
    learning_rate: Rate = 1e-5  # at the peak of the schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference(Passing):
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
class Unpaired(Passing):
    """Learning from single completions marked good or bad (KTO); pairs are taken apart."""

    loss: Callable[..., Any] = KTO  # (log-probabilities, the reference's, desirable, KL point) -> [b]


Scored = Callable[[Params], tuple[float, float]]  # of a reward model's parameters: mean and std of its scores


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
    experiment = check(experiment)
    folder, mesh = program.run_folder(experiment, file), program.make_mesh(experiment)
    with lossy_screen(), tracking.lock(folder), tracking.graceful_stop() as stop, jax.set_mesh(mesh):
        if not resuming.begin(experiment, folder):
            return 0
        with (
            Checkpoints(
                folder / "checkpoints",
                keep=experiment.keep,
                best_metric=experiment.best,
                best_mode=best_mode(experiment.best, experiment.best_mode),
            ) as checkpoints,
            _tracker(experiment, folder, checkpoints.latest()) as tracker,
        ):
            setup = set_up(experiment, mesh, folder, tracker)
            scored = _scorer(experiment, setup, tracker)
            state, progress = _begin(experiment, setup, scored, checkpoints, tracker)
            with contextlib.closing(data.prefetch(setup.task.batch, int(state.step), experiment.steps)) as batches:
                parts = _parts(experiment, setup, batches, scored, tracker)
                more = {"checkpoints": checkpoints, "tracker": tracker, "stop": stop}
                whole = loop.Loop(experiment, parts, state, progress, **more).steps()
    return loop.leave(folder, stop, whole)


def selfcheck(experiment: Run, file: str | pathlib.Path | None = None) -> int:
    """Only what a run does before its first step: set everything up, check it, say what was found."""
    experiment = check(experiment)
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

    more: Any = {"microbatches": experiment.microbatches, "on_nan": experiment.on_nan}
    update = train.make_update(task.loss_fn, optimizer, shardings=shardings, **more)
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


def check(experiment: Run) -> Passing:
    """The experiment with its `epochs` as steps. UserError for settings that cannot work, before anything is loaded."""
    experiment = in_steps(_known(experiment))
    program.check_settings(experiment)
    if isinstance(experiment, Preference):
        tryouts.pairs(experiment.loss, reference=experiment.reference)
    if isinstance(experiment, Unpaired):
        tryouts.unpaired(experiment.loss)
    if isinstance(experiment, RewardModel):
        tryouts.comparison(experiment.loss)
    return experiment


def _known(experiment: Run) -> Passing:
    if not isinstance(experiment, SFT | RewardModel | Preference | Unpaired):
        raise UserError(
            "rljax.offline runs SFT, RewardModel, Preference and Unpaired, and what is derived from them, not "
            f"{type(experiment).__name__}"
        )
    return experiment


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
    experiment: Run, setup: Setup, scored: Scored | None, checkpoints: Checkpoints, tracker: tracking.Tracker
) -> tuple[TrainState, Progress]:
    """From the last checkpoint, or checked and measured at the very beginning."""
    latest = checkpoints.latest()
    if latest is not None:
        like = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), setup.state, setup.shardings
        )
        state, progress = checkpoints.restore(latest, like)
        tracker.status(f"resumed at step {latest}")
        progress = program.resumed(experiment, latest, progress)
        if progress.owed is not None:
            tracker.take_back(latest, progress.owed)
        return state, progress
    state = setup.state
    if scored is not None:
        mean, std = scored(state.params)
        tracker.status(f"reward before normalising: mean {mean:.3f}, std {std:.3f}")
        state = dataclasses.replace(state, params=_normalized(setup, state.params, mean, std))
    written = _write(experiment, setup, state, tracker)
    if experiment.checks:
        selfchecks.require(_checks(experiment, setup, written, tracker), tracker.status, experiment.waive)
    _evaluate(experiment, setup, state, Progress(), tracker, 0)
    _measure(experiment, setup, state, written, tracker, 0, "before")
    return state, Progress()


def _parts(
    experiment: Run, setup: Setup, batches: Iterator[tuple[int, Any]], scored: Scored | None, tracker: tracking.Tracker
) -> loop.Parts[TrainState]:
    """What the loop calls."""
    everywhere = experiment.batch / len(hosts.share(experiment.batch, setup.mesh).here)  # over the rows read here
    moments: dict[int, tuple[float, float]] = {}  # of the scores, at the step that was last asked for

    def advance(state: TrainState, progress: Progress, at: int) -> loop.Made[TrainState]:
        _, batch = next(batches)
        tokens = np.count_nonzero(setup.task.tokens(batch).segments) * everywhere
        state, metrics = setup.update(state, setup.place(batch, state.params))
        return loop.Made(state, progress, metrics, tokens)

    def evaluate(state: TrainState, progress: Progress, at: int) -> tuple[Progress, dict[str, float] | None]:
        return _evaluate(experiment, setup, state, progress, tracker, at)

    def extra(state: TrainState) -> dict[str, Any]:
        if scored is None:
            return {}
        if int(state.step) not in moments:
            moments.clear()
            moments[int(state.step)] = scored(state.params)
        return {artefacts.SCORES: moments[int(state.step)]}

    def finish(state: TrainState, at: int) -> None:
        if scored is not None:
            mean, std = extra(state)[artefacts.SCORES]
            tracker.status(f"reward before normalising: mean {mean:.3f}, std {std:.3f}")
            state = dataclasses.replace(state, params=_normalized(setup, state.params, mean, std))
        _measure(experiment, setup, state, _write(experiment, setup, state, tracker), tracker, at, "after")

    return loop.Parts(
        advance=advance,
        evaluate=evaluate,
        finish=finish,
        train=lambda state: state,
        saved=lambda state: state,
        extra=extra,
        made=lambda state: int(state.step),
        schedule=setup.schedule,
    )


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


def _scorer(experiment: Run, setup: Setup, tracker: tracking.Tracker) -> Scored | None:
    """params -> (mean, std) of their scores on texts of the policy as it began, the same every time."""
    if not isinstance(experiment, RewardModel) or not experiment.normalize:
        return None
    written: list[Any] = []
    score = jax.jit(models.reward_model(setup.policy.model).scores)

    def scored(params: Params) -> tuple[float, float]:
        text = f"normalising the reward on {experiment.normalize} samples of the policy"
        with tracker.phase(None if written else text):
            if not written:
                made = policy.complete(
                    setup.policy,
                    setup.task.prompts,
                    jax.random.key(experiment.seed),
                    max_new_tokens=experiment.max_completion,
                    batch=min(32, experiment.normalize),
                    max_prompt=experiment.max_prompt,
                )
                written.extend(rollout.tokens for rollout in made.rollouts)
            scores = np.concatenate([hosts.whole(score(params, tokens)) for tokens in written])
        return float(scores.mean()), float(scores.std())

    return scored


def _normalized(setup: Setup, params: Params, mean: float, std: float) -> Params:
    """A reward model with its head rescaled to mean 0 and std 1 (Ziegler et al. 2019, section 2.1): at the beginning of
    training, and for everybody who opens a checkpoint of it; the head that is trained stays as it is.
    """
    head = models.normalize_head(params["head"], mean=mean, std=std)
    return jax.device_put({**params, "head": head}, setup.shardings.params)


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
