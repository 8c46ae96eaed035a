"""The benchmarks run: one JSON line per figure, at a shape of no interest."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
def test_offline_prints_one_figure_per_update():
    command = [
        sys.executable,
        FOLDER / "offline.py",
        "--shape",
        "toy",
        "--pairs",
        "1",
        "--rounds",
        "2",
        "--unroll",
        "1",
    ]
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
    layers = 6 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 768)
    assert offline.flops_of_step(shape, "rm", 1) == 3 * 2 * 2 * 128 * layers
    head = 2 * 2 * 64 * 256 * 1024
    assert offline.flops_of_step(shape, "dpo", 1) - offline.flops_of_step(shape, "rm", 1) == 3 * head
    assert offline.flops_of_step(shape, "dpo+ref", 1) == pytest.approx(4 / 3 * offline.flops_of_step(shape, "dpo", 1))
