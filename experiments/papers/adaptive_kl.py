"""The adaptive KL controller reaches its target from a coefficient that is ten times too small or too large.

Paper   Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", arXiv:1909.08593, section 2.2: e =
        clip(KL / target − 1, −0.2, 0.2), β ← β (1 + K_β e), K_β = 0.1.
Claim   "We use a log-space proportional controller to vary β, so that KL(π, ρ) is near the target": a fixed β ends at
        another KL for every task and start.
Set-up  The transformer of `_tiny.py` learns by PPO: the reward is 5 times the mean valence of its words, by a random
        lexicon in [0, 1]. Target 6 nats, 32 episodes an iteration, horizon 320, so that K_β = 0.1; Adam 5e-3,
        2 epochs; 300 iterations (200 in --quick), from β = 0.01 and 1, and, in full, the same with β fixed. KL is the
        program's metric `objective/kl`, its mean over the last 50 iterations. It shows the control loop with a policy
        that learns at the same time; not that 6 nats are a good target.
Run     rljax reproduce adaptive_kl   (36 s on 2 × x86_64, cpu)
Pass    From both starts the KL is within 20% of the target over the last 50 iterations; with β fixed it is more than
        20% off for both (not run in --quick). Three seeds. In a first run the reward counted words: the KL swung, and
        from β = 0.01 it was 10 instead of 6. The mean valence replaced it.
Got     KL from β = 0.01: 6.063 (6.235, 5.99, 5.964); KL from β = 1: 6.04 (6.024, 6.105, 5.991); β = 0.01, fixed, does
        not: 3.349 (3.405, 3.165, 3.476); β = 1, fixed, does not: 0.984 (0.9866, 0.9826, 0.9827).
"""

import dataclasses
import functools

import _tiny as tiny
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rljax import online, papers
from rljax.types import Tokens

TARGET, STARTS, LAST = 6.0, (0.01, 1.0), 50
COLORS = dict(zip(STARTS, ("#0072B2", "#D55E00"), strict=True))


def reward(tokens: Tokens) -> Array:
    return 5.0 * tiny.valence(tokens)


def control(key: Array, start: Array, horizon: Array, *, steps: int) -> dict[str, Array]:
    """{"kl", "coefficient"}: [steps]; an infinite horizon leaves β as it is."""
    run = online.PPO(**tiny.SETTINGS, reward=reward, batch=32, epochs=2, steps=steps, kl_target=TARGET, value_coef=0.5)
    run = dataclasses.replace(run, kl_reward=start, kl_horizon=horizon)
    _, metrics, _ = tiny.learn(key, run, 5e-3, reward)
    return {"kl": metrics["objective/kl"], "coefficient": metrics["objective/kl_coef"]}


def reproduce(*, seeds: int, quick: bool) -> papers.Result:
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    over_starts = jax.vmap(functools.partial(control, steps=200 if quick else 300), (None, 0, None))
    over_both = jax.vmap(over_starts, (None, None, 0))
    horizons = jnp.array([320.0] if quick else [320.0, jnp.inf])
    got = jax.device_get(jax.jit(jax.vmap(over_both, (0, None, None)))(keys, jnp.array(STARTS), horizons))
    ends = got["kl"][..., -LAST:].mean(-1)  # [seeds, horizons, starts]
    checks = [
        papers.near(f"KL from β = {start:g}", "nats", ends[:, 0, i], TARGET, 0.2 * TARGET)
        for i, start in enumerate(STARTS)
    ]
    for i, start in enumerate(() if quick else STARTS):
        off = np.abs(ends[:, 1, i] / TARGET - 1)
        checks.append(papers.at_least(f"β = {start:g}, fixed, does not", "|KL / target − 1|", off, 0.2))
    return papers.Result(checks, {"KL and its coefficient, over iterations of PPO": draw(got)})


def draw(got: dict[str, np.ndarray]):
    drawn, ((left, right),) = papers.figure(1, 2)
    steps = np.arange(1, got["kl"].shape[-1] + 1)
    left.axhspan(0.8 * TARGET, 1.2 * TARGET, color="#999999", alpha=0.25, linewidth=0, label="target ± 20%")
    for i, start in enumerate(STARTS):
        for j, how in enumerate(("-", ":")[: got["kl"].shape[1]]):
            label = f"β = {start:g}, fixed" if j else f"β from {start:g}"
            papers.band(left, steps, got["kl"][:, j, i], label, COLORS[start], linestyle=how)
            papers.band(right, steps, got["coefficient"][:, j, i], label, COLORS[start], linestyle=how)
    left.set(xlabel="iteration", ylabel="KL(π ‖ π_ref) [nats]")
    right.set(xlabel="iteration", ylabel="β", yscale="log")
    right.legend(loc="upper right", bbox_to_anchor=(1.0, 0.95))
    return drawn
