"""GAE's λ trades bias for variance.

Paper   Schulman et al. 2015, "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
        arXiv:1506.02438, section 3 (and figure 2 for what it does to learning).
Claim   With an imperfect value function, λ = 0 (one-step temporal differences) is biased and has low variance, λ = 1
        (Monte Carlo) is unbiased whatever the value function is and has high variance; best is a λ between them.
Set-up  A Markov reward process of 12 states that ends after 50 steps on average, γ = 0.98, V̂ = V + 1.5 · noise.
        E[returns] of `advantages.gae` is V̂ + (I − γλP)⁻¹ (r + γPV̂ − V̂), which numpy computes; its bias is the root
        mean square over the states of the difference to V. 2,000 episodes from every state (200 in --quick) go through
        `advantages.gae`. It shows the estimator; what λ does to learning it does not.
Run     rljax reproduce gae_lambda   (26 s on 2 × x86_64, cpu)
Pass    Bias falls with λ, and is < 1e-9 at λ = 1 and for V̂ = V at every λ; the mean of `gae` agrees with the formula
        (the root mean square of z over states and λ is below 1.3); the deviation at λ = 1 is at least twice that at
        0.8; the root mean square error of the mean of 16 estimates is smallest at a λ inside (0, 1). Three seeds.
Got     bias falls with λ: -0.03549 (-0.0332, -0.03162, -0.04164); λ = 1 is unbiased: 6.369e-15 (5.523e-16, 8.582e-16,
        1.77e-14); λ = 0 is biased: 0.6343 (0.5461, 0.7852, 0.5716); with the true V no λ is biased: 1.303e-14
        (2.665e-15, 2.665e-15, 3.375e-14); `gae` has the expected mean: 1.007 (0.9316, 1.11, 0.981); variance grows with
        λ: 2.732 (2.693, 2.933, 2.57); best lies inside: 1.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rljax import advantages, papers

STATES, GAMMA, NOISE, LAMBDAS = 12, 0.98, 1.5, np.round(np.linspace(0, 1, 11), 1)
LENGTH = 512  # of an episode, at most: 0.98⁵¹² of it is beyond


def process(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(P [s s], whose rows sum to 0.98, the rest being the end; r [s], the reward of leaving a state)."""
    return 0.98 * rng.dirichlet(np.full(STATES, 0.3), STATES), rng.normal(size=STATES)


def expected(transition: np.ndarray, reward: np.ndarray, values: np.ndarray, lam: float) -> np.ndarray:
    """E[returns | state], [s]."""
    delta = reward + GAMMA * transition @ values - values
    return values + np.linalg.solve(np.eye(STATES) - GAMMA * lam * transition, delta)


def episodes(key: Array, transition: Array, n: int) -> tuple[Array, Array]:
    """n episodes from every state: (states i32[s·n LENGTH], alive bool[s·n LENGTH])."""
    logits = jnp.log(jnp.concatenate([transition, 1 - transition.sum(1, keepdims=True)], axis=1))
    logits = jnp.concatenate([logits, jnp.full((1, STATES + 1), -jnp.inf).at[0, STATES].set(0.0)])

    def step(state: Array, key: Array) -> tuple[Array, Array]:
        return jax.random.categorical(key, logits[state]), state

    start = jnp.repeat(jnp.arange(STATES), n)
    states = jax.lax.scan(step, start, jax.random.split(key, LENGTH))[1].T
    return states, states < STATES


def one(seed: int, n: int) -> dict[str, np.ndarray]:
    """The figures of a seed, [λ] but for `z` and `known`."""
    rng = np.random.default_rng(seed)
    transition, reward = process(rng)
    true = np.linalg.solve(np.eye(STATES) - GAMMA * transition, reward)
    guess = true + NOISE * rng.normal(size=STATES)
    states, alive = episodes(jax.random.key(seed), jnp.asarray(transition), n)
    rewards, values = jnp.append(reward, 0.0)[states], jnp.append(guess, 0.0)[states]

    @jax.jit
    def estimates(lam: Array) -> Array:
        """[s n]: the returns at the first step of every episode."""
        return advantages.gae(rewards, values, alive, gamma=GAMMA, lam=lam)[1][:, 0].reshape(STATES, n)

    exact = np.stack([expected(transition, reward, guess, lam) for lam in LAMBDAS])
    found = np.stack([np.asarray(estimates(jnp.asarray(lam)), float) for lam in LAMBDAS])  # [λ s n]
    bias, spread = exact - true, found.std(-1)
    z = (found.mean(-1) - exact) / (spread / np.sqrt(n) + 1e-5)  # 1e-5: rounding, where nothing is random
    known = [expected(transition, reward, true, lam) - true for lam in LAMBDAS]
    return {
        "bias": np.sqrt((bias**2).mean(1)),
        "std": np.sqrt((spread**2).mean(1)),
        "rmse": np.sqrt((bias**2 + spread**2 / 16).mean(1)),
        "z": np.sqrt((z**2).mean()),
        "known": np.max(np.abs(known)),
    }


def reproduce(*, seeds: int, quick: bool) -> papers.Result:
    rows = [one(seed, 200 if quick else 2000) for seed in range(seeds)]
    got = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    best = LAMBDAS[got["rmse"].argmin(1)]
    inside = float(np.mean((best > 0) & (best < 1)))
    checks = [
        papers.at_most("bias falls with λ", "largest step up", np.diff(got["bias"]).max(1), 0.0),
        papers.at_most("λ = 1 is unbiased", "root mean square of the bias", got["bias"][:, -1], 1e-9),
        papers.at_least("λ = 0 is biased", "root mean square of the bias", got["bias"][:, 0], 0.1),
        papers.at_most("with the true V no λ is biased", "largest bias", got["known"], 1e-9),
        papers.at_most("`gae` has the expected mean", "root mean square of z", got["z"], 1.3),
        papers.at_least(
            "variance grows with λ", "std(λ = 1) / std(λ = 0.8)", got["std"][:, -1] / got["std"][:, 8], 2.0
        ),
        papers.at_least("best lies inside", f"share of seeds (λ = {', '.join(map(str, best))})", inside, 1.0),
    ]
    return papers.Result(checks, {"Bias, deviation of one estimate and error of a mean of 16, over λ": draw(got)})


def draw(got: dict[str, np.ndarray]):
    drawn, ((axis,),) = papers.figure(size=(5.6, 3.6))
    papers.band(axis, LAMBDAS, got["bias"], "bias (exact)", "#0072B2")
    papers.band(axis, LAMBDAS, got["std"], "standard deviation of one estimate", "#D55E00")
    papers.band(axis, LAMBDAS, got["rmse"], "error of the mean of 16", "#000000")
    axis.set(xlabel="λ", ylabel="root mean square over states", ylim=(0, None))
    axis.legend()
    return drawn
