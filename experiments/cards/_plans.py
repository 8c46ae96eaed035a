"""The plans that cards quote, made again and written into them.

    python experiments/cards/_plans.py [CARD …] [--only TEXT]

CARD is the file of one, all without. TEXT: only plans whose command has it, the others stay as they are. Run it where
`rljax plan` finds the config.json of the models: where the hub can be reached, or in a folder that has them in folders
of the models' names, and for later steps of a pipeline under the names that these give (runs/…/export). A new plan is a
command with "not made yet" under it. Minutes for each. `_gallery.py` then writes docs/cards.md.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap

import _gallery

HEAD = r"\S+: [\d.,]+(?: \w+)? parameters on "  # how a plan begins
QUOTED = rf"{HEAD}|note: |at best |.*: (fits, |does not fit)"  # its lines that matter


def blocks(plan: str) -> list[str]:
    """The field Plan of a card, by command, with what is quoted under each."""
    return [block.rstrip() for block in re.split(r"(?m)^(?=rljax plan )", plan) if block]


def command(block: str) -> str:
    return re.split(rf" (?={HEAD})| not made yet$", " ".join(block.split()))[0]


def quoted(printed: str) -> list[str]:
    """The lines of a printed plan that a card quotes: all but its tables."""
    return [line for line in printed.splitlines() if re.match(QUOTED, line)]


def made(command: str) -> str:
    """The block of a command that is run now. RuntimeError, with its last words, where it fails."""
    words = [str(_gallery.FOLDER.parents[1] / word) if word.endswith(".py") else word for word in shlex.split(command)]
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
    lines = quoted(done.stdout)
    if not lines:  # status 1 with lines is that of a plan that does not fit
        raise RuntimeError(f"{command}\n{done.stderr[-2000:]}")
    return "\n".join([wrapped(command, 0, 4), *(wrapped(line, 4, 6) for line in lines)])


def wrapped(text: str, first: int, further: int) -> str:
    """As the docstring has it, less the 10 columns of the field."""
    indents = {"initial_indent": " " * first, "subsequent_indent": " " * further}
    return textwrap.fill(text, 110, **indents, break_long_words=False, break_on_hyphens=False)


def written(card: str, plan: str) -> str:
    """A card with another field Plan, which is the last of its docstring."""
    field = "Plan" + textwrap.indent(plan, " " * 10)[4:]
    return re.sub(r'(?ms)^Plan .*?^"""$', lambda _: f'{field}\n"""', card, count=1)


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("cards", nargs="*", type=pathlib.Path, metavar="CARD")
    asked.add_argument("--only", default="", metavar="TEXT")
    given = asked.parse_args()
    for card in given.cards or _gallery.cards():
        quotes = blocks(_gallery.read(card)[1]["Plan"])
        for index, block in enumerate(quotes):
            if given.only in command(block):
                print(command(block), "…", flush=True)
                quotes[index] = made(command(block))
                card.write_text(written(card.read_text(), "\n".join(quotes)))
