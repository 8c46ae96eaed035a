"""PPO from end to end on a model of 260,032 parameters: stories that turn out happy (PPO: Schulman et al. 2017,
arXiv:1707.06347; the KL penalty in the reward: Ziegler et al. 2019, arXiv:1909.08593).

    rljax run experiments/ppo_tiny.py --model path/to/a/checkpoint

The model is a folder with a checkpoint in Hugging Face's form; these are the figures of stories260K, a Llama that
writes children's stories. Two CPU cores: 77 seconds, one: 110 to 130. Happy words a story on held-out openings, before
and after 100 iterations of 64 stories, and KL(policy ‖ reference) at last; several times as many were expected:

    --seed    before    after    KL (nats)
    0         0.65      5.72     19
    1         0.46      5.74     20
    2         0.56      6.37     21
"""

import itertools
import re

from rljax import online, train

TIMES = ("One day,", "Once upon a time,", "In the morning,", "Every day,", "Last night,", "After lunch,")
NAMES = ("Lily", "Tom", "Max", "Sara", "Ben", "Mia", "Tim", "Anna", "Sam", "Lucy", "Jack", "Amy")
DOINGS = ("went to the", "saw a big", "found a", "looked at the", "sat by the", "heard a", "and the dog", "ran to a")

HAPPY = "happy happily smile smiled laugh laughed fun love loved friend friends play played joy hug hugged kind nice"


def openings(policy, key) -> list[dict]:
    """Beginnings of stories: 576 of them, of which a tenth is held out."""
    return [{"prompt": " ".join(parts)} for parts in itertools.product(TIMES, NAMES, DOINGS)]


def happy(prompts: list[str], completions: list[str]) -> list[int]:
    """How many different happy words a completion has: saying one twice does not count."""
    return [len(set(HAPPY.split()) & set(re.findall("[a-z]+", text.lower()))) for text in completions]


experiment = online.PPO(
    model="stories260K",
    data=openings,
    reward=happy,
    max_prompt=32,
    max_completion=48,
    steps=100,
    batch=64,
    epochs=2,
    minibatches=2,
    learning_rate=3e-4,
    schedule=train.linear,
    kl_reward=0.1,
    remat="none",
    eval_rows=64,
    eval_every=50,
    save_every=50,
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
