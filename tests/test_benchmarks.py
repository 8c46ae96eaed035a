"""The benchmarks run: one JSON line per figure, at a shape of no interest."""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
def test_offline_prints_one_figure_per_update():
    command = [sys.executable, FOLDER / "offline.py", "--shape", "toy", "--pairs", "1", "--rounds", "2"]
    env = os.environ | {"PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=True)
    figures = [json.loads(line) for line in done.stdout.splitlines()]
    assert [figure["update"] for figure in figures] == ["dpo", "dpo+ref", "sft", "rm"]
    for figure in figures:
        assert figure["rounds"] == 2
        assert figure["seconds"] >= figure["seconds_best"] > 0
        assert 0 < figure["flops_fraction"] < 1.5
        assert figure["peak_rss_bytes"] > figure["compiled_bytes"] > 0
        assert figure["tokens_per_second"] == pytest.approx(2 * 128 / figure["seconds"], rel=1e-2)


def test_flops_of_a_step_count_only_what_is_needed(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import offline

    shape = offline.SHAPES["tiny"]
    layers, head = 6 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 768), 256 * 1024
    assert offline.flops_of_step(shape, "rm", 1) == 3 * 2 * 2 * 128 * layers
    pair = 2 * ((64 + 2 * 64) * layers + 2 * 64 * head)  # forward, the prompt once
    assert offline.flops_of_step(shape, "dpo", 1) == 3 * pair
    assert offline.flops_of_step(shape, "dpo+ref", 5) == 5 * 4 * pair
    assert offline.flops_of_step(shape, "sft", 1) == 3 * 2 * 2 * (128 * layers + 127 * head)


@pytest.mark.slow
def test_online_prints_one_figure_each():
    command = [sys.executable, FOLDER / "online.py", "--shape", "toy", "--rounds", "2", "--warm-up", "1"]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=True)
    figures = [json.loads(line) for line in done.stdout.splitlines()]
    assert [figure["figure"] for figure in figures] == ["generate", "ppo-update", "ppo-iteration", "grpo-iteration"]
    for figure in figures:
        assert figure["rounds"] == 2
        assert figure["seconds"] >= figure["seconds_best"] > 0
        assert 0 < figure["roofline_fraction"] < 1.5
        assert figure["peak_rss_bytes"] > figure["compiled_bytes"] > 0
    update, ppo, grpo = (figure["alias_bytes"] for figure in figures[1:])
    assert update == ppo > 1.9 * grpo  # the whole state is updated in place: policy and critic, or the policy alone
    layers, head = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32), 64 * 16
    assert grpo > 3 * 4 * (layers + head)  # weights and two moments


@pytest.mark.slow
def test_online_measures_rewards_on_the_host():
    command = [sys.executable, FOLDER / "online.py", "--shape", "toy", "--figure", "grpo-iteration", "--reward", "host"]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(FOLDER.parent)}
    short = ["--rounds", "1", "--warm-up", "1"]
    done = subprocess.run([*command, *short], env=env, capture_output=True, text=True, timeout=600, check=True)
    figure = json.loads(done.stdout)
    assert figure["reward"] == "host"
    assert figure["seconds"] > 0


def test_least_seconds_of_a_step_by_hand(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import online
    import shapes

    shape, sizes = shapes.SHAPES["tiny"], shapes.SIZES["tiny"]
    layers, head = 6 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 768), 256 * 1024
    assert shapes.weights(shape) == (layers, head)
    forward = 2 * 16 * 128 * layers
    update = 3 * (2 * forward + 2 * 16 * 64 * head)  # policy and critic; only the policy has logits
    assert online.least_seconds(shape, "ppo-update", sizes, 1.0, 1.0) == pytest.approx(update)

    cache = 2 * 6 * 4 * 32 * 16 * (64 + 32)  # numbers of keys and values in slots filled on average
    prefill = 2 * 16 * (64 * layers + head)
    slow_memory = online.least_seconds(shape, "generate", sizes, 1e30, 1.0)
    assert slow_memory == pytest.approx(63 * 4 * (layers + head + cache))
    assert online.least_seconds(shape, "generate", sizes, 1e30, 1.0, width=2) == pytest.approx(slow_memory / 2)
    fast_memory = online.least_seconds(shape, "generate", sizes, 1.0, 1e30)
    assert fast_memory == pytest.approx(63 * 2 * 16 * (layers + head) + prefill)

    grpo = online.least_seconds(shape, "grpo-iteration", sizes, 1.0, 1e30)
    shared_prompts = 2 * 4 * (64 * layers + head)  # a group's prompt is read once
    learn = 4 * 2 * ((4 * 64 + 16 * 64) * layers + 16 * 64 * head)  # reference forward, policy forward and backward
    assert grpo == pytest.approx(63 * 2 * 16 * (layers + head) + shared_prompts + learn)


@pytest.mark.slow
def test_shared_prompts_are_measured_against_plain_rows():
    command = [sys.executable, FOLDER / "shared.py", "--shape", "toy", "--own", "8", "--prompts", "16", "--group", "4"]
    env = os.environ | {"PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run([*command, "--rounds", "2"], env=env, capture_output=True, text=True, timeout=300, check=True)
    figures = {figure["update"]: figure for figure in map(json.loads, done.stdout.splitlines())}
    assert figures["pairs"]["tokens"] == pytest.approx((16 + 2 * 8) / (2 * 24), rel=1e-3)
    assert figures["group"]["tokens"] == pytest.approx((16 + 4 * 8) / (4 * 24), rel=1e-3)
    for figure in figures.values():
        assert figure["ratio"] > 0
        assert 0 < figure["temporary"] < 1  # both were compiled, and the shared one needs less


@pytest.mark.long
def test_compare_takes_turns_with_a_peer_and_goes_on_without_one_that_cannot_start(tmp_path):
    """The peer is a second copy of ours; the interpreter given for tunix has none."""
    command = [sys.executable, FOLDER / "compare.py", "--shape", "toy", "--figure", "dpo", "generate", "--rounds", "2"]
    others = ["--peer-python", sys.executable, "--tunix-python", sys.executable, "--results", tmp_path]
    others += ["--remat", "none", "--unroll", "all"]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": str(FOLDER.parent)}
    done = subprocess.run([*command, *others], env=env, capture_output=True, text=True, timeout=600, check=True)
    assert "No module named 'tunix'" in done.stderr
    (kept,) = tmp_path.glob("*-toy.jsonl")
    printed = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert kept.read_text().splitlines() == printed
    lines = [json.loads(line) for line in printed]
    assert [(line["figure"], line.get("library", "ratio")) for line in lines] == [
        (figure, what) for figure in ("dpo", "generate") for what in ("tunix", "rljax", "peer", "ratio")
    ]
    for failed, ours, peer, ratio in (lines[:4], lines[4:]):
        assert "ended early" in failed["error"]
        assert ratio["ratio"] == "rljax / peer, seconds"
        assert ratio["ratio_of_best"] == pytest.approx(ours["seconds_best"] / peer["seconds_best"], rel=2e-3)
        assert {"jax", "python"} <= ours["versions"].keys()
        assert (ours["remat"], ours["unroll"]) == (peer["remat"], peer["unroll"]) == ("none", "all")
        assert ours["machine"] == peer["machine"]
        assert ours["dtype"] == peer["dtype"] == "float32"
        assert ours["rounds"] == peer["rounds"] == 2
        (row,) = re.findall(rf"\| toy \| {ours['figure']} \| (\S+) \| (\S+) \| (\S+) \|", done.stdout)
        expected = [ours["seconds"], peer["seconds"], ratio["median_of_ratios"]]  # kept to four digits, shown to three
        assert [float(cell) for cell in row] == pytest.approx(expected, rel=6e-3)


# Takes 64 MiB from glibc, writes to them and gives them back: bytearray asks malloc and zeroes what it gets.
TAKES_64_MIB = "import machine; machine.serve({}, lambda: bytearray(64 << 20))"


@pytest.mark.skipif(sys.platform != "linux", reason="sets the malloc of glibc")
def test_kept_memory_is_faulted_in_once(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import machine

    def faults(malloc: str) -> float:
        env = machine.MALLOC[malloc] | {"PYTHONPATH": str(FOLDER)}
        with machine.worker([sys.executable, "-c", TAKES_64_MIB], env=env) as taker:
            machine.take_turns([taker], 3, pause=0)
            assert all(0 <= found["system_seconds"] < found["cpu_seconds"] + 0.02 for found in taker.rounds)
            return taker.median("page_faults")

    pages, huge = (64 << 20) / os.sysconf("SC_PAGE_SIZE"), pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    assert faults("kept") < 0.01 * pages
    if not (huge.is_file() and "[always]" in huge.read_text()):  # the kernel gives 2 MiB at once then, unasked
        assert faults("default") == pytest.approx(pages, rel=0.01)


def test_groups_that_take_turns_hold_ours_or_one_alone(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import compare

    names = ["rljax", "trl", "tunix"]
    assert compare.groups(names, 3) == compare.groups(names, 9) == [names]
    assert compare.groups(names, 2) == [["rljax", "trl"], ["rljax", "tunix"]]
    assert compare.groups(names, 1) == [["rljax"], ["trl"], ["tunix"]]
    assert compare.groups(["rljax"], 2) == [["rljax"]]


def test_how_layers_are_computed_is_asked_of_ours_alone(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import compare

    asked = argparse.Namespace(scale=1, peer_python="p", trl_python="t", tunix_python="u", remat="none", unroll="all")
    for figure in ("dpo", "generate", "ppo-update"):
        of = compare.commands("toy", figure, asked)
        has = {name: " ".join(command).endswith("--remat none --unroll all --worker") for name, command in of.items()}
        assert has == {"rljax": True, "peer": True, "trl": False, "tunix": False}


def test_median_of_ratios_is_over_neighbouring_rounds(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import machine

    def worker(*seconds: float) -> machine.Worker:
        made = machine.Worker.__new__(machine.Worker)
        made.rounds = [{"seconds": s, "cpu_seconds": 2 * s} for s in seconds]
        return made

    # The machine slows down in the second round: it slows down for both.
    found = machine.ratios(worker(1.0, 10.0, 3.0), worker(2.0, 40.0, 4.0))
    assert found == {"median_of_ratios": 0.5, "ratio_of_best": 0.5, "ratio_of_best_cpu": 0.5}
