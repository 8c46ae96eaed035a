"""DPO is close to the best trade of reward against KL; fine-tuning on what was preferred, and unlikelihood, are not.

Paper   Rafailov et al. 2023, "Direct Preference Optimization", arXiv:2305.18290, section 6.1 and figure 2 (left):
        reward against KL(π ‖ π_ref) of DPO, PPO, PPO with the true reward, unlikelihood, preferred fine-tuning.
Claim   DPO's frontier is the most efficient: above those of preferred fine-tuning, unlikelihood and PPO.
Set-up  The language of `_language.py` stands in for movie reviews: rewards are known and so is the best frontier.
        20,000 pairs of π_ref's texts, the one with the higher reward preferred (as in the paper; ties are dropped).
        Adam 1e-3, batches of 256 pairs, looked at after 5, 10, 20, … 640 updates by 8,192 texts. DPO with β = 0.1, 1,
        5; PPO with four weights of the KL in the reward, 4 epochs a batch, 300 batches of 256 texts, with the true
        reward and with a learned one (`losses.bradley_terry_loss`, a score for each word); best-of-n from 8,192 texts.
        With Bradley-Terry labels of scale s, DPO with β ends at π_ref tilted at β/s: this is checked for s = 6, β = 1,
        with new pairs in each of 2,000 updates (20,000 pairs are learned by heart first). --quick: 320, 120 and
        600 of them, no learned reward. It shows how much of the frontier each method gets where nothing is unknown; not
        generalisation in language. A correct PPO with the true reward is on the frontier here, so that "DPO above PPO
        with the true reward", as in the paper's figure, is not reproduced, and no criterion.
Run     rljax reproduce dpo_frontier   (162 s on 2 × x86_64, cpu)
Pass    No point is above the best frontier by 0.01 (noise of the means) or more; DPO with β = 5 is at most 0.05 below
        it for KL in [0.7, 5]; at its last look DPO (β = 1) is at least 0.1 above unlikelihood's gap; DPO's best reward
        is at least 0.3 above preferred fine-tuning's; PPO with the true reward ends at most 0.02 below the frontier;
        with Bradley-Terry labels DPO ends within 0.25 nats and 0.05 of reward of the tilted π_ref. Three seeds.
Got     nothing is above the frontier: 0.0005884; DPO is near it: -0.0307; unlikelihood is not: 0.3403 (0.3384, 0.3235,
        0.3589); preferred fine-tuning gets little: 0.5684 (0.5647, 0.5819, 0.5585); PPO with the true reward is on it:
        -0.007941 (-0.006503, -0.01061, -0.006704); DPO on Bradley-Terry labels is π_ref tilted: 1.735 (1.762, 1.729,
        1.713); and has its reward: 0.9046 (0.9059, 0.9021, 0.9059).
"""

import functools
from collections.abc import Callable

import _language as lm
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rljax import advantages, losses, ops, papers, shaping, train
from rljax.types import LossFn, Mean, Metrics, Params, TrainState

LANGUAGE = lm.make_language()
PAIRS, BATCH, LOOKS = 20_000, 256, (5, 10, 20, 40, 80, 160, 320, 640)
BETAS = (0.1, 1.0, 5.0)
COEFFICIENTS = {"true": (0.3, 0.1, 0.05, 0.02), "learned": (1.5, 0.7, 0.5, 0.3)}
COLORS = {
    "DPO β = 0.1": "#56B4E9",
    "DPO β = 1": "#0072B2",
    "DPO β = 5": "#000000",
    "preferred fine-tuning": "#E69F00",
    "unlikelihood": "#D55E00",
    "PPO, true reward": "#009E73",
    "PPO, learned reward": "#CC79A7",
}
PAPER = {  # (KL, reward), read off figure 2 (left): GPT-2 large on IMDb
    "DPO β = 1": ("DPO", ((2.5, 0.9), (5, 1.0), (20, 1.0))),
    "PPO, true reward": ("PPO, true reward", ((1, 0.49), (12, 0.89))),
    "PPO, learned reward": ("PPO, learned reward", ((2, 0.53), (11, 0.92))),
}


def preference(values: Callable[[Array, Array, Array, Array], Array]) -> LossFn:
    """An objective of pairs from (log π(won), log π(lost), and those of π_ref) -> losses."""

    def loss_fn(params: Params, batch: tuple[Array, Array, Array]) -> tuple[Mean, Metrics]:
        won, lost, counts = batch
        now = [lm.whole(lm.logps(LANGUAGE, params, texts)) for texts in (won, lost)]
        ref = [lm.whole(lm.ref_logps(LANGUAGE, texts)) for texts in (won, lost)]
        return ops.masked_mean(values(*now, *ref), counts), {}

    return loss_fn


def learn_offline(
    key: Array, beta: Array | float, *, looks: tuple[int, ...], values: Callable[..., Array] | None = None
) -> Array:
    """[looks 2]: (KL, reward) after so many updates on a fixed set of pairs, with DPO's loss or another."""
    keys = jax.random.split(key)
    data = lm.make_pairs(LANGUAGE, keys[0], PAIRS)
    loss_fn = preference(functools.partial(losses.dpo_loss, beta=beta) if values is None else values)

    def draw(key: Array) -> tuple[Array, Array, Array]:
        rows = jax.random.randint(key, (BATCH,), 0, PAIRS)
        return jax.tree.map(lambda x: x[rows], data)

    return lm.learn(LANGUAGE, keys[1], loss_fn, draw, looks=looks)


def learn_labels(key: Array, *, scale: float, steps: int) -> Array:
    """[2]: (KL, reward) of DPO (β = 1) on Bradley-Terry labels, each pair seen once."""
    keys = jax.random.split(key, 3)
    optimizer = optax.adam(train.cosine(1e-2, steps))
    update = train.update_step(preference(functools.partial(losses.dpo_loss, beta=1.0)), optimizer)

    def step(state: TrainState, key: Array) -> tuple[TrainState, None]:
        return update(state, lm.make_pairs(LANGUAGE, key, BATCH, scale=scale))[0], None

    state = train.init_state(lm.init(keys[0]), optimizer)
    state, _ = jax.lax.scan(step, state, jax.random.split(keys[1], steps))
    return lm.look(LANGUAGE, state.params, keys[2])


def learn_reward(key: Array) -> Callable[[Array], Array]:
    """A text's score is the sum of its words', by Bradley and Terry's loss on the pairs; mean 0 and std 1 on them."""
    won, lost, counts = lm.make_pairs(LANGUAGE, key, PAIRS)
    optimizer = optax.adam(1e-2)

    def loss_fn(params: Params, batch: tuple[Array, Array, Array]) -> tuple[Mean, Metrics]:
        scores = [params["words"][texts].sum(1) for texts in batch[:2]]
        return ops.masked_mean(losses.bradley_terry_loss(*scores), batch[2]), {}

    update = train.update_step(loss_fn, optimizer)
    state = train.init_state({"words": jnp.zeros(lm.WORDS)}, optimizer)
    step = lambda state, _: (update(state, (won, lost, counts))[0], None)  # noqa: E731
    words = jax.lax.scan(step, state, length=200)[0].params["words"]
    seen = words[jnp.concatenate([won, lost])].sum(1)
    return lambda texts: shaping.standardize(words[texts].sum(1), mean=seen.mean(), std=seen.std())


def learn_online(key: Array, coefficient: Array, *, reward: str, batches: int) -> Array:
    """[2]: (KL, reward) of PPO's policy, with the KL in the reward."""
    keys = jax.random.split(key, 4)
    judge = functools.partial(lm.score, LANGUAGE) if reward == "true" else learn_reward(keys[0])
    mask = jnp.ones((BATCH, lm.LENGTH), bool)
    optimizer = optax.adam(train.cosine(1e-2, 4 * batches))

    def surrogate(params: Params, batch: tuple[Array, Array, Array]) -> tuple[Mean, Metrics]:
        texts, old, gains = batch
        values = losses.ppo_clip_loss(lm.logps(LANGUAGE, params, texts), old, gains)
        return ops.aggregate(values, mask, mode="token_mean"), {}

    update = train.update_step(surrogate, optimizer)

    def step(state: TrainState, key: Array) -> tuple[TrainState, None]:
        texts = lm.write(LANGUAGE, state.params, key, BATCH)
        old, ref = lm.logps(LANGUAGE, state.params, texts), lm.ref_logps(LANGUAGE, texts)
        rewards = advantages.shape_rewards(judge(texts), old, ref, mask, kl_coef=coefficient)
        returns = advantages.reward_to_go(rewards, mask)
        batch = texts, old, ops.masked_whiten(returns - returns.mean(0), mask)
        return jax.lax.scan(lambda state, _: (update(state, batch)[0], None), state, length=4)[0], None

    state = train.init_state(lm.init(keys[1]), optimizer)
    state, _ = jax.lax.scan(step, state, jax.random.split(keys[2], batches))
    return lm.look(LANGUAGE, state.params, keys[3])


def best_of(key: Array, numbers: tuple[int, ...]) -> Array:
    """[numbers 2]: (KL, reward) of best-of-n."""
    texts = lm.write(LANGUAGE, lm.init(key), key, 8192)
    scores = lm.score(LANGUAGE, texts)
    points = [(jnp.log(n) - (n - 1) / n, ops.best_of_n(scores, scores, n=n)) for n in numbers]
    return jnp.array(points)


def gap(points: np.ndarray) -> np.ndarray:
    """How far above the best frontier, points [… 2]; below is negative."""
    return points[..., 1] - lm.envelope(LANGUAGE, points[..., 0])


def runs(*, seeds: int, quick: bool) -> dict[str, np.ndarray]:
    """[seeds points 2] of each method."""
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))

    def over_seeds(run: Callable[..., Array], *swept: tuple[float, ...]) -> np.ndarray:
        for _ in swept:
            run = jax.vmap(run, (None, 0))
        return np.asarray(jax.jit(jax.vmap(run, (0, *(None for _ in swept))))(keys, *map(jnp.array, swept)), float)

    offline = functools.partial(learn_offline, looks=LOOKS[:-1] if quick else LOOKS)
    dpo = over_seeds(offline, BETAS)
    got = {f"DPO β = {beta:g}": dpo[:, i] for i, beta in enumerate(BETAS)}
    others = {
        "preferred fine-tuning": lambda won, *_: losses.nll_loss(won),
        "unlikelihood": lambda won, lost, *_: losses.unlikelihood_loss(won, lost, alpha=0.5),
    }
    got |= {name: over_seeds(functools.partial(offline, beta=1.0, values=values)) for name, values in others.items()}
    for reward in ("true",) if quick else ("true", "learned"):
        run = functools.partial(learn_online, reward=reward, batches=120 if quick else 300)
        got[f"PPO, {reward} reward"] = over_seeds(run, COEFFICIENTS[reward])
    got["best-of-n"] = over_seeds(functools.partial(best_of, numbers=(1, 2, 4, 8, 16, 32, 64)))
    got["labels"] = over_seeds(functools.partial(learn_labels, scale=6.0, steps=600 if quick else 2000))
    return got


def reproduce(*, seeds: int, quick: bool) -> papers.Result:
    got = runs(seeds=seeds, quick=quick)
    labels, theory = got.pop("labels"), lm.tilted(*lm.known(LANGUAGE), 1.0 / 6.0)
    learned = {name: points for name, points in got.items() if name != "best-of-n"}
    strict = learned["DPO β = 5"].mean(0)
    inside = (strict[:, 0] >= 0.7) & (strict[:, 0] <= 5)
    last = {name: gap(points[:, -1]) for name, points in learned.items()}
    above = max(gap(points.mean(0)).max() for points in learned.values())
    lead = got["DPO β = 1"][:, :, 1].max(1) - got["preferred fine-tuning"][:, :, 1].max(1)
    checks = [
        papers.at_most("nothing is above the frontier", "largest gap", above, 0.01),
        papers.at_least("DPO is near it", "smallest gap, KL in [0.7, 5]", gap(strict[inside]).min(), -0.05),
        papers.at_least("unlikelihood is not", "gap, DPO's − its", last["DPO β = 1"] - last["unlikelihood"], 0.1),
        papers.at_least("preferred fine-tuning gets little", "best reward, DPO's − its", lead, 0.3),
        papers.at_least("PPO with the true reward is on it", "gap", gap(got["PPO, true reward"]).min(1), -0.02),
        papers.near("DPO on Bradley-Terry labels is π_ref tilted", "KL", labels[:, 0], theory[0], 0.25),
        papers.near("and has its reward", "reward", labels[:, 1], theory[1], 0.05),
    ]
    return papers.Result(checks, {"Reward against KL: every seed and look is a point, lines are means": draw(got)})


def draw(got: dict[str, np.ndarray]):
    drawn, ((left, right),) = papers.figure(1, 2, size=(5.6, 4.2), sharey=True)
    grid = np.linspace(0, 8, 200)
    left.plot(grid, lm.envelope(LANGUAGE, grid), color="#999999", linewidth=4, alpha=0.5, label="best possible (exact)")
    for name, points in got.items():
        color = COLORS.get(name, "#666666")
        left.plot(*points.mean(0).T, color=color, linewidth=1)
        left.plot(*points.reshape(-1, 2).T, "x" if name == "best-of-n" else "o", color=color, markersize=4, label=name)
    for name, (label, points) in PAPER.items():
        right.plot(*np.array(points).T, "o--", color=COLORS[name], markersize=4, label=label)
    left.set(xlim=(0, 8), ylim=(0.15, 1.03), xlabel="KL(π ‖ π_ref) [nats]", ylabel="reward", title="here")
    right.set(xlim=(0, 21), xlabel="KL(π ‖ π_ref) [nats]", title="read off the paper's figure 2")
    for axis in (left, right):
        axis.legend(loc="lower right")
    return drawn
