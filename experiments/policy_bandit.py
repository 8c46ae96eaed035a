"""The program's own iteration against problems that can be solved by hand: which algorithm ends where.

Papers  The policy that maximises E[r] − β KL(π‖π_ref) is π* ∝ π_ref exp(r/β) (Ziegler et al. 2019, arXiv:1909.08593,
        Eq. 2; Rafailov et al. 2023, arXiv:2305.18290, Eq. 4). Presets: PPO, REINFORCE, RLOO (2402.14740), ReMax
        (2310.10505), REINFORCE++ (2501.03262), GRPO (2402.03300), Dr. GRPO (2503.20783).
Claim   With the KL in the reward all of them end at π*: there r − β log π/π_ref is the same for every completion, so
        that no advantage is left, whatever it is divided by. With the KL in the loss the estimator decides:
          k2            the gradient of β KL(π‖π_ref) at each token: π*, if completions have one token. If they have
                        more, how a token changes the KL of those behind it is missing, so that the first one goes to
                        π_ref(a) exp(E[r|a]/β), where π* has π_ref(a) Σ_b π_ref(b|a) exp(r/β)
          k3            the gradient of β KL(π_ref‖π): π = β π_ref / (λ − r), λ so that it sums to 1
          k3, r/std     GRPO as published: the same with r/σ in r's place, σ the standard deviation of r under the π
                        that comes out of it (Vojnovic and Yun 2025, arXiv:2502.18548, solve it for two rewards)
Set-up  A random transformer of one layer writes one token out of 8 after each of 4 prompts, or up to two tokens, 0
        being the end; every completion has its own reward, uniform in [−1, 1]; β = 0.5. `steps` iterations of
        4 × `samples` completions, Adam, cosine. Each seed has its own transformer. The answers are computed in numpy
        from the logits of the reference, with nothing of rljax.
Run     rljax run experiments/policy_bandit.py   (ten minutes on one busy CPU core)
Pass    max |π − answer| < 0.02 over all completions, mean of 3 seeds; where the answer is not π*, max |π − π*| > 0.05.
Got     max |π − answer|: PPO, RLOO, Dr. GRPO, GRPO 0.0000; REINFORCE++ 0.0034, REINFORCE 0.0077, ReMax 0.0080: nothing
        but the KL's own noise stops those that compare with the group, since there no advantage is left at π*. k2 in
        the loss 0.0051; k3 0.0014 and 0.0994 from π*; GRPO with k3 0.0066 and 0.3976 from π*. Two tokens: PPO 0.0001,
        REINFORCE 0.0045, RLOO 0.0011; RLOO with k2 in the loss 0.0107 and 0.0727 from π*.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rljax import critics, filters, iteration, methods, models, online, papers, presets, rewards, train, views
from rljax.types import Params, Tokens

BETA, PROMPTS, VOCAB, END = 0.5, 4, 8, 0
MODEL = models.build(
    models.ModelConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        head_dim=16,
        max_positions=8,
    )
)
# [prompt, first token, second token]; a completion of one token has the second token 0
TABLE = np.random.default_rng(3).uniform(-1, 1, (PROMPTS, VOCAB, VOCAB)).astype(np.float32)


def prompts() -> Tokens:
    """Two tokens each, the first of which is the prompt's number."""
    ids = jnp.stack([jnp.arange(PROMPTS), jnp.full(PROMPTS, 5)], axis=1)
    return Tokens(ids=ids, segments=jnp.ones_like(ids), mask=jnp.zeros(ids.shape, bool))


@rewards.on_device
def looked_up(tokens: Tokens) -> Array:
    """TABLE's reward of each row; what follows the end counts as token 0."""
    written = jnp.where(tokens.mask, tokens.ids, 0)[:, 2:]
    return jnp.asarray(TABLE)[tokens.ids[:, 0], written[:, 0], written[:, 1] if written.shape[1] > 1 else 0]


# --- what rljax makes of it -------------------------------------------------------------------------------------------


def fit(key: Array, run: online.Sampled, *, steps: int) -> tuple[Array, Array]:
    """Log-probabilities of all completions, [prompt, first, second], before and after training."""
    params = jax.tree.map(lambda x: 4 * x if x.ndim > 2 else x, MODEL.init(jax.random.fold_in(key, 0)))  # with opinions
    drawn = filters.Sampling(stop_ids=(END,) if run.max_completion > 1 else ())
    method = make_method(run, params, drawn)
    optimizer = optax.adam(train.cosine(run.learning_rate, steps * run.epochs * run.minibatches))
    whole = iteration.build(run, MODEL, method, optimizer, (looked_up,), settings=drawn).whole
    reference = params if method.reference else None

    def step(learner: iteration.Learner, key: Array) -> tuple[iteration.Learner, None]:
        return whole(learner, reference, (None,), prompts(), None, key)[0], None

    start = iteration.init_learner(method.params, optimizer)
    end, _ = jax.lax.scan(step, start, jax.random.split(jax.random.fold_in(key, 1), steps))
    trained = views.decoder_params(end.train.params)
    return completion_logps(params, run.max_completion), completion_logps(trained, run.max_completion)


def make_method(run: online.Sampled, params: Params, drawn: filters.Sampling) -> methods.Method:
    if not isinstance(run, online.PPO):
        return methods.policy_gradient(run, MODEL, params, drawn)
    head = models.scalar_head(MODEL.config.hidden_size).init(jax.random.key(0))
    critic = critics.Critic(MODEL, {"model": params, "head": jax.tree.map(jnp.zeros_like, head)})
    return methods.ppo(run, MODEL, params, critic, drawn)


def completion_logps(params: Params, tokens: int) -> Array:
    """[prompt, first, second], −∞ for what cannot be written: by reading every completion, without rljax's helpers."""

    def after(ids: Array) -> Array:  # [b t] -> [b v]
        hidden = MODEL.apply(params, ids, jnp.ones_like(ids)).hidden[:, -1]
        return jax.nn.log_softmax(MODEL.unembed(params, hidden))

    # the second token of a completion that has none
    only = jnp.where(jnp.arange(VOCAB) == 0, 0.0, -jnp.inf)[None, None]
    asked = prompts().ids
    first = after(asked)[:, :, None]
    if tokens == 1:
        return first + only
    read = jnp.repeat(asked, VOCAB, axis=0), jnp.tile(jnp.arange(VOCAB), PROMPTS)[:, None]
    second = after(jnp.concatenate(read, axis=1)).reshape(PROMPTS, VOCAB, VOCAB)
    return first + jnp.where((jnp.arange(VOCAB) == END)[None, :, None], only, second)


# --- the answers: reference probabilities and rewards [prompt, first, second] -> probabilities, in float64 ------------


def tilted(ref: np.ndarray, r: np.ndarray) -> np.ndarray:
    """π* ∝ π_ref exp(r/β)."""
    weights = ref * np.exp(r / BETA)
    return weights / weights.sum((1, 2), keepdims=True)


def stepwise(ref: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Each token tilted by what it leads to, the KL of later tokens left out of it."""
    second = ref * np.exp(r / BETA)
    second /= second.sum(2, keepdims=True)
    first = ref.sum(2) * np.exp((second * r).sum(2) / BETA)
    return second * (first / first.sum(1, keepdims=True))[:, :, None]


def forward(ref: np.ndarray, r: np.ndarray) -> np.ndarray:
    """β π_ref / (λ − r): the best policy if it is KL(π_ref‖π) that costs β. λ by bisection."""
    low = r.max((1, 2), keepdims=True, where=ref > 0, initial=-np.inf)
    high = low + BETA
    for _ in range(60):
        middle = (low + high) / 2
        above = (BETA * ref / (middle - r)).sum((1, 2), keepdims=True) < 1
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return BETA * ref / (high - r)


def standardised(ref: np.ndarray, r: np.ndarray) -> np.ndarray:
    """`forward` of r/σ, with σ the standard deviation of r under the answer: by damped repetition."""
    pi = ref
    for _ in range(200):
        mean = (pi * r).sum((1, 2), keepdims=True)
        sigma = np.sqrt((pi * (r - mean) ** 2).sum((1, 2), keepdims=True))
        pi = (pi + forward(ref, r / sigma)) / 2
    return pi


class Case(NamedTuple):
    name: str
    preset: Callable[..., Any]
    answer: Callable[[np.ndarray, np.ndarray], np.ndarray] = tilted
    tokens: int = 1
    settings: dict[str, Any] = {"kl_reward": BETA}  # noqa: RUF012


def in_loss(estimator: str) -> dict[str, Any]:
    return {"kl_reward": 0.0, "kl_loss": BETA, "kl_loss_estimator": estimator}


PPO = functools.partial(online.PPO, epochs=2, minibatches=2)
CASES = (
    Case("PPO", PPO),
    Case("REINFORCE", presets.reinforce),
    Case("RLOO", presets.rloo),
    Case("ReMax", presets.remax),
    Case("REINFORCE++", presets.reinforce_plus_plus),
    Case("Dr. GRPO", presets.dr_grpo),
    Case("GRPO", presets.grpo, settings={"kl_reward": BETA, "kl_loss": 0.0}),
    Case("Dr. GRPO, k2 in the loss", presets.dr_grpo, settings=in_loss("k2")),
    Case("Dr. GRPO, k3 in the loss", presets.dr_grpo, forward, settings=in_loss("k3")),
    Case("GRPO, k3 in the loss", presets.grpo, standardised, settings=in_loss("k3")),
    Case("PPO, two tokens", PPO, tokens=2),
    Case("REINFORCE, two tokens", presets.reinforce, tokens=2),
    Case("RLOO, two tokens", presets.rloo, tokens=2),
    Case("RLOO, two tokens, k2 in the loss", presets.rloo, stepwise, 2, in_loss("k2")),
)


def main(*, seeds: int = 3, steps: int = 300, samples: int = 256, learning_rate: float = 4e-3, only: str = "") -> int:
    """Train every case and compare; the exit status is 1 if one misses its answer. only: part of the names to try."""
    checks = []
    for case in (case for case in CASES if only in case.name):
        sizes = {"batch": PROMPTS, "group": samples, "max_prompt": 2, "max_completion": case.tokens}
        given = {"model": "", "data": "", "reward": looked_up, "learning_rate": learning_rate}
        run = case.preset(**sizes, **given, **case.settings)
        train_all = jax.jit(jax.vmap(functools.partial(fit, run=run, steps=steps)))
        found = jax.device_get(train_all(jax.random.split(jax.random.key(0), seeds)))
        ref, pi = (np.exp(np.asarray(x, np.float64)) for x in found)
        table = TABLE.astype(np.float64)
        off = np.mean([np.abs(p - case.answer(q, table)).max() for q, p in zip(ref, pi, strict=True)])
        from_best = np.mean([np.abs(p - tilted(q, table)).max() for q, p in zip(ref, pi, strict=True)])
        checks.append(papers.at_most(case.name, "max |π − π*|", from_best, 0.02))
        if case.answer is not tilted:
            checks[-1] = papers.at_least(case.name, "max |π − π*|", from_best, 0.05)
            checks.append(papers.at_most(f"{case.name}: predicted end", "max |π − answer|", off, 0.02))
        print(f"{case.name}: {checks[-1].measured}", flush=True)
    print(f"\n{papers.text_table(checks)}")
    return 0 if all(check.holds for check in checks) else 1


if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
