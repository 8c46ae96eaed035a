"""Best-of-n against a learned reward: the gold reward rises, then falls.

Paper   Gao, Schulman and Hilton 2022, "Scaling Laws for Reward Model Overoptimization", arXiv:2210.10760, Eq. 1 and
        figures 1a and 3a: R(d) = d (α − β d) with d = √KL; α grows with the size of the reward model, and with data
        (figure 6).
Claim   As n grows the proxy reward goes on rising, and the gold reward peaks and falls; d (α − β d) fits it; α grows
        with the number of preferences.
Set-up  Completions are x ~ N(0, I₁₆); gold is w·x − Σᵢ max(|xᵢ| − 1.5, 0), in standard deviations of π_ref's. The proxy
        is linear, by `losses.bradley_terry_loss` on n_pref pairs labelled by the gold reward's Bradley-Terry model
        of rewards in those units. KL of best-of-n: log n − (n − 1)/n, exact here. `ops.best_of_n` on 50,000 samples, n
        up to 16,384 (in --quick every second). Proxies of one size differ much, so that a seed is the mean of 16 of
        them. It shows the shape of the law and what more data do; not what a reward model's size does.
Run     rljax reproduce overoptimization_best_of_n   (13 s on 2 × x86_64, cpu)
Pass    For 100 preferences: the peak lies inside, the fall from it is at least 15% of it, the proxy never falls; R² of
        the fit is at least 0.95 for 100 and more preferences; α grows with them: 30 < 100 < 300 < 3,000, all of the
        mean of three seeds.
Got     the gold reward peaks: n = 128; and falls: 0.2974; the proxy rises on: 0.1548; d (α − β d) fits 100 preferences:
        0.9963; d (α − β d) fits 300 preferences: 0.995; d (α − β d) fits 3000 preferences: 0.9975; α grows: 0.57, 0.83,
        1.05, 1.14: 0.08406.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rljax import losses, ops, papers, train
from rljax.types import Mean, Metrics, Params

SIZE, PROXIES, DECAY = 16, 16, 1e-3
PREFERENCES = (30, 100, 300, 3000)
COLORS = dict(zip(PREFERENCES, ("#D55E00", "#E69F00", "#009E73", "#0072B2"), strict=True))


def gold(direction: Array, x: Array) -> Array:
    return x @ direction - jnp.maximum(jnp.abs(x) - 1.5, 0.0).sum(-1)


def proxy(key: Array, direction: Array, spread: Array, n: int, *, flipped: float = 0.0) -> Array:
    """The direction of a linear reward that was fitted to n labelled pairs, a share of whose labels is flipped."""
    keys = jax.random.split(key)
    pairs = jax.random.normal(keys[0], (n, 2, SIZE))
    scores = gold(direction, pairs) / spread
    first = jax.random.uniform(keys[1], (n,)) < jax.nn.sigmoid(scores[:, 0] - scores[:, 1])
    first ^= jax.random.bernoulli(jax.random.fold_in(key, 2), flipped, (n,))
    won, lost = (jnp.where((first == chosen)[:, None], pairs[:, 0], pairs[:, 1]) for chosen in (True, False))
    optimizer = optax.adam(train.cosine(0.05, 500))

    def objective(params: Params, batch: tuple[Array, Array]) -> tuple[Mean, Metrics]:
        won, lost = (x @ params["direction"] for x in batch)
        decay = n * DECAY * jnp.sum(params["direction"] ** 2)
        return Mean(total=losses.bradley_terry_loss(won, lost).sum() + decay, weight=jnp.asarray(float(n))), {}

    update = train.update_step(objective, optimizer)
    state = train.init_state({"direction": jnp.zeros(SIZE)}, optimizer)
    state, _ = jax.lax.scan(lambda state, _: (update(state, (won, lost))[0], None), state, length=500)
    return state.params["direction"]


def curves(key: Array, *, n: int, samples: int, numbers: tuple[int, ...]) -> Array:
    """Gold and proxy reward of the best of each number, in standard deviations of π_ref's, [2 numbers]."""
    keys = jax.random.split(key, 3)
    direction = jax.random.normal(jax.random.key(7), (SIZE,))
    direction /= jnp.linalg.norm(direction)
    x = jax.random.normal(keys[0], (samples, SIZE))
    true = gold(direction, x)
    spread = true.std()

    def one(key: Array) -> Array:
        learned = x @ proxy(key, direction, spread, n)
        standard = [(scores - scores.mean()) / scores.std() for scores in (true, learned)]
        return jnp.stack([jnp.stack([ops.best_of_n(scores, learned, n=n) for n in numbers]) for scores in standard])

    return jax.lax.map(one, jax.random.split(keys[1], PROXIES)).mean(0)


def fit(distance: np.ndarray, reward: np.ndarray) -> tuple[float, float, float]:
    """(α, β, R²) of reward = d (α − β d)."""
    design = np.stack([distance, -(distance**2)], axis=1)
    found = np.linalg.lstsq(design, reward)[0]
    left = reward - design @ found
    return float(found[0]), float(found[1]), float(1 - np.sum(left**2) / np.sum((reward - reward.mean()) ** 2))


def reproduce(*, seeds: int, quick: bool) -> papers.Result:
    numbers = tuple(2**i for i in range(0, 15, 2 if quick else 1))
    distance = np.sqrt([np.log(n) - (n - 1) / n for n in numbers])
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    got = {}
    for n in PREFERENCES:
        run = functools.partial(curves, n=n, samples=50_000, numbers=numbers)
        got[n] = np.stack([np.asarray(jax.jit(run)(key)) for key in keys])  # [seeds 2 numbers]
    mean = {n: found.mean(0) for n, found in got.items()}
    fits = {n: fit(distance, mean[n][0]) for n in PREFERENCES}
    peak, (true, judged) = mean[100][0].argmax(), mean[100]
    alphas = np.array([fits[n][0] for n in PREFERENCES])
    inside = f"n = {numbers[peak]:,}"
    checks = [
        papers.Check("the gold reward peaks", f"inside n = 1 … {numbers[-1]:,}", inside, 0 < peak < len(numbers) - 1),
        papers.at_least("and falls", "share of the peak that is lost", 1 - true[-1] / true[peak], 0.15),
        papers.at_least("the proxy rises on", "smallest step", np.diff(judged).min(), 0.0),
        *(papers.at_least(f"d (α − β d) fits {n} preferences", "R²", fits[n][2], 0.95) for n in PREFERENCES[1:]),
        papers.at_least(
            f"α grows: {', '.join(f'{a:.2f}' for a in alphas)}", "smallest step", np.diff(alphas).min(), 0.0
        ),
    ]
    return papers.Result(checks, {"Gold and proxy reward of the best of n, over √KL": draw(distance, got, fits)})


def draw(distance: np.ndarray, got: dict[int, np.ndarray], fits: dict[int, tuple[float, float, float]]):
    drawn, ((left, right),) = papers.figure(1, 2)
    smooth = np.linspace(0, distance[-1], 200)
    for n, found in got.items():
        papers.band(left, distance, found[:, 0], f"{n:,} preferences", COLORS[n])
        alpha, beta, _ = fits[n]
        left.plot(smooth, smooth * (alpha - beta * smooth), color=COLORS[n], linestyle=(0, (2, 2)), linewidth=1)
        papers.band(right, distance, found[:, 1], f"{n:,} preferences", COLORS[n])
    left.set(xlabel="√KL(best-of-n ‖ π_ref)", ylabel="gold reward [σ of π_ref]", title="dotted: d (α − β d)")
    right.set(xlabel="√KL(best-of-n ‖ π_ref)", ylabel="proxy reward [σ of π_ref]")
    left.legend()
    return drawn
