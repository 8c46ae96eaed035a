"""Group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300) on one-digit addition.

    rljax run experiments/grpo_arithmetic.py

Needs `pip install -e ".[gguf,metrics]"`. The model is fetched once (93 MB). Six minutes on one CPU core. Share of
right answers at temperature 1, before and after 30 steps (of 80 answers each: a standard error of at most 0.06); sums
are held out together with their mirror images. Well past 0.6 was expected:

    --seed    training sums before    after    held-out sums before    after
    0         0.16                    0.90     0.10                    0.89
    1         0.20                    0.86     0.13                    0.74
    2         0.19                    0.90     0.13                    0.88
"""

import random

import jax
import numpy as np

from rljax import offline, policy, presets, rewards

TOKENS = 12  # of an answer
PAIRS = [(a, b) for a in range(10) for b in range(a, 10)]
HELD_OUT = set(random.Random(0).sample(PAIRS, 11))  # of 55; a sum and its mirror image are on the same side


def sums(*, held_out: bool) -> list[dict]:
    """A row for each of the 100 sums a + b that is held out, or is not."""
    ask = [{"role": "system", "content": "Answer with just the number."}]
    return [
        {"prompt": [*ask, {"role": "user", "content": f"What is {a} + {b}?"}], "answer": a + b}
        for a in range(10)
        for b in range(10)
        if ((min(a, b), max(a, b)) in HELD_OUT) == held_out
    ]


def training_sums(model: policy.Policy, key: jax.Array) -> list[dict]:
    return sums(held_out=False)


def accuracy(model: policy.Policy, reference: dict, key: jax.Array) -> offline.Evaluation:
    """How often answers at temperature 1 are right: one to each sum in training, four to each held-out one."""
    asked = {"train": sums(held_out=False), "held_out": sums(held_out=True) * 4}
    metrics, samples = {}, []
    for name, rows in asked.items():
        prompts, answers = [row["prompt"] for row in rows], [row["answer"] for row in rows]
        texts = policy.complete(model, prompts, key, max_new_tokens=TOKENS, batch=40).texts
        right = rewards.numeric_match(prompts, texts, answer=answers)
        metrics[f"accuracy/{name}"] = float(np.mean(np.asarray(right, float)))
        samples += [
            {"prompt": p[-1]["content"], "completion": t, "right": r}
            for p, t, r in zip(prompts, texts, right, strict=True)
        ]
    return offline.Evaluation(metrics, samples)


experiment = presets.grpo(
    model="smollm2-135m-instruct",
    data=training_sums,
    reward=rewards.numeric_match,
    evaluate=accuracy,
    max_prompt=48,
    max_completion=TOKENS,
    steps=30,
    batch=4,
    group=8,
    learning_rate=5e-5,
    eval_every=10,
    save_every=30,
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
