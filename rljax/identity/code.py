"""What a function does, as a short hash: its source without comments, docstrings and annotations, or its bytecode."""

from __future__ import annotations

import ast
import contextlib
import dis
import functools
import hashlib
import importlib.util
import linecache
import pathlib
import sys
import sysconfig
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import rljax

_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
_PARAMETER_FIELDS = ("defaults", "kw_defaults")  # of the outermost function: their values are recorded


class Code(NamedTuple):
    """A function's own code. What it binds and the globals that it reads are not in it."""

    digest: str
    names: tuple[str, ...]  # of globals and attributes that it may read, in the order of their first use
    written: frozenset[str]  # of globals and attributes that it assigns to: its state, not its settings


@functools.cache
def installed(filename: str) -> bool:
    """Whether a file belongs to Python, to an installed package or to rljax, whose versions are recorded."""
    if filename.startswith("<frozen"):
        return True
    path = pathlib.Path(filename)
    if {"site-packages", "dist-packages"} & set(path.parts):
        return True
    places = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), str(pathlib.Path(rljax.__file__).parent)]
    return any(path.is_relative_to(place) for place in places)


def code_of(function: types.FunctionType) -> Code:
    """The code of a Python function. Two functions have one digest where comments, docstrings, annotations, line
    breaks and places alone tell them apart; the digest does not depend on the version of Python where the source is
    there and is what was imported.
    """
    code = function.__code__
    node = _node(code, function.__globals__)
    if node is None:  # typed into a prompt, rewritten by an import hook, or edited since
        text = repr(_bytecode(code, function.__doc__))
    else:
        text = _dump(node, outermost=True) + _imported(node, function.__globals__)
    return Code(
        hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16], tuple(_names(code)), _written(code)
    )


def _names(code: types.CodeType) -> dict[str, None]:
    found = dict.fromkeys(code.co_names)
    for inner in _inner(code):
        found |= _names(inner)
    return found


def _written(code: types.CodeType) -> frozenset[str]:
    stores = ("STORE_GLOBAL", "STORE_ATTR")
    found = {step.argval for step in dis.get_instructions(code) if step.opname in stores}
    return frozenset(found).union(*map(_written, _inner(code)))


def _inner(code: types.CodeType) -> Iterator[types.CodeType]:
    return (constant for constant in code.co_consts if isinstance(constant, types.CodeType))


# --- source -----------------------------------------------------------------------------------------------------------


class _Module(NamedTuple):
    tree: ast.Module
    code: types.CodeType


@functools.lru_cache(maxsize=64)
def _parsed(text: str, filename: str) -> _Module | None:
    try:
        return _Module(ast.parse(text), compile(text, filename, "exec", dont_inherit=True))
    except (SyntaxError, ValueError):
        return None


def _node(code: types.CodeType, names: dict[str, Any]) -> ast.AST | None:
    """The node of a code object; None where the source is not there, or is no longer that of the code."""
    linecache.checkcache(code.co_filename)
    text = "".join(linecache.getlines(code.co_filename, names))
    module = _parsed(text, code.co_filename) if text else None
    if module is None or not _contains(module.code, code):
        return None
    found = [node for node in ast.walk(module.tree) if _matches(node, code)]
    return min(found, key=_extent, default=None)


def _contains(module: types.CodeType, code: types.CodeType) -> bool:
    return any(inner == code or _contains(inner, code) for inner in _inner(module))


def _matches(node: ast.AST, code: types.CodeType) -> bool:
    if isinstance(node, ast.Lambda):
        return code.co_name == "<lambda>" and node.lineno == code.co_firstlineno and _covers(node.body, code)
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        return node.name == code.co_name and first == code.co_firstlineno
    return False


def _covers(body: ast.expr, code: types.CodeType) -> bool:
    """Whether all instructions come from this expression: several lambdas may stand on one line."""
    start, end = (body.lineno, body.col_offset), (body.end_lineno or 0, body.end_col_offset or 0)
    for line, last_line, column, last_column in code.co_positions():
        if None in (line, last_line, column, last_column) or column == last_column:
            continue  # RESUME and the like stand for no text
        if (line, column) < start or (last_line, last_column) > end:  # pyright: ignore[reportOperatorIssue]
            return False
    return True


def _extent(node: Any) -> tuple[int, int]:
    return node.end_lineno - node.lineno, node.end_col_offset - node.col_offset


def _dump(node: Any, *, outermost: bool = False) -> str:
    """A node as text, alike in all versions of Python: without places, docstrings, annotations and empty fields."""
    if isinstance(node, list):
        return f"[{','.join(map(_dump, node))}]"
    if isinstance(node, ast.Constant):
        return f"{type(node.value).__name__}:{node.value!r}"
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = []
    for field, value in ast.iter_fields(node):
        if value is None or value == [] or field in ("ctx", "type_comment", "kind", "returns"):
            continue
        if field == "annotation" and isinstance(node, ast.arg):
            continue
        if field == "body" and isinstance(node, _DEFINITIONS):
            value = _without_docstring(value)
        if field == "args" and outermost and isinstance(value, ast.arguments):
            kept = {f: v for f, v in ast.iter_fields(value) if f not in _PARAMETER_FIELDS}
            value = ast.arguments(**kept, defaults=[], kw_defaults=[])
        parts.append(f"{field}={_dump(value)}")
    return f"{type(node).__name__}({','.join(parts)})"


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    first = body[0] if body else None
    quoted = (
        isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    )
    return body[1:] if quoted else body


def _imported(node: ast.AST, names: dict[str, Any]) -> str:
    """The modules of the user's that a function imports when it is called, as a whole."""
    wanted = []
    for statement in ast.walk(node):
        if isinstance(statement, ast.Import):
            wanted += [alias.name for alias in statement.names]
        elif isinstance(statement, ast.ImportFrom):
            wanted.append("." * statement.level + (statement.module or ""))
    return "".join(_module_text(name, str(names.get("__package__") or "")) for name in wanted)


def _module_text(name: str, package: str) -> str:
    with contextlib.suppress(ImportError, ValueError, AttributeError, OSError):
        spec = importlib.util.find_spec(name, package or None)
        if spec is not None and spec.origin and spec.origin.endswith(".py") and not installed(spec.origin):
            module = _parsed(pathlib.Path(spec.origin).read_text(encoding="utf-8"), spec.origin)
            return "" if module is None else _dump(module.tree)
    return ""


# --- bytecode ---------------------------------------------------------------------------------------------------------


def _bytecode(code: types.CodeType, docstring: str | None) -> tuple[Any, ...]:
    """What a code object does, without its places."""
    constants = list(code.co_consts)
    if docstring is not None and constants[:1] == [docstring]:
        constants[0] = None
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return (
        sys.version_info[:2],
        code.co_code,
        counts,
        names,
        code.co_exceptiontable,
        tuple(map(_constant, constants)),
    )


def _constant(value: Any) -> Any:
    if isinstance(value, types.CodeType):
        return _bytecode(value, None)
    if isinstance(value, frozenset):
        return ("frozenset", *sorted(map(repr, value)))
    return (type(value).__name__, tuple(map(_constant, value)) if isinstance(value, tuple) else repr(value))
