"""What the pages say was measured, written into the docstrings of the reproductions: python experiments/papers/_got.py

After `rljax reproduce` has written docs/papers. Fields of a docstring that it writes: Run, the command and how long it
took, and Got, the mean of each claim and its seeds. The docstrings in the pages are then these.
"""

from __future__ import annotations

import html
import inspect
import pathlib
import re
import textwrap

FOLDER = pathlib.Path(__file__).parent
PAGES = FOLDER.parents[1] / "docs" / "papers"
ROW = re.compile(r"^\| (.+?) \| .+? \| (.+?) \| \*\*(pass|FAIL)\*\* \|$", re.M)  # claim, measured, verdict


def docstring(source: str) -> str:
    return source.split('"""')[1]


def taken(page: str) -> str:
    """The field Run."""
    (took,) = re.findall(r"^(\d+ s) for `(rljax reproduce \w+) --seeds \d+`, \S+, (.+? × \w+, \w+), jax", page, re.M)
    seconds, command, machine = took
    return f"Run     {command}   ({seconds} on {machine})"


def got(page: str) -> str:
    """The field Got."""
    found = [f"{claim}: {value}{' FAIL' * (verdict == 'FAIL')}" for claim, value, verdict in ROW.findall(page)]
    text = html.unescape("; ".join(found))
    return textwrap.fill(f"Got     {text}.", 120, subsequent_indent=" " * 8, break_long_words=False)


def told(doc: str, page: str) -> str:
    """A docstring with both: Run stands before Pass, Got after it."""
    blocks = [block for block in re.split(r"\n(?=[A-Z])", doc) if not re.match(r"Run |Got ", block)]
    at = next(index for index, block in enumerate(blocks) if block.startswith("Pass "))
    made = [*blocks[:at], taken(page), blocks[at].rstrip("\n"), got(page), *blocks[at + 1 :]]
    return "\n".join(made).rstrip("\n") + "\n"


if __name__ == "__main__":
    for page in sorted(PAGES.glob("[a-z]*.md")):
        file, text = FOLDER / f"{page.stem}.py", page.read_text()
        source = file.read_text()
        new = told(docstring(source), text)
        file.write_text(source.replace(docstring(source), new, 1))
        body = inspect.cleandoc(new).partition("\n")[2].strip("\n")
        page.write_text(re.sub(r"(?s)```text\n.*?\n```", lambda _, body=body: f"```text\n{body}\n```", text, count=1))
