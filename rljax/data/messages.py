"""Messages: what a row may say in one, and the spellings of it that chat templates ask for."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rljax.data.rows import shown
from rljax.errors import UserError

Message = dict[str, Any]
MESSAGE_FIELDS = 'messages look like [{"role": "user", "content": "Hi"}]'
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # the names that templates give to a field of thoughts
SWITCHES = ("weight", "train")  # of a message: 0 or false is attended, and not trained
VARIABLES = ("chat_template_kwargs", "template_kwargs")  # the fields of a row that hold a template's other variables
TAKEN = ("messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize")


class Messages(list[Message]):
    """Messages, with what else their chat template is given: `tools`, and variables such as `enable_thinking`."""

    def __init__(self, messages: Sequence[Message] = (), variables: Mapping[str, Any] | None = None):
        super().__init__(messages)
        self.variables = dict(getattr(messages, "variables", {}) if variables is None else variables)

    def followed_by(self, messages: Sequence[Message]) -> Messages:
        return Messages([*self, *messages], self.variables)


def checked(value: Any, field: str, needs: str, variables: Mapping[str, Any]) -> Messages:
    """A field of a row as messages, null fields left out. Raises UserError for what no template could be given."""
    if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence) or not len(value):
        raise UserError(f"field {field!r} must be a list of messages that is not empty, not {shown(value)}; {needs}")
    found = []
    for i, message in enumerate(value):
        if not isinstance(message, Mapping):
            raise UserError(f"field {field!r}: message {i} is {shown(message)}; {MESSAGE_FIELDS}, with text as content")
        clean = without_nulls(message)
        if not clean.get("tool_calls"):
            clean.pop("tool_calls", None)
        problem = _problem(clean)
        if problem:
            raise UserError(f"field {field!r}: message {i} is {shown(message)}; {problem}")
        found.append(clean)
    return Messages(found, getattr(value, "variables", variables))


def _problem(message: Message) -> str | None:
    role, content = message.get("role"), message.get("content")
    calls = message.get("tool_calls")
    if not isinstance(role, str) or not (isinstance(content, str) or (content is None and calls)):
        return f"{MESSAGE_FIELDS}, with text as content"
    for name in THOUGHTS:
        if not isinstance(message.get(name, ""), str):
            return f"{name!r} must be a text"
    for name in SWITCHES:
        value = message.get(name, 1)
        if not isinstance(value, (bool, int, float, np.bool_)) or value not in (0, 1):
            return f"{name!r} must be 0 or 1 (false or true): an answer is trained or not"
    if calls is None:
        return None
    if role != "assistant":
        return f"only the assistant makes 'tool_calls', not {role!r}"
    if isinstance(calls, (str, Mapping)) or not isinstance(calls, Sequence):
        return "'tool_calls' must be a list"
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            return 'a call looks like {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}'
        if not isinstance(function.get("arguments", {}), (str, Mapping)):
            return "the 'arguments' of a call must be an object, or its JSON as a text"
    return None


def without_nulls(value: Any) -> Any:
    """Null fields of structs left out, at every depth: Arrow gives each struct the fields of all of them."""
    if isinstance(value, Mapping):
        return {str(key): without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(item) for item in value]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def variables(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row hands to its chat template beside the messages: its fields "tools" and "chat_template_kwargs"."""
    found: dict[str, Any] = {}
    for field in VARIABLES:
        more = _parsed(row.get(field), field)
        if more and not isinstance(more, Mapping):
            raise UserError(f"field {field!r} must be an object of the template's variables, not {shown(more)}")
        if taken := sorted(set(more or {}) & set(TAKEN)):
            raise UserError(f"field {field!r} cannot set {', '.join(taken)}: only further variables of the template")
        found |= without_nulls(more or {})
    tools = without_nulls(_parsed(row.get("tools"), "tools"))
    if tools:
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise UserError(f"field 'tools' must be a list of objects that describe functions, not {shown(tools)}")
        found["tools"] = tools
    return found


def _parsed(value: Any, field: str) -> Any:
    """A field, or what its text says as JSON: many data sets keep objects of many shapes so."""
    if not isinstance(value, str) or not value.strip():
        return None if isinstance(value, str) else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"field {field!r} is a text that is not JSON ({error}): {shown(value)}") from error


def is_trained(message: Message) -> bool:
    """The assistant's, and not switched off by `weight: 0` or `train: false`."""
    return message["role"] == "assistant" and all(message.get(name, 1) for name in SWITCHES)


def functions(message: Message) -> list[Mapping[str, Any]]:
    """The calls of a message: {"name", "arguments"} each."""
    return [call.get("function", call) for call in message.get("tool_calls", ())]


def is_plain(message: Message) -> bool:
    """All that it says is its content, which no template takes apart."""
    more = message.get("tool_calls") or any(message.get(name) for name in THOUGHTS)
    return not more and "</think>" not in message["content"]


# --- spellings --------------------------------------------------------------------------------------------------------


def spellings(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """The messages as they are, then in the other spellings of calls that some templates need.

    Arguments as JSON text (DeepSeek) or as an object (Qwen 2.5 would quote a text once more); the content of a message
    with calls absent, null or empty; a call alone or as {"type": "function", "function": …}.
    """
    base = [{key: value for key, value in message.items() if key not in SWITCHES} for message in messages]
    yield base
    if not any("tool_calls" in message for message in base):
        return
    options = itertools.product((_same, _nested), (_same, _as_object, _as_text), ("absent", None, ""))
    for nest, spell, content in itertools.islice(options, 1, None):
        yield [_spelled(message, nest, spell, content) if "tool_calls" in message else message for message in base]


def _spelled(message: Message, nest: Any, spell: Any, content: str | None) -> Message:
    calls = []
    for call in message["tool_calls"]:
        inner = call.get("function", call)
        if "arguments" in inner:
            inner = {**inner, "arguments": spell(inner["arguments"])}
        calls.append(nest({**call, "function": inner} if "function" in call else inner))
    bare = {} if "content" in message or content == "absent" else {"content": content}
    return {**message, **bare, "tool_calls": calls}


def _same(value: Any) -> Any:
    return value


def _nested(call: Any) -> Any:
    if "function" in call:
        return {"type": "function", **call}
    outer = {key: value for key, value in call.items() if key not in ("name", "arguments")}
    inner = {key: value for key, value in call.items() if key in ("name", "arguments")}
    return {"type": "function", **outer, "function": inner}


def _as_object(arguments: Any) -> Any:
    try:
        found = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def probe(message: Message, mark: str, *, names: bool = False) -> Message:
    """The message with `mark` in place of what it says, of the same shape.

    names: also in those of calls, which templates may repeat with the results of the calls.
    """
    changed: Message = {name: mark for name in ("content", *THOUGHTS) if str(message.get(name) or "").strip()}
    if not changed and not message.get("tool_calls"):
        changed["content"] = mark
    if "tool_calls" in message:
        changed["tool_calls"] = [_probed(call, mark, names) for call in message["tool_calls"]]
    return {**message, **changed}


def _probed(call: Mapping[str, Any], mark: str, names: bool) -> Mapping[str, Any]:
    if "function" in call:
        return {**call, "function": _probed(call["function"], mark, names)}
    changed: dict[str, Any] = {"name": mark} if names else {}
    if "arguments" in call:
        arguments = {mark: mark}
        changed["arguments"] = json.dumps(arguments) if isinstance(call["arguments"], str) else arguments
    return {**call, **changed}


# --- what a rendering shows -------------------------------------------------------------------------------------------


def unshown(messages: Sequence[Message], text: str) -> str | None:
    """What of the messages does not stand in the rendered text, in words: what others said, and any call.

    What the assistant said earlier is the template's own matter (many leave thoughts out of the past).
    """
    for i, message in enumerate(messages):
        if message["role"] != "assistant" and not _stands(message.get("content") or "", text):
            return f"message {i}, of the role {message['role']!r}"
        for function in functions(message):
            if not _called(function, text):
                return f"the call of {function['name']!r} in message {i}"
    return None


def unsaid(message: Message, turn: str) -> str | None:
    """Which field of an answer does not stand in the text that is trained for it."""
    said = re.sub(r"\s+", "", turn)
    for name in ("content", *THOUGHTS):
        if re.sub(r"\s+", "", message.get(name) or "") not in said:
            return name
    for function in functions(message):
        if not _called(function, turn):
            return f"tool_calls (of {function['name']!r})"
    return None


def _called(function: Mapping[str, Any], text: str) -> bool:
    if function["name"] not in text:
        return False
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        quoted = json.dumps(arguments, ensure_ascii=False)
        if quoted[1:-1] != arguments and quoted in text:
            return False  # a text that was quoted once more, as if it were a value
    return all(_stands(leaf, text) for leaf in _leaves(_as_object(arguments)))


def _leaves(value: Any) -> Iterator[str]:
    """The texts and numbers of nested arguments."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield json.dumps(value)


def _stands(content: str, text: str) -> bool:
    """Whether the content is in the text, whatever a template does to spaces, and escaped as in JSON or not."""
    if content.strip() in text:
        return True
    squashed = _letters(text)
    spelled = (content, json.dumps(content, ensure_ascii=False), json.dumps(content))
    return any(_letters(one) in squashed for one in spelled)


def _letters(text: str) -> str:
    return re.sub(r"\W+", "", text)
