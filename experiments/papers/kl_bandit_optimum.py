"""Every route to the KL-regularised optimum ends in the same place.

Papers  DPO: Rafailov et al. 2023, arXiv:2305.18290, Section 4: the policy that maximises E[r] − β KL(π‖π_ref) is
        π* ∝ π_ref exp(r/β), and DPO on Bradley-Terry labels has it as its optimum. Online DPO: Guo et al. 2024,
        arXiv:2402.04792. IPO: Azar et al. 2023, arXiv:2310.12036, Section 5 and Eq. 17.
Claim   Policy gradient with the KL in the reward (REINFORCE) or in the loss (PPO, k2), DPO and online DPO reach π*;
        IPO reaches its own, different optimum.
Set-up  One state, five actions, π = softmax of five logits started at π_ref; β = 1.25, τ = 0.25; Adam, cosine.
        "exact": gradients are expectations: sums over actions or ordered pairs, times their probability; 1,000 steps.
        "sampled": 20,000 actions or preferences in all. DPO and IPO have them all from the start (pairs uniform), the
        others draw 100 from the policy in each of 200 steps.
        IPO regresses h = log π_i/π_j − log π_ref,i/π_ref,j on 1/(2τ) where i won and on −1/(2τ) where j won, so on
        (P(i≻j) − ½)/τ on average. numpy solves that weighted least-squares problem, and finds the paper's closed form
        π ∝ π_ref exp(P(y≻μ)/τ), where P(y≻μ) is the chance to win against a uniform opponent.
Run     rljax reproduce kl_bandit_optimum   (4 s on 2 × x86_64, cpu)
Pass    max |π − π*| < 1e-4 with exact gradients; < 0.02 sampled, mean of 3 seeds.
Got     IPO's least squares = closed form: 0; DPO, exact gradients: 0; IPO, exact gradients: 5.96e-08; PPO, exact
        gradients: 1.49e-08; REINFORCE, exact gradients: 4.657e-08; online DPO, exact gradients: 1.89e-06; DPO, 20,000
        samples: 0.007345 (0.0111, 0.007576, 0.003359); IPO, 20,000 samples: 0.003715 (0.005396, 0.003099, 0.00265);
        PPO, 20,000 samples: 0.006732 (0.00908, 0.007675, 0.00344); REINFORCE, 20,000 samples: 0.001291 (0.001436,
        0.00133, 0.001107); online DPO, 20,000 samples: 0.008636 (0.00375, 0.006942, 0.01522).
Note    REINFORCE does best because the noise of its gradient vanishes at π*: r − β log π*/π_ref is constant there.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rljax import advantages, losses, papers, plots, train
from rljax.types import LossFn, Mean, Metrics, Params, TrainState

REWARDS = jnp.array([1.2, -2.0, 2.0, 0.0, -0.6])
REF_LOGPS = jnp.log(jnp.array([0.15, 0.10, 0.10, 0.35, 0.30]))
BETA, TAU = 1.25, 0.25
WINS = jax.nn.sigmoid(REWARDS[:, None] - REWARDS[None])  # [i j]: P(i ≻ j), Bradley and Terry
PAIRS = (1 - jnp.eye(5)) / 20  # [i j]: ordered pairs of different actions, all as likely


def ipo_tilt() -> np.ndarray:
    """log π/π_ref of IPO's optimum, up to a constant: weighted least squares over the pairs, minimum norm."""
    i, j = np.nonzero(np.asarray(PAIRS))
    weights = np.sqrt(np.asarray(PAIRS)[i, j])
    targets = (np.asarray(WINS)[i, j] - 0.5) / TAU
    return np.linalg.lstsq((np.eye(5)[i] - np.eye(5)[j]) * weights[:, None], targets * weights)[0]


def draw(key: Array, weights: Array, n: int) -> Array:
    """How often each outcome came up in n draws, as shares of n; n = 0 is infinitely often: the probabilities."""
    if n == 0:
        return weights / jnp.sum(weights)
    outcomes = jax.random.choice(key, weights.size, (n,), p=weights.ravel() / jnp.sum(weights))
    return (jnp.bincount(outcomes, length=weights.size) / n).reshape(weights.shape)


def preference(loss: Callable[..., Array], ref_logps: Array, *, beta: Array | float) -> LossFn:
    """A loss on pairs, as an objective of logits. Its batch is [i j]: how often i was preferred to j."""
    i, j = jnp.indices((ref_logps.size, ref_logps.size)).reshape(2, -1)

    def loss_fn(params: Params, shares: Array) -> tuple[Mean, Metrics]:
        logps = jax.nn.log_softmax(params["logits"])
        values = loss(logps[i], logps[j], ref_logps[i], ref_logps[j], beta=beta)
        return Mean(total=jnp.vdot(shares, values), weight=jnp.sum(shares)), {}

    return loss_fn


def act(logps: Array, key: Array, *, n: int, kl_coef: float) -> tuple[Array, Array, Array]:
    """(how often each action was taken, its log-prob then, its advantage over the mean of the batch)."""
    shares, old_logps = draw(key, jnp.exp(logps), n), logps[:, None]
    taken = jnp.ones_like(old_logps, bool)
    rewards = advantages.shape_rewards(REWARDS, old_logps, REF_LOGPS[:, None], taken, kl_coef=kl_coef)
    return shares, old_logps, rewards - jnp.vdot(shares, rewards)


def reinforce(params: Params, batch: tuple[Array, Array, Array]) -> tuple[Mean, Metrics]:
    shares, _, advantage = batch
    values = losses.reinforce_loss(jax.nn.log_softmax(params["logits"])[:, None], advantage)
    return Mean(total=jnp.vdot(shares, values), weight=jnp.sum(shares)), {}


def ppo(params: Params, batch: tuple[Array, Array, Array]) -> tuple[Mean, Metrics]:
    shares, old_logps, advantage = batch
    logps = jax.nn.log_softmax(params["logits"])[:, None]
    penalty = losses.kl_penalty(logps, REF_LOGPS[:, None], estimator="k2")  # k1 would do nothing, k3 end elsewhere
    values = losses.ppo_clip_loss(logps, old_logps, advantage) + BETA * penalty
    return Mean(total=jnp.vdot(shares, values), weight=jnp.sum(shares)), {}


def fit(loss_fn: LossFn, collect: Callable[[Array, Array], Any], key: Array, *, steps: int, epochs: int = 1) -> Array:
    """The policy after `steps` times: collect a batch with the policy as it is, and update `epochs` times on it."""
    optimizer = optax.adam(train.cosine(0.05, steps * epochs))
    update = train.make_update(loss_fn, optimizer)

    def step(state: TrainState, key: Array) -> tuple[TrainState, None]:
        batch = collect(jax.nn.log_softmax(state.params["logits"]), key)
        return jax.lax.scan(lambda state, _: (update(state, batch)[0], None), state, length=epochs)

    state = train.init_state({"logits": REF_LOGPS}, optimizer)
    return jax.nn.softmax(jax.lax.scan(step, state, jax.random.split(key, steps))[0].params["logits"])


def policies(key: Array, *, steps: int, samples: int) -> dict[str, Array]:
    """Where each algorithm ends. samples: actions or preferences in all; 0 for exact expectations."""
    if 0 < samples < steps:
        raise ValueError(f"samples={samples} must be at least the number of steps, {steps}")
    keys, n = jax.random.split(key, 6), samples // steps
    pairs = draw(keys[5], PAIRS * WINS, samples)
    dpo = preference(losses.dpo_loss, REF_LOGPS, beta=BETA)
    ipo = preference(losses.ipo_loss, REF_LOGPS, beta=TAU)

    def own_pairs(logps: Array, key: Array) -> Array:
        return draw(key, jnp.exp(logps[:, None] + logps[None]) * WINS, n)

    return {
        "REINFORCE": fit(reinforce, functools.partial(act, n=n, kl_coef=BETA), keys[0], steps=steps),
        "PPO": fit(ppo, functools.partial(act, n=n, kl_coef=0.0), keys[1], steps=steps, epochs=4),
        "DPO": fit(dpo, lambda logps, key: pairs, keys[2], steps=steps),
        "online DPO": fit(dpo, own_pairs, keys[3], steps=steps),
        "IPO": fit(ipo, lambda logps, key: pairs, keys[4], steps=steps),
    }


def reproduce(
    *, seeds: int, quick: bool, exact_steps: int = 1000, sampled_steps: int = 200, samples: int = 20_000
) -> papers.Result:
    """Compare five algorithms, exact and sampled, with the closed forms."""
    del quick  # it is quick
    keys = jax.random.split(jax.random.key(0), seeds)
    exact = jax.jit(functools.partial(policies, steps=exact_steps, samples=0))(keys[0])
    sampled = jax.jit(jax.vmap(functools.partial(policies, steps=sampled_steps, samples=samples)))(keys)
    exact, sampled = jax.device_get((exact, sampled))
    best, ipo = (np.asarray(jax.nn.softmax(REF_LOGPS + tilt)) for tilt in (REWARDS / BETA, ipo_tilt()))
    closed = np.asarray(jax.nn.softmax(REF_LOGPS + jnp.mean(WINS, axis=1) / TAU))
    what = "max |π − π*|"
    checks = [papers.at_most("IPO's least squares = closed form", what, np.max(np.abs(ipo - closed)), 1e-6)]
    for name, policy in exact.items():
        error = np.max(np.abs(policy - (ipo if name == "IPO" else best)))
        checks.append(papers.at_most(f"{name}, exact gradients", what, error, 1e-4))
    for name, policy in sampled.items():
        errors = np.max(np.abs(policy - (ipo if name == "IPO" else best)), axis=1)
        checks.append(papers.at_most(f"{name}, {samples:,} samples", what, errors, 0.02))
    return papers.Result(checks, {"Where each algorithm ends, from 20,000 samples": draw_ends(sampled, best, ipo)})


def draw_ends(sampled: dict[str, np.ndarray], best: np.ndarray, ipo: np.ndarray) -> Any:
    """Probabilities of the actions, policies [seeds actions]."""
    drawn, ((axis,),) = papers.figure(size=(6.4, 3.4))
    names = {"π_ref": np.exp(REF_LOGPS), "π*": best, **sampled, "IPO's π*": ipo}
    width = 0.8 / len(names)
    colors = ("#bbbbbb", "#000000", *plots.COLORS[: len(sampled)], "#777777")
    for i, (name, policy) in enumerate(names.items()):
        mean = np.atleast_2d(policy).mean(0)
        axis.bar(np.arange(5) + (i - len(names) / 2 + 0.5) * width, mean, width, label=name, color=colors[i])
    axis.set(xlabel="action (reward)", ylabel="probability", xticks=range(5))
    axis.set_xticklabels([f"{reward:g}" for reward in np.asarray(REWARDS)])
    axis.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return drawn
