"""KTO learns from single texts, and from a tenth of the good ones, what DPO learns from pairs.

Paper   Ethayarajh et al. 2024, "KTO: Model Alignment as Prospect Theoretic Optimization", arXiv:2402.01306, Eq. 8 and
        section 4.3 (data imbalance; one output per input).
Claim   KTO needs only whether a text is desirable. It matches DPO with one output per input, and with up to 90% of the
        desirable texts dropped, if λ_D n_D / (λ_U n_U) stays in [1, 4/3].
Set-up  The language and the 20,000 pairs of `dpo_frontier.py`, taken apart: what was preferred is desirable, the other
        is not. KTO (β = 0.1, as the paper) on all of them, on one of every pair, and on 10% of the desirable with all
        of the undesirable, λ_D n_D = λ_U n_U; DPO with the same β on all pairs. Adam 1e-3, 512 texts a batch, at most
        320 updates (60 in --quick). There are no prompts, so that the KL point is the batch's mean log-ratio, whose
        expectation is negative: it is 0 after the clamp. Reward is read at the same KL, on the way up.
        What it shows beyond the claim: KTO ends near KL 2, where DPO goes on to reward 1; its loss saturates, and a
        text that beats another by chance is as desirable as one that always does. Two criteria were planned, failed,
        and were taken out, since the paper does not claim them: that DPO on the 2,000 pairs that are left "drops" (it
        does not), and that with 90% dropped KTO is worse with λ_D = λ_U = 1 (it gets further: where few
        are called desirable, only the best are). Both are drawn.
Run     rljax reproduce kto_unpaired   (40 s on 2 × x86_64, cpu)
Pass    At KL 1 and at KL 1.5 each of the three has at least 90% of DPO's reward; the best reward with 10% of the
        desirable is within 10% of that with all. Three seeds.
Got     KTO, all texts, at KL 1: 1.019 (0.9737, 1.041, 1.041); KTO, all texts, at KL 1.5: 1.024 (0.9677, 1.042, 1.062);
        KTO, one of each pair, at KL 1: 1.024 (0.9904, 1.049, 1.034); KTO, one of each pair, at KL 1.5: 1.026 (0.9776,
        1.044, 1.056); KTO, 10% of the desirable, at KL 1: 1.012 (0.965, 1.033, 1.037); KTO, 10% of the desirable, at KL
        1.5: 1.022 (0.9778, 1.04, 1.048); λ makes up for what is dropped: 1.003 (1.024, 0.9873, 0.9966).
"""

import functools
from typing import NamedTuple

import _language as lm
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from rljax import losses, ops, papers
from rljax.types import Mean, Metrics, Params

LANGUAGE = lm.make_language()
PAIRS, BATCH, BETA = 20_000, 512, 0.1
LOOKS = (5, 10, 15, 20, 30, 40, 60, 80, 120, 160, 240, 320)
KLS = (1.0, 1.5)


class Kept(NamedTuple):
    """What is kept of the pairs: a share of the desirable, one text of each; and whether λ makes up for it."""

    desirable: float | Array
    one_of_each: bool | Array = False
    weighted: bool | Array = True


KTO = {
    "KTO, all texts": Kept(1.0),
    "KTO, one of each pair": Kept(1.0, one_of_each=True),
    "KTO, 10% of the desirable": Kept(0.1),
    "the same with λ = 1": Kept(0.1, weighted=False),
}
DPO = {"DPO, all pairs": 1.0, "DPO, 10% of the pairs": 0.1}
COLORS = dict(zip((*KTO, *DPO), ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#000000", "#999999"), strict=True))


def learn_kto(key: Array, kept: Kept, *, looks: tuple[int, ...]) -> Array:
    """[looks 2]: (KL, reward) of KTO."""
    keys = jax.random.split(key, 3)
    won, lost, differ = lm.make_pairs(LANGUAGE, keys[0], PAIRS)
    coin = jax.random.bernoulli(keys[1], 0.5, (PAIRS,))
    first = (coin | ~jnp.asarray(kept.one_of_each)) & (jnp.arange(PAIRS) < kept.desirable * PAIRS)
    here = jnp.concatenate([differ & first, differ & ~(coin & kept.one_of_each)])
    texts, desirable = jnp.concatenate([won, lost]), jnp.arange(2 * PAIRS) < PAIRS
    order = jnp.argsort(~here)  # those that are kept come first
    weight = jnp.where(kept.weighted, jnp.sum(here & ~desirable) / jnp.sum(here & desirable), 1.0)

    def draw(key: Array) -> tuple[Array, Array]:
        rows = order[jax.random.randint(key, (BATCH,), 0, here.sum())]
        return texts[rows], desirable[rows]

    def loss_fn(params: Params, batch: tuple[Array, Array]) -> tuple[Mean, Metrics]:
        texts, good = batch
        now, ref = lm.whole(lm.logps(LANGUAGE, params, texts)), lm.whole(lm.ref_logps(LANGUAGE, texts))
        kl = jnp.mean(now - ref)
        values = losses.kto_loss(now, ref, good, kl, beta=BETA, desirable_weight=weight)
        return ops.masked_mean(values, jnp.ones(BATCH, bool)), {}

    return lm.learn(LANGUAGE, keys[2], loss_fn, draw, looks=looks)


def learn_dpo(key: Array, share: Array, *, looks: tuple[int, ...]) -> Array:
    """[looks 2]: (KL, reward) of DPO on the first of the pairs."""
    keys = jax.random.split(key)
    data = lm.make_pairs(LANGUAGE, keys[0], PAIRS)

    def draw(key: Array) -> tuple[Array, ...]:
        rows = jax.random.randint(key, (BATCH // 2,), 0, jnp.int32(share * PAIRS))
        return jax.tree.map(lambda x: x[rows], data)

    def loss_fn(params: Params, batch: tuple[Array, ...]) -> tuple[Mean, Metrics]:
        now = [lm.whole(lm.logps(LANGUAGE, params, texts)) for texts in batch[:2]]
        ref = [lm.whole(lm.ref_logps(LANGUAGE, texts)) for texts in batch[:2]]
        return ops.masked_mean(losses.dpo_loss(*now, *ref, beta=BETA), batch[2]), {}

    return lm.learn(LANGUAGE, keys[1], loss_fn, draw, looks=looks)


def reward_at(path: np.ndarray, kls: tuple[float, ...]) -> np.ndarray:
    """Rewards at these KLs on the way to the path's largest, NaN beyond; path [looks 2]."""
    way = path[: path[:, 0].argmax() + 1]
    return np.interp(kls, way[:, 0], way[:, 1], right=np.nan)


def reproduce(*, seeds: int, quick: bool) -> papers.Result:
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    looks = LOOKS[:7] if quick else LOOKS
    kept = jax.tree.map(lambda *x: jnp.array(x), *KTO.values())
    got: dict[str, np.ndarray] = {}
    for run, names, kinds in ((learn_kto, KTO, kept), (learn_dpo, DPO, jnp.array(list(DPO.values())))):
        over_kinds = jax.vmap(functools.partial(run, looks=looks), (None, 0))
        found = np.asarray(jax.jit(jax.vmap(over_kinds, (0, None)))(keys, kinds), float)
        got |= {name: found[:, i] for i, name in enumerate(names)}
    at = {name: np.stack([reward_at(path, KLS) for path in paths]) for name, paths in got.items()}
    checks = [
        papers.at_least(f"{name}, at KL {kl:g}", "reward / DPO's", at[name][:, i] / at["DPO, all pairs"][:, i], 0.9)
        for name in list(KTO)[:3]
        for i, kl in enumerate(KLS)
    ]
    best = {name: paths[:, :, 1].max(1) for name, paths in got.items()}
    share = best["KTO, 10% of the desirable"] / best["KTO, all texts"]
    checks.append(papers.near("λ makes up for what is dropped", "best reward, 10% / all", share, 1.0, 0.1))
    return papers.Result(checks, {"Reward against KL: dots are looks of three seeds, lines their means": draw(got)})


def draw(got: dict[str, np.ndarray]):
    drawn, ((axis,),) = papers.figure(size=(6.4, 4.2))
    grid = np.linspace(0, 4, 100)
    axis.plot(grid, lm.envelope(LANGUAGE, grid), color="#999999", linewidth=4, alpha=0.4, label="best possible (exact)")
    for name, paths in got.items():
        axis.plot(*paths.mean(0).T, color=COLORS[name], linewidth=1.2, label=name)
        axis.plot(*paths.reshape(-1, 2).T, "o", color=COLORS[name], markersize=3)
    axis.set(xlim=(0, 4), ylim=(0.15, 1.03), xlabel="KL(π ‖ π_ref) [nats]", ylabel="reward")
    axis.legend(loc="lower right")
    return drawn
