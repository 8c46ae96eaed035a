"""What the source says beside the fields of a dataclass: the comment at the end of a line, or those above it."""

from __future__ import annotations

import functools
import inspect
import re
import textwrap


@functools.cache
def of_fields(kind: type) -> dict[str, str]:
    """{field: its comment}, of a class and those that it is derived from; nothing where there is no source."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__[:-1]):
        try:
            found |= _read(textwrap.dedent(inspect.getsource(each)))
        except (OSError, TypeError):
            continue
    return found


def _read(source: str) -> dict[str, str]:
    """Lines of comment between two fields go on with the first one's, or are the second's where it has none beside."""
    found: dict[str, str] = {}
    between: list[str] = []
    before = None  # the field before those lines, where it has a comment
    for line in [*source.splitlines(), ""]:
        comment, field = re.fullmatch(r"\s+# ?(.*)", line), re.match(r"    (\w+): ", line)
        if comment is not None:
            between.append(comment[1])
            continue
        beside = line.rpartition("  # ")[2] if field is not None and "  # " in line else ""
        if before is not None and between and (field is None or beside):
            found[before] = " ".join([found[before], *between])
            between = []
        if field is not None:
            found[field[1]] = beside or " ".join(between)
        between, before = [], field[1] if field is not None and found[field[1]] else None
    return {name: text for name, text in found.items() if text}
