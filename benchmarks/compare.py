"""Ours against TRL and tunix: the same shapes and batches, each in its own environment, one at a time, taking turns.

    python benchmarks/compare.py --shape tiny --trl-python PYTHON --tunix-python PYTHON

One JSON line per library and figure and one per ratio, printed and kept in `results/`, with date, machine and versions;
at the end a table of them. A ratio is our time over theirs (below 1 where ours is faster): the median over rounds that
were neighbours in time, the best of each, and processor time. What each side does for a figure, and where the sides
differ, stands in `offline.py` (dpo: `dpo+ref`), `online.py`, `trl_worker.py` and `tunix_worker.py`. Ours runs with the
defaults of its programs, the others without rematerialisation: `--remat none --unroll all` has ours keep everything
too, in a program without a loop over layers.

A library may be left out. One that ends early (too little memory, say) gets a line with its error, and the others go
on. `--peer-python` adds another rljax: one with another jax, or another version.

On a GPU: `python benchmarks/compare.py --shape 135M 1B 8B --scale 4 --trl-python … --tunix-python …`. Products are then
in bfloat16 on all sides, peaks and bandwidth are the GPU's, 8B only generates (training it does not fit one GPU), and
the libraries run one after the other (`--at-once 1`), since their memory does not fit together. This path has not been
run on a GPU yet.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import machine
import offline
import online
from shapes import FIGURES, SHAPES, sizes_of

HERE = pathlib.Path(__file__).parent
AT_ONCE = {"toy": 4, "tiny": 4, "135M": 2}  # libraries whose memory fits together; others run alone
FITS = {"8B": ("generate",)}
Found = dict[Any, Any]


def commands(shape: str, figure: str, options: argparse.Namespace) -> dict[str, list[str]]:
    """{library: what starts its worker}, ours first."""
    case = ["--shape", shape, "--scale", str(options.scale)]
    rljax = ["offline.py", *case, "--update", "dpo+ref"] if figure == "dpo" else ["online.py", *case]
    rljax = [*rljax, *([] if figure == "dpo" else ["--figure", figure])]
    rljax = [*rljax, "--remat", options.remat, "--unroll", options.unroll, "--worker"]
    peers = {"peer": (options.peer_python, rljax)}
    for name in ("trl", "tunix"):
        peers[name] = getattr(options, f"{name}_python"), [f"{name}_worker.py", *case, "--figure", figure]
    asked = {name: [python, str(HERE / script[0]), *script[1:]] for name, (python, script) in peers.items() if python}
    return {"rljax": [sys.executable, str(HERE / rljax[0]), *rljax[1:]], **asked}


def groups(names: Sequence[str], at_once: int) -> list[list[str]]:
    """Which libraries take turns: at most so many, ours in each group, or every one alone."""
    ours, *others = names
    if at_once == 1 or not others:
        return [[name] for name in names]
    return [[ours, *others[i : i + at_once - 1]] for i in range(0, len(others), at_once - 1)]


def measured(
    group: Sequence[str], of: Mapping[str, list[str]], options: argparse.Namespace, failed: Callable[[str, str], None]
) -> dict[str, machine.Worker]:
    """The workers of a group after their rounds; those that end early are reported and missing."""
    env = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if len(group) > 1 else {}
    env |= machine.MALLOC[options.malloc]
    ready: dict[str, machine.Worker] = {}
    with contextlib.ExitStack() as stack:
        for name in group:
            try:
                ready[name] = stack.enter_context(machine.worker(of[name], options.cores, env))
            except RuntimeError as error:
                failed(name, str(error))
        try:
            machine.take_turns(list(ready.values()), options.rounds)
        except RuntimeError as error:
            failed(" and ".join(ready), str(error))
            return {}
    return ready


def compare(shape: str, figure: str, options: argparse.Namespace, keep: Callable[..., None]) -> Found:
    """Measure one figure. Returns {library: its line, (library, "ratio"): ours over its}."""
    sizes, of, found = sizes_of(shape, options.scale), commands(shape, figure, options), {}
    label = {"shape": shape, "figure": figure, "sizes": sizes._asdict()}
    how = {"cores": options.cores or os.cpu_count(), "malloc": options.malloc}
    layers = {"remat": options.remat, "unroll": options.unroll}  # of ours
    workers: dict[str, machine.Worker] = {}

    def numbers(worker: machine.Worker) -> Found:
        if figure == "dpo":
            return offline.figures(shape, "dpo+ref", sizes.pairs, worker)
        return online.figures(shape, figure, sizes, worker)

    def failed(name: str, error: str) -> None:
        keep(library=name, **label, error=error, **machine.description())

    for group in groups(list(of), options.at_once or AT_ONCE.get(shape, 1)):
        ready = measured(group, of, options, failed)
        workers |= ready
        for name, worker in ready.items():
            found[name] = numbers(worker)
            own = {} if name in ("trl", "tunix") else layers
            keep(library=name, **label, **how, **own, **found[name], beside=group, **machine.description())
        for name in ready:
            if name != "rljax" and "rljax" in workers:
                found[name, "ratio"] = machine.ratios(workers["rljax"], workers[name])
                keep(ratio=f"rljax / {name}, seconds", **label, **found[name, "ratio"])
    return found


def table(found: Mapping[tuple[str, str], Found]) -> str:
    """Medians of seconds, ratios, shares of the roofline (of the matmul peak for dpo) and peak memory, in Markdown."""
    names = [name for name in ("rljax", "peer", "trl", "tunix") if any(name in each for each in found.values())]
    others = [name for name in names if name != "rljax"]
    heads = ["shape", "figure", *(f"{name}, s" for name in names), *(f"rljax / {name}" for name in others)]
    rows = [[*heads, *(f"share of roofline, {name}" for name in names), *(f"peak GB, {name}" for name in names)]]
    rows.append(["---"] * len(rows[0]))
    for (shape, figure), each in found.items():
        sides, ratios = [each.get(name) for name in names], [each.get((name, "ratio")) for name in others]
        rows.append(
            [shape, figure, *(_cell(side, "seconds") for side in sides)]
            + [_cell(ratio, "median_of_ratios") for ratio in ratios]
            + [_cell(side, "roofline_fraction", "flops_fraction") for side in sides]
            + [_cell(side, "device_peak_bytes", "peak_rss_bytes", unit=1e9) for side in sides]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(found: Found | None, *keys: str, unit: float = 1) -> str:
    """The first of these numbers that there is, to three digits."""
    values = [found[key] for key in keys if key in found] if found else []
    return f"{values[0] / unit:.3g}" if values else "–"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["tiny"])
    parser.add_argument("--figure", nargs="+", choices=FIGURES, help="left out: all that fit")
    parser.add_argument("--trl-python", help="an interpreter that has torch and trl (1.12, the last with PPO)")
    parser.add_argument("--tunix-python", help="an interpreter that has google-tunix")
    parser.add_argument("--peer-python", help="an interpreter that has another rljax or jax")
    parser.add_argument("--rounds", type=int, default=9, help="steps measured, one per round")
    parser.add_argument("--scale", type=int, default=1, help="that many times the batches of `shapes.py`")
    parser.add_argument("--at-once", type=int, help="how many libraries share the memory; 1: one after the other")
    parser.add_argument("--cores", type=int, help="pin to so many cores")
    machine.add_malloc(parser)
    machine.add_layers(parser)
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "results", help="folder of the kept lines")
    options = parser.parse_args()
    options.results.mkdir(parents=True, exist_ok=True)
    start = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H%M%S")
    path, found = options.results / f"{start}-{'-'.join(options.shape)}.jsonl", {}

    def keep(**line: Any) -> None:
        with path.open("a") as file:
            file.write(machine.emit(**line) + "\n")

    for shape in options.shape:
        for figure in options.figure or FITS.get(shape, FIGURES):
            found[shape, figure] = compare(shape, figure, options, keep)
    print(f"\n{table(found)}\n\nkept in {path}")


if __name__ == "__main__":
    main()
