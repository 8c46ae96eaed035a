"""Online runs in real processes, killed at any moment: what is resumed ends in the same bits as what never stopped."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from rljax import cli, data, tracking
from tests import compiler
from tests.test_programs import ROOT, WORDS, state_bits

pytestmark = pytest.mark.long  # tests/test_online.py has such runs in its own process

FILE = """
import functools, os, pathlib, signal, time
from rljax import losses, online, presets, sharding, train

FOLDER = pathlib.Path(__file__).parent
CALLS = 0

def vowels(prompts, completions):
    \"\"\"Kills its own process at the call that a file names, once; or asks it to end, and then takes its time.\"\"\"
    global CALLS
    CALLS += 1
    plan = FOLDER / f"{{os.environ.get('RLJAX_TEST_PLAN', 'none')}}.plan"
    if plan.exists():
        call, what, *saved = plan.read_text().split()
        if CALLS == int(call):
            plan.unlink()
            where = FOLDER / os.environ["RLJAX_TEST_PLAN"] / "checkpoints"
            while saved and not (where / saved[0]).exists():
                time.sleep(0.05)  # a checkpoint is written in the background
            os.kill(os.getpid(), getattr(signal, what))
            time.sleep(60)
    return [sum(letter in "aeiou" for letter in text) / 10 - 0.7 for text in completions]

common = dict(
    model={model!r}, data={data!r}, reward=vowels, steps=9, batch=4, max_prompt=32, max_completion=6,
    learning_rate=1e-3, eval_every=4, save_every=3, eval_rows=4, samples=1, evidence=1, remat="none",
    schedule=train.constant, mesh=functools.partial(sharding.make_mesh, fsdp=1), out={out!r},
)
KINDS = {{
    "ppo": lambda: online.PPO(
        **common, epochs=2, minibatches=2, normalize_running=True, kl_target=2.0, kl_horizon=50, ema=0.9
    ),
    "dapo": lambda: presets.dapo(
        **common | dict(group=3, max_age=2, overlong_buffer=4, minibatches=2, learning_rate=1e-5)
    ),
    "lag": lambda: presets.rloo(**common | dict(group=2), lag=1, old_logps="trainer", importance_cap=2.0),
}}
experiment = KINDS[os.environ["RLJAX_TEST_KIND"]]()
if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
"""


@pytest.fixture(scope="module")
def file(small, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("runs")
    rows = [{"prompt": f"Once there was a {a}. The {b}"} for a in WORDS for b in WORDS[:4]]
    path = folder / "experiment.py"
    texts = str(data.write_jsonl(folder / "prompts.jsonl", rows))
    path.write_text(FILE.format(model=str(small), data=texts, out=str(folder)))
    return path


def start(file: pathlib.Path, kind: str, name: str) -> subprocess.Popen:
    """A process of its own, as a user's; compiled functions are kept, so that the next one begins sooner."""
    environment = os.environ | {
        "RLJAX_TEST_KIND": kind,
        "RLJAX_TEST_PLAN": name,
        "XLA_FLAGS": compiler.QUICK,
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(file.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, str(file), "--name", name]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen, expected: int) -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == expected, output
    return output


def plan(file: pathlib.Path, name: str, call: int, what: str, saved: int | str = "") -> None:
    """At this call of its reward the run gets a signal; `saved`: once the checkpoint of that step is finished."""
    (file.parent / f"{name}.plan").write_text(f"{call} {what} {saved}")


def same(file: pathlib.Path, one: str, other: str) -> None:
    a, b = file.parent / one, file.parent / other
    assert state_bits(a) == state_bits(b)
    for name in ("metrics.jsonl", "samples.jsonl", "evidence.jsonl"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_ppo_killed_between_rollout_and_update_and_at_a_random_moment(file):
    """Critic, optimizer, adaptive KL, running moments and average: SIGKILL while the reward of an iteration judges
    (its rollout is there, its update is not), SIGTERM while a slow reward is waited for, SIGKILL at any moment.
    """
    whole = start(file, "ppo", "whole")
    plan(file, "killed", 3, "SIGKILL")  # the second iteration: there is no checkpoint yet
    finish(start(file, "ppo", "killed"), -signal.SIGKILL)
    plan(file, "killed", 6, "SIGKILL")  # from the beginning: before training, 4 iterations, their evaluation
    finish(start(file, "ppo", "killed"), -signal.SIGKILL)
    plan(file, "killed", 4, "SIGTERM")  # from step 3: iterations 4 and 5, an evaluation between them
    output = finish(start(file, "ppo", "killed"), 128 + signal.SIGTERM)
    assert "resumed at step 3" in output
    process = start(file, "ppo", "killed")
    deadline, step = time.monotonic() + 300, random.randrange(6, 8)
    while not any(row["step"] >= step for row in tracking.read_rows(file.parent / "killed" / "metrics.jsonl")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(random.random() * 0.05)
    process.send_signal(signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    assert "resumed at step" in finish(start(file, "ppo", "killed"), 0)
    finish(whole, 0)
    same(file, "killed", "whole")
    assert cli.main(["report", str(file.parent / "killed")]) == 0


@pytest.mark.parametrize(("kind", "calls"), [("dapo", (9, 4)), ("lag", (7, 3))])
def test_what_waits_survives_a_kill(file, kind, calls):
    """Groups that wait for a batch, or rollouts for their iteration, are in the checkpoint."""
    finish(start(file, kind, f"{kind}-whole"), 0)
    for call, saved in zip(calls, (3, ""), strict=True):
        plan(file, f"{kind}-killed", call, "SIGKILL", saved)
        finish(start(file, kind, f"{kind}-killed"), -signal.SIGKILL)
    assert "resumed at step" in finish(start(file, kind, f"{kind}-killed"), 0)
    same(file, f"{kind}-killed", f"{kind}-whole")
