"""Reward against KL of DPO, PPO, preferred fine-tuning and unlikelihood: figure 2 (left) of Direct Preference
Optimization (Rafailov et al. 2023, arXiv:2305.18290), on SmolLM2-135M with VADER's sentiment as the true reward.

    python experiments/sentiment_frontier.py
    rljax run experiments/sentiment_frontier.py --methods dpo-0.1 ppo-6    # some of them

For a GPU (`pip install -e ".[cuda,gguf,metrics]"`); at full size it has not been run yet.
`experiments/papers/dpo_frontier.py` is the same figure where every answer is known, and runs anywhere.

All methods see the same openings. Pairs of the model's own continuations, the more positive one preferred, are made
once; PPO is paid by VADER and led by the adaptive KL controller to 3, 6, 9 and 12 nats a sequence. Every checkpoint of
every run writes one continuation of each held-out opening; their mean reward and KL(π ‖ π_ref) are a point. Written:
`frontier.jsonl` and `frontier.png` in the folder of the runs; begun again, it goes on where it was.

Expected, from the figure: DPO's points lie above those of preferred fine-tuning and of unlikelihood at equal KL. That
they lie above those of PPO with the true reward, as in the paper, is not: a PPO that works gets as much.

On two CPU cores, small (14 minutes):

    rljax run experiments/sentiment_frontier.py --methods dpo-0.1 preferred unlikelihood ppo-6 \\
        --learning-rate 5e-5 --openings 80 --steps 48 --steps-ppo 24 --batch 8 --looks 3

    reward (KL in nats)    a third         two thirds      all
    dpo-0.1                0.14 (1.9)      0.19 (2.4)      0.16 (3.7)
    preferred              0.17 (3.6)      0.14 (5.2)      0.17 (10.0)
    unlikelihood           0.18 (2.5)      0.13 (4.7)      0.25 (9.6)
    ppo-6                  0.19 (2.3)      0.28 (3.9)      0.34 (4.7)

The standard error of a reward is 0.04 to 0.05 (64 held-out openings): PPO with the true reward is ahead; which of
the others comes next, a run of this size cannot tell.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import dpo_sentiment as sentiment
import jax

from rljax import artefacts, data, losses, offline, online, papers, policy, rewards, train

REWARD = functools.partial(rewards.vader_sentiment, judged="prompt+completion")
COLORS = {"dpo": "#0072B2", "preferred": "#E69F00", "unlikelihood": "#D55E00", "ppo": "#009E73"}


def experiments(common: Mapping[str, Any], pairs: str, prompts: str, steps_ppo: int) -> dict[str, Any]:
    """{name: what it trains}."""
    on_pairs = functools.partial(offline.Preference, **common, data=pairs)
    alone = functools.partial(on_pairs, reference=False)
    found: dict[str, Any] = {
        f"dpo-{beta:g}": on_pairs(name=f"dpo-{beta:g}", loss=functools.partial(losses.dpo_loss, beta=beta))
        for beta in (0.05, 0.1, 1.0, 5.0)
    }
    for name, alpha in (("preferred", 0.0), ("unlikelihood", 0.5)):
        found[name] = alone(name=name, loss=functools.partial(losses.unlikelihood_loss, alpha=alpha))
    for target in (3, 6, 9, 12):
        found[f"ppo-{target}"] = online.PPO(
            **{**common, "steps": steps_ppo, "max_completion": sentiment.TOKENS},
            name=f"ppo-{target}",
            data=prompts,
            reward=REWARD,
            critic="shared",
            kl_reward=0.05,
            kl_target=float(target),
            kl_horizon=2_000,
            minibatches=2,
            epochs=2,
        )
    return found


def look(run: pathlib.Path, step: int, seed: int) -> dict[str, Any]:
    """A checkpoint's point: reward and KL of what it writes after the held-out openings."""
    start, params, _ = artefacts.load_run(run, step=step)
    found = sentiment.held_out_reward(start._replace(params=params), start.params, jax.random.key(seed + 1))
    return {"method": run.name, "step": step, **found.metrics}


def draw(points: list[dict[str, Any]], path: pathlib.Path) -> None:
    figure, ((axis,),) = papers.figure(1, 1)
    for method in dict.fromkeys(point["method"] for point in points):
        mine = sorted((point["kl"], point["reward/mean"]) for point in points if point["method"] == method)
        axis.plot(*zip(*mine, strict=True), marker="o", color=COLORS[method.split("-")[0]], label=method, alpha=0.7)
    axis.set(xlabel="KL(π ‖ π_ref) of a sequence [nats]", ylabel="reward (VADER's score, −1 to 1)")
    axis.legend()
    figure.savefig(path, dpi=150)


def main(
    *,
    model: str = "smollm2-135m-instruct",
    out: str = "runs/sentiment_frontier",
    methods: tuple[str, ...] = (),
    steps: int = 320,
    steps_ppo: int = 160,
    batch: int = 64,
    learning_rate: float = 1e-5,
    looks: int = 8,
    openings: int = 336,
    samples: int = 4,
    seed: int = 0,
) -> int:
    """Train by every method, then draw reward against KL of all checkpoints.

    Args:
        model: a folder, or a name that resolves to one
        out: the folder of the runs
        methods: some of dpo-0.05 dpo-0.1 dpo-1 dpo-5 preferred unlikelihood ppo-3 ppo-6 ppo-9 ppo-12; all
        steps: updates on pairs
        steps_ppo: iterations of PPO
        batch: pairs, or prompts, of each
        learning_rate: of all, constant
        looks: checkpoints of each run
        openings: of movie reviews, at most 336
        samples: continuations of each, from which pairs are made
        seed: of everything
    """
    folder = pathlib.Path(out)
    pairs, prompts = folder / "pairs.jsonl", folder / "prompts.jsonl"
    if not pairs.exists():
        print(f"sampling {samples} continuations of each of {openings} openings …", flush=True)
        start = policy.load(model)
        made = sentiment.sampled_pairs(start, jax.random.key(seed), openings=openings, samples=samples)
        data.write_jsonl(prompts, [{"prompt": opening} for opening in sentiment.TRAIN[:openings]])
        data.write_jsonl(pairs, made)
    common = {"model": model, "out": out, "seed": seed, "steps": steps, "batch": batch, "keep": looks + 1}
    common |= {"learning_rate": learning_rate, "schedule": train.constant, "samples": 0, "eval_rows": 32}
    common |= {"max_prompt": 16, "max_completion": sentiment.TOKENS + 1}
    every = experiments(common, str(pairs), str(prompts), steps_ppo)
    unknown = sorted(set(methods) - set(every))
    if unknown:
        raise ValueError(f"there is no method {unknown[0]!r}; there are {', '.join(every)}")
    points = []
    for name in methods or every:
        length = max(1, (steps_ppo if name.startswith("ppo") else steps) // looks)
        run = dataclasses.replace(every[name], save_every=length, eval_every=length)
        status = (online if isinstance(run, online.PPO) else offline).run(run)
        if status:
            return status
        print(f"{name}: sampling from its checkpoints …", flush=True)
        points += [look(folder / name, step, seed) for step in range(length, run.steps + 1, length)]
    (folder / "frontier.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    draw(points, folder / "frontier.png")
    print(f"{folder / 'frontier.png'}")
    return 0


if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
