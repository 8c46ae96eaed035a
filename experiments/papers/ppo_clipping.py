"""Clipping keeps the policy near the one that sampled, when a batch is used many times.

Paper   Schulman et al. 2017, "Proximal Policy Optimization Algorithms", arXiv:1707.06347, section 3 and table 1 (no
        clipping or penalty: −0.39, ε = 0.2: 0.82, of the normalised score).
Claim   Several epochs on one batch of the unclipped surrogate lead to "destructively large policy updates"; the clipped
        surrogate prevents them.
Set-up  A contextual bandit of 64 contexts and 8 actions with normal rewards, seen through noise; batches of 512, 40
        epochs of gradient descent on each (learning rate 50: Adam's momentum would carry a policy on after its ratios
        are clipped), 20 batches (5 in --quick). What a batch did is KL(old ‖ new), the mean over contexts. It shows the
        size of updates; the score it does not: at this size both learn.
Run     rljax reproduce ppo_clipping   (6 s on 2 × x86_64, cpu)
Pass    The largest KL of an update without clipping is at least 10 times that with ε = 0.2, and so is the mean; some
        ratios are clipped; with one epoch both are the same, bit for bit. Three seeds.
Got     clipping bounds the worst update: 48.54 (50.58, 45.8, 49.24); and the usual one: 12.63 (12.62, 12.98, 12.29);
        ratios are clipped: 0.5248 (0.5259, 0.5297, 0.5188); with one epoch nothing is clipped: same.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rljax import losses, papers, train
from rljax.types import Mean, Metrics, Params, TrainState

CONTEXTS, ACTIONS, BATCH, NOISE = 64, 8, 512, 0.5


def surrogate(params: Params, batch: tuple[Array, ...], *, clip: float) -> tuple[Mean, Metrics]:
    context, action, old, advantage = batch
    logps = jnp.take_along_axis(jax.nn.log_softmax(params["logits"])[context], action[:, None], 1)
    values = losses.ppo_clip_loss(logps, old, advantage, clip_low=clip, clip_high=clip)
    share = losses.clip_fraction(logps, old, advantage, clip_low=clip, clip_high=clip)
    count = jnp.asarray(float(BATCH))
    return Mean(total=values.sum(), weight=count), {"clipped": Mean(total=share.sum(), weight=count)}


def learn(key: Array, *, clip: float, epochs: int, batches: int) -> dict[str, Array]:
    """What each batch did: its KL, the share of clipped ratios in its last epoch, and the mean true reward after it."""
    table = jax.random.normal(jax.random.fold_in(key, 0), (CONTEXTS, ACTIONS))
    optimizer = optax.sgd(50.0)
    update = train.update_step(functools.partial(surrogate, clip=clip), optimizer)

    def step(state: TrainState, key: Array) -> tuple[TrainState, dict[str, Array]]:
        old = jax.nn.log_softmax(state.params["logits"])
        keys = jax.random.split(key, 3)
        context = jax.random.randint(keys[0], (BATCH,), 0, CONTEXTS)
        action = jax.random.categorical(keys[1], old[context])
        rewards = table[context, action] + NOISE * jax.random.normal(keys[2], (BATCH,))
        batch = context, action, old[context, action][:, None], ((rewards - rewards.mean()) / rewards.std())[:, None]
        state, metrics = jax.lax.scan(lambda state, _: update(state, batch), state, length=epochs)
        new = jax.nn.log_softmax(state.params["logits"])
        kl = (jnp.exp(old) * (old - new)).sum(1).mean()
        clipped = metrics["clipped"].total[-1] / BATCH
        return state, {"kl": kl, "clipped": clipped, "reward": (jnp.exp(new) * table).sum(1).mean(), "logits": new}

    start = train.init_state({"logits": jnp.zeros((CONTEXTS, ACTIONS))}, optimizer)
    return jax.lax.scan(step, start, jax.random.split(jax.random.fold_in(key, 1), batches))[1]


def reproduce(*, seeds: int, quick: bool) -> papers.Result:
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))

    def runs(clip: float, epochs: int) -> dict[str, np.ndarray]:
        run = functools.partial(learn, clip=clip, epochs=epochs, batches=5 if quick else 20)
        return jax.device_get(jax.jit(jax.vmap(run))(keys))

    clipped, free = runs(0.2, 40), runs(jnp.inf, 40)
    same = np.array_equal(runs(0.2, 1)["logits"], runs(jnp.inf, 1)["logits"])
    ratio = {how: getattr(free["kl"], how)(1) / getattr(clipped["kl"], how)(1) for how in ("max", "mean")}
    checks = [
        papers.at_least("clipping bounds the worst update", "largest KL, without / with", ratio["max"], 10.0),
        papers.at_least("and the usual one", "mean KL, without / with", ratio["mean"], 10.0),
        papers.at_least("ratios are clipped", "share in the last epoch", clipped["clipped"].mean(1), 0.01),
        papers.Check("with one epoch nothing is clipped", "the same bits", "same" if same else "differ", same),
    ]
    return papers.Result(checks, {"What each batch did to the policy, and the true reward": draw(clipped, free)})


def draw(clipped: dict[str, np.ndarray], free: dict[str, np.ndarray]):
    drawn, ((left, right),) = papers.figure(1, 2)
    steps = np.arange(1, clipped["kl"].shape[1] + 1)
    for name, found, color in (("ε = 0.2", clipped, "#0072B2"), ("no clipping", free, "#D55E00")):
        papers.band(left, steps, found["kl"], name, color)
        papers.band(right, steps, found["reward"], name, color)
    left.set(xlabel="batch (40 epochs each)", ylabel="KL(old ‖ new) of the update [nats]", yscale="log")
    right.set(xlabel="batch", ylabel="mean true reward")
    left.legend()
    return drawn
