"""What every benchmark shares: the machine's measured peak, memory, workers that take turns, one JSON line per figure.

Nothing here imports JAX or torch before it is asked to, so that scripts of either side can use it.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

PEAK_SIZE = {"cpu": 1024, "gpu": 8192, "tpu": 8192}  # rows of the square product that stands for the machine's peak


def best_seconds(fn: Callable[[], Any], repeats: int) -> float:
    """The fastest of `repeats` calls; `fn` returns only when its work is done."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def jax_matmul_peak(dtype: str) -> Callable[[], float]:
    """A function that measures FLOP/s of one large square product in JAX, as fast as it goes right now."""
    import jax
    import jax.numpy as jnp

    size = PEAK_SIZE.get(jax.default_backend(), 4096)
    precision = jax.lax.Precision.HIGHEST if dtype == "float32" else None  # as the models multiply
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    multiply = jax.jit(lambda x: jnp.matmul(x, x, precision=precision))
    multiply(x).block_until_ready()
    return lambda: 2 * size**3 / best_seconds(lambda: multiply(x).block_until_ready(), 5)


def bandwidth() -> Callable[[], float]:
    """A function that measures how many bytes a second can be read from the memory that holds the weights.

    On an accelerator that is the sum of a large array in JAX; on CPUs a dot product in numpy's BLAS, which is closer to
    what the cores can read than a loop of either library.
    """
    import numpy as np

    size = 64 * 2**20  # elements, 256 MiB: beyond all caches
    if "jax" in sys.modules and sys.modules["jax"].default_backend() != "cpu":
        import jax

        x, add = jax.numpy.ones(size), jax.jit(jax.numpy.sum)
        add(x).block_until_ready()
        return lambda: 4 * size / best_seconds(lambda: add(x).block_until_ready(), 5)
    y = np.ones(size, np.float32)
    return lambda: 4 * size / best_seconds(lambda: np.dot(y, y), 5)


def torch_matmul_peak() -> Callable[[], float]:
    """The same in torch, float32 on the CPU."""
    import torch

    size = PEAK_SIZE["cpu"]
    x = torch.randn(size, size)
    out = torch.empty_like(x)
    torch.matmul(x, x, out=out)
    return lambda: 2 * size**3 / best_seconds(lambda: torch.matmul(x, x, out=out), 5)


def peak_rss() -> int:
    """Bytes of main memory that this process held at its largest."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def versions(*packages: str) -> dict[str, str]:
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def description() -> dict[str, Any]:
    """Which machine, how busy it is, and when."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), model)
    return {
        "machine": f"{os.cpu_count()} x {model}",
        "load": os.getloadavg()[0],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def emit(**figure: Any) -> None:
    """One figure, one line of JSON, floats to four digits."""
    print(json.dumps(_rounded(figure)), flush=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


# Workers. Each figure comes from a process of its own, so that its peak memory is its own; the processes stay alive and
# take turns, so that a noisy machine is noisy for all of them and at no time are two of them at work.


def serve(facts: dict[str, Any], step: Callable[[], Any], **measures: Callable[[], float]) -> None:
    """The worker's side: say `facts`, then for every line on stdin one step and one of each measure of the machine."""
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        step()
        found = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps(found | {name: measure() for name, measure in measures.items()}), flush=True)


class Worker:
    """The other side of `serve`: `facts`, and a list of what each round found."""

    def __init__(self, command: Sequence[str], cores: int | None = None, huge_pages: bool = False):
        pinned = ["taskset", "-c", f"0-{cores - 1}", *command] if cores else command
        env = os.environ | ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if huge_pages else {})
        self.process = subprocess.Popen(pinned, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.rounds: list[dict[str, float]] = []
        self.facts = self._read()

    def round(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.rounds.append(self._read())

    def median(self, key: str) -> float:
        return statistics.median(found[key] for found in self.rounds)

    def best(self, key: str) -> float:
        return min(found[key] for found in self.rounds)

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"'):  # what libraries print between is not ours
                return json.loads(line)
        raise RuntimeError(f"a benchmark worker ended early: {' '.join(map(str, self.process.args))}")  # pyright: ignore


@contextlib.contextmanager
def workers(*commands: Sequence[str], cores: int | None = None, huge_pages: bool = False) -> Iterator[list[Worker]]:
    """One worker after the other gets ready (compiles); all of them are ended on leaving.

    cores pins them to so many (Linux); huge_pages has glibc ask for large pages, which a process can only do at birth:
    XLA on CPU maps its temporaries anew at every step, and their page faults are a quarter of a small model's step.
    """
    started: list[Worker] = []
    try:
        for command in commands:
            started.append(Worker(command, cores, huge_pages))
        yield started
    finally:
        for worker in started:
            worker.process.kill()
            worker.process.wait()


def take_turns(workers: Sequence[Worker], rounds: int, pause: float = 0.2) -> None:
    """`rounds` rounds of every worker, one at a time; threads of the one before get `pause` seconds to fall asleep."""
    for _ in range(rounds):
        for worker in workers:
            time.sleep(pause)
            worker.round()


def ratios(ours: Worker, theirs: Worker) -> dict[str, float]:
    """Our time over theirs: rounds that were neighbours in time, the best of each, and processor time at work."""
    pairs = list(zip(ours.rounds, theirs.rounds, strict=True))
    return {
        "median_of_ratios": statistics.median(a["seconds"] / b["seconds"] for a, b in pairs),
        "ratio_of_best": ours.best("seconds") / theirs.best("seconds"),
        "ratio_of_best_cpu": ours.best("cpu_seconds") / theirs.best("cpu_seconds"),
    }
