"""A run's directory: the same bytes after a kill, no waiting for the device, locks and signals that are real."""

import errno
import io
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from rljax import errors, manifest, metrics, progress, tracking
from rljax.types import Mean

ROOT = pathlib.Path(__file__).parent.parent


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def plain():
    return Console(file=io.StringIO(), width=120, highlight=False)


def mean(total, weight=1.0):
    return Mean(total=jnp.float32(total), weight=jnp.float32(weight))


def open_tracker(folder, **options):
    return tracking.Tracker(folder, **{"total_steps": 10, "console": plain(), "tensorboard": False, **options})


def test_one_record_per_step_of_means_arrays_and_floats(tmp_path):
    with open_tracker(tmp_path) as tracker:
        tracker.log(0, {"loss": 2.0}, prefix="eval/")
        step_one = {
            "loss": mean(0.3, 3),
            "kl": jnp.float32(jnp.nan),
            "rewards/chosen": mean(0, 0),
            "num_tokens": jnp.int32(7),
        }
        tracker.log(1, step_one)
        tracker.log(1, {"loss": jnp.bfloat16(0.5), "x": float("inf")}, prefix="eval/")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == [
        '{"eval/loss": 2.0, "step": 0}',
        '{"eval/loss": 0.5, "eval/x": null, "kl": null, "loss": 0.1, "num_tokens": 7.0, "step": 1}',
    ]


def test_a_step_is_written_when_the_next_one_comes(tmp_path):
    """Nothing waits for the step that is still being computed: values are taken one step late."""
    with open_tracker(tmp_path) as tracker:
        tracker.log(1, {"loss": mean(1)})
        assert tracking.read_rows(tmp_path / "metrics.jsonl") == []
        tracker.log(2, {"loss": mean(2)})
        assert tracking.read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]
        tracker.flush()
        assert [row["step"] for row in tracking.read_rows(tmp_path / "metrics.jsonl")] == [1, 2]
        with pytest.raises(ValueError, match="Step 2 was logged already"):
            tracker.log(2, {"loss": 0.0})
        tracker.log(3, {"loss": 0.0})
        with pytest.raises(ValueError, match=r"Step 3 has \['loss'\] twice"):
            tracker.log(3, {"loss": 0.0})


def run_steps(folder, *, first, last, resumed, die_at=None):
    tracker = open_tracker(folder, resumed=resumed)
    for step in range(first, last + 1):
        noise = np.float32(math.sin(step))
        tracker.log(step, {"loss": mean(noise, 3), "grad_norm": jnp.float32(noise)}, tokens=5)
        if step % 2 == 0:
            tracker.samples(step, [{"prompt": f"p{step}", "completion": "é\n|", "reward": noise}], show=0)
        if step == die_at:  # as kill -9 leaves it: the step that is pending is lost
            for file in tracker._files.values():
                file.close()
            return
    tracker.close()


@pytest.mark.parametrize("torn", ["", '{"step": 5, "lo', '{"step": 5}', "\x00\x00"])
def test_killed_and_resumed_leaves_the_same_bytes(tmp_path, torn):
    run_steps(tmp_path / "whole", first=1, last=9, resumed=None)
    run_steps(tmp_path / "killed", first=1, last=9, resumed=None, die_at=7)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write(torn)
    run_steps(tmp_path / "killed", first=5, last=9, resumed=4)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert [row["step"] for row in tracking.read_rows(tmp_path / "killed" / "timing.jsonl")] == list(range(1, 10))


def test_a_fresh_start_drops_what_an_unsaved_run_left(tmp_path):
    run_steps(tmp_path, first=0, last=3, resumed=None)
    run_steps(tmp_path, first=0, last=1, resumed=None)
    assert [row["step"] for row in tracking.read_rows(tmp_path / "metrics.jsonl")] == [0, 1]


def test_a_record_that_is_no_record_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nhello\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 is no record.*delete that line"):
        open_tracker(tmp_path, resumed=3)


def test_throughput_leaves_phases_and_the_first_step_out(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "peak_flops", lambda: 1000.0)
    clock = Clock()
    with open_tracker(tmp_path, clock=clock, flops_per_token=16.0) as tracker:
        clock.now += 30  # compilation
        tracker.log(1, {"loss": 1.0}, tokens=100)
        for step in (2, 3):
            clock.now += 2
            tracker.log(step, {"loss": 1.0}, tokens=100)
            with tracker.phase("evaluating"):
                clock.now += 50
    timing = tracking.read_rows(tmp_path / "timing.jsonl")
    assert timing[0] == {"step": 1, "time": 30.0}
    assert timing[1]["seconds"] == pytest.approx(2)
    assert timing[1]["tokens_per_second"] == pytest.approx(50)
    assert timing[1]["mfu"] == pytest.approx(50 * 16 / (1000 * jax.device_count()))


class OnItsWay:
    """A number that the device needs some more seconds for, counted when somebody first waits."""

    def __init__(self, clock, left):
        self.clock, self.left = clock, left

    def block_until_ready(self):
        self.clock.now, self.left = self.clock.now + self.left, 0.0
        return self

    def __array__(self, dtype=None, copy=None):
        self.block_until_ready()
        return np.array(1.0, dtype)


def test_a_phase_does_not_take_the_seconds_of_the_step_before_it(tmp_path):
    clock = Clock()
    with open_tracker(tmp_path, clock=clock) as tracker:
        tracker.log(1, {"loss": 1.0}, tokens=100)
        loss = OnItsWay(clock, 2.0)
        tracker.log(2, {"loss": loss}, tokens=100)  # writes the step before
        with tracker.phase("evaluating"):
            loss.block_until_ready()  # what is evaluated comes after it
            clock.now += 50
    _, last = tracking.read_rows(tmp_path / "timing.jsonl")
    assert last["seconds"] == pytest.approx(2)


def test_a_step_does_not_take_the_seconds_of_its_evaluation(tmp_path):
    clock = Clock()
    with open_tracker(tmp_path, clock=clock) as tracker:
        tracker.log(1, {"loss": 1.0}, tokens=100)
        tracker.log(2, {"loss": OnItsWay(clock, 2.0)}, tokens=100)
        with tracker.phase():
            tracker.log(2, {"loss": OnItsWay(clock, 30.0)}, prefix="eval/")  # begun, and not waited for
    _, last = tracking.read_rows(tmp_path / "timing.jsonl")
    assert last["seconds"] == pytest.approx(2)


def test_steps_end_when_the_device_is_done_and_not_when_the_host_looks(tmp_path):
    """Online, the host rewards of a step are awaited before it is logged, and the update of the one before runs
    meanwhile: each step has its own seconds, at an evaluation and at the end too.
    """
    clock, done = Clock(), []

    watch = progress.Stopwatch(clock)
    for step in range(1, 5):
        clock.now += 3  # sampling and judging
        arrays = OnItsWay(clock, 1.0)  # then the update
        watch.expect([arrays])
        if step % 2 == 0:
            arrays.block_until_ready()
            watch.arrive()
            with watch.pause():
                clock.now += 50
                with watch.pause():
                    clock.now += 5
        else:
            clock.now += 1
            watch.arrive()
        done.append(watch.lap()[1])
    assert done == [None, pytest.approx(4), pytest.approx(4), pytest.approx(4)]


def test_plain_progress_lines_come_every_ten_seconds(tmp_path):
    clock, console = Clock(), plain()
    with open_tracker(tmp_path, total_steps=100, clock=clock, console=console, shown="rewards/margins") as tracker:
        with tracker.phase("compiling the update"):
            clock.now += 12.34
        tracker.status("a note with [brackets]")
        for step in range(1, 101):
            clock.now += 1
            tracker.log(step, {"loss": 0.6931, "rewards/margins": mean(0.25), "kl": 9.0}, tokens=1234)
    lines = console.file.getvalue().splitlines()
    assert lines[:3] == ["compiling the update …", "compiling the update: 12.3 s", "a note with [brackets]"]
    assert len(lines) == 3 + 1 + 10
    assert lines[4] == "step  11/100  eta 1:29  loss 0.6931  rewards/margins 0.25  1.23k tokens/s"
    assert lines[-1].startswith("step 100/100  loss 0.6931")


def test_a_terminal_gets_a_bar(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with open_tracker(tmp_path, console=console) as tracker:
        for step in range(1, 11):
            tracker.log(step, {"loss": 0.5})
        tracker.flush()
    assert "step 10/10  " in console.file.getvalue()
    assert "━" in console.file.getvalue()


def test_samples_are_written_and_shown(tmp_path):
    console = plain()
    rows = [
        {"prompt": "[red]why?[/red]", "completion": "x" * 900, "reward": 0.12345678},
        {"prompt": "b", "completion": "c"},
    ]
    with open_tracker(tmp_path, console=console) as tracker:
        tracker.samples(3, [*rows, {"prompt": "not shown", "completion": "", "reward": np.float32("nan")}], show=2)
    text = console.file.getvalue()
    assert "[red]why?[/red]" in text
    assert "0.1235" in text
    assert "not shown" not in text
    assert "…" in text
    written = tracking.read_rows(tmp_path / "samples.jsonl")
    assert written[0] == {"step": 3, **rows[0]}
    assert written[2]["reward"] == "nan"


def test_tensorboard_gets_the_scalars_and_purges_on_resume(tmp_path):
    for resumed in (None, 1):
        with open_tracker(tmp_path, tensorboard=True, resumed=resumed) as tracker:
            for step in (1, 2) if resumed is None else (2, 3):
                tracker.log(step, {"rewards/margins": 0.5, "bad": float("nan")})
    data = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"rewards/margins" in data
    assert b"bad" not in data


def test_wandb_missing_is_said_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install \"wandb"):
        open_tracker(tmp_path, wandb="project")
    calls = []
    (tmp_path / "wandb.py").write_text(
        "calls = []\n"
        "class R:\n"
        "    def log(self, values, step): calls.append((step, values))\n"
        "    def finish(self): calls.append('finish')\n"
        "def init(**options):\n"
        "    calls.append(options)\n"
        "    return R()\n"
    )
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.syspath_prepend(tmp_path)
    for resumed in (None, 1):
        with open_tracker(tmp_path / "run", wandb="project", resumed=resumed, config={"a": 1}) as tracker:
            tracker.log(1 + (resumed or 0), {"loss": 0.5, "bad": float("nan")})
    calls = sys.modules["wandb"].calls
    monkeypatch.delitem(sys.modules, "wandb")
    assert calls[1] == (1, {"loss": 0.5})
    assert calls[0] == calls[3]
    assert calls[0]["resume"] == "allow"
    assert calls[0]["config"] == {"a": 1}


def test_an_error_in_the_loop_is_not_hidden_and_loses_no_record(tmp_path):
    def run():
        with open_tracker(tmp_path) as tracker:
            tracker.log(1, {"loss": 0.5})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run()
    assert tracking.read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]


def test_manifest(tmp_path):
    experiment = {"loss": {"function": mean, "beta": 0.1}, "out": tmp_path, "clip": math.inf, "wandb": False}
    tracking.write_manifest(tmp_path, experiment=experiment, seed=3)
    tracking.write_manifest(tmp_path, experiment={**experiment, "wandb": True}, seed=3, may_change=("wandb",))
    written = json.loads((tmp_path / "manifest.json").read_text())
    assert written["seed"] == 3
    assert len(written["sessions"]) == 2
    session = written["sessions"][-1]
    assert session["versions"]["jax"] == jax.__version__
    assert sum(session["devices"].values()) == jax.device_count()
    assert json.loads((tmp_path / "experiment.json").read_text())["clip"] == "inf"
    with pytest.raises(ValueError, match=r"loss\.beta was 0\.1 and is 0\.2.*another name"):
        tracking.write_manifest(tmp_path, experiment={**experiment, "loss": {"function": mean, "beta": 0.2}}, seed=3)
    (tmp_path / "experiment.json").write_text("{")
    with pytest.raises(ValueError, match=r"experiment\.json is damaged"):
        tracking.write_manifest(tmp_path, experiment=experiment, seed=3)


def test_git_state_is_recorded(tmp_path, monkeypatch):
    assert manifest._git(tmp_path) is None
    identity = ["-c", "user.name=n", "-c", "user.email=e@x"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "m"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    assert manifest._git(tmp_path)["dirty"] is False
    (tmp_path / "new").write_text("")
    monkeypatch.chdir(tmp_path)
    state = manifest.environment()["git"]
    assert state["dirty"] is True
    assert len(state["commit"]) == 40


HOLD = """
import fcntl, os, sys, time
file = open(sys.argv[1], "a+"); fcntl.flock(file, fcntl.LOCK_EX); file.write(str(os.getpid())); file.flush()
print("held", flush=True); time.sleep(60)
"""


def test_two_processes_never_share_a_run_and_a_killed_one_frees_it(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / ".lock")], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"in use by process {process.pid}:"), tracking.lock(tmp_path):
            pass
        process.kill()
    refused = pytest.raises(ValueError, match=f"in use by process {os.getpid()}:")
    with tracking.lock(tmp_path), refused, tracking.lock(tmp_path):
        pass
    with tracking.lock(tmp_path):
        pass


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(tracking.fcntl, "flock", flock)
    message = r"cannot be locked \(No locks available\).*its file system has no flock.* --out"
    with pytest.raises(errors.UserError, match=message), tracking.lock(tmp_path):
        pass


@pytest.fixture
def hangups():
    """As in a terminal, also where the tests were started by nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_the_first_signal_asks_and_the_second_insists(number, hangups, capfd):
    before = signal.getsignal(number)
    with tracking.graceful_stop() as stop:
        assert stop.requested is None
        os.kill(os.getpid(), number)
        assert stop.requested == number.name
        assert stop.agreed(3) == number.name
        assert f"{number.name}: saving" in capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGHUP)  # sent twice where a shell ends
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(number) is before


def test_a_hangup_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup starts a program
    try:
        with tracking.graceful_stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_screen_that_nobody_reads_is_lost_and_nothing_else(capfd, monkeypatch):
    """A pipe whose reader has left, a stream that was closed: what is printed goes nowhere, and so it does at exit."""
    ends = os.pipe()
    with open(ends[1], "w", buffering=1) as out:
        os.close(ends[0])
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", None)  # `2>&-`
        with progress.lossy_screen():
            line = progress.Line(3)
            for step in range(3):
                line.update(step, {}, {})
                line.samples([{"prompt": "p", "completion": "c"}])
            print("a reward that prints")
            print("and one that complains", file=sys.stderr)
            assert not sys.stdout.isatty()
        assert sys.stdout is out
        print("after it", flush=True)


def test_signals_are_left_alone_in_other_threads():
    found = []

    def work():
        with tracking.graceful_stop() as stop:
            found.append((signal.getsignal(signal.SIGINT), stop.requested))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(before, None)]


def test_peaks_are_of_the_device_that_is_named():
    known = {
        "TPU v5 lite": 197e12,
        "TPU v5p": 459e12,
        "TPU v5": 459e12,
        "TPU v6 lite": 918e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-40GB": 312e12,
        "NVIDIA L40S": 362e12,
        "NVIDIA L4": 121e12,
        "NVIDIA H200": 989e12,
    }
    assert {kind: progress.peak_flops(kind) for kind in known} == known
    assert progress.peak_flops("NVIDIA L400") is None
    assert progress.peak_flops() is None  # a CPU


def test_every_metric_is_defined_in_one_line():
    for name, definition in metrics.METRICS.items():
        assert definition.text
        assert "\n" not in definition.text
        assert definition.better in ("", "higher", "lower"), name
    assert metrics.define("eval/rewards/margins").text.endswith("held-out data")
    assert metrics.define("mine") is None


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("eval/loss", "min"),
        ("eval/nll_loss", "min"),
        ("eval/perplexity", "min"),
        ("eval/kl", "min"),
        ("eval/my_error_rate", "min"),
        ("eval/accuracy", "max"),
        ("eval/rewards/accuracies", "max"),
        ("eval/rewards/margins", "max"),
        ("eval/reward", "max"),
        ("eval/rewards/vowels/mean", "max"),
        ("eval/win_rate", "max"),
    ],
)
def test_the_name_of_a_metric_says_which_way_it_gets_better(name, way):
    assert metrics.best_mode(name) == way
    assert metrics.best_mode(name, "max") == "max"
    assert metrics.best_mode(name, "min") == "min"


@pytest.mark.parametrize("name", ["eval/length", "eval/rewards/kl/mean", "eval/loss_of_reward"])
def test_a_name_that_does_not_say_it_is_refused(name):
    with pytest.raises(ValueError, match="--best-mode min"):
        metrics.best_mode(name)
    assert metrics.best_mode(name, "min") == "min"
    assert metrics.best_mode(None) == "max"


def test_numbers_are_short():
    assert [progress.quantity(x) for x in (12.0, 1234.0, 1234567.0)] == ["12", "1.23k", "1.23M"]
    assert [progress.duration(x) for x in (0.25, 12.34, 201, 3723)] == ["0.25 s", "12.3 s", "3:21", "1:02:03"]
    assert progress.number(None) == "–"
