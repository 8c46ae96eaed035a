"""PPO against a learned reward: the gold reward rises, then falls; ensembles of reward models hold it.

Paper   Gao, Schulman and Hilton 2022, "Scaling Laws for Reward Model Overoptimization", arXiv:2210.10760, Eq. 2 and
        figures 1b and 9: R(d) = d (α − β ln d) with d = √KL; a KL penalty does not change gold reward at a KL. Coste et
        al. 2023, "Reward Model Ensembles Help Mitigate Overoptimization", arXiv:2310.02743, figures 3 and 4.
Claim   As PPO goes on the proxy reward rises, and the gold reward peaks and falls. A KL penalty acts as early stopping.
        With 25% of the labels flipped, the worst case of five reward models (WCO) or their mean less their variance
        (UWO) has the higher gold reward and loses less of it.
Set-up  Completions, gold reward and proxies of `overoptimization_best_of_n.py` (100 preferences; gold in standard
        deviations of π_ref's); the policy is N(μ, I₁₆), so that KL = |μ|² / 2 exactly. PPO: batches of 256, advantages
        whitened, 2 epochs, gradient descent, 200 batches (looked at after each, by 2,048 samples); KL in the reward
        with β = 0, 0.1, 0.3 of a proxy of unit standard deviation. A seed is the mean of 8 proxies. Ensembles: 5
        proxies of 100 preferences of their own, 25% of the labels flipped; UWO's λ is 0.5. Curves are compared at
        equal KL, as far as all go. The policy follows one direction, so that a penalty can only slow it down; and
        d (α − β ln d) is the law of the paper's PPO: where a linear proxy is followed exactly, gold is nearly
        quadratic in d, which is best-of-n's form.
Run     rljax reproduce overoptimization_rl   (20 s on 2 × x86_64, cpu)
Pass    Gold: the peak lies inside, the fall from it is at least 15% of it, the proxy never falls by 0.05; R² of both
        forms is at least 0.9; gold with β = 0.1 and 0.3 is within 0.1 of that with β = 0 at equal KL. WCO and UWO: a
        peak at least the single proxy's, and at most half its fall, as shares of the peaks. Three seeds. It fails for
        d (α − β ln d), R² 0.897, for the reason above: d (α − β d) has 0.999. After a first run two things were
        changed: falls are compared as shares of the peaks (as absolute falls, WCO and UWO kept 0.66 and 0.62 of the
        single proxy's, not half), and β is 0.1 and 0.3, since 0.01 and 0.05 bind nowhere here.
Got     the gold reward peaks: √KL = 1.75; and falls: 2.235; the proxy rises on: 0.0292; d (α − β d) fits: 0.9992; d (α
        − β ln d) fits: 0.8971 FAIL; β = 0.1 is early stopping: 0.0005481 (0.0009409, 0.0004826, 0.0002209); β = 0.3 is
        early stopping: 0.002418 (0.004123, 0.002235, 0.0008948); WCO: as high: 0.3072 (0.0912, 0.4004, 0.4299); WCO:
        falls less: 0.3895 (0.7679, 0.2228, 0.1779); UWO: as high: 0.3372 (0.1133, 0.434, 0.4643); UWO: falls less:
        0.3557 (0.7105, 0.2009, 0.1556).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from overoptimization_best_of_n import SIZE, fit, gold, proxy

from rljax import advantages, losses, ops, papers, shaping, train
from rljax.types import Mean, Metrics, Params, TrainState

PREFERENCES, PROXIES, MEMBERS, NOISE, BATCH = 100, 8, 5, 0.25, 256
COEFFICIENTS, UNCERTAINTY, SAMPLES = (0.0, 0.1, 0.3), 0.5, 2048
COMBINE: dict[str, Callable[[Array], Array]] = {
    "one": lambda scores: scores[0],
    "WCO": shaping.worst_case,
    "UWO": functools.partial(shaping.uncertainty_weighted, coef=UNCERTAINTY),
}
COLORS = {"one": "#000000", "WCO": "#009E73", "UWO": "#0072B2"} | dict(
    zip(COEFFICIENTS, ("#000000", "#E69F00", "#D55E00"), strict=True)
)


def log_density(mean: Array, x: Array) -> Array:
    """Of N(mean, I) but for a constant, [b 1]: an action is one token."""
    return -0.5 * jnp.sum((x - mean) ** 2, axis=1, keepdims=True)


def learn(key: Array, beta: Array, *, combine: str, members: int, flipped: float, steps: int) -> Array:
    """[3 steps]: √KL, and the gold and proxy reward in standard deviations of π_ref's, after each batch of PPO."""
    direction = jax.random.normal(jax.random.key(7), (SIZE,))
    direction /= jnp.linalg.norm(direction)
    noise = jax.random.normal(jax.random.key(8), (SAMPLES, SIZE))
    usual = gold(direction, noise)
    fitted = functools.partial(proxy, direction=direction, spread=usual.std(), n=PREFERENCES, flipped=flipped)
    directions = jax.vmap(fitted)(jax.random.split(jax.random.fold_in(key, 0), members))
    directions /= jnp.linalg.norm(directions, axis=1, keepdims=True)  # unit standard deviation under π_ref
    judge = lambda x: COMBINE[combine](directions @ x.T)  # noqa: E731
    mask, optimizer = jnp.ones((BATCH, 1), bool), optax.sgd(0.015)

    def surrogate(params: Params, batch: tuple[Array, ...]) -> tuple[Mean, Metrics]:
        x, old, gains = batch
        values = losses.ppo_clip_loss(log_density(params["mean"], x), old, gains)
        return ops.aggregate(values, mask, mode="token_mean"), {}

    update = train.update_step(surrogate, optimizer)

    def step(state: TrainState, key: Array) -> tuple[TrainState, Array]:
        x = state.params["mean"] + jax.random.normal(key, (BATCH, SIZE))
        old, ref = log_density(state.params["mean"], x), log_density(jnp.zeros(SIZE), x)
        rewards = advantages.shape_rewards(judge(x), old, ref, mask, kl_coef=beta)
        batch = x, old, ops.masked_whiten(rewards, mask)
        state = jax.lax.scan(lambda state, _: (update(state, batch)[0], None), state, length=2)[0]
        seen = state.params["mean"] + noise
        true = shaping.standardize(gold(direction, seen), mean=usual.mean(), std=usual.std()).mean()
        distance = jnp.sqrt(jnp.sum(state.params["mean"] ** 2) / 2)
        return state, jnp.stack([distance, true, judge(seen).mean()])

    start = train.init_state({"mean": jnp.zeros(SIZE)}, optimizer)
    return jax.lax.scan(step, start, jax.random.split(jax.random.fold_in(key, 1), steps))[1].T


def fit_rl(distance: np.ndarray, reward: np.ndarray) -> tuple[float, float, float]:
    """(α, β, R²) of reward = d (α − β ln d)."""
    design = np.stack([distance, -distance * np.log(distance)], axis=1)
    found = np.linalg.lstsq(design, reward)[0]
    left = reward - design @ found
    return float(found[0]), float(found[1]), float(1 - np.sum(left**2) / np.sum((reward - reward.mean()) ** 2))


def at_equal(curves: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """[… 2 grid]: gold and proxy reward at these √KL, NaN beyond; curves [… 3 steps]."""
    flat = curves.reshape(-1, *curves.shape[-2:])
    found = [[np.interp(grid, d, values, right=np.nan) for values in rest] for d, *rest in flat]
    return np.array(found).reshape(*curves.shape[:-2], 2, len(grid))


def runs(seeds: int, steps: int) -> tuple[dict[float, np.ndarray], dict[str, np.ndarray]]:
    """[seeds 3 steps] by the penalty's β, for clean labels; and by the way to combine scores, for noisy ones."""
    keys = jax.vmap(lambda seed: jax.random.split(jax.random.key(seed), PROXIES))(jnp.arange(seeds))

    def over(beta: Array, **how: object) -> np.ndarray:
        run = functools.partial(learn, steps=steps, **how)
        over_proxies = jax.vmap(jax.vmap(run, (0, None)), (0, None))
        found = jax.jit(jax.vmap(over_proxies, (None, 0)))(keys, beta)
        return np.asarray(found, float).mean(2)

    clean = over(jnp.array(COEFFICIENTS), combine="one", members=1, flipped=0.0)
    noisy = {name: over(jnp.zeros(1), combine=name, members=MEMBERS, flipped=NOISE)[0] for name in COMBINE}
    return dict(zip(COEFFICIENTS, clean, strict=True)), noisy


def reproduce(*, seeds: int, quick: bool) -> papers.Result:
    del quick  # it is short
    clean, noisy = runs(seeds, 200)
    distance, true, judged = clean[0.0].mean(0)
    peak = int(true.argmax())
    grid = np.linspace(0.2, 0.98 * clean[0.3][:, 0, -1].min(), 30)
    equal = {beta: at_equal(curves, grid)[:, 0] for beta, curves in clean.items()}
    apart = {beta: np.abs(equal[beta] - equal[0.0]).max(1) for beta in COEFFICIENTS[1:]}
    far = np.linspace(0.2, 0.98 * min(curves[:, 0, -1].min() for curves in noisy.values()), 60)
    held = {name: at_equal(curves, far)[:, 0] for name, curves in noisy.items()}
    best = {name: values.max(1) for name, values in held.items()}
    lost = {name: 1 - values[:, -1] / best[name] for name, values in held.items()}
    inside = f"√KL = {distance[peak]:.2f}"
    checks = [
        papers.Check("the gold reward peaks", f"inside 0 … {distance[-1]:.1f}", inside, 0 < peak < len(true) - 1),
        papers.at_least("and falls", "share of the peak that is lost", 1 - true[-1] / true[peak], 0.15),
        papers.at_least("the proxy rises on", "smallest step", np.diff(judged).min(), -0.05),
        papers.at_least("d (α − β d) fits", "R²", fit(distance, true)[2], 0.9),
        papers.at_least("d (α − β ln d) fits", "R²", fit_rl(distance, true)[2], 0.9),
    ]
    for beta, found in apart.items():
        checks.append(papers.at_most(f"β = {beta:g} is early stopping", "gold apart, at equal KL [σ]", found, 0.1))
    for name in ("WCO", "UWO"):
        checks.append(papers.at_least(f"{name}: as high", "peak, its − one's [σ]", best[name] - best["one"], 0.0))
        checks.append(
            papers.at_most(f"{name}: falls less", "share of the peak lost, its / one's", lost[name] / lost["one"], 0.5)
        )
    return papers.Result(checks, {"Gold (solid) and proxy (dotted) reward over √KL": draw(clean, noisy)})


def draw(clean: dict[float, np.ndarray], noisy: dict[str, np.ndarray]):
    drawn, ((left, middle, right),) = papers.figure(1, 3, size=(4.0, 3.4))
    distance, true, _ = clean[0.0].mean(0)
    papers.band(left, distance, clean[0.0][:, 1], "gold", "#0072B2")
    papers.band(left, distance, clean[0.0][:, 2], "proxy", "#D55E00", linestyle=":")
    for label, (alpha, beta, _), shape in (
        ("d (α − β d)", fit(distance, true), distance),
        ("d (α − β ln d): the paper's", fit_rl(distance, true), np.log(distance)),
    ):
        how = (0, (4, 2)) if "ln" in label else (0, (1, 1))
        left.plot(distance, distance * (alpha - beta * shape), color="#666666", linewidth=1, linestyle=how, label=label)
    left.set(title="100 preferences, β = 0", ylim=(min(0, true.min()) - 0.1, 1.6 * true.max()))
    for beta, curves in clean.items():
        how = {"linewidth": 4, "alpha": 0.6} if beta else {"linestyle": ":", "zorder": 3}
        middle.plot(*curves.mean(0)[:2], color=COLORS[beta], label=f"β = {beta:g}", **how)
    middle.set(title="a KL penalty")
    for name, curves in noisy.items():
        papers.band(right, curves[:, 0].mean(0), curves[:, 1], name, COLORS[name])
    right.set(title="25% flipped labels")
    for axis in (left, middle, right):
        axis.set(xlabel="√KL(π ‖ π_ref)", ylabel="reward [σ of π_ref]")
        axis.legend()
    return drawn
