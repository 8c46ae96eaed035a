"""Speed and memory of the online half: sampling, PPO's update, whole iterations of PPO and GRPO, one JSON line each.

    python benchmarks/online.py --shape tiny
    python benchmarks/online.py --shape 135M --figure ppo-update

A prompt has 64 tokens, a completion 64 more, all of them sampled: nothing stops early. Weights are random; products are
in float32 on CPUs, in bfloat16 on accelerators, where `generate` has its weights in bfloat16 as well. `compare.py` sets
these figures against those of other libraries.

    generate        one batch of prompts, a completion each, with its log-probabilities
    ppo-update      one update of policy and critic, each a decoder of its own, on a batch of rollouts: rewards, GAE,
                    forward, backward, clipped AdamW, metrics; one minibatch, one epoch
    ppo-iteration   generate, reference log-probabilities, values, a trivial reward, and that update
    grpo-iteration  groups of completions of a few prompts, reference log-probabilities, a trivial reward, one update

They are the functions of `iteration.build`, compiled as `online.py` compiles them: an iteration is one program
(`whole`), or with `--reward host` three (`sample`, `annotate`, `learn`) with the reward between them on the host.

roofline_fraction: the least time that the machine could take over the time taken. A decoding step has to read all
weights once, the embedding as unembedding, and the cache as far as it is filled, at the measured bandwidth, and it has
to multiply (2 FLOPs a weight and row); the slower of the two counts. Everything else is products at the measured peak:
2 FLOPs per weight of a layer and token forward, 4 backward, the unembedding at trained tokens only, the prompt of a
group once, whoever computes it for every completion; attention scores are not counted. Where weights fit into a cache,
decoding can beat the memory's bandwidth.

Memory: `compiled_bytes` is what the compiler planned, `alias_bytes` of it the state that is updated in place, and
`temporary_bytes` lives only within a step; `logits_bytes` is what the logits of all tokens would take.
`peak_rss_bytes` is what the process held at most when it was ready, compiler included.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import machine
import shapes
from shapes import NEW, PROMPT, SHAPES, Sizes, sizes_of, weights

FIGURES = tuple(figure for figure in shapes.FIGURES if figure != "dpo")


class Case(NamedTuple):
    step: Callable[[], Any]  # one whole step; returns when it is done
    facts: dict[str, Any]  # compile time and memory


# --- what the machine would take at best ------------------------------------------------------------------------------


def decode_work(shape: Mapping[str, Any], rows: int, prompts: int, width: int) -> tuple[float, float, float]:
    """(bytes that a decoding step reads on average, FLOPs of it, FLOPs of reading the prompts); numbers of `width`."""
    layers, head = weights(shape)
    slot = 2 * shape["num_layers"] * shape["num_kv_heads"] * shape["head_dim"]
    read = float(width) * (layers + head + rows * slot * (PROMPT + NEW / 2))
    return read, 2.0 * rows * (layers + head), 2.0 * (prompts * PROMPT * layers + prompts * head)


def forward_flops(shape: Mapping[str, Any], rows: int, prompts: int, *, head: bool = True) -> float:
    """One pass over `rows` completions of `prompts` prompts, with log-probabilities of the completions or without."""
    layers, unembed = weights(shape)
    return 2.0 * (layers * (prompts * PROMPT + rows * NEW) + (unembed * rows * NEW if head else 0))


def rows_of(figure: str, sizes: Sizes) -> int:
    """Completions of a step."""
    return {"generate": sizes.sampled, "grpo-iteration": sizes.prompts * sizes.group}.get(figure, sizes.ppo)


def least_seconds(
    shape: Mapping[str, Any], figure: str, sizes: Sizes, peak: float, bandwidth: float, width: int = 4
) -> float:
    """See the module's docstring. width: bytes of a number that is multiplied."""
    rows = rows_of(figure, sizes)
    prompts = sizes.prompts if figure == "grpo-iteration" else rows
    read, flops, prefill = decode_work(shape, rows, prompts, width)
    decode = (NEW - 1) * max(read / bandwidth, flops / peak) + prefill / peak  # the prompt gives the first token
    actor, critic = forward_flops(shape, rows, prompts), forward_flops(shape, rows, prompts, head=False)
    learn = {
        "generate": 0.0,
        "ppo-update": 3 * (actor + critic),
        "ppo-iteration": actor + critic + 3 * (actor + critic),
        "grpo-iteration": actor + 3 * actor,
    }[figure]
    return (0.0 if figure == "ppo-update" else decode) + learn / peak


# --- our side ---------------------------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace) -> Case:
    """Models, state and compiled functions of one figure, warmed up."""
    import jax

    from rljax import groups, iteration, methods, models, program, rewards, settings

    sizes, shape = sizes_of(options.shape, options.scale), SHAPES[options.shape]
    how = {"compute_dtype": machine.jax_dtype(), "remat": options.remat}
    how["unroll"] = machine.layers_at_once(options.unroll, shape["num_layers"])
    policy = models.build(models.ModelConfig(**shape, max_positions=2048, **how))
    dtype = machine.jax_dtype() if options.figure == "generate" else "float32"
    params = jax.jit(lambda key: jax.tree.map(lambda x: x.astype(dtype), policy.init(key)))(jax.random.key(0))
    run = experiment(options, sizes)
    drawn, mesh = settings.sampling(run, stop_ids=()), program.make_mesh(run)
    if isinstance(run, settings.PPO):
        critic = jax.jit(models.reward_model(policy).init)(jax.random.key(1))
        method = methods.ppo(run, policy, params, (policy, critic), drawn)
    else:
        shares = groups.shares(run, mesh.shape["data"] * mesh.shape["fsdp"])
        method = methods.policy_gradient(run, policy, params, drawn, shares)
    optimizer, _ = program.make_optimizer(run)
    asked = rewards.as_rewards(run.reward)  # pyright: ignore[reportArgumentType]
    parts = iteration.build(run, policy, method, optimizer, asked, settings=drawn)
    with jax.set_mesh(mesh):
        prompts = random_prompts(run.batch, shape["vocab_size"])
        if options.figure == "generate":
            step, compiled, seconds = _generate(parts, params, prompts)
        else:
            learner = iteration.init_learner(method.params, optimizer)
            learner, shardings = program.place_state(learner, models.RULES, mesh)
            ready = _update if options.figure == "ppo-update" else _iteration
            step, compiled, seconds = ready(run, parts, learner, shardings, params, prompts)
        for _ in range(options.warm_up):
            step()
    return Case(step, {"compile_seconds": seconds, **_memory(compiled)})


def experiment(options: argparse.Namespace, sizes: Sizes) -> Any:
    """The settings of the figure: PPO's and GRPO's own defaults, one update an iteration."""
    from rljax import presets, settings

    common: dict[str, Any] = {
        "model": "random",
        "data": "random",
        "reward": even_tokens() if options.reward == "device" else even_tokens_on_host,
        "max_prompt": PROMPT,
        "max_completion": NEW,
        "epochs": 1,
        "learning_rate": 1e-6,
        "steps": 10_000,
    }
    if options.figure == "grpo-iteration":
        return presets.grpo(**common, batch=sizes.prompts, group=sizes.group)
    if options.figure == "generate":  # of any run: sampling does not depend on what is learned from it
        return settings.PolicyGradient(**common, batch=sizes.sampled, group=1)
    return settings.PPO(**common, batch=sizes.ppo)


def even_tokens() -> Any:
    """The share of tokens with an even number, as a reward on the device."""
    import jax.numpy as jnp

    from rljax import rewards

    def even(tokens: Any) -> Any:
        return jnp.where(tokens.mask, tokens.ids % 2 == 0, 0).sum(1) / jnp.maximum(tokens.mask.sum(1), 1)

    return rewards.on_device(even, name="even")


def even_tokens_on_host(prompts: Any, completions: Any, completion_ids: Any) -> list[float]:
    """The same as a reward on the host."""
    del prompts, completions
    return [float((ids % 2 == 0).mean()) for ids in completion_ids]


def random_prompts(rows: int, vocab: int) -> Any:
    import jax
    import jax.numpy as jnp

    from rljax.types import Tokens

    ids = jax.random.randint(jax.random.key(1), (rows, PROMPT), 0, vocab)
    return Tokens(ids=ids, segments=jnp.ones_like(ids), mask=jnp.zeros(ids.shape, bool))


def _compile(fn: Any, *args: Any, **how: Any) -> tuple[Any, float]:
    import jax

    start = time.perf_counter()
    return jax.jit(fn, **how).lower(*args).compile(), time.perf_counter() - start


def _generate(parts: Any, params: Any, prompts: Any) -> tuple:
    import jax

    sample, seconds = _compile(parts.sample, params, prompts, jax.random.key(0))
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        jax.block_until_ready(sample(params, prompts, jax.random.fold_in(jax.random.key(0), count)))

    return step, sample, seconds


def _update(run: Any, parts: Any, learner: Any, shardings: Any, reference: Any, prompts: Any) -> tuple:
    """`learn` on one rollout, again and again."""
    import jax
    import jax.numpy as jnp

    from rljax.iteration import Verdict

    key, params = jax.random.key(0), learner.train.params
    rollout = jax.jit(parts.sample)(params, prompts, key)
    notes = jax.jit(parts.annotate)(params, reference, rollout)
    verdict = Verdict(total=jnp.arange(run.batch) % 2.0, parts={})  # pyright: ignore[reportCallIssue]
    out = (shardings, None, None)
    given = (learner, rollout, notes, verdict, None, key)
    learn, seconds = _compile(parts.learn, *given, donate_argnums=0, out_shardings=out)

    def step() -> None:
        nonlocal learner
        learner, metrics, _ = learn(learner, rollout, notes, verdict, None, key)
        jax.block_until_ready((learner, metrics))

    return step, learn, seconds


def _iteration(run: Any, parts: Any, learner: Any, shardings: Any, reference: Any, prompts: Any) -> tuple:
    import jax

    from rljax import rewards

    if not rewards.as_rewards(run.reward)[0].on_device:
        return _iteration_in_parts(run, parts, learner, shardings, reference, prompts)
    given = (learner, reference, (None,), prompts, None, jax.random.key(0))
    out = (shardings, None, None)
    whole, seconds = _compile(parts.whole, *given, donate_argnums=0, out_shardings=out)

    def step() -> None:
        nonlocal learner
        key = jax.random.fold_in(jax.random.key(0), learner.iterations)
        learner, metrics, _ = whole(learner, reference, (None,), prompts, None, key)
        jax.block_until_ready((learner, metrics))

    return step, whole, seconds


def _iteration_in_parts(run: Any, parts: Any, learner: Any, shardings: Any, reference: Any, prompts: Any) -> tuple:
    """As the program does it for rewards on the host, which are judged while the device annotates."""
    import jax
    import numpy as np

    from rljax import collect, rewards
    from rljax.iteration import Verdict

    asked, key, params = rewards.as_rewards(run.reward), jax.random.key(0), learner.train.params
    rows = run.batch * run.group
    texts, asked_ids = [""] * rows, list(np.asarray(prompts.ids).repeat(run.group, axis=0))
    sample, first = _compile(parts.sample, params, prompts, key)
    rollout = jax.eval_shape(parts.sample, params, prompts, key)
    annotate, second = _compile(parts.annotate, params, reference, rollout)
    notes = jax.eval_shape(parts.annotate, params, reference, rollout)
    row = jax.ShapeDtypeStruct((rows,), np.float32)
    whole_rows = jax.ShapeDtypeStruct(rollout.logps.shape, np.float32)
    verdict: Any = Verdict(total=row, parts={asked[0].name: row}, per_token=whole_rows)  # pyright: ignore
    out = (shardings, None, None)
    given = (learner, rollout, notes, verdict, None, key)
    learn, third = _compile(parts.learn, *given, donate_argnums=0, out_shardings=out)

    def step() -> None:
        nonlocal learner
        key, params = jax.random.fold_in(jax.random.key(0), learner.iterations), learner.train.params
        rollout = sample(params, prompts, key)
        notes = annotate(params, reference, rollout)
        ids, mask = np.asarray(rollout.tokens.ids), np.asarray(rollout.tokens.mask)
        completions = [row[where] for row, where in zip(ids, mask, strict=True)]
        judging = rewards.start(asked, texts, texts, fields={}, prompt_ids=asked_ids, completion_ids=completions)
        verdict = jax.device_put(collect.verdict_of(judging.result(timeout=600), mask))
        learner, metrics, _ = learn(learner, rollout, notes, verdict, None, key)
        jax.block_until_ready((learner, metrics))

    return step, learn, first + second + third


def _memory(compiled: Any) -> dict[str, Any]:
    plan = compiled.memory_analysis()
    total = plan.temp_size_in_bytes + plan.argument_size_in_bytes + plan.output_size_in_bytes
    return {
        "compiled_bytes": total - plan.alias_size_in_bytes,
        "alias_bytes": plan.alias_size_in_bytes,
        "temporary_bytes": plan.temp_size_in_bytes,
    }


def work(options: argparse.Namespace) -> None:
    """One figure in this process, step by step as `main` asks."""
    from rljax import allocator

    kept = allocator.keep_memory()  # as `rljax run` does
    case, dtype = prepare(options), machine.jax_dtype()
    facts = {
        "versions": machine.versions("jax", "jaxlib", "flax", "optax"),
        "dtype": dtype,
        "keeps_memory": kept,
        **case.facts,
    }
    machine.serve(facts, case.step, peak=machine.jax_matmul_peak(dtype), bandwidth=machine.bandwidth())


# --- figures ----------------------------------------------------------------------------------------------------------


def figures(name: str, figure: str, sizes: Sizes, worker: machine.Worker) -> dict[str, Any]:
    """What one worker measured. name: of the shape."""
    shape, rows, seconds = SHAPES[name], rows_of(figure, sizes), worker.median("seconds")
    peak, bandwidth = worker.median("peak"), worker.median("bandwidth")
    width = 4 if worker.facts["dtype"] == "float32" else 2
    tokens = rows * (NEW if figure == "generate" else PROMPT + NEW)
    return {
        "seconds": seconds,
        "seconds_best": worker.best("seconds"),
        **{name: worker.median(name) for name in ("cpu_seconds", "system_seconds", "page_faults")},
        "rounds": len(worker.rounds),
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_best": tokens / worker.best("seconds"),
        "roofline_fraction": least_seconds(shape, figure, sizes, peak, bandwidth, width) / seconds,
        "matmul_peak": peak,
        "bandwidth": bandwidth,
        "logits_bytes": 4 * rows * (PROMPT + NEW) * shape["vocab_size"],
        **worker.facts,
    }


def measure(options: argparse.Namespace, figure: str) -> None:
    """Print one figure."""
    sizes = sizes_of(options.shape, options.scale)
    case = ["--shape", options.shape, "--scale", str(options.scale), "--figure", figure, "--reward", options.reward]
    how = ["--remat", options.remat, "--unroll", options.unroll, "--warm-up", str(options.warm_up), "--worker"]
    settings = {"remat": options.remat, "unroll": options.unroll, "reward": options.reward}
    env = machine.MALLOC[options.malloc]
    with machine.worker([sys.executable, __file__, *case, *how], options.cores, env) as ours:
        machine.take_turns([ours], options.rounds)
        machine.emit(
            library="rljax",
            **{"shape": options.shape, "figure": figure, "sizes": sizes._asdict(), **settings},
            cores=options.cores or os.cpu_count(),
            malloc=options.malloc,
            **figures(options.shape, figure, sizes, ours),
            **machine.description(),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--figure", choices=(*FIGURES, "all"), default="all")
    parser.add_argument("--scale", type=int, default=1, help="that many times the batch of `shapes.py`")
    parser.add_argument("--rounds", type=int, default=9, help="steps measured, one per round")
    machine.add_layers(parser)
    parser.add_argument("--reward", choices=("device", "host"), default="device")
    parser.add_argument("--cores", type=int, help="pin to so many cores; with 1, cpu_seconds is fair on a busy machine")
    machine.add_malloc(parser)
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the first that is measured")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    for figure in FIGURES if options.figure == "all" else (options.figure,):
        measure(options, figure)


if __name__ == "__main__":
    main()
