"""Whole real files through the pipeline. None of hh-rlhf's text may appear in a message, so asserts compare counts."""

import numpy as np
import pytest

from rljax import data


@pytest.fixture(scope="module")
def hh(shared):
    return data.read(shared / "data/hh_rlhf/harmless-base-test.jsonl.gz")


def test_every_hh_row_splits_into_its_dialogue(hh):
    data.check(hh, data.preference_row)
    wrong, same_prompt, empty = [], 0, 0
    for i, row in enumerate(hh):
        parts = data.hh_row(row)
        same_prompt += row["chosen"].rpartition("\n\nAssistant:")[0] == row["rejected"].rpartition("\n\nAssistant:")[0]
        empty += not parts["chosen"].strip() or not parts["rejected"].strip()
        chat = data.hh_row(row, chat=True)
        answers = [chat[side] for side in ("chosen", "rejected")]
        good = (
            all(parts["prompt"] + parts[side] == row[side] for side in ("chosen", "rejected"))
            and parts["prompt"].startswith("\n\nHuman:")
            and parts["prompt"].endswith("\n\nAssistant:")
            and parts["chosen"] != parts["rejected"]
            and chat["prompt"][0]["role"] == "user"
            and all(answer[0]["role"] == "assistant" for answer in answers)
            and len(chat["prompt"]) == row["chosen"].count("\n\nHuman:") + parts["prompt"].count("\n\nAssistant:") - 1
        )
        wrong += [] if good else [i]
    assert (len(hh), wrong) == (2312, [])
    assert (same_prompt, empty) == (2307, 4)  # five rows have one more "Assistant:" in one of the two answers


def test_hh_pairs_tokenise(hh, plain):
    rows = data.split(hh, count=200, seed=0)[1]
    get = data.memoized(rows, lambda row: data.preference_example(row, plain, max_prompt=64, max_completion=64))
    wrong = []
    for i in range(len(rows)):
        chosen, rejected = get(i)
        ends = [example.ids.tolist().count(plain.eos_token_id) for example in (chosen, rejected)]
        full = [len(example.ids) - example.prompt == 64 for example in (chosen, rejected)]
        good = (
            np.array_equal(chosen.ids[: chosen.prompt], rejected.ids[: rejected.prompt])
            and chosen.prompt <= 64
            and all(end == 1 or (cut and end == 0) for end, cut in zip(ends, full, strict=True))
            and all(example.mask.sum() == len(example.ids) - example.prompt for example in (chosen, rejected))
        )
        wrong += [] if good else [i]
    assert wrong == []
    tokens, _ = data.collate_preference([get(i) for i in range(8)], 128)
    assert tokens.ids.shape == (8, 128)


def test_gsm8k_as_prompts_and_completions(shared, chatml):
    rows = data.read(shared / "data/gsm8k/train.jsonl.gz")
    assert len(rows) == 7473
    tests = data.read(shared / "data/gsm8k/test.jsonl")
    assert (len(tests), tests.where(3)) == (1319, "test.jsonl:4")
    rows = rows.map(lambda row: {"prompt": row["question"] + "\n", "completion": row["answer"]})
    data.check(rows, data.completion_row)
    examples = data.tokenize(rows[:100], lambda row: data.completion_example(row, chatml))
    for row, example in zip(rows[:100], examples, strict=True):
        assert chatml.decode(example.ids) == row["prompt"] + row["completion"] + "<|im_end|>"
        assert chatml.decode(example.ids[example.mask]) == row["completion"] + "<|im_end|>"
    packed = data.pack(examples, 1024)
    assert sum(len(row) for row in packed) == 100
    assert sum(len(e.ids) for e in examples) / (1024 * len(packed)) > 0.93  # how full the rows are


def test_model_solutions_as_preferences(shared, plain):
    rows = data.read(shared / "data/gsm8k/model_solutions.jsonl.gz")

    def pairs():
        for row in rows:
            tries = [value for value in row.values() if isinstance(value, dict)]
            good = [one["solution"] for one in tries if one["is_correct"]]
            bad = [one["solution"] for one in tries if not one["is_correct"]]
            if good and bad:
                yield {"prompt": row["question"], "chosen": "\n" + good[0], "rejected": "\n" + bad[0]}

    made = data.read(list(pairs()))
    data.check(made, data.preference_row)
    assert len(made) == 731
    assert len(data.fingerprint(made)) == 64
    chosen, rejected = data.preference_example(made[0], plain, max_prompt=32, max_completion=32)
    assert chosen.prompt == rejected.prompt == 32


def test_sentences(shared, plain):
    rows = data.read(shared / "data/sentence_polarity/sentences.jsonl")
    data.check(rows, data.text_row)
    assert len(rows) == 10_662
    example = data.text_example(rows[7], plain)
    assert plain.decode(example.ids, skip_special_tokens=True) == rows[7]["text"]
