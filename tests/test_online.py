"""The online program end to end on a real tiny checkpoint: every kind of run, what it leaves, and how it fails."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import signal
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import (
    artefacts,
    cli,
    data,
    loop,
    models,
    offline,
    online,
    online_setup,
    policy,
    presets,
    rewards,
    sharding,
    tracking,
    train,
)
from rljax.environments import Environment, Turn, number_guessing
from rljax.errors import UserError
from rljax.metrics import define
from rljax.models import hf
from tests.test_programs import state_bits
from tests.traced import traced

pytestmark = pytest.mark.slow

WORDS = ["cat", "dog", "tree", "house", "ball", "bird", "car", "hat", "fish", "boat"]
STEPS = 4
RECORDS = ("metrics.jsonl", "samples.jsonl", "evidence.jsonl")
LONG = functools.partial(pytest.param, marks=pytest.mark.long)


# What the reward `vowels` does at a certain call (1 is the evaluation before training), once. It is a module, since of
# what a reward reads all but modules belongs to the experiment.
Trouble = types.ModuleType("trouble")
Trouble.at, Trouble.what, Trouble.calls, Trouble.released = None, "", 0, threading.Event()


def vowels(prompts, completions):
    """0.1 for every vowel, −0.7 at the start: fractions, some of them negative."""
    Trouble.calls += 1
    scores = [sum(letter in "aeiou" for letter in text) / 10 - 0.7 for text in completions]
    if Trouble.calls != Trouble.at:
        return scores
    match Trouble.what:
        case "raise":
            raise KeyError("the judge is ill")
        case "nan":
            return [float("nan") if i == 1 else score for i, score in enumerate(scores)]
        case "count":
            return scores[:-1]
        case "text":
            return ["good", *scores[1:]]
        case "hang":
            Trouble.released.wait(60)
        case "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
            Trouble.released.wait(60)
    return scores


@pytest.fixture
def trouble():
    def cause(at, what):
        Trouble.at, Trouble.what, Trouble.calls = at, what, 0
        Trouble.released.clear()

    yield cause
    Trouble.at, Trouble.calls = None, 0
    Trouble.released.set()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("data")
    data.write_jsonl(folder / "texts.jsonl", [{"text": f"{a} and {b} went to the sea."} for a in WORDS for b in WORDS])
    rows = [{"prompt": f"Once there was a {a}. The {b}", "word": a} for a in WORDS for b in WORDS[:4]]
    return str(data.write_jsonl(folder / "prompts.jsonl", rows))


def common(model, prompts, out, **changes):
    return {
        "model": str(model),
        "data": prompts,
        "reward": vowels,
        "steps": STEPS,
        "batch": 4,
        "max_prompt": 32,
        "max_completion": 6,
        "learning_rate": 1e-3,
        "eval_every": 2,
        "save_every": 3,
        "eval_rows": 4,
        "samples": 2,
        "evidence": 2,
        "checks": False,  # but for those that a test looks at
        "remat": "none",
        "mesh": functools.partial(sharding.make_mesh, fsdp=1),
        "schedule": train.constant,
        "out": str(out),
        "name": "run",
    } | changes


@pytest.fixture(scope="module")
def settings(small, prompts):
    return functools.partial(common, small, prompts)


def ppo(settings, out, **changes):
    """PPO with all that has a state: critic, running normalisation, adaptive KL, average; and pretraining text."""
    options = {"epochs": 2, "minibatches": 2, "kl_target": 2.0, "kl_horizon": 50, "normalize_running": True, "ema": 0.9}
    options |= {"temperature": 0.7, "microbatches": 2, "pretrain_batch": 4, "pretrain_coef": 1.0}
    made = settings(out) | options | changes
    return online.PPO(**made, pretrain_data=str(pathlib.Path(made["data"]).with_name("texts.jsonl")))


def metrics_of(run: pathlib.Path):
    return tracking.read_rows(run / "metrics.jsonl")


def same_run(one: pathlib.Path, other: pathlib.Path) -> None:
    """Every leaf of the last checkpoint, and every record, to the bit."""
    assert state_bits(one) == state_bits(other)
    for name in RECORDS:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


# What a run has and its compiled functions do not know; with a constant learning rate the number of steps is among it.
FREE = {"out": "", "name": "", "steps": 1, "save_every": 1, "eval_every": 1, "eval_rows": 1, "samples": 0}
FREE |= {"checks": False, "evaluate": None, "eval_data": None, "best": None, "patience": None, "reward_timeout": 1.0}


def alike(run, asked, example) -> str:
    """Equal where the compiled functions are. Parameters of rewards are arguments of theirs, and critics' too."""
    assert run.schedule is train.constant
    free = FREE | {"evidence": 0, "reward": None, "environment": run.environment is not None, "accept_changes": ""}
    if getattr(run, "critic", "shared") != "shared":
        free["critic"] = "policy"
    known = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)} | free
    judged = [(one.name, one.fn, one.weight) for one in asked]
    return repr((type(run), known, judged, jax.tree.map(jnp.shape, example[3])))


@pytest.fixture(scope="module", autouse=True)
def once():
    """Equal experiments are compiled once here: what a start of its own compiles, tests with processes see."""
    compiled, kept = online_setup._compile, {}

    def known(run, parts, method, shardings, example, asked, tracker):
        name = alike(run, asked, example)
        if name not in kept:  # with the run and its rewards, so that functions keep their addresses
            kept[name] = compiled(run, parts, method, shardings, example, asked, tracker), run, asked
        found = kept[name][0]
        return found | {"queue": jax.tree.map(np.copy, found["queue"])}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(online_setup, "_compile", known)
        yield


# --- one PPO run, looked at from all sides ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """(the experiment, its folder, what it printed)"""
    out = tmp_path_factory.mktemp("finished")
    Trouble.at, Trouble.calls = None, 0
    experiment = ppo(settings, out)
    assert online.run(experiment) == 0
    return experiment, out / "run"


def test_metrics_have_the_familiar_names(finished):
    _, run = finished
    records = metrics_of(run)
    assert [record["step"] for record in records] == list(range(STEPS + 1))
    names = {
        "objective/kl", "objective/scores", "objective/rlhf_reward", "objective/non_score_reward", "objective/entropy",
        "objective/kl_coef", "policy/approxkl_avg", "policy/clipfrac_avg", "policy/updates", "val/ratio", "val/mean",
        "val/explained_variance", "loss/policy_avg", "loss/value_avg", "loss", "grad_norm", "learning_rate",
        "completions/mean_length", "completions/clipped_ratio", "rewards/vowels/mean", "rewards/vowels/std",
        "rewards/none_ratio", "loss/pretrain_avg",
    }  # fmt: skip
    for record in records[1:]:
        assert names <= set(record)
        assert all(value is not None for value in record.values()), record
        assert record["policy/updates"] == 4
    held_out = {"eval/reward", "eval/reward/std", "eval/rewards/vowels/mean", "eval/completions/mean_length"}
    assert [held_out <= set(record) for record in records] == [True, False, True, False, True]
    plain = {name for record in records for name in record} - {"step"}
    unknown = {
        name for name in plain if define(name) is None and not name.removeprefix("eval/").startswith("rewards/vowels")
    }
    assert not unknown
    first = records[1]
    assert abs(first["objective/kl"]) < 1e-3  # the policy is still the reference; the sampler's numbers are within 1e-3
    assert first["learning_rate"] == 1e-3
    assert first["objective/rlhf_reward"] == pytest.approx(
        first["objective/scores"] + first["objective/non_score_reward"], abs=1e-5
    )
    assert records[-1]["loss/pretrain_avg"] < first["loss/pretrain_avg"]


def test_a_run_leaves_what_it_should(finished):
    _, run = finished
    assert {"report.md", "experiment.json", "manifest.json", "tensorboard", *RECORDS} <= set(os.listdir(run))
    samples = tracking.read_rows(run / "samples.jsonl")
    assert [row["phase"] for row in samples] == ["before"] * 2 + ["during"] * 2 + ["after"] * 2
    for row in samples:
        assert row["reward"] == pytest.approx(vowels([""], [row["completion"]])[0], abs=1e-3)
    report = (run / "report.md").read_text()
    assert "objective&#95;kl" in report or "`objective/kl`" in report
    assert cli.main(["report", str(run)]) == 0


@pytest.mark.slow
def test_the_same_run_again_does_nothing_and_another_is_refused(finished):
    experiment, run = finished
    before = {name: (run / name).read_bytes() for name in RECORDS}
    assert online.run(experiment) == 0
    assert {name: (run / name).read_bytes() for name in RECORDS} == before
    with pytest.raises(ValueError, match=r"lam was 0\.95 and is 0\.5"):
        online.run(dataclasses.replace(experiment, lam=0.5))


def test_inspect_shows_what_was_trained(finished, capsys):
    _, run = finished
    rows = tracking.read_rows(run / "evidence.jsonl")
    assert [(row["step"], row["row"]) for row in rows] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    for row in rows:
        assert row["prompt"].startswith("Once there was a")
        assert len(row["tokens"]) == len(row["logp"]) == len(row["advantage"]) == len(row["ratio"]) <= 6
        assert all(row["mask"])
        assert max(abs(ratio - 1) for ratio in row["ratio"]) > 1e-4  # after the updates
        assert row["score"] == pytest.approx(vowels([""], ["".join(row["tokens"]).replace("</s>", "")])[0], abs=0.011)
    assert cli.main(["inspect", str(run), "--step", "2", "--row", "1"]) == 0
    shown = capsys.readouterr().out
    assert "step 2, row 1" in shown
    assert "advantage" in shown
    assert "step 2, row 0" not in shown


@pytest.mark.slow
def test_what_is_exported_is_the_average(finished, small, tmp_path):
    """With `ema` the weights to use are their average; it opens again and writes."""
    experiment, run = finished
    assert artefacts.export(run, tmp_path / "exported") == STEPS
    _, exported = hf.load(tmp_path / "exported", dtype="float32")
    _, before = hf.load(small)
    moved = max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), exported, before)))
    assert 1e-5 < moved < 1e-2
    _, params, _ = artefacts.load_run(run)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(exported), strict=True):
        np.testing.assert_array_equal(a, b)
    assert cli.main(["sample", str(run), "--prompt", "Once", "--max-new-tokens", "3"]) == 0
    assert experiment.ema == 0.9
    shown = [row for row in tracking.read_rows(run / "samples.jsonl") if row["phase"] == "after"]  # it was evaluated
    asked = [row["prompt"] for row in shown]
    now = policy.load(str(tmp_path / "exported"), dtype="float32")
    made = policy.complete(now, asked, jax.random.key(0), max_new_tokens=6, batch=4, max_prompt=32, temperature=0.7)
    assert made.texts == [row["completion"] for row in shown]


@pytest.mark.slow
def test_selfcheck_says_what_it_found(finished, tmp_path, capsys):
    experiment, run = finished
    before = metrics_of(run)
    assert online.selfcheck(dataclasses.replace(experiment, out=str(tmp_path))) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("✓") == 9
    assert "an average of the weights (ema=0.9), at the end 66% initial ones" in said  # 0.9⁴
    assert "KL of a first rollout 0, ratios 1 to 1" in said
    assert "learning rate over 16 updates" in said
    assert "⟦" in said
    assert "loss/policy_avg will start near 0" in said
    assert metrics_of(run) == before


# --- rewards that fail ------------------------------------------------------------------------------------------------

# Calls of the reward: 1 before training, 2, 3 iterations, 4 evaluation, 5, 6 iterations, 7 evaluation.


def interrupted(experiment, cause, at, what):
    """Run until the trouble, then again without it."""
    cause(at, what)
    if what == "sigterm":
        assert online.run(experiment) == 128 + signal.SIGTERM
    else:
        with pytest.raises(rewards.RewardError) as error:
            online.run(experiment)
        assert "the reward vowels" in str(error.value)
        assert "prompt" in str(error.value)
        assert "completion" in str(error.value)
    saved = sorted(int(p.name) for p in (pathlib.Path(experiment.out) / "run" / "checkpoints").iterdir())
    cause(None, "")
    assert online.run(experiment) == 0
    return saved, None if what == "sigterm" else str(error.value)


@pytest.mark.slow
def test_a_reward_that_raises_stops_the_run_after_saving(finished, settings, trouble, tmp_path):
    """In the second iteration, before any regular checkpoint: the same command goes on to the same bits."""
    saved, message = interrupted(ppo(settings, tmp_path), trouble, 3, "raise")
    assert saved == [1]
    assert "KeyError: 'the judge is ill'" in message
    same_run(tmp_path / "run", finished[1])


@pytest.mark.long
def test_a_reward_that_fails_in_an_evaluation_owes_it(finished, settings, trouble, tmp_path):
    """The step is saved, its evaluation comes first when the run goes on, and its record is one line."""
    saved, message = interrupted(ppo(settings, tmp_path), trouble, 4, "nan")
    assert saved == [2]
    assert "failed in row 1: it returned nan" in message
    same_run(tmp_path / "run", finished[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "what", "saved", "message"),
    [
        LONG(2, "count", [0], "it returned 3 values for 4 completions"),
        LONG(5, "text", [2], "str 'good' where a number belongs"),
        LONG(6, "hang", [3], "is not done with 4 rows after 2 seconds"),
        LONG(7, "raise", [3, 4], "KeyError"),
        LONG(3, "sigterm", [1], None),
        (4, "sigterm", [2], None),
        LONG(7, "sigterm", [3, 4], None),
    ],
)
def test_trouble_of_any_kind_costs_no_bit(finished, settings, trouble, tmp_path, at, what, saved, message):
    """Also SIGTERM while a slow reward is waited for, in an iteration or an evaluation."""
    experiment = ppo(settings, tmp_path, reward_timeout=2.0 if what == "hang" else 600.0)
    found, said = interrupted(experiment, trouble, at, what)
    assert found == saved
    if message:
        assert message in said
    same_run(tmp_path / "run", finished[1])


class Killed(BaseException):
    """As if the process were."""


@pytest.mark.slow
def test_an_evaluation_that_was_owed_is_paid_once(finished, settings, trouble, tmp_path, monkeypatch):
    """Cut short, made up for, and the run killed before its next regular checkpoint: nothing is twice, nothing lost."""
    experiment = ppo(settings, tmp_path, save_every=100)
    trouble(4, "raise")
    with pytest.raises(rewards.RewardError):
        online.run(experiment)
    trouble(None, "")
    advance = online._advance

    def killed(run, setup, state, progress, at):
        if at == 3:
            raise Killed
        return advance(run, setup, state, progress, at)

    monkeypatch.setattr(online, "_advance", killed)
    monkeypatch.setattr(loop.Loop, "_rescue", lambda *_: None)
    with pytest.raises(UserError, match="Killed"):
        online.run(experiment)
    monkeypatch.undo()
    assert online.run(experiment) == 0
    same_run(tmp_path / "run", finished[1])


class Measured:
    raises = False


def measured(policy, reference, key):
    if Measured.raises:
        raise ZeroDivisionError("nothing to divide by")
    return online.Evaluation({"my/own": 1.0}, [])


@pytest.mark.long
def test_an_evaluation_of_ones_own_that_raises_loses_nothing(settings, tmp_path, monkeypatch):
    for name in ("whole", "failed"):
        experiment = ppo(settings, tmp_path / name, evaluate=measured, save_every=100, steps=3)
        if name == "failed":
            begin = online._begin

            def begun(*args, begin=begin):
                found = begin(*args)
                Measured.raises = True
                return found

            monkeypatch.setattr(online, "_begin", begun)
            assert online.run(experiment) == 1
            monkeypatch.undo()
            Measured.raises = False
            assert [p.name for p in (tmp_path / name / "run" / "checkpoints").iterdir()] == ["3"]
        assert online.run(dataclasses.replace(experiment, accept_changes="evaluate")) == 0
    same_run(tmp_path / "failed" / "run", tmp_path / "whole" / "run")


@pytest.mark.slow
def test_trouble_before_training_is_an_error_or_an_end(settings, trouble, tmp_path):
    experiment = ppo(settings, tmp_path, steps=1)
    trouble(1, "raise")
    with pytest.raises(rewards.RewardError, match="the judge is ill"):
        online.run(experiment)
    trouble(1, "sigterm")
    assert online.run(experiment) == 128 + signal.SIGTERM
    trouble(None, "")
    assert online.run(experiment) == 0
    assert [record["step"] for record in metrics_of(tmp_path / "run")] == [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("at", [3, LONG(4), LONG(6)])
def test_a_lag_loses_nothing_when_rewards_fail(whole, settings, trouble, tmp_path, at):
    """Rollouts are judged after the update that they wait for: if that fails, the update has not been made."""
    interrupted(KINDS["lag"](settings(tmp_path)), trouble, at, "raise")
    same_run(tmp_path / "run", whole("lag"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ppo", LONG("dapo"), "lag"])
def test_a_kill_costs_no_bit(finished, whole, settings, trouble, tmp_path, monkeypatch, kind):
    """Groups that wait for a batch, or rollouts for their iteration, are in the checkpoint; PPO has none so far."""
    trouble(None, "")
    experiment = ppo(settings, tmp_path) if kind == "ppo" else KINDS[kind](settings(tmp_path))
    advance, last = online._advance, 2 if kind == "ppo" else 3

    def killed(run, setup, state, progress, at):
        if at == last:
            assert kind == "ppo" or len(state.queue.born)
            raise Killed
        return advance(run, setup, state, progress, at)

    monkeypatch.setattr(online, "_advance", killed)
    monkeypatch.setattr(loop.Loop, "_rescue", lambda *_: None)
    with pytest.raises(UserError, match="Killed"):
        online.run(experiment)
    monkeypatch.undo()
    saved = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()]
    assert saved == ([] if kind == "ppo" else ["3"])
    assert online.run(experiment) == 0
    same_run(tmp_path / "run", finished[1] if kind == "ppo" else whole(kind))


def small_ids(params, tokens):
    """Thousandths of the sum of the ids; NaN for the one row whose sum is `bad`."""
    total = jnp.sum(jnp.where(tokens.mask, tokens.ids, 0), axis=1) / 1000
    return jnp.where(jnp.abs(total - params["bad"]) < 1e-4, jnp.nan, total * params["worth"])


def by_ids(settings, out, bad=-1.0, worth=1.0, **changes):
    """GRPO with such a reward."""
    params = {"bad": jnp.asarray(bad, jnp.float32), "worth": jnp.asarray(worth, jnp.float32)}
    return presets.grpo(**settings(out) | {"group": 2, "reward": rewards.on_device(small_ids, params=params)} | changes)


@pytest.mark.slow
def test_a_jax_reward_that_is_not_finite_stops_the_run_after_saving(settings, tmp_path):
    """One compiled iteration, and nothing of the failed one is kept: mended, the run goes on to the same bits."""

    def experiment(name, bad):
        return by_ids(settings, tmp_path / name, bad, evidence=99, eval_every=1)

    assert online.run(experiment("whole", -1.0)) == 0
    rows = tracking.read_rows(tmp_path / "whole" / "run" / "evidence.jsonl")  # of every row of every step
    new = [row for i, row in enumerate(rows) if row["score"] not in {other["score"] for other in rows[:i]}]
    bad = next(row for row in new if row["step"] == 4 and row["row"] > 0)
    said = rf"the reward small_ids failed in row {bad['row']}: it returned nan.*{re.escape(bad['prompt'][:10])}"
    with pytest.raises(rewards.RewardError, match=said):
        online.run(experiment("failed", bad["score"]))
    assert [p.name for p in (tmp_path / "failed" / "run" / "checkpoints").iterdir()] == ["3"]
    assert online.run(dataclasses.replace(experiment("failed", -1.0), accept_changes="reward")) == 0
    same_run(tmp_path / "failed" / "run", tmp_path / "whole" / "run")


# --- every kind of run ------------------------------------------------------------------------------------------------


def learned(run: pathlib.Path) -> None:
    records = metrics_of(run)
    assert records[-1]["step"] == STEPS
    assert all(value is not None for record in records for value in record.values())
    assert artefacts.load_run(run)[2] == STEPS


@rewards.on_device
def short(tokens):
    return -tokens.mask.sum(1) / 6


KINDS = {
    "shared critic": lambda common: online.PPO(**common, critic="shared", epochs=2, entropy_coef=0.01, target_kl=0.5),
    "trainer, filters": lambda common: online.PPO(
        **common, old_logps="trainer", temperature=0.7, top_p=0.9, top_k=50, min_p=0.01, min_new_tokens=2, epochs=1
    ),
    "reference norm": lambda common: presets.ppo_ziegler2019(**common, normalize_reference=8, whiten_rewards=True),
    "grpo": lambda common: presets.grpo(**common | {"group": 2}),
    "dapo": lambda common: presets.dapo(**common | {"group": 3, "max_age": 2, "overlong_buffer": 4, "minibatches": 3}),
    "dapo, jax reward": lambda common: presets.dapo(
        **common | {"group": 3, "reward": (short, vowels), "overlong_buffer": 4, "minibatches": 2}
    ),
    "gspo": lambda common: presets.gspo(**common | {"group": 2, "minibatches": 2, "microbatches": 2}),
    "remax": lambda common: presets.remax(**common, missing_eos_score=-1.0),
    "reinforce++": lambda common: presets.reinforce_plus_plus(**common),
    "lag": lambda common: presets.rloo(
        **common | {"group": 2}, lag=1, old_logps="trainer", importance_cap=2.0, normalize_reference=8
    ),
    "online dpo": lambda common: presets.online_dpo(**common),
    "raft": lambda common: presets.raft(**common | {"group": 2}),
    "slots": lambda common: presets.grpo(**common | {"group": 2, "slots": 4}),
    "one token": lambda common: presets.grpo(**common | {"group": 2, "max_completion": 1}),
}


RUN = ("lag", "online dpo")  # by default: what waits, and what learns otherwise than PPO, which is `finished`
# Of the rest tests/test_iteration.py makes iterations, or the experiments' tests trace presets.
TRACED = ("reference norm", "dapo, jax reward", "one token")


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """The folder of a run of a kind, made once."""

    @functools.cache
    def run(kind):
        out = tmp_path_factory.mktemp("whole")
        Trouble.at = None
        assert online.run(KINDS[kind](settings(out))) == 0
        return out / "run"

    return run


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRACED)
def test_a_kind_of_run_fits_together(settings, tmp_path, kind):
    assert traced(KINDS[kind](settings(tmp_path)), tmp_path).learner


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind if kind in RUN else LONG(kind) for kind in KINDS])
def test_every_kind_of_run(whole, kind):
    run = whole(kind)
    learned(run)
    last = metrics_of(run)[-1]
    match kind:
        case "dapo" | "dapo, jax reward":
            assert last["frac_reward_zero_std"] == 0.0
            assert last["sampling/age"] <= 2
        case "lag":
            assert last["sampling/age"] == 1.0
            assert last["val/ratio"] == pytest.approx(1.0, abs=1e-4)  # to the trainer's old policy, not the sampler's
            assert last["sampling/logp_difference"] > 1e-3
        case "trainer, filters":
            assert metrics_of(run)[1]["objective/kl"] == 0.0
            assert metrics_of(run)[1]["val/ratio"] == pytest.approx(1.0, abs=1e-5)
        case "one token":
            assert last["completions/mean_length"] == 1.0
        case "online dpo":
            assert 0 <= last["pairs/tied"] <= 1
            assert "objective/kl" in last


@pytest.mark.slow
def test_a_critic_from_a_reward_model(finished, settings, small, tmp_path):
    """Values begin as its scores, through its own head."""
    model, params = hf.load(small, dtype="float32")
    head = models.scalar_head(model.config.hidden_size).init(jax.random.key(1))
    start = policy.load(str(small))
    hf.save_reward(tmp_path / "rm", model, {"model": params, "head": head}, tokenizer=start.tokenizer)
    assert online.run(ppo(settings, tmp_path, critic=str(tmp_path / "rm"))) == 0
    learned(tmp_path / "run")
    first, zeros = metrics_of(tmp_path / "run")[1], metrics_of(finished[1])[1]
    assert abs(first["val/mean"] - zeros["val/mean"]) > 1e-3  # those of a head that begins with zeros
    with pytest.raises(ValueError, match="is a run that trained no reward model"):
        online.run(online.PPO(**settings(tmp_path, name="wrong", critic=str(finished[1]))))


@pytest.mark.long
def test_a_critic_from_a_run_that_trained_a_reward_model(settings, tmp_path):
    pairs = [{"prompt": f"The {a}", "chosen": " is happy.", "rejected": " is sad."} for a in WORDS * 4]
    common = settings(tmp_path, name="trained", data=str(data.write_jsonl(tmp_path / "pairs.jsonl", pairs)), steps=2)
    offline_fields = {field.name for field in dataclasses.fields(offline.RewardModel)}
    assert offline.run(offline.RewardModel(**{k: v for k, v in common.items() if k in offline_fields})) == 0
    mesh = functools.partial(sharding.make_mesh, fsdp=2, tensor=2)
    again = settings(tmp_path, name="again", critic=str(tmp_path / "trained"), steps=1, mesh=mesh)
    assert online.run(online.PPO(**again)) == 0


TURNS = {"max_completion": 48, "reward": None, "turn_tokens": 4, "minibatches": 2, "critic": "shared"}


@pytest.mark.long
def test_an_environment_of_several_turns(settings, tmp_path):
    """Actions are trained, what the environment says is only read; nothing is tokenised twice."""
    game = number_guessing(low=1, high=4, max_turns=2)
    assert online.run(online.PPO(**settings(tmp_path, **TURNS), environment=game)) == 0
    learned(tmp_path / "run")
    rows = tracking.read_rows(tmp_path / "run" / "evidence.jsonl")
    assert any(not all(row["mask"]) for row in rows)  # what was said between two actions
    for row in rows:
        told = [token for token, trained in zip(row["tokens"], row["mask"], strict=True) if not trained]
        assert all(ratio == 1.0 for ratio, trained in zip(row["ratio"], row["mask"], strict=True) if not trained)
        assert "guess:" in "".join(told) or not told


@pytest.mark.slow
def test_episodes_that_fail_cost_an_evaluation_but_not_the_run(settings, tmp_path, capsys):
    """All held-out ones fail: said, and not ranked by. All of a batch to train on fail: nothing is learned for ever."""

    def reset(row, seed):
        if row["prompt"] == "ill":
            raise RuntimeError("no such room")
        return 0, row["prompt"]

    rooms = Environment(reset, lambda state, text, ids: (state, Turn(None, float(ids.sum() % 7), done=True)), 1)
    ill = str(data.write_jsonl(tmp_path / "ill.jsonl", [{"prompt": "ill"}] * 2))
    common = settings(tmp_path, **TURNS, eval_data=ill, steps=2, environment=rooms, best="eval/reward")
    assert online.run(online.PPO(**common)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "2 of 2 episodes failed; number 0: reset: RuntimeError: no such room" in said
    assert said.count("none of the 2 held-out prompts has a reward") == 2
    assert all("eval/reward" not in row for row in metrics_of(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"4 of 4 episodes failed; number 0: .*no such room.*Its row: .*'ill'"):
        online.run(online.PPO(**common | {"data": ill, "eval_data": None, "name": "all"}))


@pytest.mark.long
def test_copies_of_an_episode_learn_alike_from_a_shared_prompt(settings, tmp_path):
    """The first update, of two episodes in two copies each, with their prompts computed once and twice."""

    def step(state, text, ids):
        return state + 1, Turn(" Then", float(ids.sum() % 7), done=state == 1)

    told = Environment(lambda row, seed: (0, row["prompt"]), step, 2)
    common = settings(tmp_path, max_completion=24, reward=None, batch=2, group=2, steps=1, save_every=1, eval_every=1)
    common |= {"environment": told, "turn_tokens": 4, "checks": False}
    first = {}
    for share in (True, False):
        changes = {"name": f"share-{share}", "share_prompts": share, "kl_loss": 0.1}
        assert online.run(presets.rloo(**common | changes)) == 0
        (first[share],) = [row for row in metrics_of(tmp_path / f"share-{share}") if row["step"] == 1]
    assert first[True].keys() == first[False].keys()
    for name, value in first[False].items():
        if not name.startswith("eval/"):  # what is sampled after the update may differ by more than rounding
            np.testing.assert_allclose(first[True][name], value, rtol=2e-3, atol=2e-5, err_msg=name)
    assert first[True]["grad_norm"] > 1e-3


@pytest.mark.long
def test_a_jax_reward_is_learned_in_one_compiled_iteration(settings, tmp_path):
    """The share of tokens that are one of the vowels' letters: a trivial task, which a few iterations solve."""
    wanted = jnp.asarray([token for token in range(512) if token % 3 == 0])

    @rewards.on_device
    def thirds(tokens):
        return jnp.where(tokens.mask, jnp.isin(tokens.ids, wanted), False).sum(1) / 6

    changes = {
        "reward": thirds,
        "steps": 40,
        "batch": 8,
        "group": 4,
        "learning_rate": 3e-3,
        "eval_every": 20,
        "eval_rows": 16,
    }
    experiment = presets.grpo(**settings(tmp_path) | changes, kl_loss=0.0, best="eval/reward")
    assert online.run(experiment) == 0
    records = metrics_of(tmp_path / "run")
    scores = [record["objective/scores"] for record in records[1:]]
    assert np.mean(scores[-5:]) > np.mean(scores[:5]) + 0.2
    assert records[-1]["eval/reward"] > records[0]["eval/reward"] + 0.2


@pytest.mark.long
def test_host_rewards_are_learned(settings, tmp_path):
    experiment = online.PPO(
        **settings(tmp_path) | {"steps": 25, "batch": 16, "eval_every": 25, "learning_rate": 2e-3}, kl_reward=0.01
    )
    Trouble.at = None
    assert online.run(experiment) == 0
    scores = [record["rewards/vowels/mean"] for record in metrics_of(tmp_path / "run")[1:]]
    assert np.mean(scores[-4:]) > scores[0] + 0.1  # the first batch is the untrained policy's; four steps learn most


@pytest.mark.long
def test_metrics_do_not_depend_on_the_mesh(settings, tmp_path):
    found = {}
    for axes in ({"fsdp": 1}, {"data": 2, "fsdp": 2, "tensor": 2}):
        name = "x".join(axes)
        common = settings(
            tmp_path, name=name, steps=2, batch=8, eval_rows=8, mesh=functools.partial(sharding.make_mesh, **axes)
        )
        assert online.run(online.PPO(**common, epochs=2, minibatches=2, old_logps="trainer", ema=0.9)) == 0
        found[name] = metrics_of(tmp_path / name)
    for one, many in zip(*found.values(), strict=True):
        assert one.keys() == many.keys()
        names = sorted(one.keys() - {"policy/clipfrac_avg"})
        np.testing.assert_allclose([one[k] for k in names], [many[k] for k in names], rtol=5e-3, atol=5e-3)


@pytest.mark.slow
def test_patience_ends_a_run_that_gets_no_better(settings, tmp_path):
    """With a constant reward nothing is ever better than the first evaluation in training."""
    changes = {"steps": 20, "eval_every": 1, "best": "eval/reward", "patience": 2}
    assert online.run(by_ids(settings, tmp_path, worth=0.0, **changes)) == 0
    assert metrics_of(tmp_path / "run")[-1]["step"] == 3
    assert tracking.read_rows(tmp_path / "run" / "samples.jsonl")[-1]["phase"] == "after"
    assert artefacts.load_run(tmp_path / "run")[2] == 1


def test_wrong_settings_are_one_paragraph(settings, tmp_path, capsys):
    """Before anything is loaded, and naming what to change."""
    file = tmp_path / "wrong.py"
    file.write_text(
        "from rljax import online\nexperiment = online.PPO(model='m', data='nothing.jsonl', reward=len, batch=4)\n"
    )
    for options, message in {
        ("--minibatches", "3"): "4 rows an iteration cannot be cut into minibatches=3",
        ("--temperature", "0"): "temperature=0 always writes the same",
        ("--kl_reward", "0", "--kl_target", "6"): "adapts a coefficient that is 0",
    }.items():
        assert cli.main(["run", str(file), "--mesh.fsdp", "1", *options]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    with pytest.raises(rewards.RewardError, match="needs the field"):
        online.run(
            online.PPO(**settings(tmp_path) | {"reward": lambda prompts, completions, *, answer: [0.0], "steps": 1})
        )
    assert json.loads((tmp_path / "run" / "experiment.json").read_text())["kind"] == "PPO"
