"""CISPO: the importance weight is clipped, not the update (MiniMax-M1, arXiv:2506.13585).

    rljax run experiments/cispo.py --model path/to/a/checkpoint

−sg(min(ρ, 5)) · A · log π: where PPO's clip drops a token's gradient, CISPO bounds its weight, so that rare tokens on
which a completion turns keep teaching. With one update a rollout ρ would be 1, so there are four minibatches.
`ppo_tiny.py` says what the model is and what the reward counts.
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
