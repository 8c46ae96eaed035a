"""Host rewards: how they are called, what they may return, and every way in which they fail."""

import asyncio
import decimal
import fractions
import functools
import itertools
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from rljax import rewards
from tests.rewards.support import COMPLETION_IDS, COMPLETIONS, FIELDS, PROMPT_IDS, PROMPTS, begin, judge

NAN = np.nan


def returning(value):
    """A reward that returns `value`, and for a part of the batch its part."""

    def constant(prompts, completions):
        return value

    return constant


# --- what they may return ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ([0.7, -0.25, 3], [0.7, -0.25, 3.0]),  # trap 4: fractions and negative numbers survive
        ((True, False, np.True_), [1.0, 0.0, 1.0]),
        ([1, None, 0], [1.0, NAN, 0.0]),
        ([None, None, None], [NAN, NAN, NAN]),
        (np.asarray([1, 2, 3]), [1.0, 2.0, 3.0]),
        (np.asarray([0.5, 1.5, 2.5], np.float16), [0.5, 1.5, 2.5]),
        (np.asarray([True, False, True]), [1.0, 0.0, 1.0]),
        (np.asarray([1, None, 2], object), [1.0, NAN, 2.0]),
        (jnp.asarray([0.5, -1.0, 2.0]), [0.5, -1.0, 2.0]),
        (jnp.asarray([0.5, -1.0, 2.0], jnp.bfloat16), [0.5, -1.0, 2.0]),
        ([jnp.float32(0.5), np.float64(0.25), np.asarray(2)], [0.5, 0.25, 2.0]),
        ((x / 2 for x in range(3)), [0.0, 0.5, 1.0]),
        ([decimal.Decimal("0.25"), fractions.Fraction(1, 2), 1], [0.25, 0.5, 1.0]),
    ],
)
def test_numbers(value, wanted):
    scores = judge(returning(value))
    np.testing.assert_array_equal(scores.total, np.asarray(wanted, np.float32))
    np.testing.assert_array_equal(scores.parts["constant"], np.asarray(wanted, np.float32))
    assert scores.total.dtype == scores.parts["constant"].dtype == np.float32
    assert scores.per_token is None


def test_weights_and_rows_to_which_some_or_no_reward_applies():
    some = rewards.reward(returning([1.0, None, None]), weight=2.0, name="some")
    other = rewards.reward(returning([0.5, -0.5, None]), weight=-1.0, name="other")
    scores = judge([some, other])
    np.testing.assert_array_equal(scores.total, np.asarray([1.5, 0.5, NAN], np.float32))
    np.testing.assert_array_equal(scores.parts["some"], np.asarray([1.0, NAN, NAN], np.float32))
    np.testing.assert_array_equal(scores.parts["other"], np.asarray([0.5, -0.5, NAN], np.float32))
    nothing = judge(rewards.reward(returning([1.0, None, 2.0]), weight=0.0))
    np.testing.assert_array_equal(nothing.total, np.asarray([0.0, NAN, 0.0], np.float32))


def test_a_monitor_does_not_make_a_row_count():
    some = rewards.reward(returning([1.0, None, None]), weight=2.0, name="some")
    watched = rewards.reward(returning([5.0, 6.0, None]), weight=0.0, name="watched")
    scores = judge([some, watched])
    np.testing.assert_array_equal(scores.total, np.asarray([2.0, NAN, NAN], np.float32))
    np.testing.assert_array_equal(scores.parts["watched"], np.asarray([5.0, 6.0, NAN], np.float32))
    alone = judge([watched, rewards.reward(returning([None, None, 1.0]), weight=0.0, name="other")])
    np.testing.assert_array_equal(alone.total, np.zeros(3, np.float32))  # where all are monitors all decide


@pytest.mark.parametrize("kind", [list, tuple, np.asarray, lambda x: jnp.asarray(x, jnp.float32)])
def test_per_token_rewards(kind):
    each = [kind([0.1, -0.2, 0.3, 0.4]), kind([1.0, 2.0]), kind([])]
    tokens = rewards.reward(returning(each), weight=10.0, name="tokens")
    scores = judge([tokens, rewards.reward(returning([1, None, None]), name="whole")])
    for got, wanted in zip(scores.per_token, [[1.0, -2.0, 3.0, 4.0], [10.0, 20.0], []], strict=True):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
    np.testing.assert_allclose(scores.parts["tokens"], [0.6, 3.0, 0.0], rtol=1e-6)
    np.testing.assert_allclose(scores.total, [7.0, 30.0, 0.0], rtol=1e-6)


def test_per_token_rewards_of_some_rows():
    tokens = rewards.reward(returning([None, [1.0, 2.0], None]), name="a")
    more = rewards.reward(returning([None, [0.5, 0.5], []]), weight=2.0, name="b")
    scores = judge([tokens, more])
    np.testing.assert_array_equal(scores.total, np.asarray([NAN, 5.0, 0.0], np.float32))
    assert [x.tolist() for x in scores.per_token] == [[0.0] * 4, [2.0, 3.0], []]


# --- how they are called ----------------------------------------------------------------------------------------------


def test_rewards_get_what_their_signature_names():
    seen = {}

    def everything(prompts, completions, **fields):
        seen["everything"] = (prompts, completions, fields)
        return [0] * 3

    def some(prompts, completions, level, *, answer, completion_ids, absent=7):
        seen["some"] = (level, answer, completion_ids, absent)
        return [0] * 3

    def bare(p, c):
        seen["bare"] = (p, c)
        return [0] * 3

    def swapped(completions, prompts):
        seen["swapped"] = (prompts, completions)
        return [0] * 3

    def as_in_trl(completions, answer, **kwargs):
        seen["trl"] = (completions, answer, sorted(kwargs))
        return [0] * 3

    def positional(prompts, completions, /, *rest, prompt_ids):
        seen["positional"] = (prompts, completions, rest, prompt_ids)
        return [0] * 3

    judge([everything, some, bare, swapped, as_in_trl, positional])
    ids = {"prompt_ids": PROMPT_IDS, "completion_ids": COMPLETION_IDS}
    assert seen["everything"] == (PROMPTS, COMPLETIONS, {**FIELDS, **ids})
    assert seen["some"] == (FIELDS["level"], FIELDS["answer"], COMPLETION_IDS, 7)
    assert seen["bare"] == seen["swapped"] == (PROMPTS, COMPLETIONS)
    assert seen["trl"] == (COMPLETIONS, FIELDS["answer"], ["completion_ids", "level", "prompt_ids", "prompts"])
    assert seen["positional"] == (PROMPTS, COMPLETIONS, (), PROMPT_IDS)


def test_a_parameter_gets_what_it_is_named_after_wherever_it_stands():
    seen = {}

    def ids_second(prompts, completion_ids):
        seen["ids second"] = (prompts, completion_ids)
        return [0] * 3

    def ids_first(completion_ids, answer):
        seen["ids first"] = (completion_ids, answer)
        return [0] * 3

    def as_in_trl(answer, completions, **kwargs):
        seen["trl"] = (answer, completions, sorted(kwargs))
        return [0] * 3

    def option(prompts, strength=1.0):
        seen["option"] = (prompts, strength)
        return [0] * 3

    def nameless(answer, completions, /):
        seen["nameless"] = (answer, completions)
        return [0] * 3

    def own(p, c, level, **kwargs):
        seen["own"] = (p, c, level, sorted(kwargs))
        return [0] * 3

    judge([ids_second, ids_first, as_in_trl, option, nameless, own])
    assert seen["ids second"] == (PROMPTS, COMPLETION_IDS)
    assert seen["ids first"] == (COMPLETION_IDS, FIELDS["answer"])
    assert seen["trl"] == (FIELDS["answer"], COMPLETIONS, ["completion_ids", "level", "prompt_ids", "prompts"])
    assert seen["option"] == (PROMPTS, 1.0)
    assert seen["nameless"] == (FIELDS["answer"], COMPLETIONS)
    assert seen["own"] == (PROMPTS, COMPLETIONS, FIELDS["level"], ["answer", "completion_ids", "prompt_ids"])


def test_what_cannot_be_told_is_refused():
    for fn in (lambda prompts, texts: [0], lambda level, texts: [0], lambda texts: [0]):
        with pytest.raises(rewards.RewardError, match="needs the field texts"):
            rewards.check_fields(rewards.as_rewards(fn), list(FIELDS))
    with pytest.raises(rewards.RewardError, match="needs the field gold"):
        rewards.check_fields(rewards.as_rewards(lambda gold, completions, **rest: [0]), list(FIELDS))


def test_an_option_that_was_set_is_no_field():
    def graded(prompts, completions, *, level=0):
        return [level] * 3 if isinstance(level, int) else level

    assert judge(graded).total.tolist() == [1.0, 2.0, 3.0]
    assert judge(functools.partial(graded, level=9)).total.tolist() == [9.0, 9.0, 9.0]


def test_a_field_that_is_missing_is_named_before_and_while_judging():
    def needs(prompts, completions, *, gold, answer, reason):
        return [0] * 3

    message = r"needs needs the field gold and the field reason, .*its fields: answer, level"
    with pytest.raises(rewards.RewardError, match=message):
        judge(needs)
    with pytest.raises(rewards.RewardError, match=message):
        rewards.check_fields(rewards.as_rewards(needs), list(FIELDS))
    rewards.check_fields(rewards.as_rewards(functools.partial(needs, gold=1, reason=2)), list(FIELDS))


def test_rewards_cannot_spoil_each_others_batch():
    def sorts(prompts, completions, *, answer):
        completions.sort()
        answer.clear()
        return [0] * 3

    def looks(prompts, completions, *, answer):
        time.sleep(0.05)
        return [float(completions == COMPLETIONS and answer == FIELDS["answer"])] * 3

    assert judge([sorts, looks]).parts["looks"].tolist() == [1.0] * 3
    assert COMPLETIONS[0] == "It is 4."


def test_a_function_without_a_signature_gets_prompts_and_completions():
    class Opaque:
        __signature__ = "none that inspect understands"

        def __call__(self, *given, **fields):
            return [float(given == (PROMPTS, COMPLETIONS) and not fields)] * 3

    assert judge(Opaque()).total.tolist() == [1.0] * 3


# --- at the same time -------------------------------------------------------------------------------------------------


def test_plain_and_async_rewards_run_at_the_same_time_and_in_the_background():
    meet = threading.Barrier(3, timeout=5)  # nobody passes before all are there

    def one(prompts, completions):
        meet.wait()
        return [1] * 3

    def two(prompts, completions):
        meet.wait()
        return [2] * 3

    judgement = begin([one, two])
    assert not any(answer.done() for answer in judgement.answers.values())
    meet.wait()  # the main thread, which is free
    assert judgement.result(timeout=5).total.tolist() == [3.0] * 3


def test_async_rewards_share_a_loop_that_outlives_the_batch():
    loops = []

    async def meet(others):
        loops.append(asyncio.get_running_loop())
        while len(loops) < others:  # nobody passes before all are there
            await asyncio.sleep(0.01)
        return [1] * 3

    async def plain(prompts, completions):
        return await meet(3)

    class Judge:
        async def __call__(self, prompts, completions):
            return await meet(3)

    hidden = rewards.reward(lambda prompts, completions: meet(3), name="hidden")
    assert judge([plain, Judge(), hidden]).total.tolist() == [3.0] * 3
    judge(plain)
    assert len(loops) == 4
    assert len(set(map(id, loops))) == 1


def test_a_plain_reward_may_run_a_loop_of_its_own():
    async def answer():
        return [1, 2, 3]

    assert judge(lambda prompts, completions: asyncio.run(answer())).total.tolist() == [1.0, 2.0, 3.0]


# --- what goes wrong --------------------------------------------------------------------------------------------------

FIRST = r"row 0: prompt 'What is 2 \+ 2\?', completion 'It is 4\.'"
SECOND = r"Row 1: prompt \[\{'role': 'user', 'content': 'Hi'\}\], completion 'Hello!'"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0, 2.0], r"returned 2 values for 3 completions"),
        ([1.0] * 4, r"returned 4 values for 3 completions"),
        (itertools.repeat(1.0), r"returned 4 values for 3 completions"),  # which has no end
        ([itertools.repeat(1.0)] * 3, r"returned 5 per-token numbers for a completion of 4 tokens"),
        ([1.0, decimal.Decimal("NaN"), 2.0], r"in row 1: it returned nan"),
        ([1.0, NAN, 2.0], rf"in row 1: it returned nan.*no finite number.*return None.*{SECOND}"),
        (np.asarray([1.0, -np.inf, 2.0]), rf"in row 1: it returned -inf.*{SECOND}"),
        ([1.0, 1e39, 2.0], r"in row 1: it returned 1e\+39.*float32"),
        ([1.0, 10**400, 2.0], r"in row 1: it returned inf"),
        ([1.0, "2.0", 2.0], rf"in row 1: it returned str '2\.0' where a number belongs.*{SECOND}"),
        (np.asarray(["1", "2", "3"]), r"in row 0: it returned str.* where a number"),
        ([1.0, 2j, 2.0], r"in row 1: it returned complex 2j"),
        (np.asarray([1j, 2j, 3j]), r"in row 0: .*complex"),
        ([1.0, {"score": 2.0}, 2.0], r"in row 1: it returned dict"),
        ("abc", rf"it returned str 'abc': return a list of 3 numbers.*{FIRST}"),
        ({1: 2, 3: 4, 5: 6}, r"it returned dict .*: return a list of 3 numbers"),
        ({1.0, 2.0, 3.0}, r"it returned set .*: return a list of 3 numbers"),  # which has no order
        (0.5, rf"it returned float 0\.5: return a list of 3 numbers.*{FIRST}"),
        (np.float32(0.5), r"it returned float 0\.5: return a list"),
        (jnp.asarray(0.5), r"it returned float 0\.5: return a list"),
        (None, r"it returned NoneType None: return a list"),
        ([[1.0] * 4, [1.0], []], rf"in row 1: it returned 1 per-token numbers for a completion of 2 tokens.*{SECOND}"),
        (np.ones((3, 1)), r"in row 0: it returned 1 per-token numbers for a completion of 4 tokens"),
        ([[1.0] * 4, 2.0, []], rf"in row 1: it returned a number here and sequences elsewhere.*{SECOND}"),
        ([[1.0] * 4, [NAN, 1.0], []], r"in row 1: it returned nan"),
        ([[1.0] * 4, [None, 1.0], []], r"in row 1: it returned NoneType None where a number"),
    ],
)
def test_what_is_not_an_answer(value, message):
    with pytest.raises(rewards.RewardError, match=f"(?s)the reward constant failed.*{message}"):
        judge(returning(value))


def test_a_reward_that_raises_names_the_row():
    def fragile(prompts, completions):
        return [1 / len(text) for text in completions]

    with pytest.raises(rewards.RewardError) as caught:
        judge(fragile)
    assert "the reward fragile failed in row 2: it raised ZeroDivisionError: division by zero" in str(caught.value)
    assert "Row 2: prompt 'Say nothing.', completion ''" in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)

    async def later(prompts, completions):
        return fragile(prompts, completions)

    with pytest.raises(rewards.RewardError, match="the reward later failed in row 2") as caught:
        judge(later)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_reward_that_raises_on_the_batch_only():
    def together(prompts, completions):
        if len(prompts) > 1:
            raise KeyError("too many")
        return [0]

    with pytest.raises(rewards.RewardError, match=r"together failed: it raised KeyError.*The first of its rows, row 0"):
        judge(together)


class Gone(BaseException):
    """One's own, beside Exception."""


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, Gone])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_would_end_a_program_ends_as_an_error_of_the_reward(kind, asynchronous):
    """Also in the loop that all async rewards share, which goes on."""

    def leaves(prompts, completions):
        if "" in completions:
            raise kind(3)
        return [0.0] * len(completions)

    async def leaves_later(prompts, completions):
        await asyncio.sleep(0)
        return leaves(prompts, completions)

    async def one(prompts, completions):
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    one_of_them = rewards.reward(leaves_later if asynchronous else leaves, name="leaves")
    with pytest.raises(rewards.RewardError, match=f"leaves failed in row 2: it raised {kind.__name__}: 3"):
        judge(one_of_them)
    assert judge(one).total.tolist() == [1.0] * 3


def test_long_texts_are_shortened():
    def fails(prompts, completions):
        raise ValueError("no")

    judgement = rewards.start(
        rewards.as_rewards(fails),
        ["p" * 5000 + "END"],
        ["START" + "c" * 5000],
        fields={},
        prompt_ids=PROMPT_IDS[:1],
        completion_ids=COMPLETION_IDS[:1],
    )
    with pytest.raises(rewards.RewardError, match=r"prompt …p+END', completion 'STARTc+…") as caught:
        judgement.result(timeout=5)
    assert len(str(caught.value)) < 700


def test_a_reward_that_hangs_is_named_and_one_that_raises_does_not_wait_for_it():
    wake = threading.Event()

    def hangs(prompts, completions):
        wake.wait(20)
        return [0] * 3

    try:
        with pytest.raises(rewards.RewardError, match=r"the reward hangs is not done with 3 rows after 0\.2 seconds"):
            judge([hangs, returning([1, 2, 3])], timeout=0.2)
        begun = time.monotonic()
        with pytest.raises(rewards.RewardError, match="the reward constant failed"):
            judge([hangs, returning(None)], timeout=None)
        assert time.monotonic() - begun < 2
    finally:
        wake.set()


class Speechless(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def test_an_exception_that_cannot_say_what_it_is():
    def fails(prompts, completions):
        raise Speechless

    with pytest.raises(rewards.RewardError, match=r"fails failed in row 0: it raised Speechless .*cannot be shown"):
        judge(fails)


def test_a_coroutine_that_is_late_is_cancelled():
    calls, ended = [], threading.Event()

    async def hangs(prompts, completions):
        calls.append(len(prompts))
        try:
            await asyncio.sleep(30)
        finally:
            ended.set()

    with pytest.raises(rewards.RewardError, match="hangs is not done"):
        judge(hangs, timeout=0.2)
    assert ended.wait(5)
    time.sleep(0.1)
    assert calls == [3]  # nor is it asked again, row by row, who is to blame


def test_a_coroutine_that_blocks_the_loop_stops_itself_alone(monkeypatch):
    monkeypatch.setattr("rljax.rewards.judging.STALLED", 0.2)
    wake, begun = threading.Event(), threading.Event()

    async def blocks(prompts, completions):
        begun.set()
        wake.wait(20)  # without await
        return [0] * 3

    async def fine(prompts, completions):
        await asyncio.sleep(0.01)
        return [1] * 3

    try:
        blocked = begin(blocks)
        assert begun.wait(5)
        assert judge(fine, timeout=5).total.tolist() == [1.0] * 3
        wake.set()
        assert blocked.result(timeout=5).total.tolist() == [0.0] * 3  # it still ends
    finally:
        wake.set()


def test_waiting_can_be_stopped_and_is_announced(monkeypatch):
    monkeypatch.setattr("rljax.rewards.judging.PATIENCE", 0.15)
    wake, said, polls = threading.Event(), [], []

    def hangs(prompts, completions):
        wake.wait(20)
        return [0] * 3

    def poll():
        polls.append(time.monotonic())
        if len(polls) == 5:
            raise InterruptedError("SIGTERM")

    try:
        with pytest.raises(InterruptedError, match="SIGTERM"):
            judge([hangs, returning([1, 2, 3])], timeout=None, poll=poll, say=said.append)
    finally:
        wake.set()
    assert said == ["waiting for the reward hangs"]
    assert 0.05 < np.diff(polls).mean() < 0.3  # about ten times a second


def test_the_batch_itself_has_to_fit():
    with pytest.raises(ValueError, match="answer has 2 entries for 3 prompts"):
        begin(returning([1, 2, 3]), fields={"answer": ["a", "b"]})
    with pytest.raises(ValueError, match="completion_ids has 1 entries for 3 prompts"):
        begin(returning([1, 2, 3]), completion_ids=COMPLETION_IDS[:1])
    with pytest.raises(ValueError, match="short is a JAX function: judge it with judge_on_device"):
        begin(rewards.on_device(lambda tokens: tokens.ids, name="short"))


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit, type("Own", (BaseException,), {})])
def test_no_exception_of_a_reward_ends_the_program_or_hangs_it(kind):
    def plain(prompts, completions):
        if "" in completions:
            raise kind("enough")
        return [0] * len(prompts)

    async def later(prompts, completions):
        return plain(prompts, completions)

    async def gathers(prompts, completions):
        """The exception is raised in a task of the reward's own, which takes it to the event loop."""

        async def each(text):
            return plain([""], [text])[0]

        return await asyncio.gather(*map(each, completions))

    for reward in (plain, later, gathers):
        name = reward.__name__
        with pytest.raises(rewards.RewardError, match=f"{name} failed in row 2: it raised {kind.__name__}: enough"):
            judge(reward)
    assert judge(returning([1, 2, 3])).total.tolist() == [1.0, 2.0, 3.0]


def test_what_no_sum_of_a_batch_holds_is_an_error():
    with pytest.raises(
        rewards.RewardError, match=r"constant failed in row 1: it returned 1e\+38, .*overflow in float32"
    ):
        judge(returning([1.0, 1e38, 2.0]))
    with pytest.raises(rewards.RewardError, match=r"constant failed in row 1: .*sum up to -1\.8e\+18"):
        judge(returning([[1.0] * 4, [-9e17, -9e17], []]))
    big = rewards.reward(returning([1.0, 1e17, 2.0]), weight=100.0, name="big")
    with pytest.raises(rewards.RewardError, match=r"the weighted sum of the rewards \(big\) in row 1 is 1e\+19"):
        judge(big)
    np.testing.assert_array_equal(judge(returning([1e18, None, -1e18])).total, np.float32([1e18, NAN, -1e18]))
