"""The ready rewards, against values worked out by hand."""

import functools
import gzip
import json
import math
import sys
import time
from decimal import Decimal
from fractions import Fraction

import pytest

from rljax import rewards
from rljax.rewards.matching import last_number
from tests.rewards.support import begin, judge


def of(fn, completions, **options):
    """fn's answer for completions whose prompts do not matter."""
    return fn([""] * len(completions), completions, **options)


# --- matching ---------------------------------------------------------------------------------------------------------


def test_exact_match_disregards_case_white_space_and_a_full_stop():
    said = ["Paris", " paris.\n", "New  York", "The Paris", "5", "-5", "42", "ﬁne", "b", "x", ""]
    wanted = ["paris", "Paris", "new york", "Paris", "-5", "-5", 42, "fine", ["a", "B"], None, "y"]
    assert of(rewards.exact_match, said, answer=wanted) == [1, 1, 1, 0, 0, 1, 1, 1, 1, None, 0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 12.", "12"),
        ("first 3, then 4", "4"),
        ("1,234 or 1,234,567.50", "1234567.50"),
        ("1,2345", None),  # no thousands: a pair, or a decimal comma
        ("-3", "-3"),
        ("(−4)", "-4"),
        ("x = -2", "-2"),
        ("5-3", "3"),
        ("10-12", "12"),
        ("$5 and -$6", "-6"),
        ("12%", "12"),
        ("2/2=<<2/2=1>>1", "1"),
        ("about 3/4", "0.75"),
        (".5", "0.5"),
        ("1e-3", "0.001"),
        ("he ate 7 of 9\n#### 1,000\n\nThen 8", "1000"),
        ("#### 1\n#### $2.50", "2.50"),
        ("#### Step 3\nso 42", "42"),  # a heading of Markdown is no mark
        ("5/0", None),
        ("none", None),
        ("", None),
        ("1" * 6000, "1" * 6000),  # more digits than Python's int reads
        ("1e99999999", None),  # an exponent that would fill the memory
        ("10^99999999", None),
        # LaTeX, as mathematics is written
        (r"\frac{1}{2}", "1/2"),
        (r"so $x = \dfrac{3}{2}$.", "3/2"),
        (r"$-\frac{1}{2}$", "-1/2"),
        (r"\frac{-1}{2}", "-1/2"),
        (r"\frac12", "1/2"),
        (r"$2\frac{1}{2}$", "5/2"),
        (r"\boxed{\frac{7}{10}}, since 3 are left", "7/10"),
        (r"\boxed{ -5 }$ and 7", "-5"),
        (r"1{,}000", "1000"),
        (r"1\,234\,567", "1234567"),
        ("1\u202f000", "1000"),
        ("10^5", "100000"),
        ("10^{-2}", "1/100"),
        ("10⁻¹²", "1/1000000000000"),
        (r"3.2 \times 10^{4}", "32000"),
        (r"1.5 x 10^3", "1500"),
        ("2 1/2", "5/2"),
        ("2½ cups", "5/2"),
        ("3 / 4", "3/4"),
        ("−5", "-5"),
        ("–5", "-5"),
        ("= - 5", "-5"),
        ("-$5", "-5"),
        (r"\$1{,}250.50", "1250.50"),
        (r"12\%", "12"),
        (r"90^\circ", "90"),
        (r"25\text{ cm}^2", "25"),
        ("an area of 25 cm^2", "25"),
        ("x_1 = 4", "4"),
        ("**42**", "42"),
        ("the answer is *5*.", "5"),
        ("5 million", "5000000"),
        ("gpt-4", "4"),
        ("#### -3", "-3"),
        ("#### 2 1/2 cups", "5/2"),
        (r"#### \frac{1}{3}", "1/3"),
        # what is a part of something else is not read
        ("3,14", None),
        ("1.234.567", None),
        ("1 000", None),
        ("12:30", None),
        ("x = 2+3", None),
        ("10 - 5", None),
        ("x + 3", None),
        (r"2\sqrt{3}", None),
        (r"\sqrt{2}", None),
        (r"\sqrt[3]{5}", None),
        ("√2", None),
        (r"2\pi", None),
        ("5x", None),
        (r"\frac{x}{2}", None),
        (r"\frac{\sqrt{3}}{2}", None),
        (r"\left(\frac{1}{2}\right)^2", None),
        ("101_2", None),
        (r"\binom{5}{2}", None),
        (r"0.\overline{3}", None),
        ("x/2", None),
        ("1/2/2024", None),
        (r"\boxed{(1, 2)}", None),
        (r"\boxed{3, 5}", None),
        (r"\boxed{x^2}, not 7", None),
        ("5k", None),
        ("2^{1/2}", None),
        ("3*x", None),
        ("2(3)", None),
    ],
)
def test_the_number_of_a_text(text, number):
    found = last_number(text)
    if number is None:
        assert found is None
    else:
        top, _, bottom = number.partition("/")
        assert found == Fraction(Decimal(top)) / Fraction(bottom or 1)


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        (r"\frac{1}{2}", r"\frac{3}{2}"),
        (r"\frac{1}{2}", 2),
        ("1{,}000", 0),
        ("10^5", 5),
        ("2 1/2", 0.5),
        ("1 000", 0),
        ("3,14", 14),
        ("5", "-5"),
        ("2+3", 3),
        (r"2\sqrt{3}", 3),
    ],
)
def test_what_is_another_number_is_not_paid(said, answer):
    assert of(rewards.numeric_match, [said], answer=[answer]) == [0]


def test_an_answer_in_doubt_does_not_apply():
    assert of(rewards.numeric_match, ["3", r"2\sqrt{3}"], answer=[r"2\sqrt{3}"] * 2) == [None, None]
    assert of(rewards.numeric_match, ["0.5", r"\boxed{\frac{1}{2}}"], answer=[r"$\frac{1}{2}$", "1/2"]) == [1, 1]


def test_numeric_match():
    said = ["so 18", "18.0 dollars", "19", "nothing", "0.1", "x", "3"]
    wanted = ["half is 9\n#### 18", 18, 18, 18, "0.10", None, 2.999]
    assert of(rewards.numeric_match, said, answer=wanted) == [1, 1, 0, 0, 1, None, 0]
    near = functools.partial(rewards.numeric_match, tolerance=0.01)
    assert of(near, ["3", "3.02", "-3"], answer=[2.999] * 3) == [1, 0, 0]


def test_an_answer_without_a_number_is_a_fault_of_the_data():
    with pytest.raises(
        rewards.RewardError, match=r"numeric_match failed in row 2: .*no number in the field answer: 'x'"
    ):
        judge(rewards.numeric_match)


def test_numeric_match_on_gsm8k(shared):
    """Solutions of two models that OpenAI judged by their last number (GSM8K's released model solutions)."""
    with gzip.open(shared / "data/gsm8k/model_solutions.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file][:300]
    for model in ("6b_finetuning", "175b_finetuning"):
        said = [row[model]["solution"] for row in rows]
        truth = [row["ground_truth"].replace("A: ", "#### ") for row in rows]
        found = of(rewards.numeric_match, said, answer=truth)
        judged = [float(row[model]["is_correct"]) for row in rows]
        assert sum(a != b for a, b in zip(found, judged, strict=True)) <= 0.01 * len(rows)
        assert 0.1 < sum(judged) / len(judged) < 0.6  # both values occur


def test_regex_match_searches_and_a_pattern_may_be_a_field():
    dates = functools.partial(rewards.regex_match, pattern=r"(?i)\b\d{4}\b|never")
    assert of(dates, ["in 1984.", "NEVER", "in 84", ""]) == [1, 1, 0, 0]
    assert of(rewards.regex_match, ["aab", "aab"], pattern=["^a+b$", "^ab"]) == [1, 0]
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression: missing \)"):
        of(rewards.regex_match, ["x"], pattern="(")


def test_a_pattern_of_none_does_not_apply():
    assert of(rewards.regex_match, ["aab", "x"], pattern=["^a+b$", None]) == [1, None]


@pytest.mark.parametrize("reward", [rewards.regex_match, rewards.format_reward])
def test_a_pattern_that_hangs_is_named_while_others_go_on(reward, monkeypatch):
    monkeypatch.setattr("rljax.rewards.matching.PATIENCE", 0.5)
    hangs = functools.partial(reward, pattern="(a|aa)+$")
    polls = []
    said = begin(rewards.reward(hangs, name="hangs"), completions=["fine", "a" * 60 + "b", ""])
    message = r"(?s)hangs failed in row 1: .*the pattern '\(a\|aa\)\+\$' took more than 0\.5 seconds with the text 'aaa"
    with pytest.raises(rewards.RewardError, match=message):
        said.result(timeout=10, poll=lambda: polls.append(time.monotonic()))
    assert len(polls) > 3  # `re` would have kept this thread out


def test_format_reward_wants_the_whole_completion():
    good = "<think>two\nlines</think>\n<answer>4</answer>"
    said = [good, f" {good}\n", f"Well: {good}", "<answer>4</answer>", good + good, "<think><think></think><answer>"]
    assert of(rewards.format_reward, said) == [1, 1, 0, 0, 0, 0]
    assert of(functools.partial(rewards.format_reward, pattern=r"a.b"), ["a\nb", "aab!"]) == [1, 0]


# --- text -------------------------------------------------------------------------------------------------------------


def test_length():
    ids, texts = [[1] * 4, [], [1] * 20], ["two words", "", "a b\nc"]
    assert of(rewards.length, texts, completion_ids=ids) == [4, 0, 20]
    assert of(rewards.length, texts, completion_ids=ids, unit="words") == [2, 0, 3]
    assert of(rewards.length, texts, completion_ids=ids, target_length=8) == [0.5, 0.0, -0.5]
    with pytest.raises(ValueError, match="target_length is 0"):
        of(rewards.length, texts, completion_ids=ids, target_length=0)
    with pytest.raises(ValueError, match="unit is 'letters'"):
        of(rewards.length, texts, completion_ids=ids, unit="letters")
    assert judge(rewards.length).total.tolist() == [4.0, 2.0, 0.0]


def test_repetition_penalty():
    said = ["a b c d", "a b c A B C", "a b", "", "go go go go go"]
    # trigrams: 2 of 2 new; abc bca cab abc: 3 of 4; none; none; 1 of 3
    assert of(rewards.repetition_penalty, said) == pytest.approx([0.0, -0.25, 0.0, 0.0, 1 / 3 - 1])
    assert of(functools.partial(rewards.repetition_penalty, ngram_size=1), said[-1:]) == pytest.approx([-0.8])
    with pytest.raises(ValueError, match="ngram_size is 0"):
        of(rewards.repetition_penalty, said, ngram_size=0)


def test_vader_sentiment():
    said = ["this is great!", "terrible.", "", "the book"]
    # one word of the lexicon: s / √(s² + 15), "great" 3.1 and an exclamation mark 0.292, "terrible" −2.1
    wanted = [3.392 / math.sqrt(3.392**2 + 15), -2.1 / math.sqrt(2.1**2 + 15), 0.0, 0.0]
    assert of(rewards.vader_sentiment, said) == pytest.approx(wanted, abs=1e-4)
    both = rewards.vader_sentiment(
        ["a great ", [{"role": "user", "content": "terrible"}]], ["x", "x"], judged="prompt+completion"
    )
    assert both == pytest.approx([3.1 / math.sqrt(3.1**2 + 15), wanted[1]], abs=1e-4)
    with pytest.raises(ValueError, match="judged is 'prompt'"):
        of(rewards.vader_sentiment, said, judged="prompt")


# --- overlap ----------------------------------------------------------------------------------------------------------

SAID = ["The cat sat on the mat.", "the the the", "", "A quick brown fox"]
WANTED = ["The cat is on the mat.", ["the cat", "the dog the"], "x", None]


def test_bleu():
    # 1- to 4-grams in common: 6/7, 4/6, 2/5, 1/4; as long as the reference
    found = of(rewards.bleu, SAID, answer=WANTED)
    assert found[0] == pytest.approx((6 / 7 * 4 / 6 * 2 / 5 * 1 / 4) ** 0.25)
    assert found[2:] == [0.0, None]
    assert of(rewards.bleu, ["a b c d e"], answer=["a b c d e"]) == pytest.approx([1.0])
    assert of(rewards.bleu, ["oh yes"], answer=["oh yes"]) == pytest.approx([1.0])  # too short for 3-grams
    # a third of the reference's length: brevity penalty exp(1 − 12/4)
    assert of(rewards.bleu, ["a b c d"], answer=["a b c d e f g h i j k l"]) == pytest.approx([math.exp(-2)])


def test_chrf():
    # abc and abd share 2 of 3 letters, 1 of 2 pairs, 0 of 1 triple: precision = recall = their mean
    assert of(rewards.chrf, ["abc"], reference=["abd"]) == pytest.approx([(2 / 3 + 1 / 2 + 0) / 3])
    assert of(rewards.chrf, ["same text"], reference=["same text"]) == pytest.approx([1.0])
    plus = of(functools.partial(rewards.chrf, word_order=2), ["abc x"], reference=["abd x"])
    assert plus != pytest.approx(of(rewards.chrf, ["abc x"], reference=["abd x"]))


def test_rouge():
    assert of(rewards.rouge_1, SAID, answer=WANTED) == pytest.approx([5 / 6, 2 / 3, 0.0, None])
    assert of(rewards.rouge_2, SAID, answer=WANTED) == pytest.approx([3 / 5, 0.0, 0.0, None])
    assert of(rewards.rouge_l, ["b a c d"], answer=["a b c d"]) == pytest.approx([3 / 4])
    assert of(rewards.rouge_1, ["b a c d"], answer=["a b c d"]) == pytest.approx([1.0])
    # more said than wanted: precision 2/4, recall 2/2
    assert of(rewards.rouge_1, ["x y a b"], answer=["a b"]) == pytest.approx([2 / 3])


def test_token_f1_as_squad_scores_it():
    said = ["The Eiffel Tower!", "in the city of Paris", "the", "", "Paris", "Paris", "no"]
    wanted = ["eiffel tower", "Paris, France", "", "x", ["London", "paris"], None, "yes"]
    # city of Paris in against Paris France: 1 of 4 and 1 of 2
    assert of(rewards.token_f1, said, answer=wanted) == pytest.approx([1, 1 / 3, 1, 0, 1, None, 0])


def test_what_a_metric_drops_of_a_reference_is_not_all_of_it():
    chinese = "猫坐在垫子上。"
    for fn, text in (
        (rewards.rouge_1, chinese),
        (rewards.rouge_2, "!?"),
        (rewards.rouge_l, ""),
        (rewards.token_f1, "A"),
        (rewards.bleu, " "),
        (rewards.chrf, "\n"),
    ):
        with pytest.raises(ValueError, match=rf"{fn.__name__} keeps nothing of the reference of row 1, .*chrf"):
            of(fn, ["x", text], answer=["x y", text])
        assert of(fn, ["x y", text], answer=["x y", ["x y", text]])[0] == pytest.approx(1.0)
    assert of(rewards.chrf, [chinese], answer=[chinese]) == pytest.approx([1.0])
    near = chinese.replace("垫", "席")
    assert of(rewards.bleu, [near], answer=[chinese]) == [0.0]
    some = of(functools.partial(rewards.bleu, tokenize="zh"), [near, chinese], answer=[chinese] * 2)
    # 6 of 7 characters, 4 of 6 pairs, 2 of 5 triples, none of 4 quadruples, which counts for half a one
    assert some == pytest.approx([(6 / 7 * 4 / 6 * 2 / 5 * 0.5 / 4) ** 0.25, 1.0])
    with pytest.raises(ValueError, match="tokenize is 'chinese'; choose one of 13a"):
        of(functools.partial(rewards.bleu, tokenize="chinese"), ["x"], answer=["x"])


@pytest.mark.parametrize("fn", [rewards.bleu, rewards.chrf, rewards.rouge_l, rewards.token_f1])
def test_reference_goes_before_answer_and_one_is_needed(fn):
    assert of(fn, ["a b c d"], answer=["x"], reference=["a b c d"]) == pytest.approx([1.0])
    with pytest.raises(ValueError, match=f"{fn.__name__} compares with a reference: the data needs a field reference"):
        of(fn, ["x"])
    with pytest.raises(ValueError, match="row 1 has an empty list of references"):
        of(fn, ["x", "y"], answer=["x", []])


@pytest.mark.parametrize(
    ("fn", "package", "module", "cache"),
    [
        (rewards.bleu, "sacrebleu", "sacrebleu", "overlap._sacrebleu"),
        (rewards.rouge_1, "rouge-score", "rouge_score.rouge_scorer", "overlap._rouge_scorer"),
        (rewards.vader_sentiment, "vaderSentiment", "vaderSentiment.vaderSentiment", "text._vader"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, fn, package, module, cache):
    file, function = cache.split(".")
    getattr(sys.modules[f"rljax.rewards.{file}"], function).cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    options = {} if fn is rewards.vader_sentiment else {"answer": ["x"]}
    with pytest.raises(ValueError, match=f"needs the package {package}: pip install .*{package.lower()}"):
        of(fn, ["x"], **options)
