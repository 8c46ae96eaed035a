"""A run that learns nothing says so, once, and one that learns says nothing."""

from rljax.silence import Silence

LOUD = {"loss": 0.7, "grad_norm": 1.0, "frac_reward_zero_std": 0.5, "rewards/none_ratio": 0.0}


def said(records, total=50):
    watch = Silence(total)
    return [text for record in records for text in watch.see(record)]


def test_what_learns_is_left_alone():
    assert said([LOUD] * 40) == []
    assert said([{**LOUD, "grad_norm": 0.0}] * 9 + [LOUD] * 20) == []
    assert said([{"eval/loss": 1.0}] * 40) == []  # records without a step of training


def test_no_gradient_no_contrast_and_no_reward_are_said_once():
    for change, word in (
        ({"grad_norm": 0.0}, "the gradient was exactly 0"),
        ({"frac_reward_zero_std": 1.0}, "scored alike"),
        ({"rewards/none_ratio": 1.0}, "no reward applied"),
    ):
        (text,) = said([{**LOUD, **change}] * 30)
        assert text.startswith("in each of the first 10 steps")
        assert word in text
        assert len(said([{**LOUD, **change}] * 3, total=3)) == 1  # a short run says it at its end


def test_a_reward_of_one_value_is_said_by_name():
    same = {**LOUD, "rewards/my/length/mean": 2.0, "rewards/my/length/std": 0.0}
    (text,) = said([same] * 20)
    assert "the reward my/length gave 2 to everything" in text
    other = {**same, "rewards/my/length/mean": 3.0}
    assert said([same, other] * 10) == []  # the same within a batch, another in the next
