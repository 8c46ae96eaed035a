"""What a value is, as JSON: settings, functions with all that they bind and read, objects, arrays by their content."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import os
import random
import re
import types
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rljax.identity import masking
from rljax.identity.code import Code, code_of, installed

LONGEST = 64  # items of a list that a record shows; of longer ones it has the hash
LONGEST_TEXT = 2000
RESERVED = ("function", "class", "kind", "code", "bound", "uses", "arguments", "self")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def describe(value: Any) -> Any:
    """A value as JSON, complete: two that differ have other descriptions, and two that are the same have one.

    Functions are described by their names, the values of their keywords, positional arguments of partials, what
    closures bind, and, where they are the user's own, a hash of their code and the globals that they read, helpers
    included. (Libraries' functions stand for their version.) Arrays are hashes of their content. Secrets are masked.
    Comments, formatting, the place of a file and the order of a mapping's entries are no part of it.
    """
    return _Describer().describe(value)


def digest(value: Any) -> str:
    """A short hash of a description."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def base_kind(cls: type) -> type:
    """The class of rljax that a class is, or is derived from."""
    return next((each for each in cls.__mro__ if each.__module__.partition(".")[0] == "rljax"), cls)


class _Describer:
    """One description: objects that occur twice are described once, and those that contain themselves end."""

    def __init__(self) -> None:
        self.known: dict[int, Any] = {}
        self.kept: list[Any] = []  # so that no id is used again
        self.depth = 0  # within the code of functions: there, helpers are hashes

    def describe(self, value: Any, name: str = "") -> Any:
        if value is None or (isinstance(value, bool | int | float) and not isinstance(value, enum.Enum)):
            return value.item() if isinstance(value, np.generic) else value
        if isinstance(value, str) and not isinstance(value, enum.Enum):
            return self._text(str(value), name)
        if id(value) in self.known:
            return self.known[id(value)]
        self.known[id(value)] = f"again: {type(value).__name__}"
        self.kept.append(value)
        self.known[id(value)] = found = self._object(value, name)
        return found

    def _text(self, value: str, name: str) -> str:
        text = masking.masked_value(value) if masking.named_secret(name) else masking.masked(value)
        if len(text) <= LONGEST_TEXT:
            return text
        return f"{text[:80]} … ({len(text)} characters, {digest(text)})"

    def _object(self, value: Any, name: str) -> Any:
        if isinstance(value, enum.Enum):
            return f"{type(value).__qualname__}.{value.name}"
        if isinstance(value, functools.partial):
            return self._partial(value)
        if isinstance(value, np.generic | np.dtype | bytes | bytearray | np.ndarray | jax.Array):
            return _array(value, name)
        if isinstance(value, Mapping):
            return self._mapping(value, name)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self._fields(value, getattr(value, "_fields"))  # noqa: B009
        if isinstance(value, list | tuple):
            return self._long([self.describe(item, name) for item in value])
        if isinstance(value, set | frozenset):
            return {"set": self._long(sorted((self.describe(item, name) for item in value), key=digest))}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return self._fields(value, [field.name for field in dataclasses.fields(value)])
        if isinstance(value, os.PathLike):
            return masking.masked(os.fsdecode(value))
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            return {**self._function(value.__func__), "self": self.describe(value.__self__)}
        if isinstance(value, types.ModuleType):
            return f"module {value.__name__}"
        return self._instance(value)

    def _long(self, items: list[Any]) -> Any:
        return items if len(items) <= LONGEST else {"items": len(items), "sha256": digest(items)}

    def _mapping(self, value: Mapping[Any, Any], name: str) -> Any:
        secret = masking.named_secret(name)
        found = {}
        for key, item in value.items():
            text = key if isinstance(key, str) else f"({type(key).__name__}) {key!r}"
            found[text] = self.describe(item, name if secret else text)
        if len(found) <= LONGEST:
            return found
        return {"items": len(found), "sha256": digest(found)}

    def _fields(self, value: Any, names: Any) -> dict[str, Any]:
        """A dataclass or a NamedTuple: its kind and its fields; of a class of the user's, its code as well."""
        cls = type(value)
        base = base_kind(cls)
        found = {"kind": base.__name__}
        if base is not cls:
            found["class"] = cls.__qualname__
        if not _of_library(cls):
            found["code"] = self._class(cls)["code"]
        return found | {_free(name): self.describe(getattr(value, name), name) for name in names}

    def _partial(self, value: functools.partial[Any]) -> dict[str, Any]:
        inner = self.describe(value.func)
        found = dict(inner) if isinstance(inner, dict) else {"function": inner}
        if value.args:  # those of an inner partial come first: Python merges the two
            found["arguments"] = [*found.get("arguments", []), *(self.describe(argument) for argument in value.args)]
        return found | {_free(key): self.describe(item, key) for key, item in value.keywords.items()}

    # --- functions ----------------------------------------------------------------------------------------------------

    def _function(self, value: types.FunctionType) -> dict[str, Any]:
        library = installed(value.__code__.co_filename)
        found: dict[str, Any] = {
            "function": f"{value.__module__}.{value.__qualname__}" if library else value.__qualname__
        }
        if not library:
            code = code_of(value)
            uses, hidden = self._uses(code, value.__globals__)
            found["code"] = digest([code.digest, hidden]) if hidden else code.digest
            if uses:
                found["uses"] = uses
        if library and "<locals>" not in value.__qualname__:  # as its version has it
            return found
        found |= {_free(key): self.describe(item, key) for key, item in _defaults(value).items()}
        bound = {}
        for key, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            try:
                bound[key] = self.describe(cell.cell_contents, key)
            except ValueError:  # not bound yet
                bound[key] = "unbound"
        return found | ({"bound": bound} if bound else {})

    def _uses(self, code: Code, scope: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
        """The globals that code reads: (values, and helpers as hashes of theirs; names of what libraries give). Those
        that it assigns to, and classes whose attributes it assigns to, are its state, and no part of what it is.
        """
        uses, hidden, names = {}, {}, code.names
        for name in names:
            if name not in scope or name in code.written:
                continue
            value = scope[name]
            if isinstance(value, types.ModuleType):
                hidden[name] = value.__name__ if installed(getattr(value, "__file__", None) or "<frozen") else ""
                if not hidden[name]:
                    inside = vars(value)
                    some = {other: inside[other] for other in names if other in inside}
                    uses |= {f"{name}.{other}": self._used(item, other) for other, item in some.items()}
            elif isinstance(value, types.FunctionType | type | types.BuiltinFunctionType) and _of_library(value):
                hidden[name] = f"{value.__module__}.{value.__qualname__}"
            elif isinstance(value, type) and code.written & set(vars(value)):
                hidden[name] = value.__qualname__
            else:
                uses[name] = self._used(value, name)
        return uses, {name: text for name, text in hidden.items() if text}

    def _used(self, value: Any, name: str) -> Any:
        """A global: plain values as they are, everything with code by its hash, so that records stay short."""
        found = self.describe(value, name)
        return digest(found) if isinstance(found, dict) and {"function", "class", "code"} & set(found) else found

    def _class(self, cls: type) -> Any:
        name = f"{cls.__module__}.{cls.__qualname__}"
        if _of_library(cls):
            return {"class": name}
        parts: dict[str, Any] = {"bases": [self.describe(base) for base in cls.__bases__ if base is not object]}
        for key, item in vars(cls).items():
            if _generated(key, item):
                continue
            inner = getattr(item, "fget", None) or getattr(item, "func", None) or getattr(item, "__func__", item)
            parts[key] = self.describe(inner, key)
        return {"class": cls.__qualname__, "code": digest(parts)}

    # --- other objects ------------------------------------------------------------------------------------------------

    def _instance(self, value: Any) -> Any:
        cls = type(value)
        wrapped = getattr(value, "__wrapped__", None)
        if callable(wrapped):  # jax.jit, jax.custom_vjp, functools.cache
            rules = {key: getattr(value, key, None) for key in ("fwd", "bwd", "jvp")}
            made = {key: self.describe(rule) for key, rule in rules.items() if callable(rule)}
            inner = self.describe(wrapped)
            return {**(inner if isinstance(inner, dict) else {"function": inner}), "wrapper": cls.__qualname__, **made}
        if inspect.isbuiltin(value) or isinstance(value, np.ufunc):
            owner = getattr(value, "__self__", None)
            name = f"{getattr(value, '__module__', None) or ''}.{getattr(value, '__qualname__', value.__name__)}"
            mine = {} if owner is None or isinstance(owner, types.ModuleType | type) else {"self": self.describe(owner)}
            return {"function": name.lstrip("."), **mine}
        if isinstance(value, random.Random):
            return {"class": "random.Random", "state": digest(repr(value.getstate()))}
        if isinstance(value, np.random.Generator):
            return {"class": "numpy.random.Generator", "state": digest(repr(value.bit_generator.state))}
        name = "function" if callable(value) else "class"
        if not _of_library(cls):
            return {name: cls.__qualname__, "code": self._class(cls)["code"], **self._state(value, plain=False)}
        shown = masking.masked_message(repr(value)) if cls.__repr__ is not object.__repr__ else ""
        if shown and not _ADDRESS.search(shown):
            return self._text(shown, "")
        return {name: f"{cls.__module__}.{cls.__qualname__}", **self._state(value, plain=True)}

    def _state(self, value: Any, *, plain: bool) -> dict[str, Any]:
        """The attributes of an object; of a library's, those that are plain values."""
        slots = [name for cls in type(value).__mro__ for name in _slots(cls) if hasattr(value, name)]
        state = {name: getattr(value, name) for name in slots} | dict(getattr(value, "__dict__", {}))
        kinds = (bool, int, float, str, list, tuple, dict, np.ndarray, jax.Array, type(None))
        return {
            _free(name): self.describe(item, name)
            for name, item in state.items()
            if not plain or (isinstance(item, kinds) and _is_plain(item))
        }


def _slots(cls: type) -> list[str]:
    slots = vars(cls).get("__slots__", ())
    return [slots] if isinstance(slots, str) else [name for name in slots if name not in ("__dict__", "__weakref__")]


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | np.ndarray | jax.Array)


def _free(name: str) -> str:
    """A keyword's name in a description, where some names have a meaning."""
    return f"{name}=" if name in RESERVED else name


def _defaults(function: types.FunctionType) -> dict[str, Any]:
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    positional = function.__defaults__ or ()
    return {
        **dict(zip(names[len(names) - len(positional) :], positional, strict=True)),
        **(function.__kwdefaults__ or {}),
    }


def _generated(name: str, value: Any) -> bool:
    """Whether an attribute of a class says nothing about it: written by Python or by a decorator."""
    if name in (
        "__module__",
        "__doc__",
        "__dict__",
        "__weakref__",
        "__annotations__",
        "__firstlineno__",
        "__qualname__",
    ):
        return True
    if name in ("__static_attributes__", "__dataclass_params__", "__dataclass_fields__", "__match_args__", "_abc_impl"):
        return True
    if name in ("__parameters__", "__orig_bases__", "__annotate__", "__annotate_func__", "__annotations_cache__"):
        return True
    code = getattr(value, "__code__", None)
    return isinstance(value, types.MemberDescriptorType | types.GetSetDescriptorType) or (
        code is not None and code.co_filename == "<string>" and name.startswith("__")
    )


def _of_library(value: Any) -> bool:
    """Whether a class or a function is Python's, an installed package's, or rljax's."""
    if isinstance(value, types.FunctionType):
        return installed(value.__code__.co_filename)
    module = value.__module__ if isinstance(getattr(value, "__module__", None), str) else "builtins"
    if module == "__main__":
        return False
    for item in vars(value).values() if isinstance(value, type) else ():
        code = getattr(getattr(item, "__func__", item), "__code__", None)
        if code is not None and code.co_filename != "<string>":
            return installed(code.co_filename)
    file = _file_of(module)
    return file is None or installed(file)


def _file_of(module: str) -> str | None:
    """None for a module that is compiled in."""
    import sys

    found = sys.modules.get(module)
    return getattr(found, "__file__", None)


def _array(value: Any, name: str) -> Any:
    if isinstance(value, np.dtype):
        return str(value)
    if isinstance(value, bytes | bytearray):
        if masking.named_secret(name):
            return masking.masked_value(value.decode("latin-1"))
        return f"{len(value)} bytes {hashlib.sha256(value).hexdigest()[:16]}"
    if isinstance(value, np.generic) and value.dtype.kind in "biufSU":
        return value.item() if value.dtype.kind != "S" else _array(value.tobytes(), name)
    if isinstance(value, jax.Array):
        if not value.is_fully_addressable:
            return f"{value.dtype}{list(value.shape)}"
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return f"{value.dtype} {_array(jax.random.key_data(value), '')}"
    array = np.asarray(value)
    content = repr(array.tolist()).encode() if array.dtype == object else np.ascontiguousarray(array).tobytes()
    return f"{array.dtype}{list(array.shape)} {hashlib.sha256(content).hexdigest()[:16]}"
