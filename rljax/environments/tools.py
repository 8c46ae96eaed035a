"""A tool: arithmetic questions, and a calculator that the policy may ask before it answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rljax import rewards
from rljax.data import Row
from rljax.environments.arithmetic import result
from rljax.environments.prompts import Reward, host_rewards, judge
from rljax.environments.turns import Environment, Text, Turn, message
from rljax.rewards.matching import numeric_match

MAX_CALLS = 4  # of one action
_CALL = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)


class _Exercise(NamedTuple):
    question: str
    fields: dict[str, Any]
    chat: bool


def exercise_prompt(row: Row) -> str:
    return (
        "Answer with a number. To calculate, write an expression between <calc> and </calc>: you are told its value.\n"
        f"Question: {row['question']}\nAnswer:"
    )


def calculator(
    *, reward: Reward = numeric_match, prompt: Callable[[Row], Text] = exercise_prompt, max_turns: int = 4
) -> Environment:
    """Rows {"question", "answer"}; the policy may write <calc>12*7</calc> and is told <result>84</result>.

    An action with calls is answered with their results (the first four), or with what is wrong with them; one without
    is the final answer, which the reward judges by the field "answer". prompt: row -> a text, which results continue,
    or messages, which results follow as a message of the user.
    """
    several = host_rewards(reward)

    def reset(row: Row, seed: int) -> tuple[_Exercise, Text]:
        del seed
        text = prompt(row)
        fields = {name: value for name, value in row.items() if name != "question"}
        rewards.check_fields(several, list(fields))
        return _Exercise(row["question"], fields, isinstance(text, list)), text

    def step(exercise: _Exercise, text: str, ids: np.ndarray) -> tuple[_Exercise, Turn]:
        calls = _CALL.findall(text)
        if not calls:
            return exercise, Turn(None, judge(several, exercise.question, text, ids, exercise.fields), done=True)
        results = "".join(f"<result>{result(call)}</result>" for call in calls[:MAX_CALLS])
        return exercise, Turn([message(results)] if exercise.chat else results)

    return Environment(reset, step, max_turns)


def exercises(count: int, *, seed: int = 0, largest: int = 99) -> list[dict[str, Any]]:
    """`count` rows {"question", "answer"} of three numbers from 1 to `largest`, with + - * and parentheses."""
    random, rows = np.random.default_rng(seed), []
    for _ in range(count):
        a, b, c = random.integers(1, largest + 1, 3)
        first, second = random.choice(["+", "-", "*"], 2)
        text = f"({a} {first} {b}) {second} {c}" if random.random() < 0.5 else f"{a} {first} {b} {second} {c}"
        rows.append({"question": f"What is {text}?", "answer": result(text)})
    return rows
