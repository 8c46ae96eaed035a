"""Memory that a run on CPUs keeps between its steps: in processes of their own, since a process keeps it to its end."""

import os
import pathlib
import subprocess
import sys
import types

import pytest

from rljax import allocator, cli

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="speaks to glibc")

# A program with 64 MiB of temporaries; it prints the fewest page faults of a call once the heap has its size.
FAULTS = """
import resource, sys, time
import jax, jax.numpy as jnp
from rljax import allocator
kept = sys.argv[1] == "keep" and allocator.keep_memory()
twice = jax.jit(lambda x: (x @ x.T) @ x)  # 4,096 x 4,096 numbers between
x = jnp.ones((4096, 8))
faults = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    twice(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    time.sleep(0.1)  # a result may be ready before its program's temporaries are freed
print(min(faults[3:]), kept)
"""
PAGES = (64 << 20) / os.sysconf("SC_PAGE_SIZE")
HUGE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def later_calls(how: str, **env: str) -> tuple[float, bool]:
    """(page faults, whether memory is kept)"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(allocator.DECIDED)}
    command = [sys.executable, "-c", FAULTS, how]
    env = clean | {"JAX_PLATFORMS": "cpu"} | env
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120)
    faults, kept = done.stdout.split()[-2:]
    return float(faults), kept == "True"


small_pages = pytest.mark.skipif(
    HUGE.is_file() and "[always]" in HUGE.read_text(), reason="this kernel gives 2 MiB at once, unasked"
)


@pytest.mark.slow
@small_pages
def test_temporaries_are_not_faulted_in_at_every_call():
    left, kept = later_calls("leave")
    assert left > 0.9 * PAGES
    assert not kept
    now, kept = later_calls("keep")
    assert now < 0.02 * PAGES
    assert kept


@small_pages
def test_whoever_has_chosen_an_allocator_keeps_it():
    """glibc is told nothing where a variable of it is set, and allocates as that variable says."""
    faults, kept = later_calls("keep", MALLOC_TOP_PAD_="131072")
    assert faults > 0.9 * PAGES
    assert not kept


@pytest.mark.parametrize(
    ("platforms", "files", "kept"),
    [("cpu", True, True), ("cuda,cpu", False, False), (None, True, False), (None, False, True), ("", False, True)],
)
def test_nothing_is_kept_where_an_accelerator_computes(monkeypatch, platforms, files, kept):
    told = []
    monkeypatch.setattr(allocator.jax, "config", types.SimpleNamespace(jax_platforms=platforms))
    monkeypatch.setattr(allocator.glob, "glob", lambda pattern: [pattern] * files)
    monkeypatch.setattr(allocator, "_mallopt", lambda: lambda *one: told.append(one) or 1)
    for name in [name for name in os.environ if name.startswith(allocator.DECIDED)]:
        monkeypatch.delenv(name)
    assert allocator.keep_memory() == kept == bool(told)


def test_only_a_process_that_is_a_runs_alone_keeps_memory(monkeypatch, capsys):
    kept = []
    monkeypatch.setattr(allocator, "keep_memory", lambda: kept.append(True))
    monkeypatch.setattr("sys.argv", ["rljax", "run", "missing.py"])
    assert cli.main() == 2
    assert kept == [True]
    with pytest.raises(SystemExit):
        cli.run_file("missing.py")
    assert kept == [True, True]
    assert cli.main(["run", "missing.py"]) == 2  # inside somebody's program
    monkeypatch.setattr("sys.argv", ["rljax", "selfcheck", "missing.py"])
    assert cli.main() == 2
    assert kept == [True, True]
    assert "missing.py" in capsys.readouterr().err
