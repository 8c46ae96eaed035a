"""The forms of rows: what is accepted, what it becomes, and what is said of the rest."""

import re

import pytest

from rljax import data

ASK = [{"role": "user", "content": "Q"}]
GOOD, BAD = [{"role": "assistant", "content": "good"}], [{"role": "assistant", "content": "bad"}]
TEXTS = {"prompt": "Q", "chosen": "good", "rejected": "bad", "margin": 0.0}
CHATS = {"prompt": ASK, "chosen": GOOD, "rejected": BAD, "margin": 0.0}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Q", "chosen": "good", "rejected": "bad"}, TEXTS),
        ({"prompt": "Q", "chosen": "good", "rejected": "bad", "margin": 2, "other": 1}, {**TEXTS, "margin": 2.0}),
        ({"prompt": "Q", "chosen": "good", "rejected": "bad", "margin": None}, TEXTS),
        ({"prompt": ASK, "chosen": GOOD, "rejected": BAD}, CHATS),
        ({"prompt": ASK, "chosen": "good", "rejected": "bad"}, CHATS),
        ({"prompt": "Q", "chosen": GOOD, "rejected": BAD}, CHATS),
        ({"chosen": ASK + GOOD, "rejected": ASK + BAD}, CHATS),
        ({"prompt": ASK, "chosen": ASK + GOOD, "rejected": ASK + BAD}, CHATS),
        ({"prompt": "Q", "chosen": ASK + GOOD, "rejected": ASK + BAD}, CHATS),  # as UltraFeedback has it
        ({"chosen": ASK + GOOD, "rejected": ASK + GOOD}, {**CHATS, "rejected": GOOD}),
        (
            {"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"},
            {"prompt": "\n\nHuman: Q\n\nAssistant:", "chosen": " good", "rejected": " bad", "margin": 0.0},
        ),
    ],
)
def test_preference_forms(row, expected):
    assert data.preference_row(row) == expected
    assert data.preference_row(expected) == expected


def test_shared_beginning_of_several_turns():
    first = [*ASK, *GOOD, {"role": "user", "content": "and?"}]
    row = data.preference_row({"chosen": first + GOOD, "rejected": first + BAD})
    assert (row["prompt"], row["chosen"], row["rejected"]) == (first, GOOD, BAD)


@pytest.mark.parametrize(
    ("form", "row", "message"),
    [
        (data.text_row, {"texts": "a"}, "field 'text' is missing; this run needs 'text' (this row has 'texts')"),
        (data.text_row, {"text": None}, "field 'text' is null"),
        (data.text_row, {"text": ["a"]}, "field 'text' must be a text, not list ['a']"),
        (
            data.preference_row,
            {"prompt": "Q", "chosen": "x"},
            "field 'rejected' is missing; this run needs 'prompt', 'chosen', 'rejected' "
            "(this row has 'prompt', 'chosen')",
        ),
        (data.preference_row, {"chosen": "a", "rejected": "b"}, "do not share a dialogue that ends in"),
        (data.preference_row, {"chosen": GOOD, "rejected": BAD}, "do not begin with the same messages"),
        (data.preference_row, {"chosen": ASK + GOOD, "rejected": "bad"}, "must be of one kind"),
        (data.preference_row, {"prompt": "Q", "chosen": GOOD, "rejected": "bad"}, "must be of one kind"),
        (
            data.preference_row,
            {"prompt": GOOD, "chosen": ASK + GOOD, "rejected": ASK + BAD},
            "do not begin with the 'prompt'",
        ),
        (
            data.preference_row,
            {"chosen": ASK + ASK, "rejected": ASK + BAD},
            "'chosen' must begin with a message of the assistant",
        ),
        (data.preference_row, {**TEXTS, "margin": "2"}, "field 'margin' must be a finite number, not str '2'"),
        (data.preference_row, {**TEXTS, "margin": float("nan")}, "field 'margin' must be a finite number"),
        (
            data.completion_row,
            {"prompt": 3, "completion": "a"},
            "'prompt' must be a text or a list of messages, not int 3",
        ),
        (data.completion_row, {"prompt": [], "completion": "a"}, "list of messages that is not empty"),
        (data.completion_row, {"prompt": [{"role": "user"}], "completion": "a"}, "message 0 is dict {'role': 'user'}"),
        (data.completion_row, {"prompt": ["a"], "completion": "a"}, "message 0 is str 'a'"),
        (data.chat_row, {"messages": ASK}, "no message of the role 'assistant'"),
        (data.chat_row, {"messages": "hi"}, "must be a list of messages that is not empty, not str 'hi'"),
        (
            data.unpaired_row,
            {"prompt": "Q", "completion": "a", "label": "yes"},
            "'label' must be true or false, not str 'yes'",
        ),
        (data.unpaired_row, {"prompt": "Q", "completion": "a", "label": 2}, "'label' must be true or false, not int 2"),
        (data.comparison_row, {"prompt": "Q", "completions": ["a"], "best": 0}, "at least two completions"),
        (data.comparison_row, {"prompt": "Q", "completions": ["a", "b"], "best": 2}, "(0 to 1), not int 2"),
        (data.comparison_row, {"prompt": "Q", "completions": ["a", "b"], "best": True}, "(0 to 1), not bool True"),
        (data.comparison_row, {"prompt": "Q", "completions": ["a", GOOD], "best": 0}, "mixes texts and messages"),
        (data.comparison_row, {"prompt": "Q", "completions": ["a", 7], "best": 0}, "'completion' must be a text"),
    ],
)
def test_refused(form, row, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        form(row)


def test_other_forms():
    assert data.prompt_row({"prompt": ASK, "answer": 4}) == {"prompt": ASK}
    assert data.completion_row({"prompt": "Q", "completion": ""}) == {"prompt": "Q", "completion": ""}
    assert data.unpaired_row({"prompt": "Q", "completion": "a", "label": 0})["label"] is False
    three = {"prompt": "Q", "completions": ["a", "b", "c"], "best": 2, "margin": 0.5}
    assert data.comparison_row(three) == three
    assert data.comparison_row({"chosen": ASK + GOOD, "rejected": ASK + BAD, "margin": 1}) == {
        "prompt": ASK,
        "completions": [GOOD, BAD],
        "best": 0,
        "margin": 1.0,
    }


def test_hh_dialogues():
    shared = "\n\nHuman: one \n\nAssistant: two\n\nHuman: three\n\nAssistant:"
    row = {"chosen": shared + " Human: no\n\nHuman", "rejected": shared}
    assert data.hh_row(row) == {"prompt": shared, "chosen": " Human: no\n\nHuman", "rejected": ""}
    contents = [("user", "one"), ("assistant", "two"), ("user", "three")]
    assert data.hh_row(row, chat=True) == {
        "prompt": [{"role": role, "content": content} for role, content in contents],
        "chosen": [{"role": "assistant", "content": "Human: no\n\nHuman"}],
        "rejected": [{"role": "assistant", "content": ""}],
    }
    assert data.preference_row(data.hh_row(row, chat=True))["prompt"][2]["content"] == "three"


def test_unpair_keeps_neighbours_apart():
    rows = data.unpair(data.read([{"prompt": f"Q{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(3)]))
    assert [tuple(row.values()) for row in rows] == [
        ("Q0", "c0", True),
        ("Q1", "c1", True),
        ("Q2", "c2", True),
        ("Q0", "r0", False),
        ("Q1", "r1", False),
        ("Q2", "r2", False),
    ]
    assert rows.where(4) == "rows[1]"
    with pytest.raises(ValueError, match=re.escape("rows[0]: field 'rejected' is missing")):
        data.unpair(data.read([{"prompt": "Q", "chosen": "c"}]))[0]
