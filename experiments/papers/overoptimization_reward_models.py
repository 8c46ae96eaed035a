"""Best-of-n and PPO against trained reward models: more preferences, more gold reward before it falls.

Paper   Gao, Schulman and Hilton 2022, "Scaling Laws for Reward Model Overoptimization", arXiv:2210.10760, Eq. 1 and 2
        (best-of-n: d (α − β d), PPO: d (α − β ln d), with d = √KL), figures 1 (both) and 6 (the amount of data).
Claim   The gold reward of best-of-n and of PPO follows these laws; the proxy's goes on rising where the gold one falls;
        reward models of more preferences reach more gold reward.
Set-up  `overoptimization_best_of_n.py` and `overoptimization_rl.py` with models in every place. The policy and the
        reward models are transformers of `_tiny.py`, which read and write texts of 12 words; the policy's weights are
        random, and are π_ref. Gold: the mean valence of the words by a random lexicon in [0, 1], less the share of
        words that were written twice before, in standard deviations of π_ref's. A reward model is trained from random
        weights by `objectives.comparison` on 100, 300, 1,000 or 3,000 pairs of π_ref's texts, with labels by
        Bradley-Terry of the gold reward; 400 batches of 32 pairs, AdamW. Best-of-n: `ops.best_of_n` on 8,192 texts, n
        up to 512. PPO (`online.PPO`, a critic, no KL penalty): 40 iterations of 64 texts, looked at after each by
        128 texts, whose log-ratio is the KL. A seed is a reward model of each size with a run of PPO against it; all
        start at one π_ref. --quick: 100 and 3,000 pairs, 150 batches, 24 iterations. It shows reward models that read
        text and are wrong where they have not been; not what their size does.
Run     rljax reproduce overoptimization_reward_models   (52 s on 2 × x86_64, cpu)
Pass    Best-of-n: d (α − β d) has R² of at least 0.95 for every size, and α grows with the preferences. PPO: the peak
        lies inside for every size and the fall from it is at least 15% of it; the proxy's reward at the end is at least
        95% of its highest; both laws have R² of at least 0.9; the peak grows with the preferences. Means of three
        seeds. It fails for d (α − β ln d), the paper's law of PPO, with 1,000 preferences (R² 0.87), and with others
        where PPO ends earlier, as in --quick: gold falls faster, nearly with d², since these texts end as one word over
        and over, and the penalty on repetition grows with it; d (α − β d) has at least 0.97 for all.
Got     100 preferences, best-of-n: d (α − β d): 0.9963; 100 preferences, PPO: gold peaks: √KL = 1.60; 100 preferences,
        PPO: and falls: 3.292; 100 preferences, PPO: the proxy goes on: 0.9952; 100 preferences, PPO: d (α − β d):
        0.974; 100 preferences, PPO: d (α − β ln d): 0.9545; 300 preferences, best-of-n: d (α − β d): 0.9977; 300
        preferences, PPO: gold peaks: √KL = 1.67; 300 preferences, PPO: and falls: 3.361; 300 preferences, PPO: the
        proxy goes on: 0.9992; 300 preferences, PPO: d (α − β d): 0.9949; 300 preferences, PPO: d (α − β ln d): 0.9443;
        1,000 preferences, best-of-n: d (α − β d): 0.9947; 1,000 preferences, PPO: gold peaks: √KL = 2.09; 1,000
        preferences, PPO: and falls: 1.959; 1,000 preferences, PPO: the proxy goes on: 0.9883; 1,000 preferences, PPO: d
        (α − β d): 0.9849; 1,000 preferences, PPO: d (α − β ln d): 0.8716 FAIL; 3,000 preferences, best-of-n: d (α − β
        d): 0.9987; 3,000 preferences, PPO: gold peaks: √KL = 2.17; 3,000 preferences, PPO: and falls: 2.347; 3,000
        preferences, PPO: the proxy goes on: 1; 3,000 preferences, PPO: d (α − β d): 0.9938; 3,000 preferences, PPO: d
        (α − β ln d): 0.9106; best-of-n: α grows: 0.48, 0.54, 0.96, 1.11: 0.0652; PPO: the peak grows: 0.79, 0.91, 1.24,
        1.41: 0.1227.
"""

import functools
from typing import Any, NamedTuple

import _tiny as tiny
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from overoptimization_best_of_n import fit
from overoptimization_rl import fit_rl

from rljax import iteration, models, objectives, online, ops, papers, sampling, shaping, train
from rljax.types import ComparisonBatch, Params, Tokens, TrainState

PREFERENCES, NUMBERS = (100, 300, 1000, 3000), tuple(2**i for i in range(10))
SAMPLES, SEEN, DECAY = 8192, 128, 0.1
COLORS = dict(zip(PREFERENCES, ("#D55E00", "#E69F00", "#009E73", "#0072B2"), strict=True))
MODEL = models.reward_model(tiny.MODEL)


def gold(tokens: Tokens) -> Array:
    """The mean valence of the words, less the share of them that were written twice before."""
    counts = jnp.sum(jax.nn.one_hot(tokens.ids, tiny.WORDS) * tokens.mask[..., None], axis=-2)
    return tiny.valence(tokens) - jnp.maximum(counts - 2, 0).sum(-1) / tiny.LENGTH


def write(key: Array, params: Params, n: int) -> Tokens:
    prompts = tiny.make_prompts(jax.random.fold_in(key, 0), n)
    how: dict[str, Any] = {"max_new_tokens": tiny.LENGTH}
    return sampling.generate(tiny.MODEL, params, prompts, jax.random.fold_in(key, 1), **how).tokens


def learn_reward(key: Array, base: Params, std: Array, n: Array, *, steps: int, rows: int = 32) -> Params:
    """A reward model from n pairs of π_ref's texts, labelled by Bradley-Terry of the gold reward / std."""
    keys, most = jax.random.split(key, 4), PREFERENCES[-1]
    tokens = jax.tree.map(lambda x: x.reshape(most, 2, -1), write(keys[0], base, 2 * most))
    better = jnp.diff(gold(tokens))[:, 0] / std
    best = jax.random.bernoulli(keys[1], jax.nn.sigmoid(better)).astype(jnp.int32)
    pairs = ComparisonBatch(tokens=tokens, best=best, margin=jnp.zeros(most))
    optimizer = optax.adamw(train.cosine(3e-3, steps), weight_decay=DECAY)
    update = train.update_step(objectives.comparison(MODEL), optimizer)

    def step(state: TrainState, key: Array) -> tuple[TrainState, None]:
        chosen = jax.random.randint(key, (rows,), 0, n)
        return update(state, jax.tree.map(lambda x: x[chosen], pairs))[0], None

    state = train.init_state(MODEL.init(keys[2]), optimizer)
    return jax.lax.scan(step, state, jax.random.split(keys[3], steps))[0].params


class Scale(NamedTuple):
    mean: Array
    std: Array


class Proxy(NamedTuple):
    params: Params
    usual: Scale  # of its scores of π_ref's texts


def judge(proxy: Proxy, tokens: Tokens) -> Array:
    return shaping.standardize(MODEL.scores(proxy.params, tokens), **proxy.usual._asdict())


def optimize(key: Array, base: Params, proxy: Proxy, usual: Scale, *, steps: int) -> Array:
    """[3 steps]: √KL, gold and proxy reward [σ of π_ref's], over iterations of PPO against a proxy."""
    run = online.PPO(**tiny.SETTINGS, reward=judge, batch=64, epochs=2, steps=steps, kl_reward=0.0)

    def look(learner: iteration.Learner) -> Array:
        params = learner.train.params["policy"]
        tokens = write(jax.random.fold_in(key, learner.iterations), params, SEEN)
        now, before = (objectives.sequence_logps(tiny.MODEL, weights, tokens) for weights in (params, base))
        true = shaping.standardize(gold(tokens), **usual._asdict())
        distance = jnp.sqrt(jnp.maximum((now - before).mean(), 0.0))
        return jnp.stack([distance, true.mean(), judge(proxy, tokens).mean()])

    return tiny.learn(key, run, 2e-3, judge, params=base, reward_params=proxy, look=look)[2].T


def measure(key: Array, n: Array, *, batches: int, steps: int) -> tuple[Array, Array]:
    """([2 numbers]: gold and proxy reward of best-of-n, [3 steps]: those of PPO) with a reward model of n pairs."""
    keys = jax.random.split(key, 3)
    base = tiny.MODEL.init(jax.random.key(100))
    texts = write(jax.random.key(101), base, SAMPLES)
    true = gold(texts)
    usual = Scale(true.mean(), true.std())
    params = learn_reward(keys[0], base, usual.std, n, steps=batches)
    scores = MODEL.scores(params, texts)
    proxy = Proxy(params, Scale(scores.mean(), scores.std()))
    standard = [shaping.standardize(true, **usual._asdict()), judge(proxy, texts)]
    chosen = jnp.stack([jnp.stack([ops.best_of_n(x, scores, n=k) for k in NUMBERS]) for x in standard])
    return chosen, optimize(keys[1], base, proxy, usual, steps=steps)


def reproduce(*, seeds: int, quick: bool) -> papers.Result:
    sizes = (PREFERENCES[0], PREFERENCES[-1]) if quick else PREFERENCES
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    how = {"batches": 150, "steps": 24} if quick else {"batches": 400, "steps": 40}
    over_seeds = jax.vmap(functools.partial(measure, **how), (0, None))
    found = jax.device_get(jax.jit(jax.vmap(over_seeds, (None, 0)))(keys, jnp.array(sizes)))
    got = {n: (found[0][i], found[1][i]) for i, n in enumerate(sizes)}
    distance = np.sqrt([np.log(n) - (n - 1) / n for n in NUMBERS])
    alphas = np.array([fit(distance, chosen.mean(0)[0])[0] for chosen, _ in got.values()])
    peaks = np.array([learnt.mean(0)[1].max() for _, learnt in got.values()])
    checks = []
    for n, (chosen, learnt) in got.items():
        (d, true, judged), last = learnt.mean(0), learnt.shape[-1] - 1
        at, pairs = int(true.argmax()), f"{n:,} preferences"
        lost, inside = 1 - true[-1] / true[at], f"√KL = {d[at]:.2f}"
        checks += [
            papers.at_least(f"{pairs}, best-of-n: d (α − β d)", "R²", fit(distance, chosen.mean(0)[0])[2], 0.95),
            papers.Check(f"{pairs}, PPO: gold peaks", f"inside 0 … {d[-1]:.1f}", inside, 0 < at < last),
            papers.at_least(f"{pairs}, PPO: and falls", "share of the peak that is lost", lost, 0.15),
            papers.at_least(
                f"{pairs}, PPO: the proxy goes on", "at the end / highest", judged[-1] / judged.max(), 0.95
            ),
            papers.at_least(f"{pairs}, PPO: d (α − β d)", "R²", fit(d, true)[2], 0.9),
            papers.at_least(f"{pairs}, PPO: d (α − β ln d)", "R²", fit_rl(d, true)[2], 0.9),
        ]
    for what, values in (("best-of-n: α", alphas), ("PPO: the peak", peaks)):
        listed = ", ".join(f"{value:.2f}" for value in values)
        checks.append(papers.at_least(f"{what} grows: {listed}", "smallest step", np.diff(values).min(), 0.0))
    return papers.Result(checks, {"Gold (solid) and proxy (dotted) reward over √KL": draw(distance, got)})


def draw(distance: np.ndarray, got: dict[int, tuple[np.ndarray, np.ndarray]]):
    drawn, ((left, right),) = papers.figure(1, 2)
    for n, (chosen, learnt) in got.items():
        color, label = COLORS[n], f"{n:,} preferences"
        alpha, beta, _ = fit(distance, chosen.mean(0)[0])
        left.plot(distance, distance * (alpha - beta * distance), color=color, linewidth=1, linestyle=(0, (5, 2)))
        for axis, d, curves in ((left, distance, chosen), (right, learnt[:, 0].mean(0), learnt[:, 1:])):
            papers.band(axis, d, curves[:, 0], label, color)
            axis.plot(d, curves[:, 1].mean(0), color=color, linestyle=":")
    left.set(title="best-of-n (dashed: d (α − β d))")
    right.set(title="PPO")
    for axis in (left, right):
        axis.set(xlabel="√KL(π ‖ π_ref)", ylabel="reward [σ of π_ref]")
        axis.axhline(0, color="#999999", linewidth=0.6)
    left.legend()
    return drawn
