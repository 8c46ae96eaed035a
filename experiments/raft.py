"""RAFT: fine-tuning on the best of n, again and again (Dong et al. 2023, arXiv:2304.06767).

    rljax run experiments/raft.py --model path/to/a/checkpoint

Of eight completions of each prompt the best becomes a demonstration; no advantage, no ratio, no reference. With
`threshold` only those become one whose score exceeds it, as in expert iteration (arXiv:1705.08439) and STaR
(arXiv:2203.14465). `objective/kl` is only measured. `ppo_tiny.py` says what the model is and what the reward counts.

One CPU core: about 30 seconds. Happy words a story on held-out openings, before and after 60 iterations of 64 stories,
and KL(policy ‖ reference) of the last five; several times as many words as before were expected:

    --seed    before    after    KL (nats)
    0         0.65      7.09     207
    1         0.46      8.88     148
    2         0.56      7.98     182
"""

from ppo_tiny import happy, openings

from rljax import presets, train

experiment = presets.raft(
    model="stories260K",
    data=openings,
    reward=happy,
    max_prompt=32,
    max_completion=48,
    steps=60,
    batch=8,
    group=8,
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
