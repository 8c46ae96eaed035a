"""A fault at each step of the loop, offline and online: what is left, and that a next start needs no more than that."""

import dataclasses
import errno
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from rljax import (
    artefacts,
    data,
    evaluation,
    judges,
    losses,
    offline,
    online,
    policy,
    program,
    report,
    sharding,
    tracking,
    train,
)
from rljax.errors import UserError
from rljax.finite import NotFiniteError
from tests.test_programs import state_bits

pytestmark = pytest.mark.slow

RECORDS = ("metrics.jsonl", "samples.jsonl")
LONG = functools.partial(pytest.param, marks=pytest.mark.long)
# What the loop does for both kinds alike is looked at in one.
ONE_LOOP = pytest.mark.parametrize("kind", ["offline", LONG("online")], indirect=True)
ROWS = [
    {"prompt": f"The {a}", "chosen": f" was {a}.", "rejected": " is sad."} for a in ("cat", "dog", "hat", "car")
] * 5


class Gone(BaseException):
    """One's own, beside Exception."""


class Fault:
    """What happens once, at a certain step."""

    at: int | None = None
    error: BaseException | None = None

    @classmethod
    def strike(cls, at):
        if cls.error is not None and at == cls.at:
            error, cls.error = cls.error, None
            raise error


def measured(now, reference, key):
    """The experiment's own `evaluate`."""
    del now, reference, key
    Measured.calls += 1
    if Measured.calls == Measured.at:
        raise Measured.error
    return offline.Evaluation({"own": 1.5}, [{"prompt": "p", "completion": "c"}])


class Measured:
    at, calls, error = None, 0, KeyError("gone")


def vowels(prompts, completions):
    """The reward."""
    return [sum(letter in "aeiou" for letter in text) / 10 - 0.7 for text in completions]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return str(data.write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", ROWS))


@pytest.fixture(scope="module")
def common(small, rows):
    return {
        "model": str(small),
        "data": rows,
        "steps": 4,
        "batch": 4,
        "max_prompt": 8,
        "max_completion": 8,
        "learning_rate": 1e-3,
        "eval_every": 2,
        "eval_rows": 4,
        "save_every": 2,
        "keep": 1,
        "samples": 1,
        "sample_tokens": 2,
        "evaluate": measured,
        "checks": False,
        "remat": "none",
        "mesh": functools.partial(sharding.make_mesh, fsdp=1),
        "schedule": train.constant,
        "name": "run",
    }


@pytest.fixture(params=["offline", "online"], scope="module")
def kind(request, common, tmp_path_factory):
    """(its program, its experiment, its folder of a run in which nothing happened); compiled once."""
    out = tmp_path_factory.mktemp(request.param)
    if request.param == "offline":
        made = offline.Preference(loss=functools.partial(losses.dpo_loss, beta=0.1), **common, out=str(out))
    else:
        made = online.PPO(reward=vowels, critic="shared", epochs=1, minibatches=2, evidence=0, **common, out=str(out))
    yield from _kind(offline if request.param == "offline" else online, made)


def _kind(module, made):
    whole, real, kept = dataclasses.replace(made, name="whole"), module.set_up, {}

    def set_up(experiment, mesh, folder, tracker, *stop):
        """The run's own, but compiled once for all runs that differ in nothing else."""
        if experiment.on_nan not in kept:
            kept[experiment.on_nan] = real(experiment, mesh, folder, tracker, *stop)
        setup = kept[experiment.on_nan]
        if module is offline:
            setup = setup._replace(state=jax.tree.map(jnp.copy, setup.state))
            return setup._replace(task=setup.task._replace(batch=_batches(setup.task.batch)), place=_placed(setup))
        again = judges.make(setup.sampler.judges.host, **_judging(setup, stop[0], tracker))
        setup = setup._replace(learner=jax.tree.map(jnp.copy, setup.learner), learn=_learned(setup))
        return setup._replace(sampler=setup.sampler._replace(judges=again))

    module.set_up = set_up
    assert module.run(whole) == 0
    yield module, made, whole
    module.set_up = real


def _batches(batch):
    """Strikes at the batch of step `Fault.at`, counted from 1."""

    def made(step):
        Fault.strike(step + 1)
        return batch(step)

    return made


def _placed(setup):
    """A batch whose reference makes the loss of steps in `Poison.at` NaN."""

    def place(batch, params):
        placed = setup.place(batch, params)
        Poison.step += Poison.counts
        bad = Poison.counts and Poison.step in Poison.at
        return dataclasses.replace(placed, ref_chosen_logps=placed.ref_chosen_logps * np.nan) if bad else placed

    return place


def _learned(setup):
    def learn(learner, rollout, notes, verdict, text, key):
        at = int(learner.iterations) + 1
        Fault.strike(at)
        if at in Poison.at:
            rollout = dataclasses.replace(rollout, logps=rollout.logps * jnp.float32(np.nan))
        return setup.learn(learner, rollout, notes, verdict, text, key)

    return learn


class Poison:
    at, step, counts = (), 0, False


def _judging(setup, stop, tracker):
    old = setup.sampler.judges
    return {"tokenizer": old.tokenizer, "mesh": old.mesh, "timeout": None, "stop": stop, "say": tracker.status}


@pytest.fixture(autouse=True)
def peace(monkeypatch):
    yield
    Fault.at, Fault.error = None, None
    Measured.at, Measured.calls = None, 0
    Poison.at, Poison.step, Poison.counts = (), 0, False


def poison(monkeypatch, module, *steps):
    """The updates of these steps meet NaN. (Offline, batches of evaluations are placed too, and not counted.)"""
    Poison.at = steps
    real = offline._parts

    def parts(*args):
        made = real(*args)

        def advance(state, progress, at):
            Poison.step, Poison.counts = at, True
            try:
                return made.advance(state, progress, at)
            finally:
                Poison.counts = False

        return made._replace(advance=advance)

    if module is offline:
        monkeypatch.setattr(offline, "_parts", parts)


def start(kind, out, **changes):
    module, made, _ = kind
    changes = {"out": str(out), "accept_changes": "evaluate"} | changes  # its counters are a part of it
    return module.run(dataclasses.replace(made, **changes))


def saved(out):
    return sorted(int(path.name) for path in (out / "run" / "checkpoints").iterdir() if path.name.isdecimal())


def same(kind, out):
    """Every leaf of the last checkpoint, and every record, to the bit: as if nothing had happened."""
    whole = program.run_folder(kind[2], None)
    for name in RECORDS:
        assert (out / "run" / name).read_bytes() == (whole / name).read_bytes(), name
    assert state_bits(out / "run") == state_bits(whole)


def metrics(out):
    return tracking.read_rows(out / "run" / "metrics.jsonl")


# --- not finite -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [3, LONG(4)])
def test_a_loss_that_is_not_finite_ends_the_run_and_the_last_good_checkpoint_stays(kind, tmp_path, monkeypatch, step):
    poison(monkeypatch, kind[0], step)
    with pytest.raises(NotFiniteError, match=f"^step {step}: the loss and the gradient of .* are not finite") as error:
        start(kind, tmp_path)
    assert "the checkpoint of step 2 is the last good one" in str(error.value)
    assert "--on-nan skip" in str(error.value)
    assert saved(tmp_path) == [2]
    assert metrics(tmp_path)[step]["loss"] is None
    monkeypatch.undo()
    Poison.at = ()
    assert start(kind, tmp_path) == 0
    same(kind, tmp_path)


@ONE_LOOP
def test_such_updates_are_left_out_counted_and_said(kind, tmp_path, monkeypatch):
    poison(monkeypatch, kind[0], 1, 3)
    assert start(kind, tmp_path, on_nan="skip") == 0
    each = 1 if kind[0] is offline else 2  # minibatches
    assert [row.get("updates/skipped") for row in metrics(tmp_path)] == [None, each, 0.0, each, 0.0]
    leaves = {name: leaf["checksum"] for name, leaf in state_bits(tmp_path / "run").items() if name != "step"}
    assert leaves
    assert "left out** at 2 steps (1, 3)" in (tmp_path / "run" / "report.md").read_text()
    _, params, step = artefacts.load_run(tmp_path / "run")
    assert step == 4
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@ONE_LOOP
def test_a_run_whose_updates_are_all_left_out_ends(kind, tmp_path, monkeypatch):
    poison(monkeypatch, kind[0], 1, 2, 3, 4)
    with pytest.raises(NotFiniteError, match="the last 4 steps were left out"):
        start(kind, tmp_path, on_nan="skip")
    assert saved(tmp_path) == [4]


# --- what raises ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("the template refuses"), LONG(SystemExit(3)), Gone()], ids=str)
def test_what_a_step_raises_costs_nothing_that_was_learned(kind, tmp_path, error):
    """Offline the batch (its row, its template), online the update."""
    Fault.at, Fault.error = 4, error
    expected = type(error) if isinstance(error, Exception) else UserError
    with pytest.raises(expected, match="refuses" if isinstance(error, Exception) else type(error).__name__):
        start(kind, tmp_path)
    assert saved(tmp_path) == [3]
    assert start(kind, tmp_path) == 0
    same(kind, tmp_path)


@pytest.mark.parametrize("when", ["middle", LONG("end")])
def test_held_out_rows_that_cannot_be_measured_are_owed(kind, tmp_path, monkeypatch, when):
    calls, number = [], {"middle": 2, "end": 3}[when]  # the first is before training
    where, name = (offline, "_evaluate") if kind[0] is offline else (evaluation, "write")
    real = getattr(where, name)

    def evaluate(*args):
        calls.append(args)
        if len(calls) == number:
            raise RuntimeError("no room")
        return real(*args)

    monkeypatch.setattr(where, name, evaluate)
    with pytest.raises(RuntimeError, match="no room"):
        start(kind, tmp_path)
    assert saved(tmp_path) == [2 if when == "middle" else 4]
    monkeypatch.undo()
    assert start(kind, tmp_path) == 0
    same(kind, tmp_path)


@pytest.mark.parametrize("error", [LONG(KeyError("gone")), SystemExit(0), LONG(KeyboardInterrupt())], ids=repr)
def test_an_evaluation_of_ones_own_that_fails_costs_itself_alone(kind, tmp_path, capsys, error):
    Measured.at, Measured.error = 2, error  # after training
    assert start(kind, tmp_path) == 1
    assert "The evaluation after training failed" in " ".join(capsys.readouterr().out.split())
    assert saved(tmp_path) == [4]
    assert metrics(tmp_path)[4]["loss"] is not None
    assert "The evaluation after training failed" in (tmp_path / "run" / "report.md").read_text()
    assert start(kind, tmp_path) == 0
    same(kind, tmp_path)
    assert "failed" not in (tmp_path / "run" / "report.md").read_text()


def test_samples_that_fail_at_the_end_cost_themselves(kind, tmp_path, monkeypatch):
    if kind[0] is online:
        pytest.skip("online, held-out completions are what is measured")
    real, calls = policy.complete, []

    def complete(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("no room")
        return real(*args, **options)

    monkeypatch.setattr(policy, "complete", complete)
    assert start(kind, tmp_path) == 1
    assert saved(tmp_path) == [4]
    monkeypatch.undo()
    assert start(kind, tmp_path) == 0
    same(kind, tmp_path)


# --- what cannot be written -------------------------------------------------------------------------------------------


@ONE_LOOP
def test_a_full_disk_leaves_the_checkpoint_before(kind, tmp_path, monkeypatch):
    real = ocp.CheckpointManager.save

    def save(self, step, *args, **options):
        if step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, step, *args, **options)

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)
    with pytest.raises(UserError, match=r"No space left.*Finished, and untouched: 2"):
        start(kind, tmp_path)
    assert saved(tmp_path) == [2]
    monkeypatch.undo()
    assert start(kind, tmp_path) == 0
    same(kind, tmp_path)


@ONE_LOOP
def test_a_record_that_cannot_be_written_leaves_the_checkpoint_before(kind, tmp_path, monkeypatch):
    real = tracking.Tracker._append

    def append(self, name, record):
        if (name, record["step"]) == ("metrics.jsonl", 3):
            self._files[name].write(json.dumps(record)[:20])  # half of it
            self._lost = OSError(errno.ENOSPC, "No space left on device")
            raise self._lost
        real(self, name, record)

    monkeypatch.setattr(tracking.Tracker, "_append", append)
    with pytest.raises(OSError, match="No space left"):
        start(kind, tmp_path)
    assert saved(tmp_path) == [2]
    monkeypatch.undo()
    assert start(kind, tmp_path) == 0
    same(kind, tmp_path)


@ONE_LOOP
@pytest.mark.parametrize("how", [LONG("deleted"), "renamed", LONG("replaced")])
def test_a_folder_that_goes_away_is_noticed(kind, tmp_path, monkeypatch, how):
    real = tracking.Tracker.log
    away = tmp_path / "away"

    def log(self, step, *args, **options):
        if step == 3:
            shutil.rmtree(self.folder) if how == "deleted" else self.folder.rename(away)
            if how == "replaced":
                shutil.copytree(away, self.folder)
        real(self, step, *args, **options)

    monkeypatch.setattr(tracking.Tracker, "log", log)
    with pytest.raises(UserError, match="run was deleted, renamed or replaced while the run wrote to it"):
        start(kind, tmp_path)
    assert (tmp_path / "run").exists() == (how == "replaced")
    monkeypatch.undo()
    if how == "renamed":
        away.rename(tmp_path / "run")
        assert start(kind, tmp_path) == 0
        same(kind, tmp_path)


def test_the_report_shows_what_is_not_finite(tmp_path):
    with tracking.Tracker(tmp_path, total_steps=2, tensorboard=False) as tracker:
        tracker.log(1, {"loss": np.nan})
        tracker.note(1, "an evaluation *failed*")
    text = report.write_report(tmp_path).read_text()
    assert "an evaluation &#42;failed&#42;" in text
    assert "was not finite** at 1 of 1 records" in text
