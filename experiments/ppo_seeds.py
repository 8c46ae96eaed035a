"""Sixteen seeds of PPO, at two learning rates, in one compiled program: curves with their confidence bands.

A random transformer of one layer learns to count: the reward of a completion is the share of its tokens that are one
more than the token before. The reward is a JAX function, so a whole iteration (sample, judge, advantages, epochs of
minibatches) is one pure function, `iteration.build(...).whole`; a run is a `lax.scan` of it, and all runs together are
its `vmap` over seeds and learning rates.

    rljax run experiments/ppo_seeds.py

All 32 runs of 150 iterations take two minutes on one busy CPU core, compiling included. Expected: all seeds learn it,
the higher learning rate sooner. Reward at first, and at last with its 95% interval over 16 seeds (the curves are in
runs/ppo_seeds/curves.png):

    learning rate 0.001    0.060    0.821 ± 0.026    seeds from 0.734 to 0.911    KL 29.8 nats
    learning rate 0.003    0.060    0.782 ± 0.044    seeds from 0.518 to 0.859    KL 32.4 nats
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import scipy.stats
from jax import Array
from matplotlib.figure import Figure

from rljax import critics, filters, iteration, methods, models, online, plots, rewards
from rljax.types import Tokens

VOCAB, PROMPT, COMPLETION = 16, 2, 12
MODEL = models.build(
    models.ModelConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_layers=1,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        max_positions=PROMPT + COMPLETION,
    )
)


@rewards.on_device
def counts(tokens: Tokens) -> Array:
    """The share of the completion's tokens that are one more than the token before (after the last comes 0)."""
    follows = tokens.ids == (jnp.roll(tokens.ids, 1, axis=1) + 1) % VOCAB
    return jnp.sum(follows & tokens.mask, axis=1) / COMPLETION


def curves(key: Array, learning_rate: Array, run: online.PPO) -> dict[str, Array]:
    """{"reward", "kl"}: [steps] of one run, whose weights, prompts and samples are those of its key."""
    params = MODEL.init(jax.random.fold_in(key, 0))
    head = models.scalar_head(MODEL.config.hidden_size).init(jax.random.fold_in(key, 1))
    drawn = filters.Sampling()
    method = methods.ppo(run, MODEL, params, critics.Critic(MODEL, {"model": params, "head": head}), drawn)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))
    whole = iteration.build(run, MODEL, method, optimizer, (counts,), settings=drawn).whole

    def step(learner: iteration.Learner, key: Array) -> tuple[iteration.Learner, dict[str, Array]]:
        ids = jax.random.randint(key, (run.batch, PROMPT), 0, VOCAB)
        prompts = Tokens(ids=ids, segments=jnp.ones_like(ids), mask=jnp.zeros(ids.shape, bool))
        learner, metrics, _ = whole(learner, params, (None,), prompts, None, jax.random.fold_in(key, 1))
        return learner, {"reward": metrics["objective/scores"].value(), "kl": metrics["objective/kl"].value()}

    start = iteration.init_learner(method.params, optimizer)
    return jax.lax.scan(step, start, jax.random.split(jax.random.fold_in(key, 2), run.steps))[1]


def sweep(run: online.PPO, *, seeds: int, learning_rates: tuple[float, ...]) -> dict[str, np.ndarray]:
    """{"reward", "kl"}: [learning rate, seed, step], all in one program."""
    over_seeds = jax.vmap(functools.partial(curves, run=run), in_axes=(0, None))
    over_both = jax.jit(jax.vmap(over_seeds, in_axes=(None, 0)))
    return jax.device_get(over_both(jax.random.split(jax.random.key(run.seed), seeds), jnp.asarray(learning_rates)))


def band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mean, half the width of its 95% confidence interval by Student's t): [seed, step] -> [step] each."""
    n = len(values)
    error = values.std(axis=0, ddof=1) / np.sqrt(n)
    return values.mean(axis=0), scipy.stats.t.ppf(0.975, n - 1) * error


def plot(found: Mapping[str, np.ndarray], learning_rates: tuple[float, ...], path: pathlib.Path) -> None:
    """Reward and KL against iterations: every run pale, the mean of the seeds and its confidence band on top."""
    with matplotlib.rc_context(plots.STYLE):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(9.8, 3.6), layout="constrained")
        for panel, (name, label) in zip(
            figure.subplots(1, 2),
            (("reward", "share of tokens that count on"), ("kl", "KL to the start [nats]")),
            strict=True,
        ):
            for rate, values, colour in zip(learning_rates, found[name], plots.COLORS, strict=False):
                steps = np.arange(1, values.shape[1] + 1)
                mean, half = band(values)
                panel.plot(steps, values.T, color=colour, linewidth=0.6, alpha=0.2)
                panel.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.3, linewidth=0)
                panel.plot(steps, mean, color=colour, linewidth=1.8, label=f"learning rate {rate:g}")
            panel.set(title=name, xlabel="iteration", ylabel=label)
            panel.legend(loc="best")
        figure.suptitle(f"PPO, {found['reward'].shape[1]} seeds: mean with its 95% confidence band", fontsize=10.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main(
    *,
    seeds: int = 16,
    steps: int = 150,
    learning_rates: tuple[float, ...] = (1e-3, 3e-3),
    kl_reward: float = 0.005,
    batch: int = 32,
    seed: int = 0,
    out: str = "runs/ppo_seeds",
) -> int:
    """Train all runs at once and draw their curves.

    Args:
        seeds: how many runs for each learning rate (at least 2: there is no confidence in one)
        batch: completions an iteration
    """
    if seeds < 2 or not learning_rates:
        raise ValueError(f"seeds={seeds} must be at least 2, with at least one of learning_rates={learning_rates}")
    run = dataclasses.replace(RUN, steps=steps, batch=batch, kl_reward=kl_reward, seed=seed)
    began = time.perf_counter()
    found = sweep(run, seeds=seeds, learning_rates=learning_rates)
    print(f"{seeds * len(learning_rates)} runs of {steps} iterations: {time.perf_counter() - began:.0f} s\n")
    for rate, reward, kl in zip(learning_rates, found["reward"], found["kl"], strict=True):
        (mean, half), (distance, _) = band(reward), band(kl)
        print(
            f"learning rate {rate:g}: reward {mean[0]:.3f} -> {mean[-1]:.3f} ± {half[-1]:.3f} (seeds from "
            f"{reward[:, -1].min():.3f} to {reward[:, -1].max():.3f}), KL {distance[-1]:.1f} nats"
        )
    path = pathlib.Path(out) / "curves.png"
    plot(found, learning_rates, path)
    print(f"\ncurves: {path}")
    return 0


RUN = online.PPO(
    model="random",
    data="random",
    reward=counts,
    max_prompt=PROMPT,
    max_completion=COMPLETION,
    epochs=2,
    minibatches=2,
    critic="policy",
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
