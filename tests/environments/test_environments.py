"""The environments that come with rljax, by hand and by arithmetic; no model takes part."""

import asyncio
import operator
import threading
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rljax import environments, rewards
from rljax.environments import arithmetic, dialogue
from rljax.environments.calls import Failure, call_all
from rljax.environments.guessing import best_score
from rljax.rewards.matching import exact_match
from rljax.rewards.overlap import token_f1

NO_IDS = np.asarray([7])


def through(environment, row, *actions, seed=0):
    """(prompt, the turns that these actions get)."""
    state, prompt = environment.reset(row, seed)
    turns = []
    for action in actions:
        text, ids = (action, NO_IDS) if isinstance(action, str) else ("", np.asarray(action))
        state, turn = environment.step(state, text, ids)
        turns.append(turn)
    return prompt, turns


# --- one turn ---------------------------------------------------------------------------------------------------------


def test_single_turn_hands_the_row_to_the_reward():
    def reward(prompts, completions, *, bonus, completion_ids):
        assert prompts == ["say a"]
        return [len(text) + b + ids.sum() for text, b, ids in zip(completions, bonus, completion_ids, strict=True)]

    prompt, (turn,) = through(environments.single_turn(reward), {"prompt": "say a", "bonus": 0.25}, "aa")
    assert prompt == "say a"
    assert turn == environments.Turn(None, 9.25, done=True)


def test_a_reward_that_does_not_apply_is_zero_and_several_are_added():
    def never(prompts, completions):
        return [None]

    def one(prompts, completions):
        return [1.0]

    for reward, expected in ((never, 0.0), ([never, one], 1.0)):
        _, (turn,) = through(environments.single_turn(reward), {"prompt": "x"}, "y")
        assert turn.reward == expected


@pytest.mark.parametrize("make", [environments.single_turn, environments.customer_service, environments.calculator])
def test_a_reward_of_tokens_is_refused_when_the_environment_is_made(make):
    short = rewards.on_device(lambda tokens: -tokens.mask.sum(1), name="short")
    with pytest.raises(ValueError, match=r"the reward short is a JAX function .* one text at a time"):
        make(reward=[token_f1, short])


def test_an_episode_that_is_given_up_cancels_its_reward():
    ended = threading.Event()

    async def hangs(prompts, completions):
        try:
            await asyncio.sleep(30)
        finally:
            ended.set()

    environment = environments.single_turn(hangs)
    state, _ = environment.reset({"prompt": "x"}, 0)
    (outcome,) = call_all([lambda: environment.step(state, "y", NO_IDS)], timeout=0.2)
    assert outcome == Failure("no answer within 0.2 seconds")
    assert ended.wait(5)


@pytest.mark.parametrize(
    ("reward", "text", "score"),
    [(exact_match, " Paris. ", 1), (exact_match, "in Paris", 0), (token_f1, "in Paris", 2 / 3)],
)
def test_question_answering(reward, text, score):
    row = {"question": "Where is the Louvre?", "answer": "Paris"}
    prompt, (turn,) = through(environments.question_answering(reward), row, text)
    assert prompt == "Question: Where is the Louvre?\nAnswer:"
    assert turn.done
    assert turn.reward == pytest.approx(score)


def test_questions_as_messages_and_wrong_rows():
    environment = environments.question_answering(
        exact_match, prompt=lambda row: [{"role": "user", "content": row["question"]}]
    )
    prompt, (turn,) = through(environment, {"question": "2+2", "answer": [4, "four"]}, "Four")
    assert prompt == [{"role": "user", "content": "2+2"}]
    assert turn.reward == 1
    with pytest.raises(ValueError, match="'answer' is missing"):
        environment.reset({"question": "2+2"}, 0)


# --- customer service -------------------------------------------------------------------------------------------------


def test_a_customer_follows_the_conversation():
    environment = environments.customer_service(token_f1, system="Be kind.")
    row = {"turns": ["Hello", "Hi there", "I am lost", "Where are you", "Bye"]}  # nobody answers the last word
    prompt, turns = through(environment, row, " hi", "where is it")
    assert prompt == "Be kind.\nCustomer: Hello\nAgent:"
    assert [turn.observation for turn in turns] == ["\nCustomer: I am lost\nAgent:", None]
    assert [turn.reward for turn in turns] == pytest.approx([2 / 3, 1 / 3])
    assert [turn.done for turn in turns] == [False, True]


def test_a_customer_in_a_chat():
    environment = environments.customer_service(token_f1, chat=True, system="Be kind.")
    prompt, turns = through(environment, {"turns": ["Hello", "Hi", "Bye", "Bye"]}, "Hi", "so long")
    assert prompt == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    assert turns[0] == environments.Turn([{"role": "user", "content": "Bye"}], 1.0)
    assert turns[1] == environments.Turn(None, 0.0, done=True)


@pytest.mark.parametrize("row", [{}, {"turns": "Hello"}, {"turns": ["Hello"]}, {"turns": ["Hello", 3]}])
def test_wrong_conversations(row):
    with pytest.raises(ValueError, match="turns"):
        environments.customer_service(token_f1).reset(row, 0)


def test_the_corpus():
    pytest.importorskip("chatterbot_corpus")
    rows = environments.conversations(["tech_support"])
    assert {"turns": ["I can't hear any sound.", "Check the volume and ensure your output device is selected."]} in rows
    assert len({tuple(row["turns"]) for row in rows}) == len(rows) == 10  # of 1,050 in the file
    assert any(len(row["turns"]) > 4 for row in environments.conversations())
    assert all(isinstance(text, str) for row in environments.conversations(["trivia"]) for text in row["turns"])
    for row in environments.conversations():
        environments.customer_service(token_f1).reset(row, 0)
    with pytest.raises(ValueError, match=r"no category 'weather' in english: choose of ai, botprofile"):
        environments.conversations(["weather"])
    with pytest.raises(ValueError, match="no language 'klingon'"):
        environments.conversations(language="klingon")


def test_the_corpus_keeps_words_that_yaml_would_make_booleans(tmp_path, monkeypatch):
    folder = tmp_path / "chatterbot_corpus" / "data" / "english"
    folder.mkdir(parents=True)
    (folder / "a.yml").write_text("conversations:\n- - Yes\n  - 1\n- - only one\n- no list\n")
    monkeypatch.setattr(dialogue.importlib.resources, "files", lambda name: tmp_path / name)
    assert environments.conversations(["a"]) == [{"turns": ["Yes", "1"]}]


# --- calculator -------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(0, 999).map(lambda n: (str(n), Fraction(n))),
    st.tuples(st.integers(0, 99), st.integers(0, 99)).map(lambda x: (f"{x[0]}.{x[1]:02}", x[0] + Fraction(x[1], 100))),
)


def combined(parts):
    """Texts with every operation in parentheses, and their values."""
    (a, x), (b, y), sign, space = parts
    if sign == "/" and y == 0:
        sign = "+"
    apply = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}[sign]
    return f"({a}{space}{sign}{space}{b})", apply(x, y)


EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda inner: st.tuples(inner, inner, st.sampled_from("+-*/"), st.sampled_from(["", " "])).map(combined),
    max_leaves=12,
)


@settings(deadline=None)
@given(EXPRESSIONS)
def test_the_calculator_is_exact(expression):
    text, value = expression
    if len(text) <= arithmetic.MAX_CHARACTERS:
        assert arithmetic.evaluate(text) == value
        assert arithmetic.evaluate(f"-{text}") == -value


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=8), st.data())
def test_precedence_is_pythons(numbers, draw):
    signs = [draw.draw(st.sampled_from("+-*")) for _ in numbers[1:]]
    text = str(numbers[0]) + "".join(f"{sign}{number}" for sign, number in zip(signs, numbers[1:], strict=True))
    total, product, sign = 0, numbers[0], 1
    for operation, number in zip(signs, numbers[1:], strict=True):
        if operation == "*":
            product *= number
        else:
            total, product, sign = total + sign * product, number, 1 if operation == "+" else -1
    assert arithmetic.evaluate(text) == total + sign * product


@settings(deadline=None)
@given(st.text(alphabet="0123456789.+-*/() eE_x", max_size=30))
def test_the_calculator_answers_anything(text):
    """A value or a ValueError: nothing else, whatever is written."""
    assert isinstance(arithmetic.result(text), str)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12*7", "84"),
        ("2+3*4", "14"),
        ("(2+3)*4", "20"),
        ("8/4/2", "1"),
        ("7-2-1", "4"),
        ("-3--2", "-1"),
        ("2*-3", "-6"),
        ("1/3", "0.3333333333"),
        ("0.1+0.2", "0.3"),
        (" 1 .5 ", "error: '.5' is not expected there"),
        ("1/(2-2)", "error: division by zero"),
        ("2**3", "error: a number is missing"),
        ("(1", "error: a parenthesis is not closed"),
        ("1)", "error: ')' is not expected there"),
        ("", "error: a number is missing"),
        ("__import__('os')", "error: '_' is not understood"),
        ("9" * 201, "error: an expression has at most 200 characters"),
        ("(" * 50 + "1" + ")" * 50, "error: parentheses and signs stand at most 20 deep"),
        ("-" * 50 + "1", "error: parentheses and signs stand at most 20 deep"),
        ("*".join(["9" * 65] * 3), str(int("9" * 65) ** 3)),
    ],
)
def test_calculations(text, value):
    assert arithmetic.result(text) == value


def test_a_tool_is_asked_before_the_answer():
    row = {"question": "What is 12 * 7 + 1?", "answer": "85"}
    actions = ["Let me see <calc>12*7</calc> and <calc>1/0</calc>", "<calc>84+1</calc>", "It is 85."]
    prompt, turns = through(environments.calculator(), row, *actions)
    assert prompt.endswith("Question: What is 12 * 7 + 1?\nAnswer:")
    assert [turn.observation for turn in turns] == [
        "<result>84</result><result>error: division by zero</result>",
        "<result>85</result>",
        None,
    ]
    assert [turn.reward for turn in turns] == [0, 0, 1]
    assert turns[2].done
    _, (wrong,) = through(environments.calculator(), row, "84")
    assert wrong == environments.Turn(None, 0.0, done=True)


def test_a_tool_in_a_chat_and_too_many_calls():
    environment = environments.calculator(prompt=lambda row: [{"role": "user", "content": row["question"]}])
    _, (turn,) = through(environment, {"question": "q", "answer": 1}, "<calc>1</calc>" * 9)
    assert turn.observation == [{"role": "user", "content": "<result>1</result>" * 4}]
    with pytest.raises(ValueError, match="needs the field answer"):
        environment.reset({"question": "q"}, 0)


def test_exercises():
    rows = environments.exercises(200, seed=3, largest=9)
    assert rows == environments.exercises(200, seed=3, largest=9)
    assert len({row["question"] for row in rows}) > 150
    for row in rows:
        expression = row["question"].removeprefix("What is ").removesuffix("?")
        assert str(arithmetic.evaluate(expression)) == row["answer"]
        _, (turn,) = through(environments.calculator(), row, f"I say {row['answer']}")
        assert turn.reward == 1


# --- guessing ---------------------------------------------------------------------------------------------------------


def test_guesses_are_answered():
    environment = environments.number_guessing(low=1, high=10, max_turns=4)
    prompt, turns = through(environment, {"secret": 7}, "I think 5, not 7", "-7 or 10?", "eleven, 11", "7!")
    assert prompt == "I am thinking of a number from 1 to 10. My guess:"
    assert [turn.observation for turn in turns] == [
        "\nHigher. My guess:",
        "\nLower. My guess:",
        "\nGive a number from 1 to 10. My guess:",
        None,
    ]
    assert [turn.reward for turn in turns] == [0, 0, 0, 0.25]
    assert [turn.done for turn in turns] == [False, False, False, True]
    _, (first,) = through(environment, {"secret": 7}, "7")
    assert first.reward == 1


def test_guesses_in_a_chat():
    prompt, turns = through(environments.number_guessing(high=3, chat=True), {"secret": "1"}, "2", "-1")
    assert prompt == [{"role": "user", "content": "I am thinking of a number from 1 to 3. What is your guess?"}]
    assert turns[0].observation == [{"role": "user", "content": "Lower."}]
    assert turns[1].observation == [{"role": "user", "content": "Give a number from 1 to 3."}]


def test_guesses_of_anything_in_order():
    words = {"higher": " later ", "lower": " earlier ", "again": " what? ", "max_turns": 3}
    environment = environments.guessing(["A", "C.", "CC"], "Say:", **words)
    _, turns = through(environment, {"secret": "C."}, "AC", "A", "CC")
    assert [turn.observation for turn in turns] == [" what? ", " later ", " earlier "]
    _, (turn,) = through(environment, {"secret": "C."}, " C.")
    assert turn.done
    state, _ = environments.guessing(["C", "C."], "Say:", **words).reset({"secret": "C."}, 0)
    assert environments.guessing(["C", "C."], "Say:", **words).step(state, "C.", NO_IDS)[1].done
    for choices in ([], ["A", "A"]):
        with pytest.raises(ValueError, match="different choices"):
            environments.guessing(choices, "Say:", **words)


def test_secrets_come_from_the_seed():
    environment = environments.number_guessing(high=5)
    secrets = [environment.reset({}, seed)[0].position for seed in range(60)]
    assert secrets == [environment.reset({}, seed)[0].position for seed in range(60)]
    assert set(secrets) == {0, 1, 2, 3, 4}
    with pytest.raises(ValueError, match="the secret 6 is none of the choices from 1 to 5"):
        environment.reset({"secret": 6}, 0)


@pytest.mark.parametrize(("count", "turns"), [(1, 1), (2, 1), (7, 3), (10, 3), (10, 7), (100, 5)])
def test_the_best_score_is_that_of_the_best_strategy(count, turns):
    """Against dynamic programming over all first guesses, and reached by halving."""
    scores = np.zeros((turns + 1, count + 1))  # [guesses made, numbers left]: the sum over the numbers left
    for k in range(turns - 1, -1, -1):
        for n in range(1, count + 1):
            scores[k, n] = 1 - k / turns + max(scores[k + 1, g] + scores[k + 1, n - 1 - g] for g in range(n))
    assert best_score(count, turns) == pytest.approx(scores[0, count] / count)
    if count > 2**turns - 1:
        return
    environment, total = environments.number_guessing(high=count, max_turns=turns), 0.0
    for secret in range(1, count + 1):
        state, _ = environment.reset({"secret": secret}, 0)
        low, high = 1, count
        for _ in range(turns):
            guess = (low + high) // 2
            state, turn = environment.step(state, str(guess), NO_IDS)
            total += turn.reward
            if turn.done:
                break
            low, high = (guess + 1, high) if "Higher" in turn.observation else (low, guess - 1)
    if count in (1, 7):  # a full tree: halving in the middle is the best
        assert total / count == pytest.approx(best_score(count, turns))
    assert total / count <= best_score(count, turns) + 1e-9
