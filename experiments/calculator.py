"""A tool in the middle of an answer: arithmetic with a calculator that the policy has to ask, in a dialogue.

    rljax run experiments/calculator.py

Needs `pip install -e ".[gguf]"`. The model is fetched once (93 MB). 12 minutes on two CPU cores. Three worked examples
stand before every exercise; to be learned is to copy the exercise into a call, each time and right. Expected: nearly
all of them, since the calculator does the rest. Measured on 32 held-out exercises, right answers before, after 10 and
after 20 iterations of 2 × 8 episodes (standard error of a share of 0.9: 0.05), and the KL(policy ‖ reference) of an
episode:

    --seed    before    after 10    after 20    KL (nats)
    0         0.41      0.94        1.00        1.0
    1         0.56      0.97        0.97        1.6
    2         0.47      0.84        0.97        0.7
"""

from rljax import environments, presets

SYSTEM = (
    "You have a calculator: write an expression between <calc> and </calc> and you are told the result. Then answer."
)
WORKED = {"31 * 4 - 7": 117, "(9 - 2) * 8": 56, "12 + 5 * 3": 27}


def exercises(policy, key, *, count: int = 512, largest: int = 20) -> list[dict]:
    return environments.exercises(count, largest=largest)


def ask(row: dict) -> list[dict]:
    """The worked examples as turns of the same dialogue, then the question."""
    told = [{"role": "system", "content": SYSTEM}]
    for expression, value in WORKED.items():
        turns = f"What is {expression}?", f"<calc>{expression}</calc>", f"<result>{value}</result>", str(value)
        told += [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, turns, strict=True)]
    return [*told, {"role": "user", "content": row["question"]}]


experiment = presets.grpo(
    model="smollm2-135m-instruct",
    data=exercises,
    environment=environments.calculator(prompt=ask, max_turns=2),
    turn_tokens=24,
    max_prompt=240,
    max_completion=80,
    steps=20,
    batch=2,
    group=8,
    learning_rate=2e-5,
    eval_rows=32,
    eval_every=10,
    save_every=10,
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
