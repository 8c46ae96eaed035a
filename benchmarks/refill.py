"""Rows that stop early: more prompts than slots, refilled as they get free, against one plain batch after the other.

    python benchmarks/refill.py --shape tiny
    python benchmarks/refill.py --model FOLDER --new 384 --prompt 4 --stop 1

With random weights every token has about the same probability, and so many of them stop a row that its length is
geometric with the mean asked for, cut off at `--new`. With a checkpoint, rows go on from their first tokens until
they write one of the ids given by `--stop`: a story, say, with the lengths that stories have.

Both sides draw the same rows with the same keys, `--slots` at a time, and compile before they are measured:

    plain   rows / slots calls of `generate`; each lasts as long as its longest row
    slots   one call with `slots=`; a quarter of the slots is filled again as soon as it is free (`--refill 4`)

steps: passes of the decoder over one token of every slot, counted from the lengths of the rows. occupied: the share
of them that wrote a token which was wanted. tokens_per_second counts new tokens, stop tokens included.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import machine
from shapes import SHAPES

SIDES = ("plain", "slots")


def steps_in_batches(lengths: Sequence[int], slots: int) -> int:
    """Steps of plain batches: the first token of a row comes with its prompt."""
    return sum(max(lengths[i : i + slots]) - 1 for i in range(0, len(lengths), slots))


def steps_in_slots(lengths: Sequence[int], slots: int, fresh: int) -> int:
    """Steps of slots that get the next `fresh` rows as soon as so many are free; `generate` decides the same way."""
    waiting, left, steps = list(lengths), [0] * slots, 0
    while True:
        while waiting and left.count(0) >= fresh:
            for length in waiting[:fresh]:
                left[left.index(0)] = length - 1 or -1  # one token long: free again, once all of them are placed
            left = [max(0, n) for n in left]
            del waiting[:fresh]
        if not any(left):
            return steps
        left, steps = [max(0, n - 1) for n in left], steps + 1


def prepare(options: argparse.Namespace) -> tuple[Callable[[], Any], dict[str, Any]]:
    """(one round of the side asked for, what is known about it), warmed up."""
    import functools

    import jax
    import jax.numpy as jnp
    import numpy as np

    from rljax import sampling

    sampling.REFILL = options.refill
    model, params, prompts, stop_ids = _task(options)
    rows, slots = options.rows, options.slots
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(2)))(jnp.arange(rows))
    generate = functools.partial(sampling.generate, model, params, max_new_tokens=options.new, stop_ids=stop_ids)
    if options.worker == "slots":
        step = lambda: [jax.block_until_ready(generate(prompts, keys, slots=slots))]  # noqa: E731
    else:
        parts = [
            (jax.tree.map(lambda x, i=i: x[i : i + slots], prompts), keys[i : i + slots]) for i in range(0, rows, slots)
        ]
        step = lambda: [jax.block_until_ready(generate(*part)) for part in parts]  # noqa: E731
    start = time.perf_counter()
    made = step()
    seconds = time.perf_counter() - start
    lengths = np.concatenate([np.asarray(rollout.tokens.mask.sum(1)) for rollout in made]).tolist()
    fresh = max(1, slots // options.refill)
    steps = steps_in_slots(lengths, slots, fresh) if options.worker == "slots" else steps_in_batches(lengths, slots)
    facts = {
        "first_seconds": seconds,
        "lengths": {q: float(np.quantile(lengths, q)) for q in (0.1, 0.5, 0.9, 1.0)}
        | {"mean": float(np.mean(lengths))},
        "tokens": sum(lengths),
        "steps": steps,
        "occupied": (sum(lengths) - rows) / (steps * slots),
        "versions": machine.versions("jax", "jaxlib", "flax"),
    }
    return step, facts


def _task(options: argparse.Namespace) -> tuple[Any, Any, Any, tuple[int, ...]]:
    """(model, params, prompts, stop ids)."""
    import jax
    import jax.numpy as jnp

    from rljax import models
    from rljax.types import Tokens

    shape = (options.rows, options.prompt)
    if options.model:
        from rljax.models import hf

        model, params = hf.load(options.model, dtype=jnp.float32)
        ids = jax.random.randint(jax.random.key(1), shape, 3, model.config.vocab_size).at[:, 0].set(1)
        stop_ids = tuple(options.stop)
    else:
        vocab = SHAPES[options.shape]["vocab_size"]
        model = models.build(models.ModelConfig(**SHAPES[options.shape], max_positions=2048))
        params = model.init(jax.random.key(0))
        ids = jax.random.randint(jax.random.key(1), shape, 0, vocab)
        stop_ids = tuple(range(0, vocab, options.mean))[: max(1, vocab // options.mean)]
    return model, params, Tokens(ids=ids, segments=jnp.ones_like(ids), mask=jnp.zeros(shape, bool)), stop_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="random weights")
    parser.add_argument("--model", help="a checkpoint folder instead")
    parser.add_argument("--stop", type=int, nargs="+", default=[1, 2], help="ids that stop a row of the checkpoint")
    parser.add_argument("--mean", type=int, default=64, help="mean length of a row of random weights, not cut off")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=256, help="most new tokens of a row")
    parser.add_argument("--refill", type=int, default=4, help="slots are refilled when one in so many is free")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, help="pin to so many cores")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        step, facts = prepare(options)
        machine.serve(facts, step)
        return
    commands = [[sys.executable, __file__, *sys.argv[1:], "--worker", side] for side in SIDES]
    label = {"model": options.model or options.shape, "rows": options.rows, "slots": options.slots}
    label |= {"prompt": options.prompt, "new": options.new, "refill": options.refill}
    with machine.workers(*commands, cores=options.cores) as (plain, slots):
        machine.take_turns((plain, slots), options.rounds)
        for side, worker in zip(SIDES, (plain, slots), strict=True):
            found = {"seconds": worker.median("seconds"), "seconds_best": worker.best("seconds")}
            found |= {"cpu_seconds": worker.median("cpu_seconds"), "rounds": len(worker.rounds)}
            rate = {"tokens_per_second": worker.facts["tokens"] / found["seconds"]}
            machine.emit(figure=side, **label, **found, **rate, **worker.facts, **machine.description())
        saved = 1 - slots.facts["steps"] / plain.facts["steps"]
        machine.emit(figure="slots / plain, seconds", **label, **machine.ratios(slots, plain), steps_saved=saved)


if __name__ == "__main__":
    main()
