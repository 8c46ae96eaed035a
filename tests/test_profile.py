"""What a start need not do twice, and where its time goes: the cache of programs, the trace of a few steps."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import pytest

from rljax import resuming, traces, tracking
from tests import compiler
from tests.distributed import cases
from tests.test_tracking import open_tracker

ROOT = pathlib.Path(__file__).parent.parent
FILE = """
from rljax import presets, rewards, train

@rewards.on_device
def short(tokens):
    return -tokens.mask.sum(1) / 6

experiment = presets.grpo(
    model={model!r}, data={data!r}, reward=short, group=2, steps=5, batch=4, max_prompt=32, max_completion=6,
    eval_rows=2, learning_rate=1e-3, schedule=train.constant, eval_every=5, save_every=5, samples=1, evidence=1,
    checks=False, out={out!r},
)
"""


TWICE = """
import json, sys
import jax
from rljax import cli

for call in json.loads(sys.argv[1]):
    assert cli.main(call) == 0
    jax.clear_caches()  # as in a new process
    for stream in (sys.stdout, sys.stderr):
        print("=====", file=stream, flush=True)
"""


@pytest.fixture(scope="module")
def starts(small, tmp_path_factory):
    """Two runs of one experiment; the second finds files of the first only: {name: what it said}, and their folder."""
    folder = tmp_path_factory.mktemp("starts")
    file = folder / "experiment.py"
    file.write_text(FILE.format(model=str(small), data=cases.prompts(folder), out=str(folder)))
    shared = {**os.environ, "RLJAX_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    shared["JAX_ENABLE_COMPILATION_CACHE"] = "true"
    shared["JAX_DEBUG_LOG_MODULES"] = "jax._src.compiler"
    shared["XLA_FLAGS"] = compiler.QUICK  # one device
    calls = [["run", str(file), "--name", "first"], ["run", str(file), "--name", "second", "--profile", "2"]]
    command = [sys.executable, "-c", TWICE, json.dumps(calls)]
    done = subprocess.run(command, env=shared, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = [stream.split("=====\n") for stream in (done.stdout, done.stderr)]
    said = {name: out + err for name, out, err in zip(("first", "second"), *parts, strict=False)}
    return said, folder


@pytest.mark.long
def test_the_second_start_compiles_nothing_again(starts):
    said, folder = starts
    kept = {path.name.split("-")[0] for path in (folder / "cache" / "programs").iterdir()}
    kept = {name for name in kept if "whole" in name or "generate" in name}  # other names are of several programs
    assert len(kept) == 2
    assert kept <= set(re.findall(r"compilation cache hit for '(\w+)'", said["second"]))
    assert not kept & set(re.findall(r"CACHE MISS for '(\w+)'", said["second"]))
    noise = [line for line in said["second"].splitlines() if "cpu_aot" in line or "feature" in line]
    assert noise == []


@pytest.mark.long
def test_programs_from_the_cache_compute_the_same_bits(starts):
    _, folder = starts
    records = [(folder / name / "metrics.jsonl").read_bytes() for name in ("first", "second")]
    assert records[0] == records[1]
    assert len(tracking.read_rows(folder / "second" / "metrics.jsonl")) == 6


@pytest.mark.long
def test_a_profile_shows_the_steps_under_our_names(starts):
    said, folder = starts
    (trace,) = (folder / "second" / "tensorboard").rglob("*.xplane.pb")
    content = trace.read_bytes()
    for name in ("sample", "annotate", "judge", "learn", "loss", "optimizer"):
        assert re.search(rf"[/(]{name}[/)]".encode(), content), name
    assert content.count(b"step_num") == 1
    assert "tensorboard --logdir" in said["second"]
    assert "tensorboard --logdir" not in said["first"]
    assert list((folder / "first").rglob("*.xplane.pb")) == []


@pytest.mark.long
def test_a_profile_changes_no_experiment(starts):
    """A run may be resumed with a profile that it did not have."""
    _, folder = starts
    one, other = (json.loads((folder / name / "experiment.json").read_text()) for name in ("first", "second"))
    assert {key for key in one if one[key] != other[key]} == {"name", "profile"}
    assert "profile" in resuming.FREE


def test_the_first_steps_are_not_traced_and_a_short_run_is(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda *_, **__: calls.append("start"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: calls.append("stop"))
    for steps, expected in ((9, ["start", "stop"]), (4, ["start", "stop"]), (1, [])):
        calls.clear()
        with open_tracker(tmp_path / str(steps), profile=3) as tracker:
            for step in range(1, steps + 1):
                tracker.log(step, {"loss": jnp.float32(step)})
                tracker.log(step, {"loss": jnp.float32(step)}, prefix="eval/")
                assert calls == ["start", "stop"][: (step >= traces.SETTLED) + (step >= traces.SETTLED + 3)]
        assert calls == expected
