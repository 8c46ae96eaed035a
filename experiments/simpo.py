"""SimPO (Meng et al. 2024, arXiv:2405.14734): a preference loss in one function, on pairs of your own.

    rljax run experiments/simpo.py --model smollm2-135m-instruct --data pairs.jsonl --loss.beta 2.5

`pairs.jsonl` holds {"prompt", "chosen", "rejected"} rows. Expected: `eval/rewards/accuracies` above 0.5.
"""

import jax

from rljax import offline


def simpo_loss(chosen, rejected, *, beta: float = 2.0, gamma: float = 0.5):
    """Length-averaged log-probs [b] -> loss [b] (Eq. 6)."""
    return -jax.nn.log_sigmoid(beta * (chosen - rejected) - gamma)


experiment = offline.Preference(
    loss=simpo_loss,
    average=True,
    reference=False,
    model="smollm2-135m-instruct",
    data="pairs.jsonl",
    learning_rate=1e-6,
    steps=200,
    max_prompt=64,
    max_completion=64,
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
