"""log n − (n − 1)/n bounds the KL of best-of-n from above, and is it only where no two completions are alike.

Paper   Beirami et al. 2024, "Theoretical guarantees on the best-of-n alignment policy", arXiv:2401.01879, theorems 1
        and 2. The formula is used as if exact in Stiennon et al. 2020 (2009.01325, appendix G.3) and many after them.
Claim   KL(best-of-n ‖ π_ref) ≤ log n − (n − 1)/n, far from equality where single completions are likely, near it where
        none is; the chance to beat one sample of π_ref is at most n / (n + 1).
Set-up  Finite sets of completions with distinct rewards, where best-of-n has P(y) = F(y)ⁿ − F(y⁻)ⁿ: 4,096 equally
        likely ones, 64 equally likely ones, and 64 whose probabilities fall with a power, the likeliest
        being the best. n = 1 … 1,024. The same chance to win is estimated from 20,000 samples of π_ref with
        `ops.best_of_n`.
Run     rljax reproduce best_of_n_kl   (1 s on 2 × x86_64, cpu)
Pass    No KL is above the bound; 4,096 equal ones come within 1e-3 of it at n = 4; the skewed set stays 0.1 below it at
        n = 128; the chance to win is at most n / (n + 1), ties counting half; its estimate is within 0.02 of it for
        every n up to 128. Three seeds.
Got     the bound holds: 0; it is met where none is likely: 4.47e-08; and missed where some are: 2.631; the chance to
        win is bounded: 0; the estimator agrees: 0.003735 (0.003061, 0.002831, 0.005313).
"""

import jax.numpy as jnp
import numpy as np

from rljax import ops, papers

NUMBERS = 2 ** np.arange(11)
SETS = {
    "4,096 equal": np.full(4096, 1 / 4096),
    "64 equal": np.full(64, 1 / 64),
    "64 skewed": np.arange(1.0, 65) ** -1.2,
}
COLORS = dict(zip(SETS, ("#0072B2", "#009E73", "#D55E00"), strict=True))


def chances(name: str) -> np.ndarray:
    """π_ref of the completions, from the worst to the best."""
    return SETS[name][::-1] / SETS[name].sum()


def best_of(p: np.ndarray, n: int) -> np.ndarray:
    """The distribution of the best of n."""
    below = np.concatenate([[0.0], np.cumsum(p)[:-1], [1.0]])
    return np.diff(below**n)


def kl(p: np.ndarray, n: int) -> float:
    q = best_of(p, n)
    seen = q > 0
    return float(np.sum(q[seen] * np.log(q[seen] / p[seen])))


def wins(p: np.ndarray, n: int) -> float:
    """The chance that the best of n beats one more sample, a tie counting half."""
    return float(np.sum(best_of(p, n) * (np.cumsum(p) - p / 2)))


def bound(n: np.ndarray) -> np.ndarray:
    return np.log(n) - (n - 1) / n


def estimated_wins(p: np.ndarray, n: int, rng: np.random.Generator) -> float:
    drawn = rng.choice(len(p), 20_000, p=p)
    return float(ops.best_of_n(jnp.asarray((np.cumsum(p) - p / 2)[drawn]), jnp.asarray(drawn), n=int(n)))


def reproduce(*, seeds: int, quick: bool) -> papers.Result:
    del quick  # it is quick
    worlds, few = {name: chances(name) for name in SETS}, NUMBERS[:8]
    kls = {name: np.array([kl(p, n) for n in NUMBERS]) for name, p in worlds.items()}
    won = {name: np.array([wins(p, n) for n in NUMBERS]) for name, p in worlds.items()}
    rngs = [np.random.default_rng(seed) for seed in range(seeds)]
    found = np.array([[[estimated_wins(p, n, rng) for n in few] for p in worlds.values()] for rng in rngs])
    miss = np.abs(found - np.stack([values[:8] for values in won.values()])).max((1, 2))
    excess = max((values - bound(NUMBERS)).max() for values in kls.values())
    lucky = max((values - NUMBERS / (NUMBERS + 1)).max() for values in won.values())
    checks = [
        papers.at_most("the bound holds", "largest KL − bound", excess, 1e-9),
        papers.at_most("it is met where none is likely", "bound − KL at n = 4", bound(4) - kls["4,096 equal"][2], 1e-3),
        papers.at_least("and missed where some are", "bound − KL at n = 128", bound(128) - kls["64 skewed"][7], 0.1),
        papers.at_most("the chance to win is bounded", "largest excess over n / (n + 1)", lucky, 1e-9),
        papers.at_most("the estimator agrees", "largest error of the chance to win", miss, 0.02),
    ]
    drawn, ((left, right),) = papers.figure(1, 2)
    for name in SETS:
        papers.band(left, NUMBERS, kls[name], name, COLORS[name])
        papers.band(right, NUMBERS, won[name], name, COLORS[name])
    left.plot(NUMBERS, bound(NUMBERS), color="#000000", linestyle=(0, (4, 2)), label="log n − (n − 1)/n")
    right.plot(NUMBERS, NUMBERS / (NUMBERS + 1), color="#000000", linestyle=(0, (4, 2)), label="n / (n + 1)")
    left.set(xscale="log", xlabel="n", ylabel="KL(best-of-n ‖ π_ref) [nats]")
    right.set(xscale="log", xlabel="n", ylabel="chance to beat one sample")
    left.legend()
    right.legend()
    return papers.Result(checks, {"KL and chance to win, exactly, and their bounds": drawn})
