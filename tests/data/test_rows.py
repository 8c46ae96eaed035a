"""Selecting, splitting, hashing, writing and checking rows."""

import json
import os
import re
import threading

import numpy as np
import pytest

from rljax import data
from rljax.data import progress

ROWS = data.read([{"n": i} for i in range(20)])


def test_select_keeps_order_and_places():
    some = ROWS.select(np.array([5, 3, -1]))
    assert [row["n"] for row in some] == [5, 3, 19]
    assert some.select([1]).where(0) == "rows[3]"
    with pytest.raises(IndexError):
        ROWS.select([20])


def test_split_is_disjoint_and_reproducible():
    train, held = data.split(ROWS, count=5, seed=1)
    assert (len(train), len(held)) == (15, 5)
    assert sorted(row["n"] for row in [*train, *held]) == list(range(20))
    assert [row["n"] for row in train] == sorted(row["n"] for row in train)
    again = data.split(ROWS, fraction=0.25, seed=1)
    assert list(again[1]) == list(held)
    assert list(data.split(ROWS, count=5, seed=2)[1]) != list(held)
    assert len(data.split(ROWS, fraction=0.001)[1]) == 1


@pytest.mark.parametrize(
    "how", [{}, {"count": 1, "fraction": 0.5}, {"count": 0}, {"count": 20}, {"fraction": 1.0}, {"fraction": 0.0}]
)
def test_split_refuses(how):
    with pytest.raises(ValueError, match="split"):
        data.split(ROWS, **how)


def test_check_names_the_first_bad_row():
    rows = data.read([{"text": "a"}, {"text": 1}, {}])
    with pytest.raises(
        ValueError, match=re.escape("rows[1]: field 'text' must be a text, not int 1; this run needs 'text'")
    ):
        data.check(rows, data.text_row)
    with pytest.raises(ValueError, match=re.escape("rows[2]: field 'text' is missing (this row has no fields)")):
        data.check(rows, lambda row: row["text"])


def test_fingerprint_sees_all_content_and_only_content():
    base = [{"a": 1, "b": ["x", "y"]}, {"a": None}]
    same = [{"b": ("x", "y"), "a": np.int64(1)}, {"a": None}]
    assert data.fingerprint(base) == data.fingerprint(same) == data.fingerprint(data.read(base))
    others = [
        [{"a": None}, {"a": 1, "b": ["x", "y"]}],
        [{"a": 1, "b": ["xy"]}, {"a": None}],
        [{"a": 1.0, "b": ["x", "y"]}, {"a": None}],
        [{"a": True, "b": ["x", "y"]}, {"a": None}],
        [{"a": "1", "b": ["x", "y"]}, {"a": None}],
        [{"a": 1, "b": [["x"], "y"]}, {"a": None}],
        base[:1],
    ]
    assert len({data.fingerprint(other) for other in [base, *others]}) == len(others) + 1
    assert data.fingerprint([{"a": {"b": 1, "c": 2}}]) != data.fingerprint([{"a": {"b": 1}, "c": 2}])
    ids = np.arange(3, dtype=np.int32)
    first = data.Example(ids, np.array([False, True, True]), 1)
    assert data.fingerprint([first]) == data.fingerprint([data.Example(ids.copy(), first.mask.copy(), 1)])
    changed = [
        data.Example(ids, ~first.mask, 1),
        data.Example(ids, first.mask, 2),
        data.Example(ids + 1, first.mask, 1),
    ]
    assert len({data.fingerprint([example]) for example in [first, *changed]}) == 4
    assert data.fingerprint([]) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    with pytest.raises(ValueError, match="cannot hash"):
        data.fingerprint([{"a": object()}])


@pytest.mark.parametrize("name", ["deep/x.jsonl", "x.jsonl.gz"])
def test_write_jsonl_is_whole_or_not_there(tmp_path, name):
    rows = [{"a": "é\u2028\n", "b": np.float32(0.5), "c": np.arange(2)}]
    path = data.write_jsonl(tmp_path / name, rows)
    assert list(data.read(path)) == [{"a": "é\u2028\n", "b": 0.5, "c": [0, 1]}]
    before = path.read_bytes()

    def torn():
        yield {"a": 1}
        raise RuntimeError("lost power")

    with pytest.raises(RuntimeError, match="lost power"):
        data.write_jsonl(path, torn())
    with pytest.raises(ValueError, match="cannot write"):
        data.write_jsonl(path, [{"a": object()}])
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_write_jsonl_gives_the_same_bytes(tmp_path):
    paths = [data.write_jsonl(tmp_path / f"{i}.jsonl.gz", [{"a": 1}]) for i in range(2)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_reading_from_several_threads(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps({"n": i, "x": "y" * (i % 97)}) + "\n" for i in range(500)))
    rows, wrong = data.read(path), []

    def work(offset):
        wrong.extend(i for i in range(500) if rows[(i * 7 + offset) % 500]["n"] != (i * 7 + offset) % 500)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_progress_shows_only_when_slow(monkeypatch, capsys):
    assert list(progress.track(range(3), "quick", 3)) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress, "PATIENCE", -1.0)
    assert list(progress.track(range(3), "slow", 3)) == [0, 1, 2]
    assert "slow" in capsys.readouterr().err
