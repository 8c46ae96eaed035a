"""Speed and memory of the offline updates: DPO, SFT and reward model, one JSON line per figure.

    python benchmarks/offline.py --shape tiny --update dpo --dtype float32
    python benchmarks/offline.py --shape 135M --update dpo+ref --pairs 2 --against trl --trl-python PYTHON

Updates: `dpo` is the update as our program runs it (the reference's log-probabilities are data, cached before);
`dpo+ref` computes them in the same step, which is what TRL does by default; `sft` trains on the same rows;
`rm` is a reward model on the same pairs. A pair is two rows of 64 prompt and 64 response tokens.

flops_fraction: FLOPs that the mathematics needs (2 per parameter of a layer and token forward, 4 backward; those of the
unembedding only at trained tokens; attention scores not counted), per second, over those of one large matrix product
measured in the same process between the steps. Memory: `compiled_bytes` is what the compiler planned for the update,
`peak_rss_bytes` what the process held at most, its compiler included.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import machine

PROMPT, RESPONSE = 64, 64
UPDATES = ("dpo", "dpo+ref", "sft", "rm")
SHAPES: dict[str, dict[str, Any]] = {
    "toy": {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_layers": 2, "num_heads": 4}
    | {"num_kv_heads": 2, "head_dim": 4},
    "tiny": {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 768, "num_layers": 6, "num_heads": 8}
    | {"num_kv_heads": 4, "head_dim": 32},
    "135M": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_layers": 30, "num_heads": 9}
    | {"num_kv_heads": 3, "head_dim": 64},
}


class Case(NamedTuple):
    step: Callable[[], Any]  # one whole step; returns when it is done
    facts: dict[str, Any]  # compile time and memory


def flops_of_step(shape: dict[str, Any], update: str, pairs: int) -> float:
    """See the module's docstring. The tied embedding multiplies only as the unembedding."""
    s, rows = shape, 2 * pairs
    attention = 2 * s["hidden_size"] * s["head_dim"] * (s["num_heads"] + s["num_kv_heads"])
    layers = s["num_layers"] * (attention + 3 * s["hidden_size"] * s["intermediate_size"])
    trained = {"dpo": RESPONSE, "dpo+ref": RESPONSE, "sft": PROMPT + RESPONSE - 1, "rm": 0}[update]
    forward = 2.0 * rows * (layers * (PROMPT + RESPONSE) + s["hidden_size"] * s["vocab_size"] * trained)
    return forward * (4 if update == "dpo+ref" else 3)


def prepare(options: argparse.Namespace) -> Case:
    """Model, batch and compiled update of one case, warmed up."""
    import jax
    import optax

    from rljax import losses, models, objectives, train

    accelerated = jax.default_backend() != "cpu"
    shape = SHAPES[options.shape]
    unroll = options.unroll or (1 if accelerated else shape["num_layers"])
    config = models.ModelConfig(
        **shape, max_positions=2048, compute_dtype=options.dtype, remat=options.remat, unroll=unroll
    )
    policy = models.build(config)
    # The optimizer of our programs (program.Run) and of TRL: clipped AdamW.
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.0))
    batch = _batch(options, config.vocab_size)
    init: Any = policy.init
    if options.update == "rm":
        scored = models.reward_model(policy)
        init, loss_fn = jax.jit(scored.init), objectives.comparison(scored)
    elif options.update == "sft":
        loss_fn = objectives.supervised(policy)
    else:
        loss_fn = objectives.preference(policy, functools.partial(losses.dpo_loss, beta=0.1), max_trained=RESPONSE)
    params = init(jax.random.key(0))
    state = train.init_state(params, optimizer)

    start = time.perf_counter()
    update = train.make_update(loss_fn, optimizer).lower(state, batch).compile()
    compile_seconds = time.perf_counter() - start
    with_reference = _reference(policy, params) if options.update == "dpo+ref" else lambda batch: batch
    if options.update != "dpo+ref":
        del params  # as our program does: only a reference that is asked every step needs to stay

    def step() -> None:
        nonlocal state
        state, metrics = update(state, with_reference(batch))
        jax.block_until_ready((state, metrics))

    step()
    step()
    return Case(step, {"compile_seconds": compile_seconds, **_memory(update)})


def _batch(options: argparse.Namespace, vocab: int) -> Any:
    import jax
    import jax.numpy as jnp

    from rljax.types import ComparisonBatch, PreferenceBatch, Tokens

    def tokens(key: int, *rows: int, prompt: int = PROMPT) -> Tokens:
        ids = jax.random.randint(jax.random.key(key), (*rows, PROMPT + RESPONSE), 0, vocab)
        mask = jnp.broadcast_to(jnp.arange(PROMPT + RESPONSE) >= prompt, ids.shape)
        return Tokens(ids=ids, segments=jnp.ones_like(ids), mask=mask)

    n = options.pairs
    if options.update == "sft":
        return tokens(1, 2 * n, prompt=1)
    if options.update == "rm":
        return ComparisonBatch(tokens=tokens(1, n, 2), best=jnp.zeros(n, jnp.int32), margin=jnp.zeros(n))
    ref = jnp.full(n, -RESPONSE * 6.9)
    return PreferenceBatch(
        chosen=tokens(1, n), rejected=tokens(2, n), ref_chosen_logps=ref, ref_rejected_logps=ref + 0.0
    )


def _reference(policy: Any, params: Any) -> Callable[[Any], Any]:
    """A batch with the reference's log-probabilities computed now, chosen and rejected in one forward pass."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    from rljax import objectives

    @jax.jit
    def logps(params: Any, batch: Any) -> Any:
        both = jax.tree.map(lambda *x: jnp.concatenate(x), batch.chosen, batch.rejected)
        return jnp.split(objectives.sequence_logps(policy, params, both, max_trained=RESPONSE), 2)

    def fill(batch: Any) -> Any:
        chosen, rejected = logps(params, batch)
        return dataclasses.replace(batch, ref_chosen_logps=chosen, ref_rejected_logps=rejected)

    return fill


def _memory(compiled: Any) -> dict[str, Any]:
    import jax

    plan = compiled.memory_analysis()
    total = plan.temp_size_in_bytes + plan.argument_size_in_bytes + plan.output_size_in_bytes
    found = {"compiled_bytes": total - plan.alias_size_in_bytes, "temporary_bytes": plan.temp_size_in_bytes}
    device = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in device:
        found["device_peak_bytes"] = device["peak_bytes_in_use"]
    return {**found, "peak_rss_bytes": machine.peak_rss()}


def work(options: argparse.Namespace) -> None:
    """One case in this process, step by step as `main` asks."""
    case = prepare(options)
    facts = {"versions": machine.versions("jax", "jaxlib", "flax", "optax"), **case.facts}
    machine.serve(facts, case.step, peak=machine.jax_matmul_peak(options.dtype))


def figures(options: argparse.Namespace, worker: machine.Worker, update: str) -> dict[str, Any]:
    """What one worker measured, as one figure."""
    seconds = worker.median("seconds")
    rate = flops_of_step(SHAPES[options.shape], update, options.pairs) / seconds
    return {
        "seconds": seconds,
        "seconds_best": worker.best("seconds"),
        "cpu_seconds": worker.median("cpu_seconds"),
        "rounds": len(worker.rounds),
        "tokens_per_second": 2 * options.pairs * (PROMPT + RESPONSE) / seconds,
        "flops_per_second": rate,
        "flops_fraction": rate / worker.median("peak"),
        "matmul_peak": worker.median("peak"),
        **worker.facts,
    }


def measure(options: argparse.Namespace, update: str, dtype: str) -> None:
    """Print the figure of one case, and with `--against trl` TRL's and the ratio of the two."""
    label = {"shape": options.shape, "update": update, "dtype": dtype, "pairs": options.pairs}
    case = ["--shape", options.shape, "--pairs", str(options.pairs)]
    run = ["--update", update, "--dtype", dtype, "--remat", options.remat, "--unroll", str(options.unroll)]
    commands = [[sys.executable, __file__, *case, *run, "--worker"]]
    compare = options.against == "trl" and update == "dpo+ref" and dtype == "float32"
    if compare:
        commands.append([options.trl_python, __file__.replace("offline.py", "trl_dpo.py"), *case])
    with machine.workers(*commands, cores=options.cores, huge_pages=options.huge_pages) as started:
        machine.take_turns(started, options.rounds)
        ours, *theirs = started
        settings = {
            "remat": options.remat,
            "unroll": options.unroll or "default",
            "cores": options.cores or os.cpu_count(),
            "huge_pages": options.huge_pages,
        }
        machine.emit(library="rljax", **label, **settings, **figures(options, ours, update), **machine.description())
        for other in theirs:
            machine.emit(library="trl", **label, **figures(options, other, update), **machine.description())
            machine.emit(figure="rljax / trl, seconds", **label, **machine.ratios(ours, other))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--update", choices=(*UPDATES, "all"), default="all")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "all"), default="float32")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9, help="steps measured, one per round")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="none")
    parser.add_argument("--unroll", type=int, default=0, help="layers per step of the scan; 0: as our programs choose")
    parser.add_argument("--cores", type=int, help="pin to so many cores; with 1, cpu_seconds is fair on a busy machine")
    parser.add_argument(
        "--huge-pages", action="store_true", help="GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the workers"
    )
    parser.add_argument("--against", choices=("trl",), help="take turns with TRL on dpo+ref in float32")
    parser.add_argument("--trl-python", default="python", help="an interpreter that has torch and trl")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    for dtype in ("float32", "bfloat16") if options.dtype == "all" else (options.dtype,):
        for update in UPDATES if options.update == "all" else (options.update,):
            measure(options, update, dtype)


if __name__ == "__main__":
    main()
