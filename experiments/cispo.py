"""CISPO: the importance weight is clipped, not the update (MiniMax-M1, arXiv:2506.13585).

    rljax run experiments/cispo.py --model path/to/a/checkpoint

−sg(min(ρ, 5)) · A · log π: where PPO's clip drops a token's gradient, CISPO bounds its weight, so that rare tokens on
which a completion turns keep teaching. With one update a rollout ρ would be 1, so there are four minibatches.
`ppo_tiny.py` says what the model is and what the reward counts.

One busy CPU core: 80 seconds. Happy words on held-out openings, before and after 60 iterations of 64 stories,
and KL(policy ‖ reference) of the last five; several times as many words as before were expected:

    --seed    before    after    KL (nats)
    0         0.65      8.51     123
    1         0.46      9.60     150
    2         0.56      8.51     170
"""

from ppo_tiny import happy, openings

from rljax import presets, train

experiment = presets.cispo(  # loss=losses.cispo_loss
    model="stories260K",
    data=openings,
    reward=happy,
    max_prompt=32,
    max_completion=48,
    steps=60,
    batch=8,
    group=8,
    minibatches=4,
    log_kl=True,
    learning_rate=3e-4,
    schedule=train.linear,
    remat="none",
    eval_every=30,
    save_every=30,
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
