"""What is trained is what the assistant wrote: over public templates × forms of rows × shapes of messages."""

import functools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rljax import data
from rljax.data import chat
from tests.data.templates import SHAPES, tokenizer_of

REFUSED = "does not write|rewrites earlier|refuses messages|generation prompt is not"
TEXT = st.text("ab cdé.?-1", min_size=1, max_size=12).map(str.strip).filter(bool)
tokenizer_of = functools.cache(tokenizer_of)


def user(text):
    return {"role": "user", "content": text}


def answer(text=None, **fields):
    return {"role": "assistant", "content": text, **fields}


def call(name, **arguments):
    return {"type": "function", "id": "abcdefghi", "function": {"name": name, "arguments": arguments}}


def result(text):
    return {"role": "tool", "content": text, "name": None, "tool_call_id": "abcdefghi"}


CITY = call("weather", city="Rome", year=None, at={"lat": 41.9, "lon": None})
ARGUMENTS = json.dumps({"city": "Rome", "at": {"lat": 41.9}})


def wrote(name, message, last):
    """The oracle: an answer as the model with this template would write it, None where it cannot."""
    content, calls, thought = message.get("content") or "", message.get("tool_calls") or [], message.get("thought")
    end, called = SHAPES[name][4:]
    functions = [(one["function"]["name"], said(one["function"]["arguments"])) for one in calls]
    if thought and name not in ("qwen3", "gpt-oss"):
        return None
    if name == "qwen3":
        if thought and not last:
            return None
        empty = "<think>\n" + (thought or "") + "\n</think>\n\n" if last or thought else ""
        parts = [content] if content else []
        parts += [f'<tool_call>\n{{"name": "{f}", "arguments": {a}}}\n</tool_call>' for f, a in functions]
        return empty + "\n".join(parts) + end
    if name == "gpt-oss":
        if len(calls) > 1 or (calls and content):
            return None
        if thought and not (last or calls):
            return None
        head = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
        if calls:
            f, a = functions[0]
            return f"{head} to=functions.{f}<|channel|>commentary json<|message|>{a}{called}"
        return f"{head}<|channel|>final<|message|>{content}" + (end if last else "")
    if not calls:
        return (" " if name == "mistral" else "\n" if name == "glm" else "") + content + end
    if name in ("gemma", "phi3") or (name in ("llama3.1", "mistral") and content) or (name == "llama3.1" and calls[1:]):
        return None
    if name == "qwen2.5":
        parts = [content] if content else []
        parts += [f'<tool_call>\n{{"name": "{f}", "arguments": {a}}}\n</tool_call>' for f, a in functions]
        return "\n".join(parts) + end
    if name == "llama3.1":
        return "".join(f'{{"name": "{f}", "parameters": {a}}}' for f, a in functions) + called
    if name == "mistral":
        each = [f'{{"name": "{f}", "arguments": {a}, "id": "abcdefghi"}}' for f, a in functions]
        return f"[TOOL_CALLS] [{', '.join(each)}]{called}"
    if name == "glm":
        lines = ["".join(f"\n{k}={v}" for k, v in json.loads(a).items()) for _, a in functions]
        each = [f"\n<tool_call>{f}{text}\n</tool_call>" for (f, _), text in zip(functions, lines, strict=True)]
        return ("\n" + content if content else "") + "".join(each)
    each = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{f}\n```json\n{a}\n```<｜tool▁call▁end｜>" for f, a in functions
    ]
    return f"{content}<｜tool▁calls▁begin｜>{''.join(each)}<｜tool▁calls▁end｜>{called}"


def said(arguments):
    """Arguments without nulls, as JSON."""
    if isinstance(arguments, str):
        return arguments

    def clean(value):
        return {k: clean(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value

    return json.dumps(clean(arguments), ensure_ascii=False)


def all_wrote(name, messages, first=0):
    """The trained texts of the answers from message `first` on; None where one of them cannot be shown."""
    found = [
        wrote(name, m, i == len(messages) - 1)
        for i, m in enumerate(messages)
        if m["role"] == "assistant" and i >= first
    ]
    if any(text is None for text in found):
        return None
    if name == "glm" and messages[-1]["role"] == "assistant":  # no end of turn: the last answer ends in eos
        found[-1] += SHAPES[name][2]
    return found


def spelled(name, messages):
    """The thoughts in the field that the template reads."""
    field = "thinking" if name == "gpt-oss" else "reasoning_content"
    out = []
    for message in messages:
        rest = {k: v for k, v in message.items() if k != "thought"}
        out.append({**rest, field: message["thought"]} if message.get("thought") else rest)
    return out


def trained(example, tokenizer):
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.mask.astype(np.int8), [0]])))
    return [tokenizer.decode(example.ids[a:b]) for a, b in edges.reshape(-1, 2)]


def forms(messages):
    """(form, row, first trained message) of one dialogue that ends in an answer."""
    first = max(i for i, message in enumerate(messages) if message["role"] == "user") + 1
    prompt, rest = messages[:first], messages[first:]
    yield data.chat_example, {"messages": messages}, 0
    yield data.completion_example, {"prompt": prompt, "completion": rest}, first
    yield pair, {"prompt": prompt, "chosen": rest, "rejected": [answer("no")]}, first
    yield pair, {"chosen": messages, "rejected": [*prompt, answer("no")]}, first
    yield unpaired, {"prompt": prompt, "completion": rest, "label": True}, first
    yield compared, {"prompt": prompt, "completions": [[answer("no")], rest], "best": 1}, first


def pair(row, tokenizer):
    chosen, rejected = data.preference_example(row, tokenizer)
    assert chosen.ids[: chosen.prompt].tolist() == rejected.ids[: rejected.prompt].tolist()
    return chosen


def unpaired(row, tokenizer):
    return data.unpaired_example(row, tokenizer).example


def compared(row, tokenizer):
    return data.comparison_example(row, tokenizer).examples[1]


def check(name, messages):
    tokenizer = tokenizer_of(name)
    for form, row, first in forms(spelled(name, messages)):
        expected = all_wrote(name, messages, first)
        if expected is None or (name == "r1" and first):  # the prompt of R1 begins a thought that no answer has
            with pytest.raises(ValueError, match=REFUSED):
                form(row, tokenizer)
        else:
            assert trained(form(row, tokenizer), tokenizer) == expected, f"{form.__name__} of {row}"


SHAPED = {
    "answer": [user("hi"), answer("Hello you", tool_calls=None)],
    "two turns": [user("hi"), answer("Hello"), user("more"), answer("Yes")],
    "words and a call": [user("q"), answer("Let me see.", tool_calls=[CITY]), result("20"), answer("Sunny")],
    "a call": [user("q"), answer(tool_calls=[CITY]), result("20"), answer("Sunny")],
    "arguments as text": [
        user("q"),
        answer(tool_calls=[{**CITY, "function": {"name": "weather", "arguments": ARGUMENTS}}]),
    ],
    "a last call": [user("q"), answer("Look:", tool_calls=[CITY])],
    "two calls": [user("q"), answer(tool_calls=[CITY, call("weather", city="Oslo")]), result("5"), answer("ok")],
    "a thought": [user("q"), answer("yes", thought="well")],
    "a thought and a call": [user("q"), answer(None, thought="well", tool_calls=[CITY])],
    "a thought in the past": [user("q"), answer("yes", thought="well"), user("r"), answer("no")],
    "the same words": [user("yes"), answer("yes"), user("yes"), answer("yes")],
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("shape", SHAPED)
def test_all_that_the_assistant_wrote_is_trained_and_nothing_else(name, shape):
    check(name, SHAPED[shape])


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_dialogue(drawn):
    name = drawn.draw(st.sampled_from(list(SHAPES)))
    dialogue = []
    for _ in range(drawn.draw(st.integers(1, 3))):
        dialogue.append(user(drawn.draw(TEXT)))
        if drawn.draw(st.booleans()):
            calls = [call("f", a=drawn.draw(TEXT), n=drawn.draw(st.none() | st.integers(0, 9)))]
            dialogue += [answer(drawn.draw(st.none() | TEXT), tool_calls=calls), result("42")]
        dialogue.append(answer(drawn.draw(TEXT)))
    check(name, dialogue)


@pytest.mark.parametrize("name", SHAPES)
def test_stop_ids_are_what_ends_turns(name):
    tokenizer = tokenizer_of(name)
    expected = [token for token in dict.fromkeys(SHAPES[name][4:]) if token]
    assert tokenizer.convert_ids_to_tokens(list(chat.stop_ids(tokenizer))) == expected


@pytest.mark.parametrize("switch", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": None}])
@pytest.mark.parametrize("name", SHAPES)
def test_messages_that_are_not_trained(name, switch):
    tokenizer, dialogue = tokenizer_of(name), [user("a"), {**answer("b"), **switch}, user("c"), answer("d")]
    assert trained(data.chat_example({"messages": dialogue}, tokenizer), tokenizer) == all_wrote(name, dialogue, 2)
    with pytest.raises(ValueError, match="no message of the assistant is trained"):
        data.chat_example({"messages": dialogue[:2]}, tokenizer)


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "r1"])
@pytest.mark.parametrize("completion", [" you too", [answer(" you too")]])
def test_prefill_is_continued(name, completion):
    tokenizer = tokenizer_of(name)
    row = {"prompt": [user("hi"), answer("Hello")], "completion": completion}
    example = data.completion_example(row, tokenizer)
    (whole,) = all_wrote(name, [user("hi"), answer("Hello you too")])
    assert trained(example, tokenizer) == [" you too" + whole.partition(" you too")[2]]
    seen = data.prompt_ids(row["prompt"], tokenizer)
    assert seen.tolist() == example.ids[: example.prompt].tolist()
    assert tokenizer.decode(seen).endswith("Hello")


def test_prefilled_thoughts():
    tokenizer = tokenizer_of("qwen3")
    row = {"prompt": [user("hi"), answer("<think>\nLet")], "completion": " me\n</think>\n\nyes"}
    assert trained(data.completion_example(row, tokenizer), tokenizer) == [" me\n</think>\n\nyes<|im_end|>"]


TOOLS = [{"type": "function", "function": {"name": "weather", "description": None, "parameters": {"city": "str"}}}]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "llama3.1", "mistral", "gpt-oss", "gemma", "phi3", "deepseek"])
def test_tools_reach_the_template_in_every_form(name, tools):
    tokenizer, dialogue = tokenizer_of(name), SHAPED["answer"]
    cases = [*forms(dialogue), (data.prompt_example, {"prompt": dialogue[:1]}, 0)]
    for form, row, _ in cases:
        if name in ("gemma", "phi3", "deepseek"):
            with pytest.raises(ValueError, match="field 'tools' is in the row, and the chat template never reads it"):
                form({**row, "tools": tools}, tokenizer)
            continue
        text = tokenizer.decode(form({**row, "tools": tools}, tokenizer).ids)
        assert '"name": "weather", "parameters": {"city": "str"}' in text  # and not its null description


def test_other_variables_of_a_template():
    tokenizer, off = tokenizer_of("qwen3"), {"enable_thinking": False}
    for field in ("chat_template_kwargs", "template_kwargs"):
        ids = data.prompt_example({"prompt": [user("a")], field: off}, tokenizer).ids
        assert tokenizer.decode(ids).endswith("assistant\n<think>\n\n</think>\n\n")
        example = data.completion_example({"prompt": [user("a")], "completion": "b", field: off}, tokenizer)
        assert trained(example, tokenizer) == ["b<|im_end|>"]
        for wrong, message in {"no_such": "never reads it", "messages": "cannot set messages"}.items():
            with pytest.raises(ValueError, match=message):
                data.prompt_example({"prompt": [user("a")], field: {wrong: 1}}, tokenizer)


def test_what_a_template_hides_is_refused():
    with pytest.raises(ValueError, match="does not write message 0, of the role 'system'"):
        data.chat_example(
            {"messages": [{"role": "system", "content": "Be kind"}, *SHAPED["answer"]]}, tokenizer_of("mistral")
        )
    tokenizer = tokenizer_of("phi3")
    tokenizer.chat_template = "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% endfor %}"
    with pytest.raises(ValueError, match="does not write message 0, of the role 'user'"):
        data.prompt_example({"prompt": [user("hello")]}, tokenizer)
    tokenizer.chat_template = SHAPES["phi3"][0]
    assert chat.begins_otherwise(tokenizer_of("r1")) == "<think>\n"
    assert all(chat.begins_otherwise(tokenizer_of(name)) is None for name in SHAPES if name != "r1")
