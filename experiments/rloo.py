"""RLOO: REINFORCE with the other samples' mean as the baseline (Ahmadian et al. 2024, arXiv:2402.14740).

    rljax run experiments/rloo.py --model path/to/a/checkpoint

The whole completion is one action: its advantage is its score, less the KL of the sequence, minus the mean of the other
three of its prompt; no critic, no ratio, no clip. `ppo_tiny.py` says what the model is and what the reward counts.

One CPU core: about 60 seconds. Happy words a story on held-out openings, before and after 100 iterations of 64 stories,
and KL(policy ‖ reference) of the last five; several times as many words as before were expected:

    --seed    before    after    KL (nats)
    0         0.65      7.61     36
    1         0.46      8.98     42
    2         0.56      7.46     33
"""

from ppo_tiny import happy, openings

from rljax import presets, train

experiment = presets.rloo(  # loss=losses.reinforce_loss, advantage=advantages.leave_one_out, KL in the reward
    model="stories260K",
    data=openings,
    reward=happy,
    max_prompt=32,
    max_completion=48,
    steps=100,
    batch=16,
    group=4,
    kl_reward=0.1,
    learning_rate=1e-3,
    schedule=train.linear,
    remat="none",
    eval_every=50,
    save_every=50,
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
