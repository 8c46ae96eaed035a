"""What every benchmark shares: the machine's measured peak, memory, workers that take turns, one JSON line per figure.

Nothing here imports JAX or torch before it is asked to, so that scripts of either side can use it.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

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


def jax_dtype(asked: str = "auto") -> str:
    """Of the matrix products: the one asked for, or bfloat16 on accelerators and float32 on CPUs."""
    import jax

    return asked if asked != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16"


def bandwidth() -> Callable[[], float]:
    """A function that measures how many bytes a second can be read from the memory that holds the weights.

    On an accelerator that is the sum of a large array in JAX or torch; on CPUs a dot product in numpy's BLAS, which is
    closer to what the cores can read than a loop of either library.
    """
    import numpy as np

    size = 64 * 2**20  # elements, 256 MiB: beyond all caches
    if on_cuda():
        import torch

        z = torch.ones(size, device="cuda")
        return lambda: 4 * size / best_seconds(lambda: z.sum().item(), 5)
    if "jax" in sys.modules and sys.modules["jax"].default_backend() != "cpu":
        import jax

        x, add = jax.numpy.ones(size), jax.jit(jax.numpy.sum)
        add(x).block_until_ready()
        return lambda: 4 * size / best_seconds(lambda: add(x).block_until_ready(), 5)
    y = np.ones(size, np.float32)
    return lambda: 4 * size / best_seconds(lambda: np.dot(y, y), 5)


def torch_matmul_peak() -> Callable[[], float]:
    """The same in torch: float32 on the CPU, bfloat16 on a GPU."""
    import torch

    size = PEAK_SIZE["gpu" if on_cuda() else "cpu"]
    x = torch.randn(size, size)
    x = x.to("cuda", torch.bfloat16) if on_cuda() else x
    out = torch.empty_like(x)

    def multiply() -> None:
        torch.matmul(x, x, out=out)
        synchronize()

    multiply()
    return lambda: 2 * size**3 / best_seconds(multiply, 5)


def on_cuda() -> bool:
    """Whether this process works with torch on a GPU."""
    return "jax" not in sys.modules and "torch" in sys.modules and sys.modules["torch"].cuda.is_available()


def synchronize() -> None:
    """Wait for what torch has started on a GPU; JAX is waited for by its arrays."""
    if on_cuda():
        sys.modules["torch"].cuda.synchronize()


def peak_rss() -> int:
    """Bytes of main memory that this process held at its largest."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def device_peak() -> dict[str, int]:
    """{"device_peak_bytes": what the accelerator held at its largest}, where there is one."""
    if on_cuda():
        return {"device_peak_bytes": sys.modules["torch"].cuda.max_memory_allocated()}
    found = (sys.modules["jax"].local_devices()[0].memory_stats() or {}) if "jax" in sys.modules else {}
    return {"device_peak_bytes": found["peak_bytes_in_use"]} if "peak_bytes_in_use" in found else {}


def device() -> str:
    """What computes: "cpu" or the accelerator's name."""
    if on_cuda():
        return sys.modules["torch"].cuda.get_device_name()
    return sys.modules["jax"].devices()[0].device_kind if "jax" in sys.modules else "cpu"


class Moment(NamedTuple):
    seconds: float  # by the clock
    cpu_seconds: float  # of this process's threads
    system_seconds: float  # of them, in the kernel
    page_faults: float  # pages of memory that the kernel had to give


def now() -> Moment:
    """Once all that was started is done."""
    synchronize()
    used = resource.getrusage(resource.RUSAGE_SELF)
    return Moment(time.perf_counter(), time.process_time(), used.ru_stime, used.ru_minflt)


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


def emit(**figure: Any) -> str:
    """One figure, one line of JSON, floats to four digits: printed and returned."""
    line = json.dumps(_rounded(figure))
    print(line, flush=True)
    return line


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


# Workers. Each figure comes from a process of its own, so that its peak memory is its own; the processes stay alive and
# take turns, so that a noisy machine is noisy for all of them and at no time are two of them at work.


def serve(facts: dict[str, Any], step: Callable[[], Any], **measures: Callable[[], float]) -> None:
    """The worker's side: say `facts`, then for every line on stdin one step and one of each measure of the machine."""
    turns = Turns(lambda: facts, warm_up=0, **measures)
    while True:
        turns.begin()
        step()
        turns.end(turns.start, now())


class Turns:
    """`serve` inside a trainer's own loop: a step begins when it is asked for, and ends with what it took.

    facts: asked once, when `warm_up` steps are done. The process ends where no step is asked for any more.
    """

    def __init__(self, facts: Callable[[], dict[str, Any]], *, warm_up: int = 2, **measures: Callable[[], float]):
        self.facts, self.warm_up, self.measures = facts, warm_up, measures
        self.steps, self.start = 0, now()

    def begin(self) -> None:
        if self.steps == self.warm_up:
            self._say({"device": device(), **self.facts(), **device_peak(), "peak_rss_bytes": peak_rss()})
        if self.steps >= self.warm_up and not sys.stdin.readline():
            os._exit(0)  # the trainer around may not be in its main thread
        self.start = now()

    def end(self, start: Moment, stop: Moment) -> None:
        self.steps += 1
        if self.steps > self.warm_up:
            found = {name: getattr(stop, name) - getattr(start, name) for name in Moment._fields}
            self._say(found | {name: measure() for name, measure in self.measures.items()})

    def _say(self, found: dict[str, Any]) -> None:
        print("\n" + json.dumps(found), flush=True)


class Worker:
    """The other side of `serve`: `facts`, and a list of what each round found."""

    def __init__(self, command: Sequence[str], cores: int | None = None, env: Mapping[str, str] | None = None):
        self.started = time.perf_counter()
        pinned = ["taskset", "-c", f"0-{cores - 1}", *command] if cores else command
        self.process = subprocess.Popen(
            pinned, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | dict(env or {})
        )
        self.facts: dict[str, Any] = {}
        self.rounds: list[dict[str, float]] = []

    def get_ready(self) -> None:
        self.facts = self._read()
        self.facts["ready_seconds"] = time.perf_counter() - self.started  # imports, compiling, the steps before

    def round(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.rounds.append(self._read())

    def median(self, key: str) -> float:
        return statistics.median(found[key] for found in self.rounds)

    def best(self, key: str) -> float:
        return min(found[key] for found in self.rounds)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()  # waits, and closes the pipes

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"'):  # what libraries print between is not ours
                return json.loads(line)
        command = " ".join(map(str, self.process.args))  # pyright: ignore[reportArgumentType]
        raise RuntimeError(f"a benchmark worker ended early (exit status {self.process.wait()}): {command}")


# XLA on CPU allocates its temporaries anew at every step, and glibc maps and unmaps what is large: a page fault for
# every 4 KiB, which a virtual machine may make expensive. Large pages make them fewer. Kept memory makes none, but all
# threads share one heap then, as only the main one may be large. By default our side keeps it, as `rljax run` does
# (`rljax/allocator.py`), and the others do not; these tell all sides alike.
MALLOC = {
    "default": {},
    "huge-pages": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"},
    "kept": {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000"},
}


def add_malloc(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--malloc", choices=MALLOC, default="default", help="what glibc does with memory: machine.MALLOC"
    )


def add_layers(parser: argparse.ArgumentParser) -> None:
    """How our models are computed; left out: as programs do it."""
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="dots")
    parser.add_argument("--unroll", default="auto", help="layers per step of the scan over them: auto, all, or N")


def layers_at_once(unroll: str, layers: int) -> int | None:
    """What `--unroll` means for a model of so many layers, as `ModelConfig.unroll` has it."""
    return {"auto": None, "all": layers}[unroll] if unroll in ("auto", "all") else int(unroll)


@contextlib.contextmanager
def worker(command: Sequence[str], cores: int | None = None, env: Mapping[str, str] | None = None) -> Iterator[Worker]:
    """One that is ready (has compiled); it is ended on leaving. cores pins it to so many (Linux); env: see MALLOC."""
    started = Worker(command, cores, env)
    try:
        started.get_ready()
        yield started
    finally:
        started.end()


@contextlib.contextmanager
def workers(*commands: Sequence[str], cores: int | None = None) -> Iterator[list[Worker]]:
    """Several, one after the other."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(worker(command, cores)) for command in commands]


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
