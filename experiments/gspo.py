"""GSPO: one importance ratio a sequence (Zheng et al. 2025, arXiv:2507.18071).

    rljax run experiments/gspo.py --model path/to/a/checkpoint

The ratio is the geometric mean over the completion's tokens, s = exp(mean log π/π_old), clipped as a whole to
[1 − 3e-4, 1 + 4e-4]: a sequence is either trained on or not. The range is narrow because a mean over tokens moves
little; far more is clipped than in GRPO. With one update a rollout s would be 1, so there are four minibatches.
`ppo_tiny.py` says what the model is and what the reward counts.

One busy CPU core: 140 seconds. Happy words on held-out openings, before and after 60 iterations of 64 stories,
and KL(policy ‖ reference) of the last five; several times as many words as before were expected:

    --seed    before    after    KL (nats)
    0         0.65      10.25    125
    1         0.46      8.95     136
    2         0.56      11.35    178
"""

from ppo_tiny import happy, openings

from rljax import presets, train

experiment = presets.gspo(  # loss=losses.gspo_loss
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
    learning_rate=1e-3,
    schedule=train.linear,
    remat="none",
    eval_every=30,
    save_every=30,
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
