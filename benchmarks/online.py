"""Speed and memory of the online half: sampling, PPO's update, whole iterations of PPO and GRPO, one JSON line each.

    python benchmarks/online.py --shape tiny
    python benchmarks/online.py --shape 135M --figure ppo-update --against trl --trl-python PYTHON

A prompt has 64 tokens, a completion 64 more, all of them sampled: nothing stops early. Weights are random, float32.

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
2 FLOPs per weight of a layer and token forward, 4 backward, the unembedding at trained tokens only; attention scores
are not counted. Where weights fit into a cache, decoding can beat the memory's bandwidth.

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
from offline import SHAPES

PROMPT, NEW = 64, 64
FIGURES = ("generate", "ppo-update", "ppo-iteration", "grpo-iteration")
AGAINST = {"generate": "generate", "ppo-update": "ppo", "ppo-iteration": "ppo", "grpo-iteration": "grpo"}


class Sizes(NamedTuple):
    """Rows of a batch."""

    sampled: int  # of `generate`
    ppo: int
    prompts: int  # of GRPO, each answered `group` times
    group: int


SIZES = {"toy": Sizes(4, 4, 2, 2), "tiny": Sizes(16, 16, 4, 4), "135M": Sizes(16, 4, 2, 2)}


class Case(NamedTuple):
    step: Callable[[], Any]  # one whole step; returns when it is done
    facts: dict[str, Any]  # compile time and memory


# --- what the machine would take at best ------------------------------------------------------------------------------


def weights(shape: Mapping[str, Any]) -> tuple[int, int]:
    """Weights in products of a token: (of all layers, of the unembedding)."""
    s = shape
    attention = 2 * s["hidden_size"] * s["head_dim"] * (s["num_heads"] + s["num_kv_heads"])
    layers = s["num_layers"] * (attention + 3 * s["hidden_size"] * s["intermediate_size"])
    return layers, s["hidden_size"] * s["vocab_size"]


def decode_work(shape: Mapping[str, Any], rows: int, prompts: int) -> tuple[float, float, float]:
    """(bytes that a decoding step reads on average, FLOPs of it, FLOPs of reading the prompts)."""
    layers, head = weights(shape)
    slot = 2 * shape["num_layers"] * shape["num_kv_heads"] * shape["head_dim"]
    read = 4.0 * (layers + head + rows * slot * (PROMPT + NEW / 2))
    return read, 2.0 * rows * (layers + head), 2.0 * (prompts * PROMPT * layers + prompts * head)


def forward_flops(shape: Mapping[str, Any], rows: int, *, head: bool = True) -> float:
    """One pass over `rows` rows, with log-probabilities of their completions or without."""
    layers, unembed = weights(shape)
    return 2.0 * rows * (layers * (PROMPT + NEW) + (unembed * NEW if head else 0))


def least_seconds(shape: Mapping[str, Any], figure: str, sizes: Sizes, peak: float, bandwidth: float) -> float:
    """See the module's docstring."""
    rows = {"generate": sizes.sampled, "grpo-iteration": sizes.prompts * sizes.group}.get(figure, sizes.ppo)
    read, flops, prefill = decode_work(shape, rows, sizes.prompts if figure == "grpo-iteration" else rows)
    decode = (NEW - 1) * max(read / bandwidth, flops / peak) + prefill / peak  # the prompt gives the first token
    actor, critic = forward_flops(shape, rows), forward_flops(shape, rows, head=False)
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

    from rljax import iteration, methods, models, program, rewards, settings

    sizes, accelerated = SIZES[options.shape], jax.default_backend() != "cpu"
    shape = SHAPES[options.shape]
    how = {
        "compute_dtype": "bfloat16" if accelerated else "float32",
        "remat": options.remat,
        "unroll": options.unroll or shape["num_layers"],
    }
    policy = models.build(models.ModelConfig(**shape, max_positions=2048, **how))
    params = policy.init(jax.random.key(0))
    run = experiment(options, sizes)
    drawn = settings.sampling(run, stop_ids=())
    if options.figure == "grpo-iteration":
        method = methods.policy_gradient(run, policy, params, drawn)
    else:
        critic = jax.jit(models.reward_model(policy).init)(jax.random.key(1))
        method = methods.ppo(run, policy, params, (policy, critic), drawn)
    optimizer, _ = program.make_optimizer(run)
    mesh = program.make_mesh(run)
    asked = rewards.as_rewards(run.reward)
    parts = iteration.build(run, policy, method, optimizer, asked, settings=drawn)
    with jax.set_mesh(mesh):
        learner, shardings = program.place_state(iteration.init_learner(method.params, optimizer), models.RULES, mesh)
        prompts = random_prompts(run.batch, shape["vocab_size"])
        ready = {"generate": _generate, "ppo-update": _update}.get(options.figure, _iteration)
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
    return settings.PPO(**common, batch=sizes.sampled if options.figure == "generate" else sizes.ppo)


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


def _generate(run: Any, parts: Any, learner: Any, shardings: Any, reference: Any, prompts: Any) -> tuple:
    import jax

    del run, shardings, reference
    params = {"policy": learner.train.params["policy"]}
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
        judging = rewards.start(asked, [""] * rows, [""] * rows, fields={}, completion_ids=completions)
        verdict = jax.device_put(collect.verdict_of(judging.result(), mask))
        learner, metrics, _ = learn(learner, rollout, notes, verdict, None, key)
        jax.block_until_ready((learner, metrics))

    return step, learn, first + second + third


def _memory(compiled: Any) -> dict[str, Any]:
    import jax

    plan = compiled.memory_analysis()
    total = plan.temp_size_in_bytes + plan.argument_size_in_bytes + plan.output_size_in_bytes
    found = {
        "compiled_bytes": total - plan.alias_size_in_bytes,
        "alias_bytes": plan.alias_size_in_bytes,
        "temporary_bytes": plan.temp_size_in_bytes,
    }
    device = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in device:
        found["device_peak_bytes"] = device["peak_bytes_in_use"]
    return {**found, "peak_rss_bytes": machine.peak_rss()}


def work(options: argparse.Namespace) -> None:
    """One figure in this process, step by step as `main` asks."""
    import jax

    case = prepare(options)
    facts = {"versions": machine.versions("jax", "jaxlib", "flax", "optax"), **case.facts}
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    machine.serve(facts, case.step, peak=machine.jax_matmul_peak(dtype), bandwidth=machine.bandwidth())


# --- figures ----------------------------------------------------------------------------------------------------------


def figures(options: argparse.Namespace, worker: machine.Worker) -> dict[str, Any]:
    """What one worker measured."""
    shape, sizes, seconds = SHAPES[options.shape], SIZES[options.shape], worker.median("seconds")
    rows = {"generate": sizes.sampled, "grpo-iteration": sizes.prompts * sizes.group}.get(options.figure, sizes.ppo)
    peak, bandwidth = worker.median("peak"), worker.median("bandwidth")
    tokens = rows * (NEW if options.figure == "generate" else PROMPT + NEW)
    return {
        "seconds": seconds,
        "seconds_best": worker.best("seconds"),
        "cpu_seconds": worker.median("cpu_seconds"),
        "rounds": len(worker.rounds),
        "tokens_per_second": tokens / seconds,
        "tokens_per_second_best": tokens / worker.best("seconds"),
        "roofline_fraction": least_seconds(shape, options.figure, sizes, peak, bandwidth) / seconds,
        "matmul_peak": peak,
        "bandwidth": bandwidth,
        "logits_bytes": 4 * rows * (PROMPT + NEW) * shape["vocab_size"],
        **worker.facts,
    }


def measure(options: argparse.Namespace) -> None:
    """Print one figure, and with `--against trl` TRL's and the ratio of the two."""
    sizes = SIZES[options.shape]._asdict()
    label = {"shape": options.shape, "figure": options.figure, "sizes": sizes}
    case = ["--shape", options.shape, "--figure", options.figure]
    how = ["--remat", options.remat, "--unroll", str(options.unroll), "--reward", options.reward]
    commands = [[sys.executable, __file__, *case, *how, "--worker"]]
    if options.against == "trl":
        commands.append([options.trl_python, __file__.replace("online.py", "trl_online.py"), *case])
    with machine.workers(*commands, cores=options.cores, huge_pages=options.huge_pages) as started:
        machine.take_turns(started, options.rounds)
        ours, *theirs = started
        settings = {
            "remat": options.remat,
            "unroll": options.unroll or "all",
            "reward": options.reward,
            "cores": options.cores or os.cpu_count(),
            "huge_pages": options.huge_pages,
        }
        machine.emit(library="rljax", **label, **settings, **figures(options, ours), **machine.description())
        for other in theirs:
            machine.emit(library="trl", **label, **figures(options, other), **machine.description())
            machine.emit(ratio="rljax / trl, seconds", **label, **machine.ratios(ours, other))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--figure", choices=(*FIGURES, "all"), default="all")
    parser.add_argument("--rounds", type=int, default=9, help="steps measured, one per round")
    parser.add_argument("--remat", choices=("none", "dots", "full"), default="dots")
    parser.add_argument("--unroll", type=int, default=1, help="layers per step of the scan over layers; 0: all")
    parser.add_argument("--reward", choices=("device", "host"), default="device")
    parser.add_argument("--cores", type=int, help="pin to so many cores; with 1, cpu_seconds is fair on a busy machine")
    parser.add_argument(
        "--huge-pages", action="store_true", help="GLIBC_TUNABLES=glibc.malloc.hugetlb=1 in the workers"
    )
    parser.add_argument("--against", choices=("trl",), help="take turns with TRL")
    parser.add_argument("--trl-python", default="python", help="an interpreter that has torch and trl (1.12 for PPO)")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before the first that is measured")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    for figure in FIGURES if options.figure == "all" else (options.figure,):
        measure(argparse.Namespace(**{**vars(options), "figure": figure}))


if __name__ == "__main__":
    main()
