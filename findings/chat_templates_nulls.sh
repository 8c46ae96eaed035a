#!/usr/bin/env bash
# What transformers' chat templates do with null fields and with tool calls.
#
# Versions: transformers 5.23.0, jinja2 3.1.6, pyarrow 21.0.0, Python 3.11 (no torch).
#
# One would guess: `apply_chat_template` writes what the messages say; a field that is null is as if it were absent; a
# template that works for a dialogue from JSON works for the same dialogue from Parquet; a call's arguments may be an
# object or its JSON text, as in OpenAI's format.
#
# Seen:
#  1. Null keys of a *message* are left out before rendering, those inside of it are not: Arrow gives every struct the
#     union of all keys, so the arguments {"city": "Rome"} beside another row's {"year": 1999} are written (and
#     trained) as {"city": "Rome", "year": null}.
#  2. Since null keys are left out, a template that asks `message['content'] is none` before a call, as those of
#     DeepSeek V3 and R1 do, no longer gets a yes: a valid message with content null raises UndefinedError.
#  3. Arguments as JSON text, through a template that writes `arguments | tojson` (Qwen 2.5, Llama 3.1), are quoted once
#     more: "arguments": "{\"city\": \"Rome\"}". Nothing is said.
#  4. A template that knows no calls (SmolLM2's) renders a message that is only a call as an empty answer.
#
# Why it matters here: data sets of tool calls live in Parquet. All of these are silent in the text that is trained
# on, but for 2, which refuses the very form that OpenAI's API returns.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 jinja2==3.1.6 pyarrow==21.0.0
cat > "$folder/look.py" <<'PY'
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

CALLS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "{\"name\": \"{{ c.function.name }}\", \"arguments\": {{ c.function.arguments | tojson }}}{% endfor %}{% endfor %}"
)
ASKS_FOR_NULL = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and 'tool_calls' in m %}{% if m['content'] is none %}"
    "<call>{% else %}{{ '<words>' + m['content'] }}{% endif %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
NO_CALLS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"


def render(template, messages):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), chat_template=template)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def call(arguments, **fields):
    return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}], **fields}


rows = [{"messages": [{"role": "user", "content": "q"}, call(a)]} for a in ({"city": "Rome"}, {"year": 1999})]
pq.write_table(pa.Table.from_pylist(rows), "rows.parquet")
read = pq.read_table("rows.parquet").to_pylist()

found = {
    "from JSON": render(CALLS, rows[0]["messages"]),
    "from Parquet": render(CALLS, read[0]["messages"]),
    "content null, asked for": render(ASKS_FOR_NULL, [{"role": "user", "content": "q"}, call({}, content=None)]),
    "arguments as text": render(CALLS, [{"role": "user", "content": "q"}, call('{"city": "Rome"}')]),
    "a template without calls": render(NO_CALLS, [{"role": "user", "content": "q"}, call({"a": 1}, content="")]),
}
for name, text in found.items():
    print(f"{name:26}{text}")
expected = {
    "from JSON": '<user>q<assistant>{"name": "f", "arguments": {"city": "Rome"}}',
    "from Parquet": '<user>q<assistant>{"name": "f", "arguments": {"city": "Rome", "year": null}}',
    "content null, asked for": "UndefinedError: 'dict object' has no attribute 'content'",
    "arguments as text": '<user>q<assistant>{"name": "f", "arguments": "{\\"city\\": \\"Rome\\"}"}',
    "a template without calls": "<user>q<end><assistant><end>",
}
assert found == expected, "this is no longer what is seen"
PY
cd "$folder" && "$folder/venv/bin/python" look.py
