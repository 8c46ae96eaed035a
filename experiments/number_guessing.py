"""A task of several turns: guess the secret letter, told after every guess whether it comes earlier or later.

    rljax run experiments/number_guessing.py --model path/to/a/checkpoint

The model is a folder with a checkpoint in Hugging Face's form; these are the figures of stories260K. Two minutes on one
CPU core. A hit at the first of three guesses is worth 1, at the second 2/3, at the third 1/3. The best strategy earns
0.52 (`environments.best_score`), the same three letters whatever is answered 0.29. On held-out rows, before and after
120 iterations of 128 episodes:

    --seed    before    after
    0         0.13      0.43
    1         0.14      0.20
    2         0.16      0.41

Seeds 0 and 2 listen: "D later: W", "D earlier: A". Seed 1 has not found out in this time; more was expected of it.
"""

from rljax import environments, online

LETTERS = "ACDGJRW"
TURNS = 3


def secrets(policy, key, *, rounds: int = 100) -> list[dict]:
    """Every letter is the secret of as many rows."""
    return [{"secret": letter} for letter in LETTERS * rounds]


experiment = online.PPO(
    model="stories260K",
    data=secrets,
    environment=environments.guessing(
        LETTERS, "Guess a letter: ", higher=" later: ", lower=" earlier: ", again=" what? ", max_turns=TURNS
    ),
    turn_tokens=1,
    max_prompt=16,
    max_completion=32,
    critic="shared",
    kl_reward=0.0,
    entropy_coef=0.02,
    value_coef=0.5,
    steps=120,
    batch=128,
    epochs=2,
    minibatches=2,
    learning_rate=1e-3,
    eval_rows=70,
    eval_every=20,
    save_every=60,
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
