"""Fields of the data that only some of its rows have."""

import types

import jax
import numpy as np
import pytest

from rljax import data, hosts, judges, prompts, rewards, sharding
from rljax.models import resolve
from rljax.types import Tokens

ROWS = [{"prompt": "One"}, {"prompt": "Two", "hint": 1}, {"prompt": "Three"}, {"prompt": "Four", "answer": "4"}]


def test_the_fields_are_those_of_all_rows():
    assert prompts.fields(ROWS) == ("hint", "answer")
    assert prompts.fields([]) == ()


def test_of_large_data_the_first_rows_are_looked_at(monkeypatch):
    monkeypatch.setattr(prompts, "FIRST", 3)
    read = []
    rows = data.Rows(lambda i: read.append(i) or ROWS[i], 4, "row {}".format)
    assert prompts.fields(rows) == ("hint",)
    assert read == [0, 1, 2]


@pytest.mark.parametrize("indices", [(0, 2), (0, 3)])
def test_rows_without_a_field_hand_none_to_the_reward(stories, indices):
    """Also where all rows of a batch lack it."""
    seen = []

    def judge(prompts, completions, *, answer):
        seen.append(answer)
        return [None if one is None else 1.0 for one in answer]

    run = types.SimpleNamespace(max_prompt=8, environment=None, batch=2, seed=0)
    tokenizer, rows = resolve.load_tokenizer(stories), data.Rows(ROWS.__getitem__, len(ROWS), "row {}".format)
    asked = rewards.as_rewards([judge, rewards.numeric_match])
    rewards.check_fields(asked, prompts.fields(rows))
    made = judges.make(
        asked,
        tokenizer=tokenizer,
        mesh=sharding.make_mesh(data=1, fsdp=1),
        timeout=10,
        stop=types.SimpleNamespace(requested=None),
        say=print,
    )
    ids = np.ones((2, 3), np.int32)
    tokens = Tokens(ids=ids, segments=ids, mask=ids > 0)  # pyright: ignore[reportArgumentType]
    source = prompts.prompts(run, tokenizer, rows)
    part = hosts.share_of_known(len(indices))
    scores = judges.start(made, source, indices, jax.device_put(tokens), part)()
    assert seen == [[ROWS[i].get("answer") for i in indices]]
    assert np.isnan(scores.total).tolist() == [ROWS[i].get("answer") is None for i in indices]
