"""Any row at all: an example, or an error that says where the row is; never a traceback of another kind, or silence."""

import functools
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rljax import UserError, data
from tests.data.templates import tokenizer_of

FUZZ = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ODD = ["", " ", "a", "hi there", "</s>", "<s>10</s> x", "<|im_end|>", "\ud800", "\x00\u2028", "🙂", "x" * 3000]
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 10**400, 1.5, float("inf"), float("nan")]),
    st.sampled_from(ODD),
)
calls = st.fixed_dictionaries(
    {}, optional={"name": scalars, "arguments": scalars | st.dictionaries(st.sampled_from("ab"), scalars, max_size=2)}
)
messages = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", "", None, 3]),
        "content": scalars,
        "tool_calls": scalars | st.lists(calls | st.fixed_dictionaries({"function": calls | scalars}), max_size=2),
        "weight": scalars,
        "reasoning_content": scalars,
    },
)
values = scalars | st.lists(messages | scalars, max_size=3)
FIELDS = ("text", "prompt", "completion", "chosen", "rejected", "completions", "messages", "tools", "margin")
rows = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(FIELDS, values) | {"label": scalars, "best": scalars, "chat_template_kwargs": scalars},
)
FORMS = [
    data.text_example,
    data.prompt_example,
    data.completion_example,
    data.chat_example,
    data.preference_example,
    data.unpaired_example,
    data.comparison_example,
]


tokenizer = functools.cache(tokenizer_of)


def examples_of(found):
    """Of any form's result."""
    if isinstance(found, data.Example):
        return (found,)
    return (found.example,) if isinstance(found, data.Unpaired) else getattr(found, "examples", found)


def place(path, action):
    """The action's result, or None after an error that names the file."""
    try:
        return action()
    except UserError as error:
        if not str(error).startswith(path.name):
            raise AssertionError(f"an error without a place: {error}") from error
        return None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3", "deepseek"])
@FUZZ
@given(row=rows)
def test_any_row(tmp_path, name, row):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"a": 1}) + "\n" + json.dumps(row) + "\n")
    read = data.read(path)
    for form in FORMS:
        made = functools.partial(form, tokenizer=tokenizer(name))
        found = place(path, functools.partial(read.apply, made, 1))
        if found is not None and form is not data.prompt_example:
            assert all(one.mask[one.prompt :].any() for one in examples_of(found))
    data.fingerprint([read[1]])
    data.write_jsonl(tmp_path / "again.jsonl", [read[1]])
    assert place(path, lambda: read.apply(data.prompt_key, 1)) is not None or "chosen" in row


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.parquet", "x.jsonl.gz"])
@FUZZ
@given(content=st.binary(max_size=60), at=st.integers(0, 400), damage=st.binary(min_size=1, max_size=4))
def test_any_file(tmp_path, name, content, at, damage):
    path = tmp_path / name
    whole = [{"prompt": f"p{i}", "n": [1.5, None]} for i in range(3)]
    if name == "x.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(whole), path)
    elif name == "x.json":
        path.write_text(json.dumps(whole))
    else:
        data.write_jsonl(path, whole)
    bytes_of = bytearray(path.read_bytes())
    at %= len(bytes_of)
    bytes_of[at : at + len(damage)] = damage
    for blob in (bytes(bytes_of), bytes(bytes_of[:at]), content):
        path.write_bytes(blob)
        place(path, lambda: list(data.read(path)))


DEEP = "[" * 100_000


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
@pytest.mark.parametrize(
    "text", ['{"a": ' + DEEP, DEEP, '{"a": ' + "1" * 5000 + "}"], ids=["a deep field", "a deep row", "many digits"]
)
def test_depth_and_digits(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(name)):
        list(data.read(path))
