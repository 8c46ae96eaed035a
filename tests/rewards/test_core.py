"""What counts as a reward, and what it is called."""

import functools
import inspect

import pytest

from rljax import rewards


def polite(prompts, completions, *, strength: float = 1.0):
    return [strength * text.count("please") for text in completions]


class Judge:
    def __call__(self, prompts, completions):
        return [0.5] * len(completions)


def test_names_and_weights():
    assert rewards.reward(polite).name == "polite"
    assert rewards.reward(functools.partial(functools.partial(polite, strength=2.0))).name == "polite"
    assert rewards.reward(Judge()).name == "Judge"
    assert rewards.reward(Judge().__call__).name == "__call__"
    assert rewards.reward(lambda p, c: c).name == "reward"
    made = rewards.reward(polite, weight=0.0, name="manners")
    assert (made.name, made.weight, made.on_device) == ("manners", 0.0, False)
    assert rewards.reward(polite).weight == 1.0


def test_a_reward_passes_through_and_stays_callable():
    made = rewards.reward(polite, weight=-0.5)
    assert rewards.reward(made) == made or rewards.reward(made).weight == -0.5
    again = rewards.reward(made, name="other")
    assert (again.weight, again.name) == (-0.5, "other")
    assert rewards.reward(made, weight=0.0).weight == 0.0
    assert made([""], ["please"]) == [1.0]


def test_options_of_a_reward_are_those_of_its_function():
    made = rewards.reward(polite, weight=3.0, name="manners")
    assert list(inspect.signature(made).parameters) == ["prompts", "completions", "strength"]
    bound = rewards.reward(functools.partial(made, strength=2.0))  # how the command line sets an option
    assert (bound.name, bound.weight) == ("manners", 3.0)
    assert bound([""], ["please"]) == [2.0]


def test_on_device_as_a_decorator():
    @rewards.on_device
    def short(tokens):
        return -tokens.mask.sum(1)

    assert (short.on_device, short.name, short.params) == (True, "short", None)
    assert rewards.on_device(len, params={"w": 1}, weight=2.0, name="n").params == {"w": 1}


def test_on_device_keeps_what_a_reward_has():
    made = rewards.on_device(rewards.reward(polite, weight=0.25, name="manners"))
    assert (made.on_device, made.weight, made.name) == (True, 0.25, "manners")
    weighted = rewards.on_device(len, params={"w": 1}, weight=2.0, name="n")
    assert rewards.on_device(weighted).params == {"w": 1}
    assert rewards.on_device(weighted, weight=3.0).weight == 3.0
    assert rewards.on_device(len).weight == 1.0


def test_one_or_many():
    assert [one.name for one in rewards.as_rewards(polite)] == ["polite"]
    assert [one.name for one in rewards.as_rewards(rewards.reward(polite, name="x"))] == ["x"]
    assert [one.name for one in rewards.as_rewards([polite, Judge()])] == ["polite", "Judge"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([polite, functools.partial(polite, strength=2.0)], r"2 rewards are called 'polite'.*name=\"…\""),
        ([], "there is no reward"),
        ("polite", "a callable .*, or a list of them, not polite"),
        ([polite, 3], "a reward is a callable .*not 3"),
        ({"a": polite}, "or a list of them"),
    ],
)
def test_what_is_no_reward(given, message):
    with pytest.raises(ValueError, match=message):
        rewards.as_rewards(given)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "2"])
def test_weights_are_finite_numbers(weight):
    with pytest.raises(ValueError, match="weight of a reward is a finite number"):
        rewards.reward(polite, weight=weight)


def test_names_are_texts():
    with pytest.raises(ValueError, match="name of a reward"):
        rewards.reward(polite, name=" ")
