"""GRPO is biased: towards hard and easy prompts, and towards long wrong answers.

Paper   Liu et al. 2025, "Understanding R1-Zero-Like Training: A Critical Perspective" (Dr. GRPO), arXiv:2503.20783,
        section 3.1. DAPO: Yu et al. 2025, arXiv:2503.14476, section 3.3.
Claim   Dividing by the group's standard deviation gives prompts that are almost always or never solved too much
        weight; dividing a completion's loss by its length punishes a long wrong answer less per token than a short
        one, so that wrong answers grow. Dr. GRPO does neither.
Set-up  Difficulty, exactly: a prompt is solved with probability p by a policy with one logit; the expected gradient of
        a group of 8 is the sum over all 9 outcomes, weighted by their probability. The true one is p (1 − p).
        Length: whether an answer is right is decided by a coin; then one logit for each of the two modes decides
        whether the answer goes on, to 32 tokens at most, 5.5 at first. (Where length is independent of the mode
        nothing drifts: a vacuous test.) 300 steps of 64 groups of 8, gradient descent, learning rate 1.
Run     rljax reproduce grpo_biases   (5 s on 2 × x86_64, cpu)
Pass    Difficulty: E[GRPO] is 0.1175 at p = 0.05 and 0.4639 at p = 0.5 (± 1e-4), so that the hard prompt has 1.33 times
        the weight it should have; the ratio of Dr. GRPO's weights is the true one (± 1e-3). Length: GRPO's wrong
        answers end at least twice as long and its right ones at most half as long as at first, also without the
        deviation; Dr. GRPO's within 1.5 tokens. DAPO, whose tokens share one mean, drifts at most half as far. Three
        seeds.
Got     GRPO's weight of a hard prompt: 0.1175; GRPO's weight of an even one: 0.4639; Dr. GRPO weighs as the gradient
        does: 0.19; GRPO: wrong answers grow: 5.596 (5.596, 5.596, 5.596); GRPO: right answers shrink: 0.1848 (0.1847,
        0.1848, 0.1848); without the deviation: wrong answers grow: 5.329 (5.331, 5.328, 5.327); without the deviation:
        right answers shrink: 0.189 (0.1891, 0.1889, 0.1889); Dr. GRPO: wrong answers stay: 5.51 (5.464, 5.525, 5.541);
        Dr. GRPO: right answers stay: 5.513 (5.526, 5.538, 5.475); DAPO drifts less than GRPO: 0.1915 (0.1763, 0.1941,
        0.2042).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rljax import advantages, losses, ops, papers, train
from rljax.types import Mean, Metrics, Params, TrainState

GROUP, GROUPS, LONGEST, START, STEPS, RATE = 8, 64, 32, 5.5, 300, 1.0
RELATIVE = functools.partial(advantages.group_relative, divide_by_std=True, ddof=0, eps=0.0)
CENTRED = functools.partial(advantages.group_relative, divide_by_std=False)
METHODS = {
    "GRPO": (RELATIVE, "seq_mean_token_mean"),
    "GRPO without the deviation": (CENTRED, "seq_mean_token_mean"),
    "DAPO": (RELATIVE, "token_mean"),
    "Dr. GRPO": (CENTRED, "constant"),
}
COLORS = dict(zip(METHODS, ("#D55E00", "#E69F00", "#009E73", "#0072B2"), strict=True))


def weight(advantage, p: float) -> float:
    """E[1/G Σ A_i (r_i − p)]: the expected gradient of the logit of solving a prompt."""
    outcomes = np.tril(np.ones((GROUP + 1, GROUP)), -1)  # k of 8 solved, k = 0 … 8
    found = np.asarray(advantage(jnp.asarray(outcomes)), float)
    chance = [math.comb(GROUP, k) * p**k * (1 - p) ** (GROUP - k) for k in range(GROUP + 1)]
    return float(np.dot(chance, (found * (outcomes - p)).mean(1)))


def write(logits: Array, key: Array) -> tuple[Array, Array, Array]:
    """Answers: (right bool[b], whether each token goes on bool[b t], mask bool[b t])."""
    keys = jax.random.split(key)
    right = jax.random.bernoulli(keys[0], 0.5, (GROUPS * GROUP,))
    going = jax.random.bernoulli(
        keys[1], jax.nn.sigmoid(logits[right.astype(int)])[:, None], (len(right), LONGEST)
    ).astype(bool)
    alive = jnp.cumprod(going, axis=1).astype(bool)
    mask = jnp.concatenate([jnp.ones((len(right), 1), bool), alive[:, :-1]], axis=1)
    return right, going, mask


def objective(params: Params, batch: tuple[Array, ...], *, mode: str) -> tuple[Mean, Metrics]:
    right, going, mask, advantage = batch
    logits = params["logits"][right.astype(int)][:, None]
    logps = jnp.where(going, jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits))
    values = losses.reinforce_loss(logps, jnp.where(mask, advantage[:, None], 0.0))
    return ops.aggregate(values, mask, mode=mode, length=LONGEST), {}


def lengths(key: Array, *, method: str, steps: int) -> Array:
    """[steps 2]: the mean length of wrong and of right answers."""
    advantage, mode = METHODS[method]
    optimizer = optax.sgd(RATE)
    update = train.update_step(functools.partial(objective, mode=mode), optimizer)

    def step(state: TrainState, key: Array) -> tuple[TrainState, Array]:
        logits = state.params["logits"]
        right, going, mask = write(logits, key)
        gains = advantage(right.reshape(GROUPS, GROUP).astype(float)).ravel()
        state, _ = update(state, (right, going, mask, gains))
        p = jax.nn.sigmoid(logits)
        return state, (1 - p**LONGEST) / (1 - p)

    start = jnp.full(2, jnp.log(START - 1))  # a mean length of START is going on with probability 1 − 1 / START
    state = train.init_state({"logits": start}, optimizer)
    return jax.lax.scan(step, state, jax.random.split(key, steps))[1]


def reproduce(*, seeds: int, quick: bool) -> papers.Result:
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    got = {}
    for method in METHODS:
        run = functools.partial(lengths, method=method, steps=STEPS)
        got[method] = np.asarray(jax.jit(jax.vmap(run))(keys))
    wrong, right = ({name: found[:, -1, i] / START for name, found in got.items()} for i in (0, 1))
    hard, even = (({"GRPO": weight(RELATIVE, p), "Dr. GRPO": weight(CENTRED, p)}) for p in (0.05, 0.5))
    true = 0.05 * 0.95 / 0.25
    checks = [
        papers.near("GRPO's weight of a hard prompt", "at p = 0.05", hard["GRPO"], 0.1175, 1e-4),
        papers.near("GRPO's weight of an even one", "at p = 0.5", even["GRPO"], 0.4639, 1e-4),
        papers.near("Dr. GRPO weighs as the gradient does", "ratio", hard["Dr. GRPO"] / even["Dr. GRPO"], true, 1e-3),
        papers.at_least("GRPO: wrong answers grow", "length / first", wrong["GRPO"], 2.0),
        papers.at_most("GRPO: right answers shrink", "length / first", right["GRPO"], 0.5),
        papers.at_least(
            "without the deviation: wrong answers grow", "length / first", wrong["GRPO without the deviation"], 2.0
        ),
        papers.at_most(
            "without the deviation: right answers shrink", "length / first", right["GRPO without the deviation"], 0.5
        ),
        papers.near("Dr. GRPO: wrong answers stay", "tokens", wrong["Dr. GRPO"] * START, START, 1.5),
        papers.near("Dr. GRPO: right answers stay", "tokens", right["Dr. GRPO"] * START, START, 1.5),
        papers.at_most("DAPO drifts less than GRPO", "wrong, DAPO / GRPO", wrong["DAPO"] / wrong["GRPO"], 0.5),
    ]
    plots = {"Expected gradient of a prompt's logit": draw_weights(), "Mean length of answers": draw(got)}
    return papers.Result(checks, plots)


def draw_weights():
    drawn, ((axis,),) = papers.figure(size=(5.2, 3.4))
    chances = np.linspace(0.01, 0.99, 99)
    true = chances * (1 - chances)
    for name, found in (
        ("GRPO", [weight(RELATIVE, p) for p in chances]),
        ("Dr. GRPO", [weight(CENTRED, p) for p in chances]),
    ):
        axis.plot(chances, np.asarray(found) / max(found), color=COLORS[name], label=name)
    axis.plot(chances, true / true.max(), color="#000000", linestyle=(0, (4, 2)), label="p (1 − p)")
    axis.set(xlabel="p, the chance to solve the prompt", ylabel="weight / largest weight")
    axis.legend()
    return drawn


def draw(got: dict[str, np.ndarray]):
    drawn, ((wrong, right),) = papers.figure(1, 2, sharey=True)
    for name, found in got.items():
        for axis, values in ((wrong, found[:, :, 0]), (right, found[:, :, 1])):
            papers.band(axis, np.arange(found.shape[1]), values, name, COLORS[name])
    wrong.set(title="wrong answers", xlabel="step", ylabel="mean length [tokens]")
    right.set(title="right answers", xlabel="step")
    wrong.legend()
    return drawn
