"""IPO keeps the promise of its τ where preferences are deterministic; DPO ends in a deterministic policy for every β.

Paper   Azar et al. 2023, "A General Theoretical Paradigm to Understand Learning from Human Preferences",
        arXiv:2310.12036, Section 5, the bandit experiments with sampled preferences.
Claim   Where preferences never contradict each other, DPO drives h = log π(w)/π(l) − log π_ref(w)/π_ref(l) to infinity:
        the best action gets probability 1, one that never won 0, however large β is. IPO regresses h on 1/(2τ), so
        that τ decides how far it goes.
Set-up  Three actions, π_ref and the start uniform, Adam 1e-2, 18,000 steps, τ = β in {0.1, 0.5, 1}. The data sets:
          total order    a≻b, b≻c, a≻c
          a over b only  a≻b; c was never compared
          c never wins   a≻b, b≻a, a≻c, b≻c; a and b beat each other once, and c both times
        (the pairs of the third are this file's choice, made without the paper's text at hand: it is the exact answers
        that are reproduced). Full batches, judged at their end, and mini-batches of 9 drawn anew in each step, judged
        by the mean policy over the last tenth of the steps: at a constant rate Adam keeps jittering around the optimum.
        IPO's exact answer: least squares on s_w − s_l = 1/(2τ), π = softmax of the solution s of minimum norm, which is
        the one that descent from s = 0 finds: it leaves the logit of an action that was never compared.
Run     rljax reproduce ipo_vs_dpo_bandit   (5 s on 2 × x86_64, cpu)
Pass    Full batches: DPO π(a) > 0.999 on the total order and on "a over b only", π(c) < 1e-3 where c never wins, for
        every β; IPO within 1e-3 of its exact answer in every action. Mini-batches, mean of 3 seeds: the same for DPO,
        within 0.01 for IPO.
Got     DPO, total order, full batches: π(a) = 1.0000, 1.0000, 1.0000; DPO, a over b only, full batches: π(a) = 1.0000,
        1.0000, 0.9994; DPO, c never wins, full batches: π(c) = 0.0000, 0.0000, 0.0000; DPO, total order, batches of 9,
        3 seeds: π(a) = 1.0000, 1.0000, 1.0000; DPO, a over b only, batches of 9, 3 seeds: π(a) = 1.0000, 1.0000,
        0.9993; DPO, c never wins, batches of 9, 3 seeds: π(c) = 0.0000, 0.0000, 0.0000; IPO, total order, full batches:
        π(a) = 0.9644, 0.5631, 0.4484; IPO, a over b only, full batches: π(a) = 0.9184, 0.5065, 0.4192; IPO, c never
        wins, full batches: π(c) = 0.0034, 0.1554, 0.2327; IPO, total order, batches of 9, 3 seeds: π(a) = 0.9645,
        0.5628, 0.4485; IPO, a over b only, batches of 9, 3 seeds: π(a) = 0.9184, 0.5065, 0.4192; IPO, c never wins,
        batches of 9, 3 seeds: π(c) = 0.0034, 0.1554, 0.2327.
Note    The three numbers of a row are for τ = β = 0.1, 0.5, 1.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from kl_bandit_optimum import draw, preference
from matplotlib.figure import Figure

from rljax import losses, papers, train
from rljax.types import TrainState

ACTIONS = {"a": "#0072B2", "b": "#E69F00", "c": "#000000"}  # Okabe and Ito's colours: told apart by every eye
DATA = {  # (winner, loser)
    "total order": [(0, 1), (1, 2), (0, 2)],
    "a over b only": [(0, 1)],
    "c never wins": [(0, 1), (1, 0), (0, 2), (1, 2)],
}
TAUS = (0.1, 0.5, 1.0)


def exact(data: list[tuple[int, int]], tau: float) -> np.ndarray:
    """IPO's optimum: softmax of the minimum-norm least-squares solution of s_w − s_l = 1/(2τ)."""
    rows = np.stack([np.eye(3)[winner] - np.eye(3)[loser] for winner, loser in data])
    scores = np.exp(np.linalg.lstsq(rows, np.full(len(data), 1 / (2 * tau)))[0])
    return scores / scores.sum()


def curve(key: Array, tau: Array, wins: Array, *, loss: Callable[..., Array], steps: int, batch: int) -> Array:
    """[steps 3]: the policy after each update. wins[i j]: how often i beat j in the data; batch 0: all of the data."""
    optimizer = optax.adam(1e-2)
    update = train.make_update(preference(loss, -jnp.log(jnp.full(3, 3.0)), beta=tau), optimizer)

    def step(state: TrainState, key: Array) -> tuple[TrainState, Array]:
        state, _ = update(state, draw(key, wins, batch))
        return state, jax.nn.softmax(state.params["logits"])

    state = train.init_state({"logits": jnp.zeros(3)}, optimizer)
    return jax.lax.scan(step, state, jax.random.split(key, steps))[1]


def curves(loss: Callable[..., Array], *, seeds: int, steps: int, batch: int) -> np.ndarray:
    """[data, τ, seed, step, action], all at once."""
    wins = jnp.stack([jnp.zeros((3, 3)).at[tuple(zip(*data, strict=True))].add(1.0) for data in DATA.values()])
    run = functools.partial(curve, loss=loss, steps=steps, batch=batch)
    over_seeds = jax.vmap(run, in_axes=(0, None, None))
    over_taus = jax.vmap(over_seeds, in_axes=(None, 0, None))
    over_data = jax.jit(jax.vmap(over_taus, in_axes=(None, None, 0)))
    return np.asarray(over_data(jax.random.split(jax.random.key(0), seeds), jnp.array(TAUS), wins))


def judge(name: str, policies: np.ndarray, tolerance: float, how: str) -> list[papers.Check]:
    """The verdicts on policies [data, τ, action]."""
    out = []
    for data, by_tau in zip(DATA, policies, strict=True):
        answers = np.stack([exact(DATA[data], tau) for tau in TAUS])
        action = 2 if data == "c never wins" else 0
        if name == "IPO":
            criterion = f"exact ({', '.join(f'{p:.4f}' for p in answers[:, action])}) ± {tolerance}"
            holds = np.all(np.abs(by_tau - answers) < tolerance)
        else:
            criterion = "π(c) < 1e-3" if action == 2 else "π(a) > 0.999"
            holds = np.all(by_tau[:, 2] < 1e-3 if action == 2 else by_tau[:, 0] > 0.999)
        measured = f"π({'abc'[action]}) = {', '.join(f'{p:.4f}' for p in by_tau[:, action])}"
        out.append(papers.Check(f"{name}, {data}, {how}", criterion, measured, bool(holds)))
    return out


def draw_curves(dpo: np.ndarray, ipo: np.ndarray) -> Figure:
    """π(a), π(b), π(c) against steps: a row of panels per data set, a column per τ; arrays [data, τ, step, action]."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots(len(DATA), len(TAUS), sharex=True, sharey=True)
    steps = np.unique(np.geomspace(1, dpo.shape[2], 400).astype(int))
    for i, data in enumerate(DATA):
        for j, tau in enumerate(TAUS):
            panel = axes[i, j]
            for action, (name, colour) in enumerate(ACTIONS.items()):  # the later the thinner: a and b may coincide
                regressed, driven = ipo[i, j, steps - 1, action], dpo[i, j, steps - 1, action]
                panel.plot(steps, regressed, color=colour, linewidth=4 - 1.2 * action, label=f"IPO π({name})")
                panel.plot(steps, driven, color=colour, linestyle=(0, (4, 2)), label=f"DPO π({name})")
            panel.set(title=f"{data}, τ = β = {tau}", xscale="log", ylim=(-0.03, 1.03))
            panel.grid(alpha=0.3)
    figure.supxlabel("updates (Adam, learning rate 0.01, full batches)")
    figure.supylabel("probability of the action")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def reproduce(*, seeds: int, quick: bool, steps: int = 18_000, batch: int = 9) -> papers.Result:
    """Train DPO and IPO on the three data sets, with full batches and (not in --quick) with mini-batches."""
    checks, full = [], {}
    for name, loss in (("DPO", losses.dpo_loss), ("IPO", losses.ipo_loss)):
        full[name] = curves(loss, seeds=1, steps=steps, batch=0)[:, :, 0]
        checks += judge(name, full[name][:, :, -1], 1e-3, "full batches")
        if not quick:
            small = curves(loss, seeds=seeds, steps=steps, batch=batch)[:, :, :, -(steps // 10) :]
            checks += judge(name, small.mean(axis=(2, 3)), 0.01, f"batches of {batch}, {seeds} seeds")
    return papers.Result(checks, {"Policies over updates": draw_curves(full["DPO"], full["IPO"])})
