"""What is said of the rows of a run: counted, named by file and line, dropped or refused on request."""

import functools

import numpy as np
import pytest

from rljax import data, notes


def survey(rows, form, tokenizer, name="training", overlong="cut", positions=None, **limits):
    example = functools.partial(form, tokenizer=tokenizer, **limits)
    return data.survey(data.read(rows), example, name=name, overlong=overlong, positions=positions, tokenizer=tokenizer)


LIMITS = {"max_prompt": 4, "max_completion": 4}
ROWS = [
    {"prompt": "Once", "chosen": " upon", "rejected": " a"},
    {"prompt": "Once upon a time there was", "chosen": " a", "rejected": " b"},
    {"prompt": "Once", "chosen": " a a a a b", "rejected": " a a a a c"},
    {"prompt": "Once", "chosen": " a", "rejected": " a"},
    {"prompt": "Once", "chosen": "", "rejected": "<s> a"},
    {"prompt": "Once", "chosen": "Once a", "rejected": "Once b"},
]


def test_what_is_said_of_pairs(plain):
    found = survey(ROWS, data.preference_example, plain, positions=5, **LIMITS)
    assert found.lines == [
        "1 of 6 training rows have a prompt longer than max_prompt: it loses its beginning (rows[1])",
        "1 of 6 training rows are longer than their limit: they lose their end (rows[2])",
        "1 of 6 training rows are pairs of one and the same completion: they have no gradient (rows[3])",
        "1 of 6 training rows are pairs that are alike once they are cut: they have no gradient (rows[2])",
        "1 of 6 training rows have an empty completion: only its end is trained (rows[4])",
        "1 of 6 training rows repeat the prompt at the beginning of every completion: it is taken once (rows[5])",
        "1 of 6 training rows spell special tokens in their texts: they are read as those tokens (rows[4])",
        "1 of 6 training rows need more positions than the model was made for (max_position_embeddings) (rows[1])",
    ]
    assert len(found.rows) == 6
    assert found.get(-1) is None


def test_rows_that_are_too_long_are_left_out_or_refused(plain):
    found = survey(ROWS, data.preference_example, plain, overlong="drop", **LIMITS)
    assert found.lines[0] == "2 of 6 training rows are left out, too long (rows[1], rows[2])"
    assert not any("lose" in line for line in found.lines)
    assert [row["chosen"] for row in found.rows] == [" upon", " a", "", "Once a"]
    whole = data.preference_example(ROWS[3], plain)[0]
    assert np.array_equal(found.get(1)[0].ids, whole.ids)
    with pytest.raises(
        ValueError, match=r"2 of 6 training rows are longer than .* \(rows\[1\], rows\[2\]\) and overlong="
    ):
        survey(ROWS, data.preference_example, plain, overlong="refuse", **LIMITS)
    with pytest.raises(ValueError, match="all 1 training rows are longer"):
        survey(ROWS[1:2], data.preference_example, plain, overlong="drop", **LIMITS)


def test_texts_and_chats_that_are_cut(plain, chatml):
    assert survey([{"text": "Once upon a time"}], data.text_example, plain, max_length=3).lines == [
        "1 of 1 training rows are longer than their limit: they lose their end (rows[0])"
    ]
    chats = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 5
    assert survey(chats, data.chat_example, chatml, max_length=8).lines == [
        "5 of 5 training rows are longer than their limit: they lose their end (rows[0], rows[1], rows[2], …)",
        "5 of 5 training rows train no token (rows[0], rows[1], rows[2], …)",
    ]


def test_prompts(plain):
    rows = [{"prompt": "Once upon a time"}, {"prompt": "Once"}]
    assert survey(rows, data.prompt_example, plain, max_prompt=2).lines == [
        "1 of 2 training rows have a prompt longer than max_prompt: it loses its beginning (rows[0])"
    ]
    assert survey(rows, data.prompt_example, plain, max_prompt=9).lines == []


def test_data_without_signal(plain):
    same = survey(ROWS[3:4], data.preference_example, plain)
    assert "all training pairs are of one and the same completion: there is nothing to learn from them" in same.lines
    good = [{"prompt": "Once", "completion": " a", "label": True}]
    found = survey(good, data.unpaired_example, plain, name="held-out")
    assert found.lines == ["all held-out completions are desirable: a loss of both kinds has nothing to tell them from"]
    assert survey([*good, {**good[0], "label": 0}], data.unpaired_example, plain).lines == []


def test_a_row_that_only_the_template_refuses_is_found(chatml):
    rows = [
        {"prompt": [{"role": "user", "content": "a"}]},
        {"prompt": [{"role": "user", "content": "a"}], "tools": [{}]},
    ]
    with pytest.raises(ValueError, match=r"rows\[1\]: field 'tools' is in the row"):
        survey(rows, data.prompt_example, chatml)


def test_notes_are_said_once_and_kept(tmp_path):
    said = []
    notes.keep(tmp_path / "run", "data", ["a", "b"], said.append)
    notes.keep(tmp_path / "run", "data", ["a", "b"], said.append)
    notes.keep(tmp_path / "run", "weights", ["c"], said.append)
    notes.keep(tmp_path / "run", "data", ["b", "d"], said.append)
    assert said == ["note: a", "note: b", "note: c", "note: d"]
    assert notes.read(tmp_path / "run") == {"data": ["b", "d"], "weights": ["c"]}
    assert notes.read(tmp_path) == {}
