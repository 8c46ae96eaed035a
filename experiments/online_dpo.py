"""Online DPO, OAIF (Guo et al. 2024, arXiv:2402.04792): preference pairs from the policy as it is.

    rljax run experiments/online_dpo.py --model path/to/a/checkpoint

Two completions of each prompt are sampled, the reward picks the better one, and DPO learns the pair; then everything
is sampled anew. The annotator may be any reward: a judge that compares texts, a reward model, or words that are counted
as here. Pairs that tie teach nothing (`pairs/tied`). `ppo_tiny.py` says what the model is and what the reward counts.

One CPU core: about 60 seconds. Happy words a story on held-out openings, before and after 100 iterations of 64 stories,
and KL(policy ‖ reference) of the last five; several times as many words as before were expected:

    --seed    before    after    KL (nats)
    0         0.65      7.35     46
    1         0.46      6.77     33
    2         0.56      7.42     39
"""

import functools

from ppo_tiny import happy, openings

from rljax import losses, presets, train

experiment = presets.online_dpo(  # also with losses.ipo_loss or losses.hinge_loss, as in the paper
    model="stories260K",
    data=openings,
    reward=happy,
    loss=functools.partial(losses.dpo_loss, beta=0.1),
    max_prompt=32,
    max_completion=48,
    steps=100,
    batch=32,
    group=2,
    learning_rate=5e-4,
    schedule=train.linear,
    remat="none",
    eval_every=50,
    save_every=50,
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
