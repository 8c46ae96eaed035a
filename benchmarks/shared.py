"""No prompt twice: an update with shared prompts against the same update on plain rows, one JSON line per figure.

    python benchmarks/shared.py --shape tiny --own 64 --prompts 64 256 1024

`pairs` is a DPO update (chosen and rejected share their prompt), `group` a policy-gradient update on `--group`
completions of each prompt. Both kinds of step are compiled in one process and take turns, float32 on a CPU; `ratio` is
the median of the ratios of neighbouring steps, below 1 where sharing is faster. `tokens` is the same ratio of tokens,
and `temporary` of the bytes that the compiler planned for what it computes in between.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from typing import Any

import machine
from shapes import SHAPES


def batches(options: argparse.Namespace, prompt: int, vocab: int) -> dict[str, Any]:
    """{kind: a batch of --prompts-a-step prompts with completions that fill their columns}."""
    import jax
    import jax.numpy as jnp

    from rljax.types import PolicyBatch, PreferenceBatch, Tokens

    def tokens(n: int) -> Tokens:
        start = jax.random.randint(jax.random.key(0), (options.rows, 1, prompt), 0, vocab)
        own = jax.random.randint(jax.random.key(n), (options.rows, n, options.own), 0, vocab)
        ids = jnp.concatenate([jnp.broadcast_to(start, (options.rows, n, prompt)), own], axis=2)
        ids = ids.reshape(options.rows * n, -1)
        mask = jnp.broadcast_to(jnp.arange(ids.shape[1]) >= prompt, ids.shape)
        return Tokens(ids=ids, segments=jnp.ones_like(ids), mask=mask)

    two, many = tokens(2), tokens(options.group)
    chosen, rejected = (jax.tree.map(lambda x, i=i: x[i::2], two) for i in (0, 1))
    ref = jnp.full(options.rows, -6.9 * options.own)
    logps = jnp.where(many.mask, -6.9, 0.0)
    return {
        "pairs": PreferenceBatch(chosen=chosen, rejected=rejected, ref_chosen_logps=ref, ref_rejected_logps=ref + 0.0),
        "group": PolicyBatch(tokens=many, old_logps=logps, advantages=jnp.where(many.mask, 1.0, 0.0)),
    }


def losses_of(kind: str, options: argparse.Namespace, model: Any) -> dict[bool, Any]:
    """{whether prompts are shared: the objective}."""
    from rljax import losses, models, objectives, views
    from rljax.filters import Sampling

    if kind == "pairs":
        dpo = functools.partial(objectives.preference, model, functools.partial(losses.dpo_loss, beta=0.1))
        return {share: dpo(max_trained=options.own, share_prompts=share) for share in (False, True)}

    def policy(n: int) -> Any:
        seen = models.share_prompts(model, n=n, completion=options.own)
        return objectives.policy(views.of_policy(seen, sampling=Sampling(), max_trained=options.own))

    return {False: policy(1), True: policy(options.group)}


def measure(kind: str, prompt: int, options: argparse.Namespace) -> None:
    """Print the figure of one kind of update with prompts of one length."""
    import jax
    import optax

    from rljax import models, train

    shape = SHAPES[options.shape]
    config = models.ModelConfig(**shape, max_positions=prompt + options.own, remat="dots")
    model = models.build(config)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6))
    batch = batches(options, prompt, config.vocab_size)[kind]
    n = 2 if kind == "pairs" else options.group
    updates, states, temporary = {}, {}, {}
    for shared, loss_fn in losses_of(kind, options, model).items():
        states[shared] = train.init_state(model.init(jax.random.key(0)), optimizer)
        updates[shared] = train.make_update(loss_fn, optimizer).lower(states[shared], batch).compile()
        temporary[shared] = updates[shared].memory_analysis().temp_size_in_bytes

    def step(shared: bool) -> float:
        start = time.perf_counter()
        states[shared], metrics = updates[shared](states[shared], batch)
        jax.block_until_ready((states[shared], metrics))
        return time.perf_counter() - start

    step(False), step(True)
    rounds = [(step(False), step(True)) for _ in range(options.rounds)]
    machine.emit(
        update=kind,
        shape=options.shape,
        prompts=options.rows,
        completions=n,
        prompt=prompt,
        own=options.own,
        rounds=options.rounds,
        plain_seconds=statistics.median(plain for plain, _ in rounds),
        shared_seconds=statistics.median(shared for _, shared in rounds),
        ratio=statistics.median(shared / plain for plain, shared in rounds),
        tokens=(prompt + n * options.own) / (n * (prompt + options.own)),
        temporary=temporary[True] / temporary[False],
        **machine.description(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--own", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--prompts", type=int, nargs="+", default=[64, 256, 1024], help="tokens of a prompt")
    parser.add_argument("--rows", type=int, default=4, help="prompts of a step")
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt, in `group`")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    for kind in ("pairs", "group"):
        for prompt in options.prompts:
            measure(kind, prompt, options)


if __name__ == "__main__":
    main()
