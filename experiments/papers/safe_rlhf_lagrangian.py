"""A Lagrange multiplier finds the trade of reward against cost that no fixed one on a grid has.

Paper   Dai et al. 2023, "Safe RLHF: Safe Reinforcement Learning from Human Feedback", arXiv:2310.12773, section 3.3
        and Eq. 9–11 (harmful answers 53.08% → 2.45%; figure 6 compares with reward shaping by a fixed factor).
Claim   max_θ E[reward] where E[cost] ≤ limit, by a multiplier that grows while the limit is broken, ends at the limit;
        a fixed factor ends above it or gives reward away.
Set-up  A bandit of 32 contexts and 12 actions; rewards are normal, costs correlated with them (0.7) and around 0.
        Exact gradients of `advantages.constrained`, Adam 0.02, 3,000 steps, entropy bonus 0.1 (else the policy is
        deterministic and the cost jumps); λ starts at 1, rate 0.02. Limits 0 and −0.3; fixed factors 0.1, 1, 10. It
        shows the dual ascent; nothing of cost models or language.
Run     rljax reproduce safe_rlhf_lagrangian   (4 s on 2 × x86_64, cpu)
Pass    |cost − limit| < 0.02 at the end for both limits, and the reward is at least that of the best fixed factor that
        keeps the limit; no fixed factor keeps the limit with a reward within 0.1 of it. Three seeds.
Got     limit 0 is met: -1.279e-05 (-1.217e-05, -8.362e-06, -1.783e-05); limit 0: ahead of fixed factors: 0.5359
        (0.5819, 0.5738, 0.4519); limit -0.3 is met: -0.3 (-0.3, -0.3, -0.3); limit -0.3: ahead of fixed factors: 0.3096
        (0.3635, 0.3303, 0.235).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rljax import advantages, losses, papers, train
from rljax.types import Mean, Metrics, Params, TrainState

CONTEXTS, ACTIONS, CORRELATION, ENTROPY, STEPS = 32, 12, 0.7, 0.1, 3000
FIXED, LIMITS = (0.1, 1.0, 10.0), (0.0, -0.3)


def tables(key: Array) -> tuple[Array, Array]:
    """Reward and cost of every action in every context."""
    reward, noise = jax.random.normal(key, (2, CONTEXTS, ACTIONS))
    return reward, CORRELATION * reward + (1 - CORRELATION**2) ** 0.5 * noise


def objective(params: Params, batch: tuple[Array, Array]) -> tuple[Mean, Metrics]:
    """The exact policy gradient: every action, weighted by its probability."""
    chance, gains = batch
    logps = jax.nn.log_softmax(params["logits"])
    entropy = -jnp.sum(jnp.exp(logps) * logps)
    total = jnp.vdot(chance, losses.reinforce_loss(logps, gains)) - ENTROPY * entropy
    return Mean(total=total, weight=jnp.asarray(float(CONTEXTS))), {}


def learn(key: Array, fixed: Array, *, limit: float | None) -> dict[str, Array]:
    """[steps]: reward, cost and multiplier. limit: None keeps the multiplier at `fixed`."""
    reward, cost = tables(key)
    optimizer = optax.adam(0.02)
    update = train.update_step(objective, optimizer)

    def centred(x: Array, chance: Array) -> Array:
        return x - jnp.sum(chance * x, 1, keepdims=True)

    def step(carry: tuple[TrainState, Array], _: None) -> tuple[tuple[TrainState, Array], dict[str, Array]]:
        state, log_multiplier = carry
        chance, multiplier = jax.nn.softmax(state.params["logits"]), jnp.exp(log_multiplier)
        found = {name: jnp.sum(chance * x, 1).mean() for name, x in (("reward", reward), ("cost", cost))}
        gains = advantages.constrained(centred(reward, chance), centred(cost, chance), multiplier=multiplier)
        state, _ = update(state, (chance, gains))
        if limit is not None:
            log_multiplier = advantages.update_log_multiplier(log_multiplier, found["cost"], limit=limit, rate=0.02)
        return (state, log_multiplier), {**found, "multiplier": multiplier}

    start = train.init_state({"logits": jnp.zeros((CONTEXTS, ACTIONS))}, optimizer), jnp.log(fixed)
    return jax.lax.scan(step, start, length=STEPS)[1]


def reproduce(*, seeds: int, quick: bool) -> papers.Result:
    del quick  # it is quick
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))

    def runs(fixed: float, limit: float | None) -> dict[str, np.ndarray]:
        return jax.device_get(jax.jit(jax.vmap(functools.partial(learn, limit=limit), (0, None)))(keys, fixed))

    found = {limit: runs(1.0, limit) for limit in LIMITS}
    kept = {factor: runs(factor, None) for factor in FIXED}
    checks = []
    for limit, got in found.items():
        end, cost = got["reward"][:, -1], got["cost"][:, -1]
        safe = [
            np.where(fixed["cost"][:, -1] <= limit + 0.02, fixed["reward"][:, -1], -np.inf) for fixed in kept.values()
        ]
        lead = end - np.max(safe, axis=0)
        checks.append(papers.near(f"limit {limit:g} is met", "cost", cost, limit, 0.02))
        checks.append(
            papers.at_least(f"limit {limit:g}: ahead of fixed factors", "reward − best safe one's", lead, 0.1)
        )
    return papers.Result(checks, {"Cost, multiplier and where reward and cost end": draw(found, kept)})


def draw(found: dict[float, dict[str, np.ndarray]], kept: dict[float, dict[str, np.ndarray]]):
    drawn, ((costs, multipliers, ends),) = papers.figure(1, 3)
    for (limit, got), color in zip(found.items(), ("#0072B2", "#009E73"), strict=True):
        steps = np.arange(STEPS)
        papers.band(costs, steps, got["cost"], f"limit {limit:g}", color)
        costs.axhline(limit, color=color, linestyle=(0, (2, 2)), linewidth=1)
        papers.band(multipliers, steps, got["multiplier"], f"limit {limit:g}", color)
        ends.plot(got["cost"][:, -1], got["reward"][:, -1], "o", color=color, label=f"limit {limit:g}")
    for (factor, got), marker in zip(kept.items(), "sD^", strict=True):
        ends.plot(got["cost"][:, -1], got["reward"][:, -1], marker, color="#D55E00", label=f"fixed factor {factor:g}")
    costs.set(xlabel="step", ylabel="mean cost")
    multipliers.set(xlabel="step", ylabel="λ")
    ends.set(xlabel="mean cost at the end", ylabel="mean reward at the end")
    costs.legend()
    ends.legend()
    return drawn
