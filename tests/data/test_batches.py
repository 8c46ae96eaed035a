"""Padding, packing and the collations: fixed shapes, segments from lengths, nothing lost."""

import re

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from rljax import data
from rljax.types import ComparisonBatch, Tokens


def example(n, *, start=1, prompt=0):
    """Tokens start, start+1, …; all after the prompt (and after the first) are trained."""
    mask = np.arange(n) >= max(prompt, 1)
    return data.Example(np.arange(start, start + n, dtype=np.int32), mask, prompt)


def lists(tokens):
    assert isinstance(tokens, Tokens)
    assert (tokens.ids.dtype, tokens.segments.dtype, tokens.mask.dtype) == (np.int32, np.int32, np.bool_)
    assert isinstance(tokens.ids, np.ndarray)
    return (
        np.asarray(tokens.ids).tolist(),
        np.asarray(tokens.segments).tolist(),
        np.asarray(tokens.mask).astype(int).tolist(),
    )


def test_pad():
    packed = (example(2), example(3, start=7))
    ids, segments, mask = lists(data.pad([example(3, prompt=1), packed, None, example(6)], 6))
    assert ids == [[1, 2, 3, 0, 0, 0], [1, 2, 7, 8, 9, 0], [0] * 6, [1, 2, 3, 4, 5, 6]]
    assert segments == [[1, 1, 1, 0, 0, 0], [1, 1, 2, 2, 2, 0], [0] * 6, [1] * 6]
    assert mask == [[0, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 0], [0] * 6, [0, 1, 1, 1, 1, 1]]
    with pytest.raises(ValueError, match="6 tokens do not fit in rows of length=5"):
        data.pad([example(6)], 5)


def test_pad_does_not_look_at_ids(chatml):
    eos = chatml.pad_token_id
    full = data.Example(np.full(4, eos, np.int32), np.array([False, True, True, True]))
    _, segments, mask = lists(data.pad([full], 6))
    assert segments == [[1, 1, 1, 1, 0, 0]]
    assert mask == [[0, 1, 1, 1, 0, 0]]


def test_pack_fills_rows_and_is_deterministic():
    documents = [example(n, start=10 * n) for n in (3, 5, 2, 4, 2)]
    rows = data.pack(documents, 8)
    assert [[len(e.ids) for e in row] for row in rows] == [[5, 3], [4, 2, 2]]
    assert rows[1][1].ids[0] == 20
    again = data.pack(documents, 8)
    assert [[e.ids.tolist() for e in row] for row in rows] == [[e.ids.tolist() for e in row] for row in again]
    assert lists(data.collate_supervised(rows, 8))[1] == [[1] * 5 + [2] * 3, [1] * 4 + [2] * 2 + [3] * 2]
    assert [len(row) for row in data.pack(documents, 8, window=2)] == [2, 2, 1]  # neighbours only


@hypothesis.given(st.lists(st.integers(2, 12), min_size=1, max_size=40), st.integers(12, 20), st.integers(1, 50))
@hypothesis.settings(max_examples=50, deadline=None)
def test_pack_loses_and_overfills_nothing(lengths, length, window):
    documents = [example(n, start=1000 * i) for i, n in enumerate(lengths)]
    rows = data.pack(documents, length, window=window)
    assert sorted(int(e.ids[0]) for row in rows for e in row) == [1000 * i for i in range(len(lengths))]
    assert all(sum(len(e.ids) for e in row) <= length for row in rows)
    assert len(rows) <= len(lengths)
    tokens = data.pad(rows, length)
    assert int(tokens.mask.sum()) == sum(n - 1 for n in lengths)


def test_pack_long_and_untrained_documents():
    documents = [example(9), example(3, prompt=3), example(9, prompt=7)]
    rows = data.pack(documents, 6)
    assert [[len(e.ids) for e in row] for row in rows] == [[6]]  # the others have nothing trained within six tokens
    with pytest.raises(ValueError, match="document 0 has 9 tokens and rows hold length=6"):
        data.pack(documents, 6, truncate=False)
    with pytest.raises(ValueError, match="none of the 1 documents has a trained token"):
        data.pack([example(3, prompt=3)], 6)


def test_collate_preference():
    pair = (example(3, prompt=1), example(2, prompt=1))
    chosen, rejected = data.collate_preference([pair, None], 4)
    assert lists(chosen)[1] == [[1, 1, 1, 0], [0] * 4]
    assert lists(rejected)[1] == [[1, 1, 0, 0], [0] * 4]


def test_collate_comparison():
    items = [data.Comparison((example(2), example(3), example(1)), 1, 0.5), None]
    batch = data.collate_comparison(items, 3, k=3)
    assert isinstance(batch, ComparisonBatch)
    assert np.asarray(batch.tokens.segments).tolist() == [[[1, 1, 0], [1, 1, 1], [1, 0, 0]], [[0] * 3] * 3]
    assert (batch.best.tolist(), batch.best.dtype) == ([1, 0], np.int32)
    assert (batch.margin.tolist(), batch.margin.dtype) == ([0.5, 0.0], np.float32)
    with pytest.raises(ValueError, match="3 completions and the batch k=2"):
        data.collate_comparison(items, 3)


def test_memoized_tokenises_each_row_once():
    calls = []
    rows = data.read([{"n": 2}, {"n": 3}])
    get = data.memoized(rows, lambda row: calls.append(row) or example(row["n"]))
    assert get(-1) is None
    assert [len(get(i).ids) for i in (0, 1, 0, np.int64(1))] == [2, 3, 2, 3]
    assert len(calls) == 2
    small = data.memoized(rows, lambda row: calls.append(row) or example(row["n"]), capacity=1)
    assert [len(small(i).ids) for i in (0, 1, 0)] == [2, 3, 2]
    assert len(calls) == 5


def test_errors_name_the_row(plain):
    rows = data.read([{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    message = re.escape("rows[1]: field 'completion' is missing")
    with pytest.raises(ValueError, match=message):
        data.tokenize(rows, lambda row: data.completion_example(row, plain))
    with pytest.raises(ValueError, match=message):
        data.memoized(rows, lambda row: data.completion_example(row, plain))(1)


def test_every_process_count_reads_the_same_global_batch(plain):
    rows = data.unpair(data.read([{"prompt": f"Once {i}", "chosen": " a" * i, "rejected": " b" * i} for i in range(9)]))
    get = data.memoized(rows, lambda row: data.unpaired_example(row, plain, max_prompt=8, max_completion=8))

    def make(indices):
        return data.pad([get(i).example for i in indices], 16)

    def read(p, of):
        tokens = data.Batches(make, len(rows), batch=8, seed=3, here=np.split(np.arange(8), of)[p])(5)
        return [tokens.ids, tokens.segments, tokens.mask]

    whole = read(0, 1)
    for of in (2, 4):
        parts = zip(*(read(p, of) for p in range(of)), strict=True)
        for part, expected in zip(parts, whole, strict=True):
            np.testing.assert_array_equal(np.concatenate(part), expected)
