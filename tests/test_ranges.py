"""Every number among the settings has a range, and nothing outside of it gets as far as loading a model."""

import dataclasses
import functools
import math
import typing

import hypothesis
import hypothesis.strategies as st
import numpy as np
import optax
import pytest

from rljax import UserError, advantages, comments, losses, offline, online, options, program, ranges, settings, train
from rljax.environments import Environment

COMMON = {"model": "no model", "data": "none.jsonl"}
ONLINE = COMMON | {"reward": lambda prompts, completions: [0.0] * len(prompts)}
RUNS = {
    "SFT": offline.SFT(**COMMON),
    "RewardModel": offline.RewardModel(**COMMON),
    "Preference": offline.Preference(loss=functools.partial(losses.dpo_loss, beta=0.1), **COMMON),
    "Unpaired": offline.Unpaired(**COMMON),
    "PPO": online.PPO(**ONLINE),
    "PolicyGradient": online.PolicyGradient(**ONLINE),
    "OnlinePreference": online.OnlinePreference(**ONLINE),
    "Imitation": online.Imitation(**ONLINE),
}


def check(run):
    program.check_settings(run)
    if isinstance(run, online.Sampled):
        settings.check(run)


def kinds(run):
    return ranges.hints_of(type(run))


def is_number(hint):
    plain = [typing.get_args(kind)[0] if hasattr(kind, "__metadata__") else kind for kind in ranges.alternatives(hint)]
    return int in plain or float in plain


NUMBERS = [(name, field) for name, run in RUNS.items() for field, hint in kinds(run).items() if is_number(hint)]


@pytest.mark.parametrize("name", RUNS)
def test_every_number_has_a_range_and_every_default_is_within_it(name):
    check(RUNS[name])
    bare = [field for field, hint in kinds(RUNS[name]).items() if is_number(hint) and ranges.range_of(hint) is None]
    assert not bare, f"{name} has numbers without a range: {bare}"


def outside(limits, whole):
    """Numbers that a range does not have, and what is no number of its kind."""
    worst = [math.nan, math.inf, -math.inf, True, "1", "nan", [1]] + [1.5] * whole
    worst += [limits.low] * limits.above + [limits.high] * limits.below
    below = st.floats(max_value=limits.low, exclude_max=True, allow_infinity=False)
    above = st.floats(min_value=limits.high, exclude_min=True, allow_infinity=False)
    if whole:
        below, above = st.integers(max_value=int(limits.low) - 1), st.integers(min_value=int(limits.high) + 1)
    return st.sampled_from(worst) | below | above


@hypothesis.settings(max_examples=300, derandomize=True, deadline=None, database=None)
@hypothesis.given(data=st.data())
def test_whatever_is_outside_of_its_range_is_refused_by_name(data):
    name, field = data.draw(st.sampled_from(NUMBERS))
    hint = kinds(RUNS[name])[field]
    limits = ranges.range_of(hint)
    whole = any(typing.get_args(kind)[:1] == (int,) for kind in ranges.alternatives(hint))
    bad = data.draw(outside(limits, whole))
    with pytest.raises(UserError, match=rf"^{field} must be .*, got ") as error:
        check(dataclasses.replace(RUNS[name], **{field: bad}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("PPO", {"ema": 1.0}, "ema must be at least 0 and below 1 or None, got 1.0"),
        ("PPO", {"ema": math.nan}, "ema must be a finite number at least 0 and below 1 or None, got nan"),
        ("PPO", {"top_p": 0.0}, "top_p must be above 0 and at most 1 or None, got 0.0"),
        ("PPO", {"whiten_ddof": 99}, "whiten_ddof must be at least 0 and at most 1, got 99"),
        ("PPO", {"min_new_tokens": 256}, "leaves no room for an end: set it below the budget of 256 tokens"),
        ("PPO", {"kl_estimator": "k4"}, "kl_estimator must be 'k1', 'k2', 'k3', got 'k4'"),
        ("PPO", {"normalize_reference": 1}, "one sample has no deviation"),
        (
            "PPO",
            {"reward": None, "environment": Environment(len, len, "3")},  # pyright: ignore
            r"environment\.max_turns must be an integer at least 1, got '3'",
        ),
        ("PPO", {"reward": "length"}, "reward must be a function, a tuple, each of it a function or None"),
        (
            "PPO",
            {"value_loss": functools.partial(losses.value_clip_loss, clip=-1.0)},
            r"value_loss\.clip must be above 0",
        ),
        ("PPO", {"schedule": functools.partial(train.linear, warmup=4 * 200)}, "warmup=800 must be"),
        (
            "PolicyGradient",
            {"loss": functools.partial(losses.ppo_clip_loss, clip_low=-0.2)},
            r"loss\.clip_low must be at",
        ),
        (
            "PolicyGradient",
            {"advantage": functools.partial(advantages.group_relative, divide_by_std=True, ddof=7)},
            r"advantage\.ddof must be",
        ),
        ("SFT", {"dtype": "float16"}, "dtype must be 'float32', 'bfloat16', got 'float16'"),
        ("SFT", {"compute_dtype": "bf16"}, "compute_dtype must be"),
        ("SFT", {"waive": "sampler,all"}, "waive='sampler,all': there is no check all; they are"),
        ("SFT", {"packing": "yes"}, "packing must be True or False, got 'yes'"),
        ("SFT", {"model": None}, "model must be a text, got None"),
        ("SFT", {"steps": 2.0}, "steps must be an integer at least 1, got 2.0"),
        ("SFT", {"optimizer": functools.partial(optax.adamw, b1=2.0)}, r"optimizer\.b1 must be at least 0 and below 1"),
        (
            "SFT",
            {"optimizer": functools.partial(optax.sgd, momentum=math.nan)},
            r"optimizer\.momentum must be a finite",
        ),
        ("SFT", {"optimizer": optax.adamw(1e-3)}, "not what it makes"),
        ("SFT", {"optimizer": lambda learning_rate: 3}, "must make an optax.GradientTransformation"),
        ("SFT", {"optimizer": lambda rate: optax.sgd(rate)}, "has to take learning_rate="),
        ("SFT", {"schedule": functools.partial(train.constant, warmup=-1)}, r"schedule\.warmup must be at least 0"),
        ("SFT", {"schedule": optax.constant_schedule(1.0)}, "schedule is a function"),
        ("SFT", {"schedule": lambda peak, steps: 1e-3}, "schedule is a function"),
        ("SFT", {"schedule": lambda peak, steps: lambda step: -peak}, "not all are ≥ 0"),
        ("Preference", {"loss": functools.partial(losses.dpo_loss, beta=math.inf)}, r"loss\.beta must be a finite"),
        (
            "Preference",
            {"loss": functools.partial(lambda a, b, c, d, beta: a, beta=math.nan)},
            r"loss\.beta must be a f",
        ),
    ],
)
def test_what_cannot_work_is_said(kind, change, message):
    with pytest.raises(UserError, match=message):
        check(dataclasses.replace(RUNS[kind], **change))


def test_what_a_user_means_passes():
    """Functions of one's own may have keywords of any range; numbers of numpy and integers where any number goes."""
    mine = functools.partial(lambda a, b, c, d, beta: a, beta=-3.0)
    check(dataclasses.replace(RUNS["Preference"], loss=mine, nll_weight=1, learning_rate=np.float32(1e-3)))
    check(dataclasses.replace(RUNS["PPO"], reward=[len, max], top_p=1, min_p=0.0, ema=0.0, kl_target=None))


@pytest.mark.parametrize("name", RUNS)
def test_every_field_is_described_beside_it(name):
    """--help shows these comments; a field without one is a field that nobody can use."""
    beside = comments.of_fields(type(RUNS[name]))
    assert not [field for field in kinds(RUNS[name]) if not beside.get(field)]


def test_help_shows_comments_ranges_and_choices(capsys):
    with pytest.raises(SystemExit):
        options.with_options(RUNS["PPO"], ["--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for text in (
        "completions of each prompt; at least 1",
        "λ of generalised advantage estimation; at least 0 and at most 1",
        "{none,dots,full}",
        "of the KL in the reward",
        "here adamw",
    ):
        assert text in said, text


@pytest.mark.parametrize(
    ("given", "ours"),
    [("--lr", "--learning-rate"), ("--batch-size=4", "--batch"), ("--warmup_steps", "--schedule.warmup")],
)
def test_names_of_other_programs_are_translated(given, ours):
    with pytest.raises(UserError, match=rf"there is no option {given.partition('=')[0]}: {ours} is what is meant"):
        options.with_options(RUNS["SFT"], [given, "1"])
