"""A language of 32 words in which every answer is known: what best trades reward against KL, how far a policy is.

π_ref writes 12 words, each by the one before (a bigram). Every word has a valence from −3 to 3; the reward of a text is
σ(sum / 1.5 − 0.5), as a classifier's chance that it is positive. What maximises E[reward] − β KL is π_ref tilted by
exp(reward / β), which depends on the sum alone, so that its reward and its KL follow from the distribution of the sum
under π_ref, which is computed exactly. Policies are π_ref's logits plus a network of the last word, the place and the
sum so far, which can represent the best one. They start at π_ref.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rljax import ops, train
from rljax.types import LossFn, Params, TrainState

WORDS, LENGTH, HIDDEN = 32, 12, 64


class Language(NamedTuple):
    logps: Array  # f32[words + 1, words]: of the next word after each, and at the beginning (the last row)
    valences: Array  # i32[words]


def make_language(seed: int = 0) -> Language:
    rng = np.random.default_rng(seed)
    logps = jax.nn.log_softmax(jnp.asarray(rng.normal(0, 1, (WORDS + 1, WORDS)), jnp.float32))
    return Language(logps, jnp.asarray(rng.permutation(np.arange(WORDS) % 7 - 3)))


def score(language: Language, texts: Array) -> Array:
    """The reward of texts i32[b LENGTH], f32[b]."""
    return value_of(language.valences[texts].sum(1))


def value_of(total):
    return jax.nn.sigmoid(total / 1.5 - 0.5)


# --- what is best -----------------------------------------------------------------------------------------------------


def sums(language: Language) -> tuple[np.ndarray, np.ndarray]:
    """(every sum that a text can have, its probability under π_ref), in float64."""
    step, valences, most = np.exp(np.asarray(language.logps, np.float64)), np.asarray(language.valences), 3 * LENGTH
    step /= step.sum(1, keepdims=True)
    state = np.zeros((WORDS, 2 * most + 1))  # [last word, sum]
    state[np.arange(WORDS), most + valences] = step[-1]
    for _ in range(LENGTH - 1):
        moved = step[:-1].T @ state  # [next word, sum]
        state = np.stack([np.roll(row, shift) for row, shift in zip(moved, valences, strict=True)])
    return np.arange(-most, most + 1), state.sum(0)


def known(language: Language) -> tuple[np.ndarray, np.ndarray]:
    """(probability, reward) of every sum under π_ref."""
    total, chance = sums(language)
    return chance, 1 / (1 + np.exp(-(total / 1.5 - 0.5)))


def envelope(language: Language, kls: np.ndarray) -> np.ndarray:
    """The largest reward at each KL [nats]."""
    chance, reward = known(language)
    points = np.array([tilted(chance, reward, beta) for beta in np.geomspace(100, 1e-3, 400)])
    return np.interp(kls, np.append(0.0, points[:, 0]), np.append(chance @ reward, points[:, 1]))


def tilted(chance: np.ndarray, reward: np.ndarray, beta: float) -> tuple[float, float]:
    """(KL, reward) of π_ref exp(reward / β) / Z."""
    weight = chance * np.exp((reward - reward.max()) / beta)
    best, seen = weight / weight.sum(), weight > 0
    return float(np.sum(best[seen] * np.log(best[seen] / chance[seen]))), float(best @ reward)


# --- policies ---------------------------------------------------------------------------------------------------------


def init(key: Array) -> Params:
    """A network whose output is 0, with hidden units that turn at different sums."""
    keys = jax.random.split(key, 3)
    places = jax.random.normal(keys[0], (WORDS + 1 + LENGTH, HIDDEN)) * (WORDS + 1 + LENGTH) ** -0.5
    total = 1.5 * jax.random.normal(keys[1], (1, HIDDEN))
    bias = jax.random.uniform(keys[2], (HIDDEN,), minval=-2.0, maxval=2.0)
    return {"in": jnp.concatenate([places, total]), "bias": bias, "out": jnp.zeros((HIDDEN, WORDS))}


def next_logps(language: Language, params: Params, last: Array, place: Array, total: Array) -> Array:
    """Log-probabilities of the next word, [… words]; last: WORDS at the beginning; total: the sum so far."""
    words, places = params["in"][: WORDS + 1], params["in"][WORDS + 1 : -1]
    hidden = words[last] + places[place] + params["in"][-1] * (total / 6.0)[..., None]
    return jax.nn.log_softmax(language.logps[last] + jnp.tanh(hidden + params["bias"]) @ params["out"])


def contexts(language: Language, texts: Array) -> tuple[Array, Array, Array]:
    """(last word [b LENGTH], place [LENGTH], sum so far [b LENGTH]) before every word."""
    last = jnp.concatenate([jnp.full_like(texts[:, :1], WORDS), texts[:, :-1]], axis=1)
    valences = language.valences[texts]
    return last, jnp.arange(LENGTH), jnp.cumsum(valences, axis=1) - valences


def logps(language: Language, params: Params, texts: Array) -> Array:
    """f32[b LENGTH]"""
    return ops.aligned_logps(next_logps(language, params, *contexts(language, texts)), texts)


def ref_logps(language: Language, texts: Array) -> Array:
    return ops.aligned_logps(language.logps[contexts(language, texts)[0]], texts)


def write(language: Language, params: Params, key: Array, n: int) -> Array:
    """n texts, i32[n LENGTH]."""

    def step(state: tuple[Array, Array], at: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        (last, total), (place, key) = state, at
        word = jax.random.categorical(key, next_logps(language, params, last, place, total))
        return (word, total + language.valences[word]), word

    start = jnp.full(n, WORDS), jnp.zeros(n, jnp.int32)
    return jax.lax.scan(step, start, (jnp.arange(LENGTH), jax.random.split(key, LENGTH)))[1].T


def distance(language: Language, params: Params, texts: Array) -> Array:
    """KL(π ‖ π_ref) of texts of π [nats]: at every word the exact one."""
    seen = contexts(language, texts)
    now, ref = next_logps(language, params, *seen), language.logps[seen[0]]
    return (jnp.exp(now) * (now - ref)).sum((1, 2)).mean()


def look(language: Language, params: Params, key: Array, n: int = 8192) -> Array:
    """(KL, reward) of a policy, by n texts of its own."""
    texts = write(language, params, key, n)
    return jnp.stack([distance(language, params, texts), score(language, texts).mean()])


def whole(x: Array) -> Array:
    """Sums over the words of texts, f32[b]."""
    return ops.sequence_sum(x, jnp.ones(x.shape, bool))


# --- learning from pairs ----------------------------------------------------------------------------------------------


def make_pairs(language: Language, key: Array, n: int, *, scale: float | None = None) -> tuple[Array, Array, Array]:
    """(preferred texts, the others, whether they count), by the reward or by Bradley-Terry labels of scale · reward."""
    keys = jax.random.split(key, 3)
    start = init(key)
    first, second = (write(language, start, key, n) for key in keys[:2])
    difference = score(language, first) - score(language, second)
    wins = difference > 0
    if scale is not None:
        wins = jax.random.uniform(keys[2], (n,)) < jax.nn.sigmoid(scale * difference)
    won, lost = jnp.where(wins[:, None], first, second), jnp.where(wins[:, None], second, first)
    return won, lost, (difference != 0) if scale is None else jnp.ones(n, bool)


def learn(
    language: Language,
    key: Array,
    loss_fn: LossFn,
    draw: Callable[[Array], Any],
    *,
    looks: tuple[int, ...],
    rate: float = 1e-3,
) -> Array:
    """[looks 2]: (KL, reward) of a policy after so many updates by Adam. draw: key -> batch."""
    keys = jax.random.split(key, 3)
    optimizer = optax.adam(rate)
    update = train.update_step(loss_fn, optimizer)

    def step(number: Array, state: TrainState) -> TrainState:
        return update(state, draw(jax.random.fold_in(keys[1], number)))[0]

    def until(state: TrainState, between: Array) -> tuple[TrainState, Array]:
        state = jax.lax.fori_loop(between[0], between[1], step, state)
        return state, look(language, state.params, jax.random.fold_in(keys[2], between[1]))

    start = train.init_state(init(keys[0]), optimizer)
    return jax.lax.scan(until, start, jnp.array([(0, *looks[:-1]), looks]).T)[1]
