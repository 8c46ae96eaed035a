"""The benchmarks run: one JSON line per figure, at a shape of no interest."""

import argparse
import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from rljax import sharding
from tests import compiler

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


def printed(module, monkeypatch, capsys, *options: str) -> list[dict]:
    """The figures that a benchmark prints, called here; its worker is a process of its own."""
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    monkeypatch.setattr(sys, "argv", [module.__file__, "--shape", "toy", *options])
    module.main()
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def options(**changes) -> argparse.Namespace:
    """Of a worker, as the command line gives them."""
    common = {"shape": "toy", "scale": 1, "remat": "dots", "unroll": "auto", "warm_up": 1}
    return argparse.Namespace(**common | changes)


@pytest.mark.slow
def test_offline_prints_a_figure_of_an_update(monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    import offline

    (figure,) = printed(offline, monkeypatch, capsys, "--update", "sft", "--pairs", "1", "--rounds", "2")
    assert figure["update"] == "sft"
    assert figure["rounds"] == 2
    assert figure["seconds"] >= figure["seconds_best"] > 0
    assert 0 < figure["flops_fraction"] < 1.5
    assert figure["peak_rss_bytes"] > figure["compiled_bytes"] > 0
    assert figure["tokens_per_second"] == pytest.approx(2 * 128 / figure["seconds"], rel=1e-2)


@pytest.mark.long
def test_offline_takes_a_step_of_every_other_update(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import offline

    for update in ("dpo+ref", "rm"):  # what `dpo` is, `dpo+ref` does
        case = offline.prepare(options(update=update, dtype="float32", pairs=1, share_prompts=True))
        case.step()
        assert case.facts["compiled_bytes"] > case.facts["temporary_bytes"] > 0
    assert set(offline.UPDATES) == {"dpo", "dpo+ref", "rm", "sft"}


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


def on_one_device(online, monkeypatch) -> None:
    """Where tests have eight."""
    made, mesh = online.experiment, functools.partial(sharding.make_mesh, fsdp=1)
    monkeypatch.setattr(online, "experiment", lambda *args: dataclasses.replace(made(*args), mesh=mesh))


FIGURES = ["generate", "ppo-update", "ppo-iteration", "grpo-iteration"]


@pytest.mark.slow
@pytest.mark.parametrize("figure", ["generate", pytest.param("all", marks=pytest.mark.long)])
def test_online_prints_one_figure_each(figure, monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    import online

    monkeypatch.setenv("XLA_FLAGS", compiler.flags())
    figures = printed(online, monkeypatch, capsys, "--figure", figure, "--rounds", "2", "--warm-up", "1")
    assert [found["figure"] for found in figures] == (FIGURES if figure == "all" else [figure])
    for found in figures:
        assert found["rounds"] == 2
        assert found["seconds"] >= found["seconds_best"] > 0
        assert 0 < found["roofline_fraction"] < 1.5
        assert found["peak_rss_bytes"] > found["compiled_bytes"] > 0
    if figure == "all":
        update, ppo, grpo = (found["alias_bytes"] for found in figures[1:])
        assert update == ppo > 1.9 * grpo  # policy and critic, or the policy alone


@pytest.mark.long
def test_the_whole_state_is_updated_in_place(monkeypatch):
    """Policy and critic."""
    monkeypatch.syspath_prepend(FOLDER)
    import online

    on_one_device(online, monkeypatch)
    facts = online.prepare(options(figure="ppo-update", reward="device")).facts
    layers, head = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32), 64 * 16
    assert facts["alias_bytes"] > 1.9 * 3 * 4 * (layers + head)  # weights and two moments of both


@pytest.mark.slow
@pytest.mark.parametrize(
    ("figure", "reward", "programs"),
    [("ppo-iteration", "device", 1), ("grpo-iteration", "device", 1), ("grpo-iteration", "host", 3)],
)
def test_the_parts_of_other_iterations_fit_together(figure, reward, programs, monkeypatch):
    """Their programs are traced; `long` compiles and runs them."""
    monkeypatch.syspath_prepend(FOLDER)
    import online

    traced = []

    def trace(fn, *args, **how):
        traced.append(jax.jit(fn, **how).trace(*args))
        return traced[-1], 1.0

    on_one_device(online, monkeypatch)
    monkeypatch.setattr(online, "_compile", trace)
    monkeypatch.setattr(online, "_memory", lambda compiled: {})
    case = online.prepare(options(figure=figure, reward=reward, warm_up=0))
    assert len(traced) == programs
    assert case.facts == {"compile_seconds": float(programs)}


@pytest.mark.long
def test_online_measures_rewards_on_the_host(monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    import online

    monkeypatch.setenv("XLA_FLAGS", compiler.flags())
    asked = ["--figure", "grpo-iteration", "--reward", "host", "--rounds", "1", "--warm-up", "1"]
    (figure,) = printed(online, monkeypatch, capsys, *asked)
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


@pytest.mark.long
def test_shared_prompts_are_measured_against_plain_rows(monkeypatch, capsys):
    monkeypatch.syspath_prepend(FOLDER)
    import shared

    asked = ["--own", "8", "--prompts", "16", "--group", "4", "--rounds", "2"]
    figures = {figure["update"]: figure for figure in printed(shared, monkeypatch, capsys, *asked)}
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
