"""SIGKILLs at random moments of PPO and DPO runs, exports included: how many of them cost a bit.

    python benchmarks/kills.py --count 50

A run is killed and started again until it ends, then it is compared with one that was never stopped: parameters,
optimizer and the rest of the last checkpoint, metrics.jsonl, samples.jsonl, and every tensor and file of the export.
Then the next run begins, until so many kills were made of each kind. Exit status 1 where anything differs.

Cheap, so that a kill takes seconds: a process that has imported everything forks one for each start, which finds its
compiled programs in a cache; a tiny model, a few steps. A moment is drawn from the whole start, loading included, in
one of five; in the others from what comes after loading: steps, evaluations, saving, the report, exporting.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from safetensors.numpy import load_file

from rljax import artefacts, data, losses, offline, online, program, sharding, train

WORDS = ("cat", "dog", "tree", "house", "ball", "bird", "car", "hat", "fish", "boat")
RECORDS = ("metrics.jsonl", "samples.jsonl")
SHARED = pathlib.Path(os.environ.get("RLJAX_SHARED", pathlib.Path(__file__).parents[2] / "shared"))


def vowels(prompts: list[Any], completions: list[str]) -> list[float]:
    """The reward: 0.1 for every vowel, −0.7 at the start."""
    del prompts
    return [sum(letter in "aeiou" for letter in text) / 10 - 0.7 for text in completions]


def experiment(kind: str, model: str, folder: pathlib.Path, name: str) -> program.Run:
    common: dict[str, Any] = {
        "model": model,
        "data": str(folder / "rows.jsonl"),
        "steps": 12,
        "batch": 4,
        "max_prompt": 16,
        "max_completion": 8,
        "learning_rate": 1e-3,
        "schedule": train.constant,
        "mesh": functools.partial(sharding.make_mesh, fsdp=1),
        "eval_every": 3,
        "eval_rows": 4,
        "save_every": 2,
        "samples": 2,
        "sample_tokens": 4,
        "checks": False,
        "out": str(folder),
        "name": name,
    }
    if kind == "dpo":
        return offline.Preference(loss=functools.partial(losses.dpo_loss, beta=0.1), best="eval/loss", **common)
    return online.PPO(reward=vowels, epochs=2, minibatches=2, normalize_running=True, ema=0.9, **common)


def start(made: program.Run, exported: pathlib.Path, told: int) -> None:
    """One start of the run and its export, in a process of its own; `told` hears when loading is over."""
    module: Any = offline if isinstance(made, offline.Preference) else online
    jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(made.out) / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    set_up = module.set_up

    def announced(*args: Any) -> Any:
        found = set_up(*args)
        os.write(told, b".")
        return found

    module.set_up = announced
    status = module.run(made)
    if status == 0:
        artefacts.export(pathlib.Path(made.out) / str(made.name), exported)
    os._exit(status)


def forked(call: Callable[[int], None], log: pathlib.Path) -> tuple[int, int]:
    """(process id, a pipe that hears when it has loaded): call(the pipe's end), its output in a file."""
    ours, theirs = os.pipe()
    if pid := os.fork():
        os.close(theirs)
        return pid, ours
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        call(theirs)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(1)


def ended(pid: int, seconds: float | None, pipe: int | None = None) -> int | None:
    """The status of a process within so many seconds, or once its pipe says something; None while it goes on."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if pipe is not None and select.select([pipe], [], [], 0)[0]:
            return None
        if deadline is not None and time.monotonic() > deadline:
            return None
        time.sleep(0.002)


def contents(run: pathlib.Path, exported: pathlib.Path) -> dict[str, Any]:
    """All that must be the same to the bit."""
    step = max(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())
    record = json.loads((run / "checkpoints" / str(step) / "rljax" / "metadata").read_text())
    found: dict[str, Any] = {"step": step, **{f"state.{name}": leaf for name, leaf in record["leaves"].items()}}
    found |= {name: (run / name).read_bytes() for name in RECORDS}
    for path in sorted(exported.iterdir()):
        if path.suffix == ".safetensors":  # which says nothing about the order of its tensors
            found |= {f"export/{name}": (x.dtype, x.shape, x.tobytes()) for name, x in load_file(path).items()}
        else:
            found[f"export/{path.name}"] = path.read_bytes()
    return found


def killed_until_done(
    kind: str, model: str, folder: pathlib.Path, name: str, dice: random.Random, spans: tuple[float, float], most: int
) -> int:
    """How many kills one run took until it was over. spans: seconds of loading, and of what comes after it."""
    made, exported, kills = experiment(kind, model, folder, name), folder / f"{name}-export", 0
    log = folder / f"{name}.log"
    while True:
        pid, pipe = forked(lambda told: start(made, exported, told), log)
        early = dice.random() < 0.2
        if early:
            status = ended(pid, dice.uniform(0, spans[0]))
        else:
            status = ended(pid, None, pipe)
            status = ended(pid, dice.uniform(0, spans[1])) if status is None else status
        if status is None and kills < most:
            os.kill(pid, signal.SIGKILL)
            kills += 1
        status = ended(pid, None) if status is None else status
        os.close(pipe)
        if status not in (0, -signal.SIGKILL):
            sys.exit(f"{kind}: a start ended with status {status}:\n{log.read_text()[-3000:]}")
        if status == 0:
            return kills


def measure(kind: str, model: str, folder: pathlib.Path, count: int, seed: int) -> int:
    """How many runs differed, after `count` kills."""
    dice, kills, wrong, runs = random.Random(seed), 0, 0, 0
    rows = [
        {"prompt": f"The {a} saw a {b}.", "chosen": f" The {b} ran.", "rejected": f" The {a} sat."}
        for a in WORDS
        for b in WORDS[:4]
    ]
    data.write_jsonl(folder / "rows.jsonl", rows)
    spans = (0.0, 0.0)
    for _ in range(2):  # the first compiles
        shutil.rmtree(folder / "whole", ignore_errors=True)
        shutil.rmtree(folder / "whole-export", ignore_errors=True)
        began = time.monotonic()
        call = functools.partial(start, experiment(kind, model, folder, "whole"), folder / "whole-export")
        pid, pipe = forked(call, folder / "whole.log")
        assert ended(pid, None, pipe) is None, (folder / "whole.log").read_text()
        loaded = time.monotonic()
        assert ended(pid, None) == 0, (folder / "whole.log").read_text()
        os.close(pipe)
        spans = loaded - began, time.monotonic() - loaded
    print(f"{kind}: a run loads for {spans[0]:.1f} s, and takes {spans[1]:.1f} s with its export", flush=True)
    expected = contents(folder / "whole", folder / "whole-export")
    while kills < count:
        name, runs = f"killed{runs}", runs + 1
        made = killed_until_done(kind, model, folder, name, dice, spans, count - kills)
        kills += made
        found = contents(folder / name, folder / f"{name}-export")
        different = [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
        wrong += bool(different)
        print(f"{kind}: {kills} kills; a run of {made} differs in {sorted(different) or 'nothing'}", flush=True)
        if not different:
            shutil.rmtree(folder / name)
            shutil.rmtree(folder / f"{name}-export")
    print(f"{kind}: {kills} SIGKILLs in {runs} runs, of which {wrong} differ from a run that was never stopped")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=["ppo", "dpo"], default=["ppo", "dpo"])
    parser.add_argument("--count", type=int, default=50, help="kills of each kind")
    parser.add_argument("--model", default=str(SHARED / "models" / "stories260K"))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    began, wrong = time.monotonic(), 0
    for kind in options.kind:
        with tempfile.TemporaryDirectory(prefix="kills-") as folder:
            wrong += measure(kind, options.model, pathlib.Path(folder), options.count, options.seed)
    print(f"{time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
