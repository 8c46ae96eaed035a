"""What an exception says on the command line: the file and line of the user's that it came from, in a paragraph."""

from __future__ import annotations

import linecache
import os
import pathlib
import re
import sysconfig
import traceback
from collections.abc import Iterator
from types import TracebackType

from rljax.errors import UserError

SWITCH = "RLJAX_TRACEBACK"
EVERYTHING = f"({SWITCH}=1 shows the whole traceback)"
LONGEST = 1200  # characters of a message; shape errors of JAX go on for pages

_OURS = str(pathlib.Path(__file__).parent) + os.sep
_LIBRARIES = tuple(
    path.rstrip(os.sep) + os.sep
    for key in ("stdlib", "platstdlib", "purelib", "platlib")
    if (path := sysconfig.get_path(key))
)
_ANONYMOUS = re.compile(r"(\.<locals>)?\.<(listcomp|setcomp|dictcomp|genexpr)>")
_MEMORY = re.compile(r"(?i)RESOURCE_EXHAUSTED|out of memory|unable to allocate")


def wanted() -> bool:
    """Whether somebody asked for whole tracebacks."""
    return bool(os.environ.get(SWITCH))


def paragraph(error: BaseException) -> str | None:
    """What to print in place of a traceback; None where only the traceback says what happened.

    That is a UserError's message, an exception in a file of the user's with its line, a file that cannot be read or
    written, a library that is missing, memory that does not suffice. Whatever else is our own fault.
    """
    cause, place = origin(error)
    if isinstance(error, UserError):
        return visible(str(error)) + _because(error, cause, place)
    if place is not None and cause is not None:
        text = f"{place}: {described(cause)}{_code(cause)}\n{EVERYTHING}"
        return text if cause is error else f"{described(error)}\n{text}"
    if is_memory(error):
        return (
            f"the memory does not suffice: {_short(str(error))}. Smaller: --batch, --max-prompt, --max-completion, or "
            f"more --microbatches; `rljax plan FILE` says what a run needs {EVERYTHING}"
        )
    if isinstance(error, OSError):
        return f"{_system(error)} {EVERYTHING}"
    if isinstance(error, ImportError):
        return f"{_short(str(error))} {EVERYTHING}"
    return None


def line(error: BaseException) -> str:
    """One line for a log, or for the other processes."""
    cause, place = origin(error)
    head = str(error) if isinstance(error, UserError) else described(error)
    if place is not None:
        head = f"{place}: {head}" if cause is error else head + _because(error, cause, place)
    return " ".join(visible(head).split())


def origin(error: BaseException) -> tuple[BaseException | None, str | None]:
    """(the exception that came out of a file of the user's, "file.py:12 in name"); None twice where none did.

    Of an exception and its causes: the first whose last frame, libraries left out, is the user's own; else the first
    with any frame of the user's, which then called something here that failed.
    """
    called: tuple[BaseException | None, str | None] = None, None
    for each in _chain(error):
        if isinstance(each, SyntaxError) and each.filename and is_users(each.filename):
            return each, f"{_shown(each.filename)}:{each.lineno}"
        frames = [(frame, number) for frame, number in _frames(each.__traceback__) if not _is_librarys(frame[0])]
        users = [(frame, number) for frame, number in frames if is_users(frame[0])]
        if not users:
            continue
        (file, name), number = users[-1]
        place = f"{_shown(file)}:{number}" + ("" if name == "<module>" else f" in {name}")
        if frames[-1] == users[-1]:
            return each, place
        if called[0] is None:
            called = each, place
    return called


def is_memory(error: BaseException) -> bool:
    """Whether a device or the machine had no room for an array."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | ValueError) and _MEMORY.search(str(error)[:2000]) is not None
    )


def described(error: BaseException) -> str:
    """The type and the message of an exception, even of one that fails to say what it is."""
    try:
        text = error.msg if isinstance(error, SyntaxError) else str(error)
    except BaseException:  # a class of the user's
        return f"{type(error).__name__} (its message cannot be shown)"
    return f"{type(error).__name__}: {_short(text)}" if text else type(error).__name__


def visible(text: str) -> str:
    """Text with what would steer a terminal shown in place of sent: escape sequences, control characters, the signs
    that turn the direction of writing around. Line breaks and tabs stay.
    """
    return text.translate(_SHOWN)


_STEERING = (*range(9), *range(0xB, 0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F))
_STEERING += (*range(0x2066, 0x206A), *range(0xD800, 0xE000))  # a lone half of a pair cannot be written at all
_SHOWN = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _STEERING}


def _short(text: str) -> str:
    """The first paragraphs of a message."""
    text = visible(text.strip())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def _because(error: BaseException, cause: BaseException | None, place: str | None) -> str:
    if cause is None or place is None or place in str(error):
        return ""
    text = described(cause)
    known = cause is error or text in str(error) or str(cause) in str(error)
    return f" ({place})" if known else f" ({place}: {text})"


def _code(error: BaseException) -> str:
    """The line of the user's file, on a line of its own."""
    if isinstance(error, SyntaxError):
        return f"\n    {visible(error.text.strip())}" if error.text and error.text.strip() else ""
    for (file, _), number in reversed(list(_frames(error.__traceback__))):
        if is_users(file):
            text = linecache.getline(file, number).strip()
            return f"\n    {visible(text)}" if text else ""
    return ""


def _system(error: OSError) -> str:
    files = [str(file) for file in (error.filename, error.filename2) if file is not None]
    if error.strerror is None or not files:
        return _short(str(error)) or type(error).__name__
    return f"{visible(' and '.join(files))}: {error.strerror}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, what is in it if it is a group, and what it came from, the nearest first."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        each = left.pop(0)
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        if isinstance(each, BaseExceptionGroup):
            left += each.exceptions
        left.append(each.__cause__ if each.__cause__ is not None or each.__suppress_context__ else each.__context__)


def _frames(trace: TracebackType | None) -> Iterator[tuple[tuple[str, str], int]]:
    for frame, number in traceback.walk_tb(trace):
        yield (
            (frame.f_code.co_filename, _ANONYMOUS.sub("", frame.f_code.co_qualname).rpartition(".<locals>.")[2]),
            number,
        )


def _is_librarys(file: str) -> bool:
    if file.startswith("<"):
        return not file.startswith("<ipython")
    return file.startswith(_LIBRARIES) or "site-packages" in file or "dist-packages" in file


def is_users(file: str) -> bool:
    """Whether a file is neither ours, nor Python's, nor an installed package's."""
    return not file.startswith(_OURS) and not _is_librarys(file)


def _shown(file: str) -> str:
    """Relative to here, where it is below here."""
    try:
        return visible(str(pathlib.Path(file).resolve().relative_to(pathlib.Path.cwd())))
    except (ValueError, OSError):
        return visible(file)
