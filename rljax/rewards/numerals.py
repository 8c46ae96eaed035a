"""The number that a text comes to, in plain writing or LaTeX: read exactly, or not at all.

A number that stands in an expression (2 + 3, 2√3, 5x, a pair) is no number by itself: it is doubtful, and a doubtful
text has no number. Nothing is evaluated but fractions, powers, and products of numbers.
"""

from __future__ import annotations

import itertools
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple


class Doubt(ValueError):
    """There is a number, and what it is cannot be told."""


class _Found(NamedTuple):
    start: int  # of its sign and currency
    first: int  # of its digits
    end: int
    value: Fraction | None  # without the sign; None: doubtful


NEAR = 200  # characters on both sides of a number that may make it a part of something
LONGEST = 10_000  # digits
LARGEST = 5_000  # of an exponent of ten: such numbers are still exact and small in memory
_DIGITS = r"(?:[0-9]{1,3}(?:[,\u2009'][0-9]{3})+(?![0-9])|[0-9]+)"
_PLAIN = re.compile(rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_FRACTION = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|([0-9]))\s*(?:\{([^{}]*)\}|([0-9]))")
_START = re.compile(r"\\frac|\.?[0-9]")
_PREFIX = re.compile(r"(?:[-+]\s*)?(?:[$€£]\s*)?(?:[-+]\s*)?\Z")
_OVER = re.compile(r"\s*/\s*(?=\.?[0-9])")
_POWER = re.compile(r"\s*(?:\^|\*\*)\s*(?:\{\s*([-+]?[0-9]+)\s*\}|\(\s*([-+]?[0-9]+)\s*\)|([-+]?[0-9]+))")
_TIMES = re.compile(
    r"\s*(?:\*(?!\*)|×|·|\\times(?![a-zA-Z])|\\cdot(?![a-zA-Z])|[xX](?=\s*10\s*\^))\s*(?=\\frac|\.?[0-9])"
)
_SCALE = re.compile(r"\s+(hundred|thousand|million|billion|trillion)\b", re.IGNORECASE)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_FUNCTION = r"sqrt|log|ln|sin|cos|tan|exp|pi|theta|alpha|beta|infty|binom|overline"
_BEFORE = re.compile(  # a number that stands behind one of these is an operand
    rf"(?:[0-9)\]}}]\(|[0-9)\]}}]\s*\*{{1,2}}|[A-Za-z]\*|[\w)\]}}]\s*\+|[×·÷^/±√]|\\(?:times|cdot|div|pm|{_FUNCTION})"
    rf"|(?<![A-Za-z])(?:sqrt|log|ln|sin|cos|tan)\b)\s*[({{\[]?\s*\Z"
)
_AFTER = re.compile(  # and one before these
    rf"[xyznieKkMB_](?![A-Za-z])|_|\s*(?:π|√|\\(?:{_FUNCTION}|times|cdot|div|pm)(?![a-zA-Z]))|\(\s*[-+]?[\\0-9A-Za-z]"
    r"|\s*[+×·÷^±]\s*[\w(\\{]|\*(?=[\w(\\])|\s\*\s|\s*[-/]\s*[a-z](?![A-Za-z])|\s-\s+[0-9(\\]"
)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|bm|operatorname)\s*\{([^{}]*)\}")
_HARMLESS = re.compile(r"\\(?:boxed|fbox|underline)\s*\Z")
_MARK = re.compile(r"####\s*(?=[-+]?\s*[$€£]?\s*[-+]?\s*(?:\\frac|\\boxed|\.?[0-9]))")
_SPELLED = {
    **dict.fromkeys("\u2212\ufe63\uff0d\u2013\u2012\u2011", "-"),
    **dict.fromkeys("\u202f\u2009\u00a0", "\u2009"),
    **dict(zip("０１２３４５６７８９．，", "0123456789.,", strict=True)),
    **{c: f"^{{{i}}}" for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    "⁻": "^{-}",
    **{
        c: rf"\frac{{{a}}}{{{b}}}"
        for c, a, b in zip("½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞", "112131234151357", "233445555668888", strict=True)
    },
    "’": "'",
    "⁄": "/",
}
_LATEX: list[tuple[re.Pattern[str], Any]] = [
    (re.compile(r"\{\s*([,.])\s*\}"), r"\1"),  # 1{,}000
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])\s*"), ""),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?"), "°"),
    (re.compile(r"(?<=[0-9])\\[,;:!](?=[0-9]{3})"), "\u2009"),
    (re.compile(r"\\[,;:! ]|~"), " "),
    (re.compile(r"\\([$%&#])"), r"\1"),
    (re.compile(r"(?:\^\{[-0-9]\}){2,}"), lambda match: "^{" + re.sub(r"[\^{}]", "", match[0]) + "}"),  # 10⁻¹²
]


def number(text: str) -> Fraction | None:
    """The number that a text comes to; None where it has none. Doubt where it has one that cannot be told.

    It is the one behind its last "####" (as in GSM8K), else that of its last \\boxed{…}, else the last in it.
    """
    text = _prepared(text)
    marks = [mark.end() for mark in _MARK.finditer(text)]
    if marks and not text.startswith("\\boxed", marks[-1]):
        found = _scan(text)
        return _signed(text, found, next(i for i, one in enumerate(found) if one.first >= marks[-1]))
    box = _boxed(text)
    if box is not None:
        found = _scan(box)
        if len(found) != 1 and (found or re.search("[0-9]", box)):
            raise Doubt(box)
        if found and box[found[0].end :].lstrip().startswith("!"):
            raise Doubt(box)
        return _signed(box, found, 0) if found else None
    found = _scan(text)
    return _signed(text, found, len(found) - 1) if found else None


def _prepared(text: str) -> str:
    """One spelling of what is written in several ways."""
    text = text.translate(str.maketrans(_SPELLED))
    for pattern, by in _LATEX:
        text = pattern.sub(by, text)
    return _TEXT.sub(r"\1", text)


def _boxed(text: str) -> str | None:
    """What stands in the last \\boxed{…}."""
    start = text.rfind("\\boxed")
    opened = text.find("{", start) if start >= 0 else -1
    if opened < 0 or text[start + 6 : opened].strip():
        return None
    depth = 0
    for i in range(opened, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if not depth:
            return text[opened + 1 : i]
    return None


def _scan(text: str) -> list[_Found]:
    """All numbers of a text but for exponents and indices of letters (cm^2, x_1)."""
    found, place = [], 0
    while start := _START.search(text, place):
        first = start.start()
        try:
            value, end = _quantity(text, first)
        except Doubt as doubt:
            value, end = None, doubt.args[0]
        lead = _PREFIX.search(text, max(place, first - 12), first)
        begin = lead.start() if lead else first
        attached = re.search(r"[^\W\d]\s*[\^_]\s*\{?\s*\Z", text[max(0, begin - 12) : begin])
        if not attached:
            found.append(_Found(begin, first, end, value))
        place = max(end, first + 1)
    return found


def _quantity(text: str, at: int) -> tuple[Fraction, int]:
    """(value, end) of a number without sign that begins at `at`. Doubt(end) where it cannot be told."""
    value, end, whole = _atom(text, at)
    if whole and (more := re.compile(r"\s*(?=\\frac)|[ \u2009]+(?=[0-9]+\s*/\s*[0-9])").match(text, end)):
        part, end, _ = _ratio(text, more.end())  # 2 1/2
        if not 0 <= part < 1:
            raise Doubt(end)
        value += part
    elif over := _OVER.match(text, end):
        below, end, _ = _atom(text, over.end())
        if not below or _OVER.match(text, end):
            raise Doubt(end)
        value /= below
    if times := _TIMES.match(text, end):
        more_value, end = _quantity(text, times.end())
        value *= more_value
    if scale := _SCALE.match(text, end):
        value, end = value * 10 ** _SCALES[scale[1].lower()], scale.end()
    return value, end


def _ratio(text: str, at: int) -> tuple[Fraction, int, bool]:
    value, end, whole = _atom(text, at)
    if whole and (over := _OVER.match(text, end)):
        below, end, _ = _atom(text, over.end())
        if not below:
            raise Doubt(end)
        return value / below, end, False
    return value, end, whole


def _atom(text: str, at: int) -> tuple[Fraction, int, bool]:
    """(value, end, whether it is written in digits alone) of digits or a \\frac, with its power."""
    if text.startswith("\\frac", at):
        match = _FRACTION.match(text, at)
        if match is None:
            raise Doubt(at + len("\\frac"))
        above, below = (_whole(part, match.end()) for part in (match[1] or match[2], match[3] or match[4]))
        if not below:
            raise Doubt(match.end())
        value, end, digits = above / below, match.end(), False
        if _POWER.match(text, end):
            raise Doubt(end)
        return value, end, digits
    match = _PLAIN.match(text, at)
    assert match is not None
    written = re.sub(r"[,\u2009']", "", match[0])
    mantissa, _, exponent = written.lower().partition("e")
    if len(mantissa) > LONGEST or (exponent and abs(int(exponent[:9])) > LARGEST):
        raise Doubt(match.end())
    value, end = Fraction(Decimal(mantissa)) * Fraction(10) ** int(exponent or 0), match.end()
    if power := _POWER.match(text, end):
        n = int((power[1] or power[2] or power[3])[:9])
        if abs(n) > LARGEST // max(1, len(written)) or (not value and n <= 0):
            raise Doubt(power.end())
        return value**n, power.end(), False
    return value, end, written.isdigit()


def _whole(part: str, end: int) -> Fraction:
    """The value of what stands in the braces of a \\frac, which is a number and nothing else."""
    match = re.match(r"\s*([-+]?)\s*", part)
    assert match is not None
    try:
        value, stop = _quantity(part, match.end()) if _START.match(part, match.end()) else (Fraction(0), -1)
    except Doubt:
        raise Doubt(end) from None
    if part[stop:].strip() or stop < 0:
        raise Doubt(end)
    return -value if match[1] == "-" else value


def _signed(text: str, found: list[_Found], which: int) -> Fraction:
    """The value of one of the numbers of a text, with its sign. Doubt where what stands around it is an expression."""
    one = found[which]
    lead = text[one.start : one.first]
    before, after = text[max(0, one.start - NEAR) : one.start], text[one.end : one.end + NEAR]
    if one.value is None or _joined(text, found, which) or _AFTER.match(after) or _in_command(before):
        raise Doubt(text)
    if "-" not in lead and "+" not in lead:
        if _BEFORE.search(before):
            raise Doubt(text)
        return one.value
    signs = lead.replace("$", "").replace("€", "").replace("£", "").strip()
    tight = not lead[lead.index(signs[0]) + 1 :][:1].isspace()
    left = before.rstrip(" ")
    behind = left[-1:] if left else ""
    if len(signs.replace(" ", "")) > 1 or _BEFORE.search(before) or _FUNCTION_BEFORE.search(before):
        raise Doubt(text)
    if signs[0] == "+":
        if re.match(r"[\w)\]}]", behind):
            raise Doubt(text)  # 2+3
        return one.value
    if before and not before[-1:].isspace():
        if before[-1] in ")]}":
            raise Doubt(text)
        return one.value if re.match(r"[\w.]", before[-1]) else -one.value  # 5-3 is a range, or a name: gpt-4
    if tight:
        return -one.value
    if behind in ("", "\n") or re.search(r"(?:[0-9)\]}]|(?<![A-Za-z])[A-Za-z])\Z", left):
        raise Doubt(text)  # "10 - 5"; "- 5" on a line of its own, a list's
    return one.value if behind.isalpha() else -one.value


_FUNCTION_BEFORE = re.compile(rf"\\(?:{_FUNCTION})\s*[({{\[]?\s*\Z")


def _joined(text: str, found: list[_Found], which: int) -> bool:
    """Whether it is a part of something longer: 3,14 and 1.234.567 and 12:30 and 1 000."""
    one = found[which]
    for left, right in itertools.pairwise(found[max(0, which - 1) : which + 2]):
        between, digits = text[left.end : right.first], text[right.first : right.end]
        if between in ("", ",", ".", ":", "'", "_", "x", "X", " x ", "÷", " ÷ ", "/", " / "):
            return True
        small = re.fullmatch(r"[0-9]{1,3}", text[left.first : left.end]) and re.match(r"[0-9]{3}(?![0-9,])", digits)
        if between in (" ", "\u2009") and small:
            return True
    return bool(re.search(r"[0-9][,.:']\Z", text[: one.start]))


def _in_command(before: str) -> bool:
    """Whether a number stands in the braces of a command such as \\sqrt{…}, or of a power."""
    depth = 0
    for i in range(len(before) - 1, -1, -1):
        depth += {"}": 1, "{": -1}.get(before[i], 0)
        if depth < 0:
            outside = before[:i].rstrip()
            if _HARMLESS.search(outside):
                return False
            return bool(re.search(r"(?:\\[a-zA-Z]+\s*(?:\[[^\[\]]*\])?|[}^_])\Z", outside))
    return False
