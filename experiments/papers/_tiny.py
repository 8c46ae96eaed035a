"""Online runs of a tiny transformer as one pure function of a key: what `iteration.build` makes, scanned over steps.

One layer of 32 units, 16 words, prompts of one word, 12 words written. A run is a setting of `online`, its rewards are
JAX functions, and so seeds and coefficients are swept by `vmap`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rljax import critics, filters, iteration, methods, models, objectives, online, rewards, train
from rljax.types import LanguageModel, Params, Tokens

WORDS, PROMPT, LENGTH = 16, 1, 12
MODEL = models.build(
    models.ModelConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=64,
        num_layers=1,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        max_positions=PROMPT + LENGTH,
    )
)
LEXICON = jax.random.permutation(jax.random.key(3), jnp.linspace(0.0, 1.0, WORDS))
SETTINGS: dict[str, Any] = {"model": "random", "data": "random", "max_prompt": PROMPT, "max_completion": LENGTH}


def valence(tokens: Tokens) -> Array:
    """The mean valence of the words written, in [0, 1]; words that are not written count 0."""
    return jnp.sum(jnp.where(tokens.mask, LEXICON[tokens.ids], 0.0), axis=-1) / LENGTH


def make_prompts(key: Array, n: int, low: int = 0, high: int = WORDS) -> Tokens:
    """n prompts of one word each, from [low, high)."""
    ids = jax.random.randint(key, (n, PROMPT), low, high)
    return Tokens(ids=ids, segments=jnp.ones_like(ids), mask=jnp.zeros(ids.shape, bool))


def imitate(key: Array, draw: Callable[[Array], Tokens], *, steps: int = 300, rate: float = 5e-3) -> Params:
    """A policy that was trained on texts. draw: key -> a batch."""
    optimizer = optax.adam(train.cosine(rate, steps))
    update = train.update_step(objectives.supervised(MODEL), optimizer)
    state = train.init_state(MODEL.init(jax.random.fold_in(key, 0)), optimizer)
    step = lambda state, key: (update(state, draw(key))[0], None)  # noqa: E731
    return jax.lax.scan(step, state, jax.random.split(jax.random.fold_in(key, 1), steps))[0].params


def make_method(run: Any, params: Params, drawn: filters.Sampling, model: LanguageModel = MODEL) -> methods.Method:
    """PPO with a critic of its own that starts at 0, or a policy gradient without one."""
    if not isinstance(run, online.PPO):
        return methods.policy_gradient(run, model, params, drawn)
    head = models.scalar_head(model.config.hidden_size).init(jax.random.key(0))
    head = jax.tree.map(jnp.zeros_like, head)
    return methods.ppo(run, model, params, critics.Critic(model, {"model": params, "head": head}), drawn)


def learn(
    key: Array,
    run: Any,
    rate: Array | float,
    reward: Callable[..., Array],
    *,
    params: Params | None = None,
    reward_params: Any = None,
    prompts: Callable[[Array, int], Tokens] = make_prompts,
    pretrain: Callable[[Array], Tokens] | None = None,
    look: Callable[[iteration.Learner], Any] = lambda learner: (),
    stop_ids: tuple[int, ...] = (),
) -> tuple[iteration.Learner, dict[str, Array], Any]:
    """(the learner at the end, the mean of every metric [steps], what `look` saw [steps …]) of a run by Adam.

    The policy begins at `params`, else at random; that is the reference as well. pretrain: key -> texts for PPO-ptx.
    """
    params = MODEL.init(jax.random.fold_in(key, 0)) if params is None else params
    drawn = filters.Sampling(stop_ids=stop_ids)
    method = make_method(run, params, drawn)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    judge = rewards.on_device(reward) if reward_params is None else rewards.on_device(reward, params=reward_params)
    whole = iteration.build(run, MODEL, method, optimizer, (judge,), settings=drawn).whole

    def step(learner: iteration.Learner, key: Array) -> tuple[iteration.Learner, Any]:
        keys = jax.random.split(key, 3)
        texts = None if pretrain is None else pretrain(keys[2])
        learner, metrics, _ = whole(learner, params, (reward_params,), prompts(keys[0], run.batch), texts, keys[1])
        return learner, ({name: metric.value() for name, metric in metrics.items()}, look(learner))

    start = iteration.init_learner(method.params, optimizer)
    learner, (metrics, seen) = jax.lax.scan(step, start, jax.random.split(jax.random.fold_in(key, 1), run.steps))
    return learner, metrics, seen
