"""Chat templates: the text that a template makes of messages, and where in it the assistant speaks."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

from rljax.errors import UserError

Message = dict[str, Any]
Span = tuple[int, int]  # characters start..end of a rendered dialogue


def render(messages: Sequence[Message], tokenizer: Any, *, generation_prompt: bool = False) -> str:
    """The dialogue as text; with `generation_prompt` up to where the assistant's next answer begins.

    Raises UserError for a tokenizer without chat template, and where the template refuses the messages.
    """
    template = _template(tokenizer)
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, chat_template=template, add_generation_prompt=generation_prompt
        )
    except ImportError:
        raise
    except Exception as error:  # jinja's own classes, and whatever a template's filters raise on a missing field
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise UserError(f"the chat template refuses messages of the roles {roles}: {error}") from error


def spans(messages: Sequence[Message], tokenizer: Any, *, first: int = 0) -> tuple[str, list[Span]]:
    """The rendered dialogue and, for each answer from message `first` on, what generation would have to write of it.

    That is the content, from where the generation prompt ends (so with an empty <think> block that the template puts
    there), up to and with the end-of-turn token. Found by one of three ways:
      - the template's {% generation %} marks where it has them: then the spans are exactly those;
      - rendering again with placeholders for the contents: exact, and verified, for every template that copies contents
        verbatim or stripped;
      - rendering turn by turn, for templates that rewrite contents (as Qwen3's does with thoughts): exact where each
        rendering is the beginning of the whole, and a UserError where it is not.
    """
    text = render(messages, tokenizer)
    ours = [i for i, message in enumerate(messages) if i >= first and message["role"] == "assistant"]
    if marked := _marked(messages, tokenizer, text):
        return text, marked[-len(ours) :]
    prompts = [_prompt(messages[:i], tokenizer, text) for i in ours]
    found = _by_placeholders(messages, ours, tokenizer, text) or _by_turns(messages, ours, prompts, tokenizer, text)
    if found is None:
        raise UserError(
            "the chat template rewrites earlier turns when the dialogue goes on, so the assistant's tokens cannot be "
            "told from the others: put {% generation %} … {% endgeneration %} around the assistant's turns in "
            "tokenizer.chat_template, or give rows of one answer each ('prompt' and 'completion')"
        )
    found = [(start if at is None else min(at, start), end) for at, (start, end) in zip(prompts, found, strict=True)]
    return text, _with_end_of_turn(text, found, messages[: ours[-1]], tokenizer)


def _prompt(before: Sequence[Message], tokenizer: Any, text: str) -> int | None:
    """Where in `text` the generation prompt after these messages ends; None where `text` does not begin with it."""
    try:
        prompt = render(before, tokenizer, generation_prompt=True)
    except ValueError:  # no template renders an empty dialogue, some refuse one of a system message alone
        return None
    return len(prompt) if text.startswith(prompt) else None


def special_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches one special (or added) token of the tokenizer in a text."""
    return _special_pattern(tokenizer, len(tokenizer))


@functools.lru_cache(maxsize=8)
def _special_pattern(tokenizer: Any, _size: int) -> re.Pattern[str]:
    names = [str(token) for token in tokenizer.added_tokens_decoder.values() if str(token).strip()]
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


def _template(tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'!r} has no chat template, which rows with "
            "messages need: start from a chat (instruct) checkpoint, set tokenizer.chat_template, or give prompts and "
            "completions as texts"
        )
    return tokenizer.get_chat_template()


def _marked(messages: Sequence[Message], tokenizer: Any, text: str) -> list[Span] | None:
    """The {% generation %} spans; None where the template has no such marks."""
    template = _template(tokenizer)
    if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        return None
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, marks = render_jinja_template(
        conversations=[[{k: v for k, v in message.items() if v is not None} for message in messages]],
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    if rendered[0] != text:
        raise UserError("the chat template's {% generation %} marks change the text that it renders; mend the template")
    return [(int(start), int(end)) for start, end in marks[0]]  # pyright: ignore[reportGeneralTypeIssues]


def _by_placeholders(messages: Sequence[Message], ours: list[int], tokenizer: Any, text: str) -> list[Span] | None:
    """Spans of the contents alone; None where putting the contents for the placeholders does not give `text` again."""
    if not all(isinstance(messages[i].get("content"), str) for i in ours):
        return None  # tool calls: there is no content to look for
    marks = {i: f"RLJAX{i}TURN" for i in ours}
    while any(mark in text for mark in marks.values()):
        marks = {i: f"X{mark}" for i, mark in marks.items()}
    changed = [{**message, "content": marks[i]} if i in marks else message for i, message in enumerate(messages)]
    frame = re.split("|".join(map(re.escape, marks.values())), render(changed, tokenizer))
    if len(frame) != len(ours) + 1:
        return None
    for strip in (str, str.strip, str.rstrip, str.lstrip):
        contents = [strip(messages[i]["content"]) for i in ours]
        if text == frame[0] + "".join(content + after for content, after in zip(contents, frame[1:], strict=True)):
            break
    else:
        return None
    found, position = [], len(frame[0])
    for content, after in zip(contents, frame[1:], strict=True):
        found.append((position, position + len(content)))
        position += len(content) + len(after)
    return found


def _by_turns(
    messages: Sequence[Message], ours: list[int], prompts: list[int | None], tokenizer: Any, text: str
) -> list[Span] | None:
    """From the end of the generation prompt to the end of the turn; None where a rendering does not begin the whole."""
    found = []
    for i, start in zip(ours, prompts, strict=True):
        turn = render(messages[: i + 1], tokenizer)
        if start is None or not text.startswith(turn):
            return None
        ends = list(special_pattern(tokenizer).finditer(turn, start))
        tail = ends[-1].start() if ends and not turn[ends[-1].end() :].strip() else len(turn.rstrip())
        found.append((start, max(start, tail)))
    return found


def _with_end_of_turn(text: str, found: list[Span], before: Sequence[Message], tokenizer: Any) -> list[Span]:
    """Each span up to and with the token that ends the assistant's turn, where the template writes one.

    Which token that is shows when a last answer follows the messages `before`: the first special token behind it.
    """
    special, mark = special_pattern(tokenizer), "RLJAXLASTTURN"
    probe = render([*before, {"role": "assistant", "content": mark}], tokenizer)
    end = special.search(probe.rpartition(mark)[2])
    limits = [start for start, _ in found[1:]] + [len(text)]
    longer = []
    for (start, stop), limit in zip(found, limits, strict=True):
        token = special.search(text, stop, limit)
        longer.append((start, token.end() if token and end and token.group() == end.group() else stop))
    return longer
