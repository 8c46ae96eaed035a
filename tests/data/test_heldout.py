"""Held-out rows share no prompt with training."""

import pytest

from rljax import data

PAIRS = [
    {"prompt": f"Question {i // 4}" + ("", "?", "  !", "\n")[i % 4], "chosen": f"a{i}", "rejected": "b"}
    for i in range(80)
]


def keys(rows):
    return {data.prompt_key(row) for row in rows}


def test_no_prompt_is_on_both_sides():
    rows = data.read(PAIRS)
    train, held = data.split_prompts(rows, count=8, seed=3)
    assert (len(train), len(held)) == (72, 8)
    assert not keys(train) & keys(held)
    assert sorted(row["chosen"] for row in [*train, *held]) == sorted(row["chosen"] for row in PAIRS)
    assert data.shared_prompts(train, held) == []
    assert [row["chosen"] for row in data.split_prompts(rows, count=8, seed=3)[1]] == [row["chosen"] for row in held]
    assert keys(data.split_prompts(rows, count=8, seed=4)[1]) != keys(held)
    assert len(data.split_prompts(rows, count=1)[1]) == 4  # no group is that small: the smallest one
    assert data.split_prompts(data.read(PAIRS[:4]), count=1) is None
    by_row = data.split(rows, count=8, seed=3)
    assert data.shared_prompts(*by_row) == list(range(8))  # what splitting by row does to such data


@pytest.mark.parametrize(
    "rows",
    [
        ({"prompt": "What is it?"}, {"prompt": " what  is it"}, {"prompt": "What is his?"}),
        (
            {"prompt": [{"role": "user", "content": "A b"}]},
            {"prompt": [{"role": "user", "content": "a B."}]},
            {"prompt": "c"},
        ),
        (
            {"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "x"}]},
            {"messages": [{"role": "user", "content": "a!"}, {"role": "assistant", "content": "y"}]},
            {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "x"}]},
        ),
        ({"text": "Ｏnce"}, {"text": "once "}, {"text": "twice"}),
        (
            {"chosen": "\n\nHuman: Q\n\nAssistant: a", "rejected": "\n\nHuman: Q\n\nAssistant: b"},
            {"chosen": "\n\nHuman: q!\n\nAssistant: c", "rejected": "\n\nHuman: q!\n\nAssistant: d"},
            {"chosen": "\n\nHuman: R\n\nAssistant: a", "rejected": "\n\nHuman: R\n\nAssistant: b"},
        ),
        ({"question": "2+2", "answer": "4"}, {"question": "2 + 2", "answer": "four"}, {"question": "2+3"}),
        ({"n": 1}, {"n": 1}, {"n": 2}),
        ({"prompt": "?!"}, {"prompt": "?!"}, {"prompt": "!?"}),
    ],
)
def test_near_duplicates_have_one_key(rows):
    first, second, other = map(data.prompt_key, rows)
    assert first == second != other
