"""ReMax: the baseline is the score of the greedy completion (Li et al. 2023, arXiv:2310.10505).

    rljax run experiments/remax.py --model path/to/a/checkpoint

One sample a prompt, compared with what the policy writes at temperature 0: no critic and no group. An advantage
function with a parameter named `greedy` is all that it takes for the program to sample and judge greedy completions.
`ppo_tiny.py` says what the model is and what the reward counts.

One busy CPU core: 100 to 270 seconds. Happy words on held-out openings, before and after 100 iterations of 64 stories,
and KL(policy ‖ reference) of the last five; several times as many words as before were expected:

    --seed    before    after    KL (nats)
    0         0.65      5.37     20
    1         0.46      5.02     21
    2         0.56      4.98     19
"""

from ppo_tiny import happy, openings

from rljax import presets, train

experiment = presets.remax(  # loss=losses.reinforce_loss, advantage=advantages.greedy_baseline
    model="stories260K",
    data=openings,
    reward=happy,
    max_prompt=32,
    max_completion=48,
    steps=100,
    batch=64,
    kl_reward=0.1,
    learning_rate=3e-4,
    schedule=train.linear,
    remat="none",
    eval_every=50,
    save_every=50,
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
