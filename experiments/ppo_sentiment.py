"""Proximal policy optimisation against a sentiment reward, after Fine-Tuning Language Models from Human Preferences
(Ziegler et al. 2019, arXiv:1909.08593), section 3.1.

    rljax run experiments/ppo_sentiment.py

Needs `pip install -e ".[gguf,metrics]"`. The model is fetched once (93 MB). 17 minutes on one CPU core. One
continuation of each of the 64 held-out openings of `dpo_sentiment.py`, before and after 40 iterations of 32 samples
(standard error of a mean: 0.04), and the KL(policy ‖ reference) of the sequences after; expected was about what DPO
reaches there (0.30):

    --seed    reward before    reward after    KL (nats)
    0         0.158            0.307           1.1
    1         0.040            0.358           1.3
    2         0.096            0.340           1.1
"""

import functools

import jax
from dpo_sentiment import TOKENS, TRAIN, held_out_reward

from rljax import offline, online, policy, rewards


def openings(model: policy.Policy, key: jax.Array) -> list[dict]:
    """The openings that the policy is trained on; those of `dpo_sentiment.HELD_OUT` are not among them."""
    return [{"prompt": opening} for opening in TRAIN]


def held_out(model: policy.Policy, reference: dict, key: jax.Array) -> offline.Evaluation:
    """Reward and KL on the held-out openings, as dpo_sentiment has them: the two can be compared."""
    found = held_out_reward(model, reference, key)
    return offline.Evaluation({f"held_out/{name}": value for name, value in found.metrics.items()}, found.samples)


experiment = online.PPO(
    model="smollm2-135m-instruct",
    data=openings,
    reward=functools.partial(rewards.vader_sentiment, judged="prompt+completion"),
    evaluate=held_out,
    critic="shared",
    kl_reward=0.05,
    steps=40,
    batch=32,
    minibatches=2,
    epochs=2,
    learning_rate=2e-5,
    max_prompt=16,
    max_completion=TOKENS,
    eval_rows=32,
    eval_every=20,
    save_every=20,
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
