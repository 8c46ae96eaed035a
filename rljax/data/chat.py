"""Chat templates: the text that a template makes of messages, and where in it the assistant speaks."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rljax.data import messages as said
from rljax.data.messages import Message, Messages
from rljax.errors import UserError

MARK = "RLJAXMARK"  # stands for what is looked for in a rendering


class Turn(NamedTuple):
    """An answer of the assistant in a rendered dialogue, as characters."""

    message: int  # which of the messages
    start: int  # where generation begins to write it
    end: int  # behind its end-of-turn token
    closed: bool  # the template ends it in a special token


def render(messages: Sequence[Message], tokenizer: Any, *, generation_prompt: bool = False) -> str:
    """The dialogue as text; with `generation_prompt` up to where the assistant's next answer begins.

    `Messages` bring their tools and other variables of the template. Raises UserError for a tokenizer without chat
    template, and where the template refuses the messages or does not write what they say.
    """
    return _Dialogue.of(messages, tokenizer, generation_prompt).text


def prompt(messages: Sequence[Message], tokenizer: Any) -> str:
    """Up to where generation goes on: the next answer of the assistant, or the one that the messages end in."""
    if not continues(messages):
        return render(messages, tokenizer, generation_prompt=True)
    *before, last = messages
    thinks = last["content"].find("<think>")
    if thinks >= 0 and "</think>" not in last["content"]:  # templates would take it for a text without thoughts
        start = render(Messages(before, getattr(messages, "variables", {})), tokenizer, generation_prompt=True)
        return start.removesuffix("<think>\n") + last["content"]
    mark = _unused(messages)
    open_end = Messages([*before, {**last, "content": last["content"] + mark}], getattr(messages, "variables", {}))
    text, found, _ = render(open_end, tokenizer).rpartition(mark)
    if not found:
        raise UserError("the chat template does not write the answer that the prompt ends in, so it cannot go on")
    return text


def continues(messages: Sequence[Message]) -> bool:
    """Whether the messages end in the beginning of an answer: one of the assistant, without calls."""
    return messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]


def turns(messages: Sequence[Message], tokenizer: Any, *, first: int = 0) -> tuple[str, list[Turn]]:
    """The rendered dialogue, and what generation would have to write of each trained answer from message `first` on.

    That is all from where the generation prompt ends (so with an empty <think> block that the template puts there) to
    the end of the turn: what the template writes after the last part of the answer, up to its end-of-turn token.
      - A template's {% generation %} marks are followed where it has them.
      - Contents that are copied verbatim or stripped are found by rendering again with placeholders in their places.
      - Any other answer (calls, thoughts) is rendered as the last one, where it is all that follows the generation
        prompt, and is looked up in the whole dialogue at the place where that changes with the answer.
    Raises UserError where that shows that the template rewrites an answer, or leaves out a part of it.
    """
    dialogue = _Dialogue.of(messages, tokenizer)
    ours = [i for i, message in enumerate(messages) if i >= first and said.is_trained(message)]
    if not ours:
        raise UserError("no message of the assistant is trained ('weight': 0 or 'train': false in all of them)")
    if (marks := dialogue.marks()) is not None:
        found = _marked(dialogue, ours, marks)
    else:
        contents = dialogue.contents(ours) or {}
        found = [
            (_copied(dialogue, i, contents[i]) if i in contents else None) or _rendered_last(dialogue, i) for i in ours
        ]
    for i in ours:
        _check_answer(dialogue, i, [turn for turn in found if turn.message == i])
    return dialogue.text, found


def _check_answer(dialogue: _Dialogue, i: int, found: list[Turn]) -> None:
    """Raise UserError for an answer that is not all there, or that goes on after its end."""
    message, end = dialogue.messages[i], _end_of(dialogue, i)
    before = len(_header(dialogue))  # a <think> that the generation prompt wrote already is a part of the answer
    written = dialogue.text[max(0, found[0].start - before) : found[-1].end]
    if missing := said.unsaid(message, written):
        raise UserError(_not_written(f"{missing} of message {i}"))
    for token in {end.tail[: end.length].strip() if end.closed else "", str(dialogue.tokenizer.eos_token or "")} - {""}:
        if token in (message.get("content") or ""):
            raise UserError(
                f"the content of message {i} holds {token!r}, where generation stops, so what follows it would "
                "never be written: split the message there, write it in another way, or set 'train': false"
            )


def begins_otherwise(tokenizer: Any) -> str | None:
    """What generation prompts end in and answers of the template do not begin with ("<think>\\n"), if anything."""
    if not tokenizer.chat_template:
        return None
    asked: list[Message] = [{"role": "user", "content": "a"}]
    dialogue = _Dialogue(asked, tokenizer, {}, "")
    prompt = dialogue.render(asked, generation_prompt=True)
    whole = dialogue.render([*asked, {"role": "assistant", "content": MARK}])
    if prompt is None or whole is None or whole.startswith(prompt):
        return None
    return prompt[_common(prompt, whole) :]


def stop_ids(tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer in the tokenizer's chat template: after text, and after a call where that differs.

    () without a template, or where it writes no special token there (training then ends answers in eos).
    """
    if not tokenizer.chat_template:
        return ()
    found, call = [], {"type": "function", "id": "call12345", "function": {"name": MARK, "arguments": {MARK: MARK}}}
    for answer in ({"content": MARK}, {"tool_calls": [call]}):
        try:
            text, (turn,) = turns([{"role": "user", "content": "a"}, {"role": "assistant", **answer}], tokenizer)
        except UserError:  # a template that knows no calls, or asks for more than these messages
            continue
        ends = list(special_pattern(tokenizer).finditer(text, turn.start, turn.end)) if turn.closed else []
        found += [tokenizer.convert_tokens_to_ids(ends[-1].group())] if ends else []
    return tuple(dict.fromkeys(found))


def special_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Matches one special (or added) token of the tokenizer in a text."""
    return _special_pattern(tokenizer, len(tokenizer))


@functools.lru_cache(maxsize=8)
def _special_pattern(tokenizer: Any, _size: int) -> re.Pattern[str]:
    names = [str(token) for token in tokenizer.added_tokens_decoder.values() if str(token).strip()]
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or r"(?!)")


def template_of(tokenizer: Any, tools: Any = None) -> str:
    """The text of the tokenizer's chat template (that for tools, where it has one). UserError without any."""
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path or 'this model'!r} has no chat template, which rows with "
            "messages need: start from a chat (instruct) checkpoint, set tokenizer.chat_template, or give prompts and "
            "completions as texts"
        )
    return tokenizer.get_chat_template(tools=tools)


# --- rendering --------------------------------------------------------------------------------------------------------


class _Dialogue(NamedTuple):
    """Messages in the spelling of calls that their template writes, and what it makes of them."""

    messages: list[Message]
    tokenizer: Any
    variables: Mapping[str, Any]
    text: str

    @classmethod
    def of(cls, messages: Sequence[Message], tokenizer: Any, generation_prompt: bool = False) -> _Dialogue:
        variables = getattr(messages, "variables", {})
        _check_variables(template_of(tokenizer, variables.get("tools")), variables)
        refused = missing = None
        for spelled in said.spellings(messages):
            try:
                text = _render(spelled, tokenizer, variables, generation_prompt)
            except ImportError:
                raise
            except Exception as error:  # jinja's own, and whatever a template's filters raise on a missing field
                refused = refused or error
                continue
            found = said.unshown(spelled, text) or _unshown_tool(variables, text)
            if found is None:
                return cls(spelled, tokenizer, variables, text)
            missing = missing or found
        if missing is not None:
            raise UserError(_not_written(missing))
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise UserError(f"the chat template refuses messages of the roles {roles}: {refused}") from refused

    def render(self, messages: list[Message], generation_prompt: bool = False) -> str | None:
        """Of other messages in the same spelling; None where the template refuses them."""
        try:
            return _render(messages, self.tokenizer, self.variables, generation_prompt)
        except ImportError:
            raise
        except Exception:
            return None

    def prompt(self, i: int) -> str | None:
        """Up to where the answer i is generated; None where the template renders no such beginning."""
        return self.render(self.messages[:i], generation_prompt=True) if i else None

    def marks(self) -> list[tuple[int, int]] | None:
        """The {% generation %} spans; None where the template has no such marks."""
        template = template_of(self.tokenizer, self.variables.get("tools"))
        if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
            return None
        text, marks = _jinja(
            self.messages, self.tokenizer, template, self.variables, False, return_assistant_tokens_mask=True
        )
        if text != self.text:
            raise UserError(
                "the chat template's {% generation %} marks change the text that it renders; mend the template"
            )
        return [(int(start), int(end)) for start, end in marks[0]]

    def contents(self, ours: list[int]) -> dict[int, tuple[int, int]] | None:
        """Where the contents of plain answers stand; None where placeholders for them do not give the text."""
        if not all(said.is_plain(self.messages[i]) for i in ours):
            return None
        marks = {i: f"{_unused(self.messages)}{i}TURN" for i in ours}
        changed = [
            {**message, "content": marks[i]} if i in marks else message for i, message in enumerate(self.messages)
        ]
        frame = re.split("|".join(map(re.escape, marks.values())), self.render(changed) or "")
        if len(frame) != len(ours) + 1:
            return None
        for strip in (str, str.strip, str.rstrip, str.lstrip):
            texts = [strip(self.messages[i]["content"]) for i in ours]
            if self.text == frame[0] + "".join(text + after for text, after in zip(texts, frame[1:], strict=True)):
                break
        else:
            return None
        found, position = {}, len(frame[0])
        for i, text, after in zip(ours, texts, frame[1:], strict=True):
            found[i] = (position, position + len(text))
            position += len(text) + len(after)
        return found

    def place(self, i: int, messages: list[Message], text: str) -> tuple[int, int] | None:
        """Where `text` changes with what answer i says; None where it does not."""
        for names in (False, True):
            changed = said.probe(messages[i], _unused(messages), names=names)
            other = self.render([*messages[:i], changed, *messages[i + 1 :]])
            if other is not None and other != text:
                start = _common(text, other)
                return start, len(text) - min(_common(text[::-1], other[::-1]), min(len(text), len(other)) - start)
        return None


def _render(messages: list[Message], tokenizer: Any, variables: Mapping[str, Any], generation_prompt: bool) -> str:
    template = template_of(tokenizer, variables.get("tools"))
    if any(message.get("content", "") is None for message in messages):
        # apply_chat_template leaves a null content out, which some templates ask for
        return _jinja(messages, tokenizer, template, variables, generation_prompt)[0]
    return tokenizer.apply_chat_template(
        messages, tokenize=False, chat_template=template, add_generation_prompt=generation_prompt, **variables
    )


def _jinja(
    messages: list[Message], tokenizer: Any, template: str, variables: Mapping[str, Any], prompt: bool, **options: Any
) -> tuple[str, Any]:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, marks = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        add_generation_prompt=prompt,
        **options,
        **{**tokenizer.special_tokens_map, **variables},
    )
    return rendered[0], marks


def _check_variables(template: str, variables: Mapping[str, Any]) -> None:
    for name in variables:
        if not re.search(rf"\b{re.escape(name)}\b", template):
            field = "field 'tools'" if name == "tools" else f"the template's variable {name!r}"
            raise UserError(
                f"{field} is in the row, and the chat template never reads it: leave it out, or take another template"
            )


def _unshown_tool(variables: Mapping[str, Any], text: str) -> str | None:
    for tool in variables.get("tools", ()):
        name = tool.get("function", tool).get("name") if isinstance(tool.get("function", tool), Mapping) else None
        if isinstance(name, str) and name not in text:
            return f"the tool {name!r}"
    return None


def _not_written(what: str) -> str:
    return (
        f"the chat template does not write {what} as the row has it, so the model would not see or learn it: mend "
        "tokenizer.chat_template, put it into a content that the template copies, or (an answer) set 'train': false"
    )


def _unused(messages: Sequence[Message]) -> str:
    mark = MARK
    while any(mark in str(message) for message in messages):
        mark = f"X{mark}"
    return mark


def _common(a: str, b: str) -> int:
    """How many characters two texts begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle - 1)
    return low


# --- where a turn begins and ends -------------------------------------------------------------------------------------


class _End(NamedTuple):
    """What a template writes after an answer of text that is the last message."""

    tail: str
    length: int  # so much of it belongs to the answer
    closed: bool  # it ends in a special token


def _end_of(dialogue: _Dialogue, i: int) -> _End:
    """After answer i; looked at once a template, on a small dialogue, where it takes one."""
    template = template_of(dialogue.tokenizer, dialogue.variables.get("tools"))
    return _small_end(dialogue.tokenizer, len(dialogue.tokenizer), template) or _probed_end(
        dialogue._replace(messages=dialogue.messages[:i])
    )


@functools.lru_cache(maxsize=64)
def _small_end(tokenizer: Any, _size: int, _template: str) -> _End | None:
    dialogue = _Dialogue([{"role": "user", "content": "a"}], tokenizer, {}, "")
    return _probed_end(dialogue) if dialogue.render(dialogue.messages) is not None else None


def _probed_end(dialogue: _Dialogue) -> _End:
    """The end of an answer is what stands after it both where it is the last message and where the dialogue goes on."""
    special, mark = special_pattern(dialogue.tokenizer), _unused(dialogue.messages)
    probe = [*dialogue.messages, {"role": "assistant", "content": mark}]
    tail = (dialogue.render(probe) or "").rpartition(mark)[2]
    going_on = (dialogue.render([*probe, {"role": "user", "content": "a"}]) or "").rpartition(mark)[2]
    both = list(special.finditer(tail, 0, _common(tail, going_on)))
    if both:
        return _End(tail, both[-1].end(), True)
    length = 0
    for token in special.finditer(tail):  # the first, and those that follow it at once
        if length and token.start() != length:
            break
        length = token.end()
    return _End(tail, length or len(tail.rstrip()), bool(length))


def _copied(dialogue: _Dialogue, i: int, content: tuple[int, int]) -> Turn | None:
    """The turn around a content that the template copies; None where the text does not begin with its prompt."""
    text, (start, stop), prompt = dialogue.text, content, dialogue.prompt(i)
    if prompt is None:
        start = _after_header(dialogue, i, text, start)
    elif not text.startswith(prompt):
        return None
    else:
        start = min(len(prompt), start)
    end = _end_of(dialogue, i)
    written = text.startswith(end.tail[: end.length], stop)
    return Turn(i, start, stop + end.length if written else stop, written and end.closed)


def _rendered_last(dialogue: _Dialogue, i: int) -> Turn:
    """The turn as it is where answer i is the last message, found again in the whole dialogue."""
    text, last = dialogue.text, i == len(dialogue.messages) - 1
    alone = text if last else dialogue.render(dialogue.messages[: i + 1])
    if alone is None:
        raise UserError(_rewritten(i))
    here = dialogue.place(i, dialogue.messages[: i + 1], alone)
    there = here if last else dialogue.place(i, dialogue.messages, text)
    if here is None or there is None:
        raise UserError(_not_written(f"message {i}"))
    if alone[slice(*here)] != text[slice(*there)]:
        raise UserError(_rewritten(i))
    prompt = dialogue.prompt(i)
    begin = _begin(dialogue, i, alone, prompt, here[0])
    stop, end, closed = _stop(dialogue, i, alone, here[1])
    lead, closing, ending = alone[begin : here[0]], alone[here[1] : stop], alone[stop:end]
    if prompt is not None and text.startswith(prompt):
        start = len(prompt)
    elif text.endswith(lead, 0, there[0]):
        start = there[0] + begin - here[0]
    else:
        raise UserError(_rewritten(i))
    if not text.startswith(closing, there[1]):
        raise UserError(_rewritten(i))
    stop = there[1] + len(closing)
    written = text.startswith(ending, stop)
    return Turn(i, start, stop + len(ending) if written else stop, written and closed)


def _begin(dialogue: _Dialogue, i: int, alone: str, prompt: str | None, part: int) -> int:
    """Where answer i begins in a rendering that ends in it; its first part begins at `part`."""
    header = _header(dialogue)
    if prompt is not None and alone.startswith(prompt):
        return len(prompt)
    alike = 0 if prompt is None else _common(prompt, alone)
    if prompt is not None and alike > len(prompt) - len(header):  # answers begin otherwise than it ends (DeepSeek R1)
        ends = [token.end() for token in special_pattern(dialogue.tokenizer).finditer(alone, len(prompt) - len(header))]
        return min(part, max((end for end in ends if end <= alike), default=alike))
    if not header:
        raise UserError(_rewritten(i))
    return _after_header(dialogue, i, alone, part)


def _after_header(dialogue: _Dialogue, i: int, text: str, part: int) -> int:
    """Where an answer begins that no prompt precedes: behind the header that generation prompts end in."""
    header = _header(dialogue)
    at = text.rfind(header, 0, part) if header else -1
    return at + len(header) if at >= 0 else part


def _header(dialogue: _Dialogue) -> str:
    """What a generation prompt adds to a dialogue; "" where that cannot be told."""
    template = template_of(dialogue.tokenizer, dialogue.variables.get("tools"))
    return _small_header(dialogue.tokenizer, len(dialogue.tokenizer), template)


@functools.lru_cache(maxsize=64)
def _small_header(tokenizer: Any, _size: int, _template: str) -> str:
    asked: list[Message] = [{"role": "user", "content": "a"}]
    dialogue = _Dialogue(asked, tokenizer, {}, "")
    plain, prompt = dialogue.render(asked), dialogue.render(asked, generation_prompt=True)
    return prompt[len(plain) :] if plain is not None and prompt is not None and prompt.startswith(plain) else ""


def _stop(dialogue: _Dialogue, i: int, alone: str, part: int) -> tuple[int, int, bool]:
    """(end of what the answer says, end of its turn, whether in a special token); its last part ends at `part`."""
    end, tail = _end_of(dialogue, i), alone[part:]
    if tail.endswith(end.tail):
        stop = len(alone) - len(end.tail)
        return stop, stop + end.length, end.closed
    ends = list(special_pattern(dialogue.tokenizer).finditer(alone, part)) if end.closed else []
    if ends:  # calls end in a token of their own
        return ends[-1].start(), ends[-1].end(), True
    return len(alone.rstrip()), len(alone.rstrip()), False


def _rewritten(i: int) -> str:
    return (
        f"the chat template rewrites earlier turns when the dialogue goes on, so message {i} is not in it as it was "
        "generated: put {% generation %} … {% endgeneration %} around the answers in tokenizer.chat_template, set "
        "'train': false in it, or give rows of one answer each ('prompt' and 'completion')"
    )


def _marked(dialogue: _Dialogue, ours: list[int], marks: list[tuple[int, int]]) -> list[Turn]:
    """The template's own marks, each given to the message that changes it."""
    text, found = dialogue.text, []
    answers = [i for i, message in enumerate(dialogue.messages) if message["role"] == "assistant"]
    contents = dialogue.contents(answers) or {}
    for i in ours:
        place = contents.get(i) or dialogue.place(i, dialogue.messages, text)
        mine = [m for m in marks if place and m[0] <= place[1] and m[1] >= place[0]]
        if not mine:
            raise UserError(f"the chat template's {{% generation %}} marks leave out message {i}: mend them")
        end = _end_of(dialogue, i)
        closed = bool(special_pattern(dialogue.tokenizer).search(text, mine[0][0])) and end.closed
        found += [Turn(i, start, stop, closed) for start, stop in mine]
    return found
