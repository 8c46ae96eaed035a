"""A reward model that learned "longer is better" makes PPO write longer; balanced preferences take most of it away.

Paper   Singhal et al. 2023, "A Long Way to Go: Investigating Length Correlations in RLHF", arXiv:2310.03716, sections 3
        to 5: 70 to 90% of PPO's gain in reward is explained by length; balancing the preferences mitigates it.
Claim   "Length increases account for much of the reward improvement"; it comes from reward models that were trained on
        preferences that length predicts. Interventions on the data help and do not remove it everywhere.
Set-up  The transformer of `_tiny.py`, first trained to write words at random and to end after each with probability
        1/4 (at most 12). 4,000 pairs of its texts: in 40% the longer is preferred, in 60% the one with the higher mean
        valence of a random lexicon, which knows nothing of length: length predicts 70% of the labels that it can. Two
        reward models by `losses.bradley_terry_loss`, the mean of learned scores of words and so much for each word: on
        all pairs; on pairs balanced as in the paper (of those where the longer won, as many as of those where the
        shorter won). PPO on each, β = 0.3, 64 texts an iteration, 100 iterations (60 in --quick). The share that length
        explains: how much the reward would have gained if only the lengths had changed, each length keeping its mean
        reward under the initial policy. A transformer as reward model was tried first and failed: of balanced pairs,
        too, it made texts longer (2.6 times the growth), since it extrapolates that more good words are better.
Run     rljax reproduce length_bias   (39 s on 2 × x86_64, cpu)
Pass    The longer text wins 70% ± 3% of the pairs that differ in length; PPO's texts become at least 1.5 times as long;
        length explains at least half of the gain (the paper: 70 to 90%); with balanced preferences the length grows by
        at most half as much. Three seeds. It fails for the share that length explains, 26%: here good words are as easy
        to write as long texts, and the reward model knows them exactly; the paper's policies found little but length.
Got     length predicts the preference: 0.7087 (0.7099, 0.7029, 0.7134); PPO writes longer: 1.924 (1.909, 2.226, 1.636);
        that is what the reward gains: 0.2637 (0.2872, 0.3091, 0.1949) FAIL; balanced preferences mitigate it: 0.1192
        (0.1528, -0.0144, 0.2193).
"""

import functools
from typing import Any

import _tiny as tiny
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rljax import losses, online, papers, sampling, shaping, train
from rljax.types import ComparisonBatch, Mean, Metrics, Params, Tokens

END, STOP, PAIRS, SEEN, LAST = 0, 0.25, 4000, 2048, 10  # word 0 ends a text
COLORS = {"all preferences": "#D55E00", "balanced preferences": "#0072B2"}


def make_texts(key: Array, n: int) -> Tokens:
    """Texts that end after each word with probability 1/4."""
    keys = jax.random.split(key)
    words = jax.random.randint(keys[0], (n, tiny.PROMPT + tiny.LENGTH), 1, tiny.WORDS)
    ends = jax.random.bernoulli(keys[1], STOP, words.shape).at[:, : tiny.PROMPT].set(False)
    there = jnp.cumsum(ends, axis=1) - ends == 0
    ids, segments = jnp.where(ends, END, words), there.astype(jnp.int32)
    return Tokens(ids=ids, segments=segments, mask=there.at[:, : tiny.PROMPT].set(False))


def lengths(tokens: Tokens) -> Array:
    return tokens.mask.sum(-1)


def quality(tokens: Tokens) -> Array:
    """The mean valence of the words, the end left out; as usual for a text without any."""
    words = tokens.mask & (tokens.ids != END)
    total = jnp.sum(jnp.where(words, tiny.LEXICON[tokens.ids], 0.0), -1)
    return jnp.where(words.any(-1), total / jnp.maximum(words.sum(-1), 1), tiny.LEXICON[1:].mean())


def write(key: Array, params: Params, n: int) -> Tokens:
    prompts = tiny.make_prompts(jax.random.fold_in(key, 0), n, low=1)
    how: dict[str, Any] = {"max_new_tokens": tiny.LENGTH, "stop_ids": (END,)}
    return sampling.generate(tiny.MODEL, params, prompts, jax.random.fold_in(key, 1), **how).tokens


def make_pairs(key: Array, base: Params) -> tuple[ComparisonBatch, Array]:
    """(pairs with their labels, what length says: 1 where the longer won, −1 where it lost, 0 for equal lengths)"""
    keys = jax.random.split(key, 2)
    tokens = jax.tree.map(lambda x: x.reshape(PAIRS, 2, -1), write(keys[0], base, 2 * PAIRS))
    longer, better = jnp.diff(lengths(tokens))[:, 0], jnp.diff(quality(tokens))[:, 0]
    by_length = jax.random.bernoulli(keys[1], 0.4, (PAIRS,)) & (longer != 0)
    best = jnp.where(by_length, longer > 0, better > 0).astype(jnp.int32)
    return ComparisonBatch(tokens=tokens, best=best, margin=jnp.zeros(PAIRS)), jnp.sign(longer) * (2 * best - 1)


def rate(params: Params, tokens: Tokens) -> Array:
    """The mean score of a text's words, and so much for every word."""
    words = jnp.where(tokens.mask, params["words"][tokens.ids], 0.0)
    return words.sum(-1) / lengths(tokens) + params["length"] * lengths(tokens)


def learn_reward(pairs: ComparisonBatch, weights: Array, *, steps: int = 300) -> Params:
    """A reward model from all pairs, with these weights."""
    optimizer = optax.adam(0.05)

    def loss_fn(params: Params, pairs: ComparisonBatch) -> tuple[Mean, Metrics]:
        scores = rate(params, pairs.tokens)
        won, lost = (jnp.take_along_axis(scores, best[:, None], 1)[:, 0] for best in (pairs.best, 1 - pairs.best))
        return Mean(total=jnp.sum(weights * losses.bradley_terry_loss(won, lost)), weight=weights.sum()), {}

    update = train.update_step(loss_fn, optimizer)
    state = train.init_state({"words": jnp.zeros(tiny.WORDS), "length": jnp.zeros(())}, optimizer)
    return jax.lax.scan(lambda state, _: (update(state, pairs)[0], None), state, length=steps)[0].params


def judge(params: tuple[Params, Array, Array], tokens: Tokens) -> Array:
    weights, mean, std = params
    return shaping.standardize(rate(weights, tokens), mean=mean, std=std)


def explained(before: Tokens, rewards: Array, after: Tokens, gain: Array) -> Array:
    """The share of the gain that the change of lengths alone would have brought."""
    kinds = jax.nn.one_hot(lengths(before), tiny.LENGTH + 1)
    usual = (rewards @ kinds) / jnp.maximum(kinds.sum(0), 1.0)
    return (usual[lengths(after)].mean() - rewards.mean()) / gain


def learn(key: Array, balanced: Array, *, steps: int) -> dict[str, Array]:
    """Lengths and rewards over iterations of PPO [steps], and what length explains."""
    keys = jax.random.split(key, 6)
    base = tiny.imitate(keys[0], functools.partial(make_texts, n=64))
    pairs, agrees = make_pairs(keys[1], base)
    won, lost = jnp.sum(agrees > 0), jnp.sum(agrees < 0)
    keep = jnp.where(balanced & (agrees > 0), lost / won, 1.0)
    model = learn_reward(pairs, keep)
    before = write(keys[3], base, SEEN)
    scores = rate(model, before)
    frozen = (model, scores.mean(), scores.std())
    run = online.PPO(**tiny.SETTINGS, reward=judge, batch=64, epochs=2, steps=steps, kl_reward=0.3)
    prompts = functools.partial(tiny.make_prompts, low=1)
    how = {"params": base, "reward_params": frozen, "prompts": prompts, "stop_ids": (END,)}
    learner, metrics, _ = tiny.learn(keys[4], run, 2e-3, judge, **how)
    after = write(keys[5], learner.train.params["policy"], SEEN)
    gain = judge(frozen, after).mean()
    return {
        "predicts": won / (won + lost),
        "length": metrics["completions/mean_length"],
        "reward": metrics["objective/scores"],
        "explained": explained(before, judge(frozen, before), after, gain),
        "growth": lengths(after).mean() / lengths(before).mean(),
        "quality": quality(after).mean() - quality(before).mean(),
    }


def reproduce(*, seeds: int, quick: bool) -> papers.Result:
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    over_both = jax.vmap(functools.partial(learn, steps=60 if quick else 100), (None, 0))
    found = jax.device_get(jax.jit(jax.vmap(over_both, (0, None)))(keys, jnp.array([False, True])))
    growth = found["growth"]
    share = (growth[:, 1] - 1) / (growth[:, 0] - 1)
    checks = [
        papers.near("length predicts the preference", "the longer wins", found["predicts"][:, 0], 0.7, 0.03),
        papers.at_least("PPO writes longer", "mean length, after / before", growth[:, 0], 1.5),
        papers.at_least("that is what the reward gains", "share explained by length", found["explained"][:, 0], 0.5),
        papers.at_most("balanced preferences mitigate it", "growth of length, balanced / all", share, 0.5),
    ]
    return papers.Result(checks, {"PPO against reward models of all and of balanced preferences": draw(found)})


def draw(found: dict[str, np.ndarray]):
    drawn, ((left, middle, right),) = papers.figure(1, 3, size=(4.0, 3.2))
    for i, (name, color) in enumerate(COLORS.items()):
        steps = np.arange(1, found["length"].shape[-1] + 1)
        papers.band(left, steps, found["length"][:, i], name, color)
        papers.band(middle, steps, found["reward"][:, i], name, color)
        right.bar(i, 100 * found["explained"][:, i].mean(), color=color, width=0.6)
        right.plot([i] * len(found["explained"]), 100 * found["explained"][:, i], "o", color="#444444", markersize=3)
    left.set(xlabel="iteration", ylabel="mean length [words, the end included]")
    middle.set(xlabel="iteration", ylabel="reward [σ of the initial policy's]")
    right.axhspan(70, 90, color="#999999", alpha=0.3, linewidth=0, label="the paper: 70 to 90%")
    right.set(xticks=(0, 1), xticklabels=[name.replace(" ", "\n") for name in COLORS])
    right.set(ylabel="gain in reward explained by length [%]", ylim=(min(0, 110 * found["explained"].min()), 110))
    left.legend()
    right.legend()
    return drawn
