"""PPO from end to end on a model of 260,032 parameters: stories that turn out happy (PPO: Schulman et al. 2017,
arXiv:1707.06347; the KL penalty in the reward: Ziegler et al. 2019, arXiv:1909.08593).
"""

import itertools
import random
import re

from rljax import online, train

NAMES = ("Lily", "Tom", "Max", "Sara", "Ben", "Mia", "Tim", "Anna", "Sam", "Lucy", "Jack", "Amy")
BEGINNINGS = (
    "One day, {} went to the park",
    "One day, {} was in the kitchen and",
    "Once upon a time, {} had a big",
    "{} and the dog",
    "{} was walking home when",
    "In the morning, {} looked at",
    "Every day, {} sat by the",
    "{} found a box. In the box",
)
HAPPY = "happy happily smile smiled laugh laughed fun love loved friend friends play played joy hug hugged kind nice proud"


def openings(policy, key, *, count: int = 96) -> list[dict]:
    """Beginnings of stories, each name with each beginning, in an order of its own."""
    prompts = [beginning.format(name) for name, beginning in itertools.product(NAMES, BEGINNINGS)]
    return [{"prompt": prompt} for prompt in random.Random(0).sample(prompts, count)]


def happy(prompts: list[str], completions: list[str]) -> list[int]:
    """How many different happy words a completion has: saying one twice does not count."""
    return [len(set(HAPPY.split()) & set(re.findall("[a-z]+", text.lower()))) for text in completions]


experiment = online.PPO(
    model="stories260K",
    data=openings,
    reward=happy,
    max_prompt=32,
    max_completion=48,
    steps=120,
    batch=32,
    epochs=2,
    minibatches=2,
    learning_rate=1e-3,
    schedule=train.linear,
    kl_reward=0.05,
    remat="none",
    eval_rows=64,
    eval_every=40,
    save_every=120,
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
