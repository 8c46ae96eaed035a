"""Advantages, returns and shaped rewards: what is computed once per rollout, before the update.

Per-token arrays are `[b t]` and indexed by the token they describe; group arrays are `[g n]`: g prompts, n samples of
each. Nothing here whitens (`ops.masked_whiten` does), and nothing is read where the mask is False.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import ArrayLike, Bool, Float, Real

from rljax.errors import UserError
from rljax.losses.kl import kl_penalty
from rljax.ops import Scalar, as_float, require_positive, zero_where_masked


def gae(
    rewards: Real[ArrayLike, "b t"],
    values: Real[ArrayLike, "b t"],
    mask: Bool[ArrayLike, "b t"],
    *,
    gamma: Scalar,
    lam: Scalar,
) -> tuple[Float[Array, "b t"], Float[Array, "b t"]]:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv:1506.02438 Eq. 16) -> (advantages, returns), [b t].

    δ_t = r_t + γ V_{t+1} − V_t,   A_t = δ_t + γλ A_{t+1},   returns = A + V

    t + 1 means the *next trained* token: prompts, padding and tool tokens inside a response (mask False) take no time
    step, are never bootstrapped from, and get 0. After a row's last trained token the value is 0: the response is an
    episode that ends there. (verl carries over masked tokens likewise; TRL's PPO steps through them.) λ = 1 gives Monte
    Carlo returns whatever V is, λ = 0 one-step temporal differences.
    """
    mask = jnp.asarray(mask)
    rewards, values = zero_where_masked(rewards, mask), zero_where_masked(values, mask)

    def step(later, now):
        next_value, next_advantage = later
        reward, value, trained = now
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carry = jnp.where(trained, value, next_value), jnp.where(trained, advantage, next_advantage)
        return carry, jnp.where(trained, advantage, 0.0)

    end = jnp.zeros_like(rewards[:, 0] + values[:, 0])
    _, advantages = jax.lax.scan(step, (end, end), (rewards.T, values.T, mask.T), reverse=True)
    return advantages.T, advantages.T + values


def discounted_returns(
    rewards: Real[ArrayLike, "b t"], mask: Bool[ArrayLike, "b t"], *, gamma: Scalar
) -> Float[Array, "b t"]:
    """G_t = r_t + γ G_{t+1} over the trained tokens, 0 where the mask is False: `gae` without a critic."""
    returns, _ = gae(rewards, jnp.zeros_like(as_float(rewards)), mask, gamma=gamma, lam=1.0)
    return returns


def shape_rewards(
    scores: Real[ArrayLike, " b"],
    logps: Real[ArrayLike, "b t"],
    ref_logps: Real[ArrayLike, "b t"],
    mask: Bool[ArrayLike, "b t"],
    *,
    kl_coef: Scalar,
    estimator: str = "k1",
) -> Float[Array, "b t"]:
    """Per-token rewards of RLHF: a KL penalty everywhere and the score at the end, [b t] (Ziegler et al. 2019, Eq. 2).

    r_t = −kl_coef · KL_t + (score if t is the row's last trained token)

    KL_t is `kl_penalty` with `estimator`; k1 is the papers' (arXiv:1909.08593, arXiv:2203.02155). An empty row gets no
    score. Untrained tokens get 0.
    """
    mask = jnp.asarray(mask)
    penalty = kl_penalty(zero_where_masked(logps, mask), zero_where_masked(ref_logps, mask), estimator=estimator)
    positions = jnp.arange(mask.shape[1])[None, :]
    last = jnp.max(jnp.where(mask, positions, -1), axis=1, keepdims=True)
    score = jnp.where(positions == last, as_float(scores)[:, None], 0.0)
    return jnp.where(mask, score - kl_coef * penalty, 0.0)


def group_relative(
    rewards: Real[ArrayLike, "g n"],
    *,
    divide_by_std: bool,
    ddof: int = 1,
    eps: Scalar = 1e-4,
    applies: Bool[ArrayLike, "g n"] | None = None,
) -> Float[Array, "g n"]:
    """GRPO's advantages: each of n samples against its group (Shao et al. 2024, arXiv:2402.03300), [g n].

    A = (r − mean) / (std + eps),   or r − mean without divide_by_std: Dr. GRPO (Liu et al. 2025, arXiv:2503.20783)

    The defaults are TRL's (torch.std, so ddof = 1; eps = 1e-4); verl has ddof = 1 and eps = 1e-6; jnp.std has ddof = 0.
    A group of equal rewards, or of one sample, gives 0 for any eps.

    applies: which samples have a reward: mean, std and n are taken over those, and the others get 0. The program tells
    an advantage function with a parameter of that name; to another one a sample without a reward is its group's mean.
    """
    rewards, applies, n = _present(rewards, applies)
    first = jnp.take_along_axis(rewards, jnp.argmax(applies, axis=1, keepdims=True), axis=1)
    rewards = jnp.where(applies, rewards - first, 0.0)  # equal rewards centre to exactly 0, not to a rounding error
    mean = jnp.sum(rewards, axis=1, keepdims=True) / jnp.maximum(n, 1)
    centred = jnp.where(applies, rewards - mean, 0.0)
    if not divide_by_std:
        return centred
    variance = jnp.sum(centred**2, axis=1, keepdims=True) / jnp.maximum(n - ddof, 1)
    varied = variance > 0  # the gradient of sqrt at 0 is infinite
    return jnp.where(varied, centred / (jnp.sqrt(jnp.where(varied, variance, 1.0)) + eps), 0.0)


def leave_one_out(
    rewards: Real[ArrayLike, "g n"], *, applies: Bool[ArrayLike, "g n"] | None = None
) -> Float[Array, "g n"]:
    """RLOO's advantages: each sample against the mean of the others (Ahmadian et al. 2024, arXiv:2402.14740), [g n].

    A_i = r_i − (Σ_{j≠i} r_j) / (n − 1)

    That is n/(n − 1) times `group_relative` without the std. Raises UserError for groups of one.
    applies: as in `group_relative`; a sample that is the only one with a reward gets 0.
    """
    rewards, applies, n = _present(rewards, applies)
    if rewards.shape[1] < 2:
        raise UserError(
            f"leave_one_out compares a sample with the others of its prompt: sample 2 or more, not {rewards.shape[1]}."
        )
    rewards = jnp.where(applies, rewards, 0.0)
    others = (jnp.sum(rewards, axis=1, keepdims=True) - rewards) / jnp.maximum(n - 1, 1)
    return jnp.where(applies & (n > 1), rewards - others, 0.0)


def _present(rewards: ArrayLike, applies: ArrayLike | None) -> tuple[Array, Array, Array]:
    """(rewards, applies, how many apply in each group: [g 1])"""
    rewards = as_float(rewards)
    applies = jnp.ones(rewards.shape, bool) if applies is None else jnp.asarray(applies)
    return rewards, applies, jnp.sum(applies, axis=1, keepdims=True)


def greedy_baseline(rewards: Real[ArrayLike, "g n"], greedy: Real[ArrayLike, " g"]) -> Float[Array, "g n"]:
    """ReMax's advantages: each sample against its prompt's greedy completion (Li et al. 2023, arXiv:2310.10505), [g n].

    A_i = r_i − r(greedy completion)

    An advantage function with a parameter named `greedy` has the program sample and judge the greedy completions.
    """
    return as_float(rewards) - as_float(greedy)[:, None]


def reward_to_go(
    rewards: Real[ArrayLike, "b t"], mask: Bool[ArrayLike, "b t"], *, gamma: Scalar = 1.0
) -> Float[Array, "b t"]:
    """REINFORCE's advantages without a baseline, [b t]: `discounted_returns` of the per-token rewards.

    With the KL penalty in the reward and whitening over the whole batch this is REINFORCE++ (Hu et al. 2025,
    arXiv:2501.03262). An advantage function with a parameter named `mask` works on tokens instead of groups.
    """
    return discounted_returns(rewards, mask, gamma=gamma)


def adaptive_kl(
    coef: Real[ArrayLike, ""], kl: Real[ArrayLike, ""], *, target: Scalar, horizon: Scalar, batch_size: Scalar
) -> Float[Array, ""]:
    """The next KL coefficient, by a proportional controller (Ziegler et al. 2019, arXiv:1909.08593, section 2.2).

    coef · (1 + e · batch_size / horizon),   e = clip(kl / target − 1, −0.2, 0.2)

    kl: mean over sequences of the KL summed over tokens. batch_size and horizon count episodes. OpenAI's code starts at
    coef 0.15, with target 6, horizon 10 000 and batch 512; the paper's K_β is batch_size / horizon.
    """
    require_positive(target=target, horizon=horizon)
    error = jnp.clip(as_float(kl) / target - 1.0, -0.2, 0.2)
    return as_float(coef) * (1.0 + error * batch_size / horizon)


def constrained(
    rewards: Real[ArrayLike, "*s"], costs: Real[ArrayLike, "*s"], *, multiplier: Scalar
) -> Float[Array, "*s"]:
    """Advantages of reward and cost as one, for reward under a limit on cost (Dai et al. 2023, arXiv:2310.12773).

    A = (A_r − λ A_c) / (1 + λ),   λ = multiplier ≥ 0

    Dividing by 1 + λ keeps the size of the step when λ grows.
    """
    return (as_float(rewards) - multiplier * as_float(costs)) / (1.0 + multiplier)


def update_log_multiplier(
    log_multiplier: Real[ArrayLike, ""], cost: Real[ArrayLike, ""], *, limit: Scalar, rate: Scalar
) -> Float[Array, ""]:
    """The logarithm of the multiplier after a batch whose mean cost was `cost` (Dai et al. 2023, arXiv:2310.12773).

    ln λ + rate · λ · (cost − limit)

    λ grows while the cost is above its limit, else it shrinks; gradient ascent on the logarithm keeps it positive. The
    paper's d is −limit.
    """
    log_multiplier = as_float(log_multiplier)
    return log_multiplier + rate * jnp.exp(log_multiplier) * (as_float(cost) - limit)
