"""A tool: arithmetic questions, and a calculator that the policy may ask before it answers."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from rljax import rewards
from rljax.data import Row
from rljax.environments.single_turn import Reward, judge
from rljax.environments.turns import Environment, Text, Turn, message
from rljax.rewards.matching import numeric_match

MAX_CHARACTERS, MAX_DEPTH = 200, 20  # of an expression: they bound its value and the time that it takes
MAX_CALLS = 4  # of one action
_CALL = re.compile(r"<calc>(.*?)</calc>", re.DOTALL)
_TOKEN = re.compile(r"\s*(?:([0-9]+(?:\.[0-9]*)?|\.[0-9]+)|([-+*/()]))")


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
    several = rewards.as_rewards(reward)

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


def result(expression: str) -> str:
    """The value of an expression as a text, or "error: …": what the calculator shows."""
    try:
        return shown(evaluate(expression))
    except ValueError as error:
        return f"error: {error}"


def shown(value: Fraction) -> str:
    """Whole numbers in full, others with ten significant digits."""
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10g}"


def evaluate(expression: str) -> Fraction:
    """The exact value of an expression of numbers, + - * / and parentheses. Nothing else is understood.

    Raises ValueError for anything else, a division by zero, and expressions that are too long or too deep.
    """
    if len(expression) > MAX_CHARACTERS:
        raise ValueError(f"an expression has at most {MAX_CHARACTERS} characters")
    tokens, at = [], 0
    text = expression.strip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"{text[at:].strip()[0]!r} is not understood")
        tokens.append(match.group().strip())
        at = match.end()
    value, at = _sum([*tokens, ""], 0, 0)
    if at < len(tokens):
        raise ValueError(f"{tokens[at]!r} is not expected there")
    return value


# sum: product { (+ | -) product };  product: factor { (* | /) factor };  factor: [+ | -] factor | number | ( sum )
# Each takes the tokens, where to begin, and how deep it stands; and returns a value and where it ended.


def _sum(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    value, at = _product(tokens, at, depth)
    while tokens[at] in ("+", "-"):
        sign = tokens[at]
        other, at = _product(tokens, at + 1, depth)
        value = value + other if sign == "+" else value - other
    return value, at


def _product(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    value, at = _factor(tokens, at, depth)
    while tokens[at] in ("*", "/"):
        sign = tokens[at]
        other, at = _factor(tokens, at + 1, depth)
        if sign == "/" and other == 0:
            raise ValueError("division by zero")
        value = value * other if sign == "*" else value / other
    return value, at


def _factor(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    token = tokens[at]
    if depth > MAX_DEPTH:
        raise ValueError(f"parentheses and signs stand at most {MAX_DEPTH} deep")
    if token in ("+", "-"):
        value, at = _factor(tokens, at + 1, depth + 1)
        return (-value if token == "-" else value), at
    if token == "(":
        value, at = _sum(tokens, at + 1, depth + 1)
        if tokens[at] != ")":
            raise ValueError("a parenthesis is not closed")
        return value, at + 1
    if not token or token in "*/)":
        raise ValueError("a number is missing")
    return Fraction(token), at + 1
