"""The forms of rows: what each kind of training needs of a row, checked, and brought to one shape.

Each `*_row` is a pure function from a row as it was read to a plain one. It raises UserError with what is wrong with
which field; `Rows.apply` and `check` put the file and line before it.

A prompt or completion is a text, or messages ([{"role": "user", "content": …}, …]) for the tokenizer's chat template.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from rljax.data import messages as said
from rljax.data.messages import Messages
from rljax.data.rows import Row, Rows, shown
from rljax.errors import UserError

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # the dialogues of Anthropic's hh-rlhf
Text = str | Messages


def text_row(row: Row) -> dict[str, Any]:
    """{"text": str}."""
    return {"text": _text(row, "text", _need(row, "text"))}


def prompt_row(row: Row) -> dict[str, Any]:
    """{"prompt": text or messages}: for generation."""
    return {"prompt": _either(row, "prompt", _need(row, "prompt"))}


def completion_row(row: Row) -> dict[str, Any]:
    """{"prompt", "completion"}, both texts or both messages."""
    needs = _need(row, "prompt", "completion")
    prompt, completion = _same_kind(_either(row, "prompt", needs), _either(row, "completion", needs))
    return {"prompt": prompt, "completion": _answer("completion", completion)}


def chat_row(row: Row) -> dict[str, Any]:
    """{"messages": [...]} with at least one message of the assistant."""
    messages = _messages(row, "messages", _need(row, "messages"))
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError("field 'messages' has no message of the role 'assistant', so there is nothing to train on")
    return {"messages": messages}


def preference_row(row: Row) -> dict[str, Any]:
    """{"prompt", "chosen", "rejected", "margin"}, three texts or three lists of messages; margin 0.0 if there is none.

    Without "prompt": chosen and rejected are whole dialogues, as messages that begin alike, or as hh-rlhf texts
    (`hh_row`). With one, chosen and rejected may both repeat it.
    """
    needs = _need(row, "chosen", "rejected") if "prompt" not in row else _need(row, "prompt", "chosen", "rejected")
    chosen, rejected = _either(row, "chosen", needs), _either(row, "rejected", needs)
    if "prompt" not in row:
        if isinstance(chosen, str) and isinstance(rejected, str):
            return {**hh_row(row), "margin": _margin(row)}
        prompt, chosen, rejected = _shared_beginning(chosen, rejected)
    else:
        prompt = _either(row, "prompt", needs)
        whole = [isinstance(side, list) and side[0]["role"] != "assistant" for side in (chosen, rejected)]
        if all(whole):  # the dialogues repeat the prompt
            shared, chosen, rejected = _shared_beginning(chosen, rejected)
            prompt = shared if isinstance(prompt, str) else prompt
            if prompt != shared:
                raise UserError(
                    "fields 'chosen' and 'rejected' are whole dialogues that do not begin with the 'prompt'"
                )
        if isinstance(chosen, list) != isinstance(rejected, list):
            raise UserError("fields 'chosen' and 'rejected' must be of one kind: two texts or two lists of messages")
    (_, chosen), (prompt, rejected) = _same_kind(prompt, chosen), _same_kind(prompt, rejected)
    chosen, rejected = _unrepeated(prompt, [chosen, rejected])
    sides = {"chosen": _answer("chosen", chosen), "rejected": _answer("rejected", rejected)}
    return {"prompt": prompt, **sides, "margin": _margin(row)}


def unpaired_row(row: Row) -> dict[str, Any]:
    """{"prompt", "completion", "label": bool}; True is a good completion."""
    needs = _need(row, "prompt", "completion", "label")
    label = row["label"]
    if not (isinstance(label, (bool, np.bool_)) or (isinstance(label, (int, np.integer)) and label in (0, 1))):
        raise UserError(f"field 'label' must be true or false, not {shown(label)}; {needs}")
    return {**completion_row(row), "label": bool(label)}


def comparison_row(row: Row) -> dict[str, Any]:
    """{"prompt", "completions": [k], "best": int, "margin"}; a preference row is k = 2 with best 0."""
    if "completions" not in row:
        pair = preference_row(row)
        return {
            "prompt": pair["prompt"],
            "completions": [pair["chosen"], pair["rejected"]],
            "best": 0,
            "margin": pair["margin"],
        }
    needs = _need(row, "prompt", "completions", "best")
    completions, best = row["completions"], row["best"]
    if not isinstance(completions, (list, tuple)) or len(completions) < 2:
        raise UserError(
            f"field 'completions' must be a list of at least two completions, not {shown(completions)}; {needs}"
        )
    if isinstance(best, bool) or not isinstance(best, (int, np.integer)) or not 0 <= best < len(completions):
        raise UserError(
            f"field 'best' must be a position in 'completions' (0 to {len(completions) - 1}), not {shown(best)}"
        )
    pairs = [completion_row({**row, "completion": completion}) for completion in completions]
    if len({isinstance(pair["prompt"], str) for pair in pairs}) > 1:
        raise UserError("field 'completions' mixes texts and messages; give one kind")
    answers = _unrepeated(pairs[0]["prompt"], [pair["completion"] for pair in pairs])
    return {"prompt": pairs[0]["prompt"], "completions": answers, "best": int(best), "margin": _margin(row)}


def hh_row(row: Row, *, chat: bool = False) -> dict[str, Any]:
    """hh-rlhf's {"chosen", "rejected"} -> {"prompt", "chosen", "rejected"}.

    Each is a dialogue "\\n\\nHuman: … \\n\\nAssistant: …".

    The prompt is all that both dialogues share up to and with their last shared "\\n\\nAssistant:"; the responses
    begin after it (with a space). chat: the same as messages for a chat template, without the markers and the spaces
    around the turns.
    """
    needs = _need(row, "chosen", "rejected")
    chosen, rejected = _text(row, "chosen", needs), _text(row, "rejected", needs)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
    shared = chosen[: sum(1 for _ in same)]
    end = shared.rfind(ASSISTANT) + len(ASSISTANT)
    if end < len(ASSISTANT):
        raise UserError(
            "there is no field 'prompt', and 'chosen' and 'rejected' do not share a dialogue that ends in "
            "'\\n\\nAssistant:': give a 'prompt', or dialogues as in hh-rlhf, or as lists of messages"
        )
    parts = {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}
    if not chat:
        return parts
    prompt = _turns(parts["prompt"].removesuffix(ASSISTANT))
    return {"prompt": prompt, **{side: _turns(ASSISTANT + parts[side]) for side in ("chosen", "rejected")}}


def _turns(dialogue: str) -> list[dict[str, Any]]:
    """An hh-rlhf dialogue as messages; text before the first marker is dropped (there is none in the data)."""
    turns: list[dict[str, Any]] = []
    rest = dialogue
    while rest:
        starts = [(rest.find(marker, 1), marker) for marker in (HUMAN, ASSISTANT)]
        end = min((start for start, _ in starts if start > 0), default=len(rest))
        turn, rest = rest[:end], rest[end:]
        for marker, role in ((HUMAN, "user"), (ASSISTANT, "assistant")):
            if turn.startswith(marker):
                turns.append({"role": role, "content": turn.removeprefix(marker).strip()})
    return turns


def unpair(rows: Rows) -> Rows:
    """2n unpaired rows of n preference rows: first every chosen completion (label True), then every rejected one.

    So the neighbours of a row in an ordered evaluation batch belong to other prompts.
    """
    n = len(rows)

    def read(i: int) -> Row:
        pair = rows.apply(preference_row, i % n)
        return {"prompt": pair["prompt"], "completion": pair["chosen" if i < n else "rejected"], "label": i < n}

    return Rows(read, 2 * n, lambda i: rows.where(i % n))


# --- fields -----------------------------------------------------------------------------------------------------------


def _need(row: Row, *fields: str) -> str:
    """Raise unless all fields are there (and not null); otherwise the end of further messages about them."""
    needs = "this run needs " + ", ".join(map(repr, fields))
    for field in fields:
        if row.get(field) is None:
            found = ", ".join(map(repr, row)) or "no fields"
            raise UserError(
                f"field {field!r} is {'null' if field in row else 'missing'}; {needs} (this row has {found})"
            )
    return needs


def _text(row: Row, field: str, needs: str) -> str:
    if not isinstance(row[field], str):
        raise UserError(f"field {field!r} must be a text, not {shown(row[field])}; {needs}")
    return row[field]


def _either(row: Row, field: str, needs: str) -> Text:
    if isinstance(row[field], str):
        return row[field]
    if not isinstance(row[field], Sequence):
        raise UserError(f"field {field!r} must be a text or a list of messages, not {shown(row[field])}; {needs}")
    return _messages(row, field, needs)


def _messages(row: Row, field: str, needs: str) -> Messages:
    return said.checked(row[field], field, needs, said.variables(row))


def _same_kind(prompt: Text, completion: Text) -> tuple[Text, Text]:
    """Both texts or both messages: a text beside messages is the user's or the assistant's message."""
    if isinstance(prompt, list) and isinstance(completion, str):
        return prompt, Messages([{"role": "assistant", "content": completion}], prompt.variables)
    if isinstance(prompt, str) and isinstance(completion, list):
        return Messages([{"role": "user", "content": prompt}], completion.variables), completion
    return prompt, completion


def repeats(prompt: Text, completions: Sequence[Text]) -> bool:
    """Whether all completions begin with the text of their prompt (or with the beginning of an answer that ends it)."""
    begun = _begun(prompt)
    texts = [x if isinstance(x, str) else x[0].get("content") or "" for x in completions]
    return bool(begun.strip()) and all(text.startswith(begun) for text in texts)


def _begun(prompt: Text) -> str:
    if isinstance(prompt, str):
        return prompt
    return prompt[-1].get("content") or "" if prompt[-1]["role"] == "assistant" else ""


def _unrepeated(prompt: Text, completions: list[Text]) -> list[Text]:
    """Completions of one prompt without it, where they all repeat it."""
    if not repeats(prompt, completions):
        return completions
    size = len(_begun(prompt))
    return [
        x[size:] if isinstance(x, str) else Messages([{**x[0], "content": x[0]["content"][size:]}, *x[1:]], x.variables)
        for x in completions
    ]


def continued(prompt: Messages, completion: Messages) -> Messages:
    """The dialogue of a prompt that ends in the beginning of an answer, and a completion that goes on with it."""
    begun, first = prompt[-1], completion[0]
    answer = {**begun, **first, "content": begun["content"] + (first.get("content") or "")}
    return Messages([*prompt[:-1], answer, *completion[1:]], prompt.variables)


def _answer(field: str, completion: Text) -> Text:
    if isinstance(completion, list) and completion[0]["role"] != "assistant":
        raise UserError(f"field {field!r} must begin with a message of the assistant, not of {completion[0]['role']!r}")
    return completion


def _shared_beginning(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Two whole dialogues as messages -> what they share, and how each goes on."""
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise UserError("fields 'chosen' and 'rejected' must be of one kind: two texts or two lists of messages")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise UserError("there is no field 'prompt', and 'chosen' and 'rejected' do not begin with the same messages")
    parts = (chosen[:shared], chosen[shared:], rejected[shared:])
    prompt, chosen, rejected = (Messages(part, chosen.variables) for part in parts)
    return prompt, chosen, rejected


def _margin(row: Row) -> float:
    margin = row.get("margin")
    margin = 0.0 if margin is None else margin
    try:
        finite = not isinstance(margin, bool) and isinstance(margin, (int, float, np.number)) and math.isfinite(margin)
    except OverflowError:  # an integer of hundreds of digits
        finite = False
    if not finite:
        raise UserError(f"field 'margin' must be a finite number, not {shown(margin)}")
    return float(margin)
