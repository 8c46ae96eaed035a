"""Arithmetic from text: a parser of its own, since nothing that a model writes is evaluated."""

from __future__ import annotations

import re
from fractions import Fraction

from rljax.errors import UserError

MAX_CHARACTERS, MAX_DEPTH = 200, 20  # of an expression: they bound its value and the time that it takes
_TOKEN = re.compile(r"\s*(?:([0-9]+(?:\.[0-9]*)?|\.[0-9]+)|([-+*/()]))")


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

    Raises UserError for anything else, a division by zero, and expressions that are too long or too deep.
    """
    if len(expression) > MAX_CHARACTERS:
        raise UserError(f"an expression has at most {MAX_CHARACTERS} characters")
    tokens, at = [], 0
    text = expression.strip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise UserError(f"{text[at:].strip()[0]!r} is not understood")
        tokens.append(match.group().strip())
        at = match.end()
    value, at = _sum([*tokens, ""], 0, 0)
    if at < len(tokens):
        raise UserError(f"{tokens[at]!r} is not expected there")
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
            raise UserError("division by zero")
        value = value * other if sign == "*" else value / other
    return value, at


def _factor(tokens: list[str], at: int, depth: int) -> tuple[Fraction, int]:
    token = tokens[at]
    if depth > MAX_DEPTH:
        raise UserError(f"parentheses and signs stand at most {MAX_DEPTH} deep")
    if token in ("+", "-"):
        value, at = _factor(tokens, at + 1, depth + 1)
        return (-value if token == "-" else value), at
    if token == "(":
        value, at = _sum(tokens, at + 1, depth + 1)
        if tokens[at] != ")":
            raise UserError("a parenthesis is not closed")
        return value, at + 1
    if not token or token in "*/)":
        raise UserError("a number is missing")
    return Fraction(token), at + 1
