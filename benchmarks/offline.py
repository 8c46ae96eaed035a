"""Speed and memory of the offline updates: DPO, SFT and reward model, one JSON line per figure.

    python benchmarks/offline.py --shape tiny --update dpo --dtype float32
    python benchmarks/offline.py --shape 135M --update dpo+ref --no-share-prompts

Updates: `dpo` is the update as our program runs it (the reference's log-probabilities are data, cached before);
`dpo+ref` computes them in the same step, which is what other libraries do by default; `sft` trains on the same rows;
`rm` is a reward model on the same pairs. A pair is a prompt of 64 tokens with two responses of 64 each. `compare.py`
sets `dpo+ref` against other libraries.

flops_fraction: FLOPs that the mathematics needs (2 per parameter of a layer and token forward, 4 backward; those of the
unembedding only at trained tokens; the prompt of a DPO pair once, whoever computes it twice; attention scores not
counted), per second, over those of one large matrix product measured in the same process between the steps. Memory:
`compiled_bytes` is what the compiler planned for the update, `peak_rss_bytes` what the process held at most, its
compiler included.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import machine
from shapes import NEW, PROMPT, SHAPES, sizes_of, weights

RESPONSE = NEW
UPDATES = ("dpo", "dpo+ref", "sft", "rm")


class Case(NamedTuple):
    step: Callable[[], Any]  # one whole step; returns when it is done
    facts: dict[str, Any]  # compile time and memory


def flops_of_step(shape: Mapping[str, Any], update: str, pairs: int) -> float:
    """See the module's docstring. The tied embedding multiplies only as the unembedding."""
    layers, unembedding = weights(shape)
    prompts = pairs if update.startswith("dpo") else 2 * pairs
    trained = {"dpo": RESPONSE, "dpo+ref": RESPONSE, "sft": PROMPT + RESPONSE - 1, "rm": 0}[update]
    tokens = prompts * PROMPT + 2 * pairs * RESPONSE
    forward = 2.0 * (layers * tokens + unembedding * 2 * pairs * trained)
    return forward * (4 if update == "dpo+ref" else 3)


def prepare(options: argparse.Namespace) -> Case:
    """Model, batch and compiled update of one case, warmed up."""
    import jax
    import optax

    from rljax import losses, models, objectives, train

    shape = SHAPES[options.shape]
    how = {"compute_dtype": machine.jax_dtype(options.dtype), "remat": options.remat}
    how["unroll"] = machine.layers_at_once(options.unroll, shape["num_layers"])
    config = models.ModelConfig(**shape, max_positions=2048, **how)
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
        dpo = functools.partial(losses.dpo_loss, beta=0.1)
        loss_fn = objectives.preference(policy, dpo, max_trained=RESPONSE, share_prompts=options.share_prompts)
    params = init(jax.random.key(0))
    state = train.init_state(params, optimizer)

    start = time.perf_counter()
    update = train.make_update(loss_fn, optimizer).lower(state, batch).compile()
    compile_seconds = time.perf_counter() - start
    if options.update == "dpo+ref":
        with_reference = _reference(policy, params, options.share_prompts)
    else:
        with_reference = lambda batch: batch  # noqa: E731
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
    chosen, rejected, ref = tokens(1, n), tokens(2, n), jnp.full(n, -RESPONSE * 6.9)
    same = rejected.ids.at[:, :PROMPT].set(chosen.ids[:, :PROMPT])
    return PreferenceBatch(
        chosen=chosen,
        rejected=dataclasses.replace(rejected, ids=same),
        ref_chosen_logps=ref,
        ref_rejected_logps=ref + 0.0,
    )


def _reference(policy: Any, params: Any, share_prompts: bool) -> Callable[[Any], Any]:
    """A batch with the reference's log-probabilities computed now, chosen and rejected in one forward pass."""
    import jax

    from rljax import objectives, ops

    @jax.jit
    def logps(params: Any, batch: Any) -> Any:
        pair = batch.chosen, batch.rejected
        each = objectives.pair_logps(policy, params, *pair, max_trained=RESPONSE, share_prompts=share_prompts)
        return [ops.sequence_sum(logps, tokens.mask) for logps, tokens in zip(each, pair, strict=True)]

    def fill(batch: Any) -> Any:
        chosen, rejected = logps(params, batch)
        return dataclasses.replace(batch, ref_chosen_logps=chosen, ref_rejected_logps=rejected)

    return fill


def _memory(compiled: Any) -> dict[str, Any]:
    plan = compiled.memory_analysis()
    total = plan.temp_size_in_bytes + plan.argument_size_in_bytes + plan.output_size_in_bytes
    return {"compiled_bytes": total - plan.alias_size_in_bytes, "temporary_bytes": plan.temp_size_in_bytes}


def work(options: argparse.Namespace) -> None:
    """One case in this process, step by step as `main` asks."""
    from rljax import allocator

    kept = allocator.keep_memory()  # as `rljax run` does
    case, dtype = prepare(options), machine.jax_dtype(options.dtype)
    facts = {
        "versions": machine.versions("jax", "jaxlib", "flax", "optax"),
        "dtype": dtype,
        "keeps_memory": kept,
        **case.facts,
    }
    machine.serve(facts, case.step, peak=machine.jax_matmul_peak(dtype))


def figures(shape: str, update: str, pairs: int, worker: machine.Worker) -> dict[str, Any]:
    """What one worker measured, as one figure."""
    seconds = worker.median("seconds")
    rate = flops_of_step(SHAPES[shape], update, pairs) / seconds
    return {
        "seconds": seconds,
        "seconds_best": worker.best("seconds"),
        **{name: worker.median(name) for name in ("cpu_seconds", "system_seconds", "page_faults")},
        "rounds": len(worker.rounds),
        "tokens_per_second": 2 * pairs * (PROMPT + RESPONSE) / seconds,
        "flops_per_second": rate,
        "flops_fraction": rate / worker.median("peak"),
        "matmul_peak": worker.median("peak"),
        **worker.facts,
    }


def measure(options: argparse.Namespace, update: str, dtype: str) -> None:
    """Print the figure of one case."""
    pairs = options.pairs or sizes_of(options.shape, options.scale).pairs
    settings = {"remat": options.remat, "unroll": options.unroll, "share_prompts": options.share_prompts}
    case = ["--shape", options.shape, "--pairs", str(pairs), "--update", update, "--dtype", dtype]
    share = "--share-prompts" if options.share_prompts else "--no-share-prompts"
    how = [share, "--remat", options.remat, "--unroll", options.unroll, "--worker"]
    env = machine.MALLOC[options.malloc]
    with machine.worker([sys.executable, __file__, *case, *how], options.cores, env) as ours:
        machine.take_turns([ours], options.rounds)
        machine.emit(
            library="rljax",
            **{"shape": options.shape, "update": update, "pairs": pairs, **settings},
            cores=options.cores or os.cpu_count(),
            malloc=options.malloc,
            **figures(options.shape, update, pairs, ours),
            **machine.description(),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--update", choices=(*UPDATES, "all"), default="all")
    parser.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "all"), default="auto", help="auto: bfloat16 on accelerators"
    )
    parser.add_argument("--pairs", type=int, help="of a batch; left out: as many as `shapes.py` says")
    parser.add_argument("--scale", type=int, default=1, help="that many times the batch of `shapes.py`")
    parser.add_argument("--rounds", type=int, default=9, help="steps measured, one per round")
    machine.add_layers(parser)
    parser.add_argument("--share-prompts", action=argparse.BooleanOptionalAction, default=True, help="of DPO pairs")
    parser.add_argument("--cores", type=int, help="pin to so many cores; with 1, cpu_seconds is fair on a busy machine")
    machine.add_malloc(parser)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        options.pairs = options.pairs or sizes_of(options.shape, options.scale).pairs
        work(options)
        return
    for dtype in ("float32", "bfloat16") if options.dtype == "all" else (options.dtype,):
        for update in UPDATES if options.update == "all" else (options.update,):
            measure(options, update, dtype)


if __name__ == "__main__":
    main()
