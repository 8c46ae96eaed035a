"""What a run would compile, traced: that settings, data and rewards fit together is seen without a compiler."""

import pathlib
import types

import jax
import pytest

from rljax import offline, online_setup, program, settings, tracking, train

UNCOMPILED = types.SimpleNamespace(memory_analysis=lambda: None)
LOWERED = types.SimpleNamespace(compile=lambda: UNCOMPILED)


def traced(experiment, folder: pathlib.Path):
    """Set up as `run` does, in this folder, with each function of the run traced instead of compiled."""
    online = isinstance(experiment, settings.Sampled)
    program.check_settings(experiment)
    (settings if online else offline).check(experiment)
    mesh = program.make_mesh(experiment)
    with (
        jax.set_mesh(mesh),
        tracking.Tracker(folder, total_steps=experiment.steps, tensorboard=False) as tracker,
        pytest.MonkeyPatch.context() as patch,
    ):
        if online:
            patch.setattr(online_setup, "_compile", _trace)
            return online_setup.set_up(experiment, mesh, folder, tracker, types.SimpleNamespace(requested=None))
        patch.setattr(train, "make_update", _updating(train.make_update))
        patch.setattr(train, "make_evaluate", lambda _: types.SimpleNamespace(lower=lambda *_: LOWERED))
        return offline.set_up(experiment, mesh, folder, tracker)


def _trace(run, parts, method, shardings, example, asked, tracker):
    names = [one.name for one in asked] if run.environment is None else ["environment"]
    whole = online_setup.is_whole(run, asked)
    for part in online_setup.jitted(run, parts, method, shardings, example, names, whole=whole).values():
        part.function.trace(*part.args)
    return dict.fromkeys((*online_setup.PHASES, "queue")) | {"learn": UNCOMPILED}


def _updating(make):
    """The update itself, which knows how to be traced only."""

    def made(*args, **options):
        def lower(*operands):
            make(*args, **options).trace(*operands)
            return LOWERED

        return types.SimpleNamespace(lower=lower)

    return made
