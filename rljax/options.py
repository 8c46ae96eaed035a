"""Experiment files and their options: every field that can be written down, and every function's keywords."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib.util
import inspect
import pathlib
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, NoneType
from typing import Annotated, Any

import tyro

from rljax import comments, failures, ranges
from rljax.errors import UserError
from rljax.program import Run

# What options are called in other programs of the field, and here.
ALIASES = {
    "lr": "learning_rate",
    "bs": "batch",
    "batch_size": "batch",
    "per_device_train_batch_size": "batch",
    "train_batch_size": "batch",
    "gradient_accumulation_steps": "microbatches",
    "max_steps": "steps",
    "max_new_tokens": "max_completion",
    "max_completion_length": "max_completion",
    "max_prompt_length": "max_prompt",
    "num_generations": "group",
    "num_train_epochs": "steps",
    "max_grad_norm": "clip_norm",
    "kl_coef": "kl_reward",
    "output_dir": "out",
    "model_name_or_path": "model",
    "dataset": "data",
    "dataset_name": "data",
    "weight_decay": "optimizer.weight_decay",
    "warmup": "schedule.warmup",
    "warmup_steps": "schedule.warmup",
    "lr_scheduler_type": "schedule",
    "beta": "loss.beta",
}
PLAIN = (bool, int, float, str)  # what can be written on a command line


def read_experiment(argv: Sequence[str], command: str) -> tuple[Any, pathlib.Path]:
    """(the file's experiment with the options applied, the file); a file with `main` gives a function to call."""
    if not argv or argv[0].startswith("-"):
        raise UserError(f"name the experiment file: rljax {command} FILE [--field value …]")
    file = pathlib.Path(argv[0])
    module = import_file(file)
    prog = f"rljax {command} {file}"
    if hasattr(module, "experiment"):
        return with_options(_experiment(module.experiment, file), argv[1:], prog), file
    if hasattr(module, "main"):
        return functools.partial(tyro.cli, module.main, args=list(argv[1:]), prog=prog), file
    raise UserError(f"{file} defines neither `experiment` (a value such as rljax.offline.Preference(…)) nor `main`")


def _experiment(value: Any, file: pathlib.Path) -> Run:
    if isinstance(value, Run):
        return value
    got = f"the class {value.__name__}" if isinstance(value, type) else f"{type(value).__name__} {value!r:.80}"
    raise UserError(
        f"{file}: `experiment` is a value such as rljax.offline.Preference(…) or a preset's, not {got}: "
        + ("call it with its settings" if callable(value) else "make one")
    )


def import_file(file: pathlib.Path) -> ModuleType:
    """Import an experiment module by its path, under its own name, with its folder importable as for `python FILE`."""
    if not file.is_file():
        raise UserError(f"there is no experiment file {file}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file} is not a Python file")
    there = sys.modules.get(file.stem)
    if file.stem in sys.stdlib_module_names or (there is not None and _library(there)):
        raise UserError(f"{file} is called like the module {file.stem}, and would take its place: give it another name")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    sys.path.insert(0, str(file.parent.resolve()))
    try:
        spec.loader.exec_module(module)
    except (TypeError, ValueError) as error:
        _, place = failures.origin(error)
        problem = _misspelt(error) if isinstance(error, TypeError) else None
        if problem is not None and place is not None:
            raise UserError(f"{place}: {problem}") from None
        if place is None and not isinstance(error, UserError):  # bytes that are no text
            raise UserError(f"{file} cannot be read as Python: {error}") from error
        raise
    return module


def _library(module: ModuleType) -> bool:
    """Whether a module that is loaded belongs to Python, to an installed package or to rljax."""
    place = getattr(module, "__file__", None)
    return place is None or not failures.is_users(place)


def _misspelt(error: TypeError) -> str | None:
    """What to say of an experiment with a field that it does not have, or without one that it needs."""
    unknown = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    missing = re.search(r"(\w+)\.__init__\(\) missing \d+ required keyword-only arguments?: (.+)$", str(error))
    found = unknown or missing
    kind = next((kind for kind in _kinds(Run) if found and kind.__name__ == found[1]), None)
    if found is None or kind is None:
        return None
    if missing:
        names = re.findall(r"'(\w+)'", missing[2])
        return f"{missing[1]} needs {' and '.join(names)}: give {', '.join(f'{name}=…' for name in names)}"
    near = difflib.get_close_matches(found[2], [field.name for field in dataclasses.fields(kind)], n=1)
    hint = f"; did you mean {near[0]}?" if near else "; `rljax run FILE --help` lists those that it has"
    return f"{found[1]} has no setting {found[2]}{hint}"


def _kinds(kind: type[Run]) -> Iterator[type[Run]]:
    yield kind
    for each in kind.__subclasses__():
        yield from _kinds(each)


def with_options(experiment: Any, argv: Sequence[str], prog: str = "rljax run") -> Any:
    """Replace fields of an experiment by `--field value`, and keyword arguments of its functions by `--field.name
    value`.

    The options are a dataclass made from the experiment's value: a field that holds a function becomes a group of that
    function's keyword-only parameters. What is not among them is an error.
    """
    hints, beside, full = (
        typing.get_type_hints(type(experiment)),
        comments.of_fields(type(experiment)),
        ranges.hints_of,
    )
    values = {field.name: getattr(experiment, field.name) for field in dataclasses.fields(experiment)}
    options, defaults = [], {}
    for name, value in values.items():
        if callable(value):
            group = _keyword_options(name, value)
            if group is not None:
                type(group).__doc__ = f"{beside.get(name, name)}; here {_called(value)}"
                options.append((name, type(group), dataclasses.field(default=group)))
                defaults[name] = group
        elif (kind := _written(hints[name])) is not None and _is_plain(value):
            said = _said(beside.get(name, ""), ranges.range_of(full(type(experiment))[name]))
            options.append((name, Annotated[kind, tyro.conf.arg(help=said)], dataclasses.field(default=value)))
    _check_names(argv, options)
    made = dataclasses.make_dataclass(type(experiment).__name__, options, kw_only=True, frozen=True)
    made.__doc__ = type(experiment).__doc__
    chosen = tyro.cli(made, args=list(argv), prog=prog)
    changes = {name: getattr(chosen, name) for name, _, _ in options}
    for name, default in defaults.items():
        old = dataclasses.asdict(default)
        given = {key: value for key, value in dataclasses.asdict(changes[name]).items() if value != old[key]}
        changes[name] = functools.partial(values[name], **given) if given else values[name]
    return dataclasses.replace(experiment, **changes)


def _said(comment: str, limits: ranges.Range | None) -> str:
    """What --help says of a field: the comment beside it in the source, and its range."""
    return "; ".join(text for text in (comment, "" if limits is None else str(limits)) if text)


def _called(function: Any) -> str:
    function = getattr(function, "func", function)
    return getattr(function, "__name__", type(function).__name__)


def _check_names(argv: Sequence[str], options: Sequence[tuple[str, Any, Any]]) -> None:
    """Raise UserError for an option that other programs have, or its initials (--lr), with our name for it."""
    known = {name for name, _, _ in options}
    initials = {"".join(word[0] for word in name.split("_")): name for name in known if "_" in name}
    for word in argv:
        name = word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else ""
        ours = ALIASES.get(name) or initials.get(name)
        if ours is not None and name not in known and ours.partition(".")[0] in known:
            raise UserError(
                f"there is no option {word.partition('=')[0]}: --{ours.replace('_', '-')} is what is meant here"
            )


def _keyword_options(name: str, function: Callable[..., Any]) -> Any:
    """A dataclass value of the parameters that fit on a command line, or None where there are none: those with a
    default that does, and keywords that have to be given, which are None until they are; a reward's are data.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return None
    hints = _hints(function)
    fields = []
    for parameter in parameters:
        empty = parameter.default is inspect.Parameter.empty
        asked = empty and parameter.kind is inspect.Parameter.KEYWORD_ONLY and name != "reward"
        default = None if asked else parameter.default
        kind = _option_type(hints.get(parameter.name), default)
        if kind is not None:
            fields.append((parameter.name, kind | None if asked else kind, dataclasses.field(default=default)))
    return dataclasses.make_dataclass(name, fields, kw_only=True, frozen=True)() if fields else None


def _option_type(hint: Any, default: Any) -> Any:
    """What to read an option as: its annotation if that is plain, else the type of its default (1 may become 0.5)."""
    if default is inspect.Parameter.empty or not (default is None or isinstance(default, PLAIN)):
        return None
    if any(hint is t for t in PLAIN) or (
        typing.get_args(hint) and all(t in (*PLAIN, NoneType) for t in typing.get_args(hint))
    ):
        return hint
    if default is None:  # a number where there is one: `ops.Scalar | None`
        return float | None if any(getattr(t, "dim_str", None) == "" for t in typing.get_args(hint)) else None
    return float if type(default) is int else type(default)


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    while isinstance(function, functools.partial):
        function = function.func
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):  # annotations that only a type checker can read
        return {}


def _written(hint: Any) -> Any:
    """The part of a field's type that can be written on a command line; None where nothing can."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    parts = [t for t in (typing.get_args(hint) if union else (hint,)) if _fits(t) or t is NoneType]
    return typing.Union[tuple(parts)] if parts and parts != [NoneType] else None  # noqa: UP007


def _fits(hint: Any) -> bool:
    """Whether a type is plain, one of a few names, or a tuple of plain ones (--stop "\n" "###")."""
    inside = [t for t in typing.get_args(hint) if t is not Ellipsis]
    return (
        hint in PLAIN
        or typing.get_origin(hint) is typing.Literal
        or (typing.get_origin(hint) is tuple and bool(inside) and all(t in PLAIN for t in inside))
    )


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))
