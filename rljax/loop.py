"""The loop of every run, in one order: a step, its record, is it finite, save, evaluate, save what is better, leave.

A step that is evaluated and saved is saved first, with its record and the note that its evaluation is owed: whatever an
evaluation does then costs no work, and a run that is killed in it pays it at its next start, to the same bits.
"""

from __future__ import annotations

import functools
import pathlib
import signal
from collections.abc import Callable, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import optax

from rljax import hosts, program, report, tracking
from rljax.checkpoint import Checkpoints
from rljax.errors import UserError
from rljax.finite import NotFiniteError, Watch
from rljax.program import Progress, Run
from rljax.types import Metrics, TrainState

S = TypeVar("S")  # the state of a run
T = TypeVar("T")


def leave(folder: pathlib.Path, stop: tracking.Stop, whole: bool) -> int:
    """The exit status of a run, after its report: 1 where its evaluation failed, 128 + the number of a signal."""
    if stop.requested is not None:
        return 128 + signal.Signals[stop.requested].value
    if jax.process_index() == 0:
        print(f"\nreport: {report.write_report(folder)}\nexport: rljax export {folder} FOLDER")
    return 0 if whole else 1


class Made(NamedTuple, Generic[S]):
    """One step, under way on the devices."""

    state: S
    progress: Progress
    metrics: Metrics
    tokens: Any  # how many were read and written
    check: Callable[[], None] = lambda: None  # raises where nothing was learned; the state is good all the same
    evidence: Callable[[], list[dict[str, Any]]] = list  # what the step did to single tokens


class Parts(NamedTuple, Generic[S]):
    """What a program brings to the loop. `at`: how many steps were made."""

    advance: Callable[[S, Progress, int], Made[S]]  # (state, progress, at): one step more
    evaluate: Callable[[S, Progress, int], tuple[Progress, dict[str, float] | None]]  # (…, what ranks this state)
    finish: Callable[[S, int], None]  # samples, and what the experiment itself wants to know after training
    train: Callable[[S], TrainState]
    saved: Callable[[S], Any]  # the pytree of a checkpoint
    extra: Callable[[S], Mapping[str, Any]]  # what goes with it, beside the progress
    made: Callable[[S], int]  # how many steps were made
    schedule: optax.Schedule


class Loop(Generic[S]):
    """One run at work: its state, where it is, and what is saved of it."""

    def __init__(
        self,
        run: Run,
        parts: Parts[S],
        state: S,
        progress: Progress,
        *,
        checkpoints: Checkpoints,
        tracker: tracking.Tracker,
        stop: tracking.Stop,
    ):
        self.run, self.parts, self.state, self.progress = run, parts, state, progress
        self.checkpoints, self.tracker, self.stop = checkpoints, tracker, stop
        self.at = run.steps if progress.done else parts.made(state)  # steps that were made
        more: dict[str, Any] = {"in_a_row": progress.left_out, "latest": checkpoints.latest}
        self.watch = Watch(run.on_nan, parts.train(state).params, total=run.steps, **more)

    def steps(self) -> bool:
        """Steps until the last, until `patience` runs out, a signal comes or something fails; saved in all cases, but
        for weights that are not finite. Whether nothing failed.
        """
        run, over = self.run, False
        while not over and (self.at < run.steps or self.progress.owed is not None):
            owed = self.progress.owed is not None
            made = None if owed else self._guarded(self.step, lambda: self.progress)
            last = self.at == run.steps
            due = owed or last or self.at % run.eval_every == 0
            leaving = self.stop.agreed(self.at) is not None
            saves = made is not None and (leaving or last or self.at % run.save_every == 0)
            if due or saves:
                self._guarded(self.watch.settle, lambda: self.progress)
            if due and made is not None:
                with self.tracker.phase():
                    self.tracker.evidence(self.at, made.evidence())
            if saves:
                self.save(self.progress._replace(owed=self.tracker.hold()) if due else self.progress)
            over = leaving or (due and self.evaluate(saved=saves or owed))
        return self.progress.owed is None or self.stop.requested is not None

    def step(self) -> Made[S]:
        """One step, with its record; raises for the step before where that was not finite."""
        with jax.profiler.StepTraceAnnotation("step", step_num=self.at + 1):
            made = self.parts.advance(self.state, self.progress, self.at)
        self.state = made.state
        made.check()
        self.at, self.progress = self.at + 1, made.progress
        rate = program.learning_rate(self.parts.schedule, self.parts.train(self.state))
        metrics = self.watch.take(self.at, made.metrics)
        self.tracker.log(self.at, {**metrics, "learning_rate": rate}, tokens=made.tokens)
        self.watch.check()
        return made

    def evaluate(self, *, saved: bool) -> bool:
        """Measure the state, and save it where it is better or the last one. Whether the run is over.

        What a reward raises ends the run; what the end of the experiment itself raises is said.
        """
        run, before = self.run, self.progress._replace(owed=self.tracker.hold())
        measure = functools.partial(self.parts.evaluate, self.state, self.progress, self.at)
        self.progress, measured = self._guarded(measure, lambda: before)
        over = self.at == run.steps or program.patient(run, self.progress)
        self.progress = self.progress._replace(owed=None, done=over)
        if over and not saved:
            self.save(before)
        if over and not self._finished():
            self.progress = before
            self.save(before, measured)
        elif over or saved or (measured is not None and self.progress.waited == 0):
            self.save(self.progress, measured)
        return over

    def save(self, progress: Progress, measured: dict[str, float] | None = None) -> None:
        """The state as it is, if it is finite. While an evaluation is owed the record of the step stays open."""
        if progress.owed is None:
            self.tracker.flush()
        with self.tracker.phase():
            self.watch.settle()
            extra = progress._replace(left_out=self.watch.in_a_row)._asdict() | dict(self.parts.extra(self.state))
            self.checkpoints.save(self.at, self.parts.saved(self.state), extra, measured)

    def _guarded(self, call: Callable[[], T], progress: Callable[[], Progress]) -> T:
        """call(); what was learned is saved before what it raises goes on."""
        try:
            return call()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and self.stop.requested is not None:
                raise  # the second signal
            self._rescue(error, progress())
            if isinstance(error, Exception):
                raise
            raise UserError(f"after step {self.at}: {_said(error)}. Such an exception ends the run, saved") from error

    def _rescue(self, error: BaseException, progress: Progress) -> None:
        agreed = jax.process_count() == 1 or isinstance(error, hosts.AgreedError)  # of several processes all, or none
        if isinstance(error, NotFiniteError) and not error.good:
            return
        if not agreed or any(x.is_deleted() for x in jax.tree.leaves(self.state) if isinstance(x, jax.Array)):
            return
        try:
            self.save(progress)
        except NotFiniteError:
            raise
        except Exception as other:
            self.tracker.status(f"what was learned up to step {self.at} could not be saved: {other}")

    def _finished(self) -> bool:
        """Whether the end of the experiment worked; where it did not, nothing else is lost."""
        try:
            self.parts.finish(self.state, self.at)
        except BaseException as error:
            alone = jax.process_count() > 1 and not isinstance(error, hosts.AgreedError)
            if alone or (isinstance(error, KeyboardInterrupt) and self.stop.requested is not None):
                raise
            self.tracker.note(
                self.at,
                f"The evaluation after training failed ({_said(error)}). The weights of step {self.at} are saved, and "
                "nothing else is missing. Once this is mended, the same command makes the evaluation and nothing else.",
            )
            return False
        return True


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")
