"""A tool in the middle of an answer: arithmetic with a calculator that the policy has to ask, in a dialogue.

    rljax run experiments/calculator.py

Needs `pip install "rljax[gguf]"`. The model is fetched once (93 MB). Not measured yet: only that it takes its steps.
"""

from rljax import environments, presets

SYSTEM = (
    "You have a calculator: write an expression between <calc> and </calc> and you are told the result. Then answer."
)


def exercises(policy, key, *, count: int = 512, largest: int = 20) -> list[dict]:
    return environments.exercises(count, largest=largest)


def ask(row: dict) -> list[dict]:
    """One worked example, then the question."""
    example = ["What is 31 * 4 - 7?", "<calc>31 * 4 - 7</calc>", "<result>117</result>", "117"]
    roles = ["user", "assistant"] * 2
    shown = [{"role": role, "content": text} for role, text in zip(roles, example, strict=True)]
    return [{"role": "system", "content": SYSTEM}, *shown, {"role": "user", "content": row["question"]}]


experiment = presets.grpo(
    model="smollm2-135m-instruct",
    data=exercises,
    environment=environments.calculator(prompt=ask, max_turns=3),
    turn_tokens=20,
    max_prompt=144,
    max_completion=112,
    steps=40,
    batch=4,
    group=8,
    learning_rate=2e-5,
    eval_rows=32,
    eval_every=20,
    save_every=20,
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
