"""Win rates of completions against their companions, by hand."""

import functools

import numpy as np
import pytest

from rljax import rewards

PROMPTS = ["p"] * 3 + ["q"] + [[{"role": "user", "content": "r"}]] * 2
SAID = ["a", "bbb", "bb", "alone", "same", "four"]


def longer(prompts, first, second):
    """Of equal lengths neither is better."""
    return [None if len(a) == len(b) else len(a) > len(b) for a, b in zip(first, second, strict=True)]


def judged(reward, prompts=PROMPTS, said=SAID, **fields):
    ids = [np.arange(2)] * len(prompts)
    started = rewards.start([reward], prompts, said, fields=fields, prompt_ids=ids, completion_ids=ids)
    return started.result(timeout=10)


def test_three_completions_of_a_judge_of_lengths():
    scores = judged(rewards.win_rate(longer))
    wanted = [0.0, 1.0, 0.5, np.nan, 0.5, 0.5]  # loses both; wins both; one of each; alone; a tie
    np.testing.assert_array_equal(scores.total, np.asarray(wanted, np.float32))
    assert list(scores.parts) == ["win_rate"]


def test_every_pair_is_judged_in_both_orders_so_that_a_bias_for_a_place_cancels():
    asked = []

    def biased(prompts, first, second):
        asked.extend(zip(prompts, first, second, strict=True))
        return [0.9 if len(a) > len(b) else 0.5 for a, b in zip(first, second, strict=True)]

    rates = rewards.win_rate(biased)(["p"] * 2, ["long", "x"])
    assert asked == [("p", "long", "x"), ("p", "x", "long")]
    assert rates == pytest.approx([0.7, 0.3])  # (0.9 + 1 − 0.5) / 2
    always = rewards.win_rate(lambda prompts, first, second: np.ones(len(first)))
    assert always(["p"] * 3, ["a", "b", "c"]) == [0.5] * 3


def test_the_judge_gets_the_fields_that_it_names():
    def named(prompts, first, second, *, answer, strength=0.25):
        assert prompts == ["p", "p"]
        return [0.5 + strength * (a == gold) - strength * (b == gold) for a, b, gold in zip(first, second, answer)]  # noqa: B905

    fields = {"answer": ["x", "x", None], "strength": [9, 9, 9], "other": [0, 0, 0]}
    bound = rewards.win_rate(functools.partial(named, strength=0.5), name="gold")
    scores = judged(bound, ["p", "p", "q"], ["x", "y", "z"], **fields)
    assert scores.parts["gold"].tolist()[:2] == [1.0, 0.0]
    with pytest.raises(rewards.RewardError, match="the reward gold needs the field answer"):
        rewards.check_fields([bound], ["other"])

    def everything(prompts, first, second, **rest):
        assert {name: len(column) for name, column in rest.items()} == {"answer": 2, "prompt_ids": 2}
        return [True, False]

    scores = judged(rewards.win_rate(everything), ["p", "p"], ["x", "y"], answer=["1", "2"])
    assert scores.total.tolist() == [1.0, 0.0]


def test_an_async_judge_and_nothing_to_compare():
    async def later(prompts, first, second):
        return longer(prompts, first, second)

    assert judged(rewards.win_rate(later), ["p"] * 2, ["a", "bb"]).total.tolist() == [0.0, 1.0]

    def never(prompts, first, second):
        raise AssertionError("there are no pairs")

    assert rewards.win_rate(never)(["p", "q"], ["a", "b"]) == [None, None]
    assert rewards.win_rate(never)([], []) == []


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([0.5], r"its judge answers for 2 pairs .* it returned 1 values"),
        ([0.5, 1.5], r"in row 2: its judge returned 1\.5 for a pair, and wanted is the probability"),
        ([0.5, "first"], r"in row 2: its judge .* it returned str 'first'"),
        ([[], []], r"its judge returned sequences"),
    ],
)
def test_what_is_no_probability(said, message):
    with pytest.raises(rewards.RewardError, match=message):
        judged(rewards.win_rate(lambda prompts, first, second: said), ["o", "p", "p"], ["a", "b", "c"])
