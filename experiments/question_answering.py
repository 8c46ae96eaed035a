"""Question answering over a list of questions and answers, the running example of surveys of reinforcement learning for
language: an answer is an episode of one turn, and its reward is the F1 of the words it shares with the right one.

    rljax run experiments/question_answering.py

Needs `pip install -e ".[gguf,environments]"`. The model is fetched once (93 MB). 19 minutes on two CPU cores that ran
tests beside it. Expected: little, since a model of this size hardly knows these facts: it can prefer the answers it is
surer of, and learn how long one is. Measured with seed 0, F1 of one answer to each of 32 held-out questions (standard
error 0.02 to 0.05) first, after 20 and after 40 iterations: 0.03, 0.04, 0.11; mean of the 640 answers to training
questions in the first ten iterations and in the last ten: 0.04 and 0.10; KL(policy ‖ reference) of an answer: 1.6 nats.
"""

from rljax import environments, presets, rewards

CATEGORIES = ("trivia",)  # the one whose answers are facts
SHOWN = {
    "What is the capital of Portugal?": "Lisbon",
    "How many legs does a spider have?": "8",
    "Who wrote Don Quixote?": "Cervantes",
}


def questions(policy, key, *, categories: tuple[str, ...] = CATEGORIES) -> list[dict]:
    """The questions of chatterbot-corpus, each once, with all answers that it has there."""
    found: dict[str, list[str]] = {}
    for row in environments.conversations(categories):
        found.setdefault(row["turns"][0], []).append(row["turns"][1])
    return [{"question": question, "answer": answers} for question, answers in found.items()]


def ask(row: dict) -> list[dict]:
    """A dialogue that shows how long an answer is to be, then the question."""
    told = [{"role": "system", "content": "Answer with a name, a word or a number."}]
    for question, answer in SHOWN.items():
        told += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*told, {"role": "user", "content": row["question"]}]


experiment = presets.grpo(
    model="smollm2-135m-instruct",
    data=questions,
    environment=environments.question_answering(rewards.token_f1, prompt=ask),
    max_prompt=128,
    max_completion=16,
    steps=40,
    batch=8,
    group=8,
    learning_rate=2e-5,
    eval_rows=32,
    eval_every=20,
    save_every=20,
)

if __name__ == "__main__":
    from rljax import cli

    cli.run_file(__file__)
