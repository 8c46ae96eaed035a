"""Presets say what their papers say, make runs that pass the checks, and take nothing that is not a setting."""

import dataclasses
import functools
import json

import jax.numpy as jnp
import optax
import pytest

from rljax import advantages, cli, losses, online, policy, presets, program, rewards, settings, train
from rljax.environments import number_guessing
from rljax.models.resolve import load_tokenizer
from rljax.objectives.online import surrogate_inputs

COMMON = {"model": "m", "data": "d.jsonl", "reward": len, "batch": 16}
NAMES = [name for name, value in vars(presets).items() if isinstance(value, functools.partial)]


def made(name, **changes):
    return getattr(presets, name)(**COMMON | changes)


def check(run):
    program.check_settings(run)
    settings.check(run)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_a_run_that_can_work(name):
    run = made(name)
    check(run)
    assert cli.with_options(run, []) == run
    assert program.describe(run)["kind"] == type(run).__name__
    changed = cli.with_options(run, ["--learning_rate", "0.0", "--temperature", "0.5", "--kl_reward", "0.0"])
    assert (changed.learning_rate, changed.temperature, changed.kl_reward) == (0.0, 0.5, 0.0)
    assert isinstance(program.make_optimizer(run, 100)[0], optax.GradientTransformation)
    with pytest.raises(TypeError, match="betta"):
        made(name, betta=1)


def test_there_is_a_preset_for_every_algorithm_that_is_named():
    assert {"grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "remax", "reinforce", "online_dpo", "raft"} <= set(
        NAMES
    )


# What the papers state (see the comments in presets.py for where).
@pytest.mark.parametrize(
    ("name", "stated"),
    [
        (
            "ppo_ziegler2019",
            {
                "kl_reward": 0.15,
                "kl_target": 6.0,
                "kl_horizon": 10_000,
                "temperature": 0.7,
                "epochs": 4,
                "minibatches": 1,
                "gamma": 1.0,
                "lam": 0.95,
                "value_coef": 0.1,
                "whiten_rewards": True,
                "whiten_ddof": 0,
                "missing_eos_score": -1.0,
                "entropy_coef": 0.0,
                "critic": "shared",
            },
        ),
        ("ppo_stiennon2020", {"kl_reward": 0.05, "kl_target": None, "epochs": 4, "gamma": 1.0, "lam": 0.95}),
        ("ppo_instructgpt", {"kl_reward": 0.02, "epochs": 1, "minibatches": 8, "ema": 0.992, "pretrain_coef": 27.8}),
        (
            "ppo_huang2024",
            {
                "kl_reward": 0.05,
                "learning_rate": 3e-6,
                "epochs": 4,
                "temperature": 0.7,
                "missing_eos_score": -1.0,
                "whiten_rewards": False,
                "whiten_advantages": True,
                "value_coef": 0.1,
            },
        ),
        (
            "rloo",
            {"advantage": advantages.leave_one_out, "kl_reward": 0.03, "aggregate": "seq_mean_token_sum", "group": 4},
        ),
        ("remax", {"advantage": advantages.greedy_baseline, "loss": losses.reinforce_loss, "group": 1}),
        ("reinforce_plus_plus", {"advantage": advantages.reward_to_go, "whiten_advantages": True, "group": 1}),
        ("grpo", {"kl_loss": 0.04, "kl_loss_estimator": "k3", "aggregate": "seq_mean_token_mean", "kl_reward": 0.0}),
        ("dr_grpo", {"kl_loss": 0.0, "aggregate": "constant"}),
        ("dapo", {"kl_loss": 0.0, "aggregate": "token_mean", "filter_groups": True, "group": 16, "minibatches": 16}),
        ("gspo", {"aggregate": "seq_mean_token_mean", "minibatches": 4, "kl_loss": 0.0, "old_logps": "trainer"}),
        ("cispo", {"aggregate": "token_mean", "kl_loss": 0.0}),
        ("online_dpo", {"group": 2}),
        ("expert_iteration", {"threshold": 0.0}),
    ],
)
def test_settings_are_those_of_the_papers(name, stated):
    run = made(name)
    assert {key: getattr(run, key) for key in stated} == stated


def test_bounds_and_advantages_of_the_group_methods():
    def bounds(name):
        keywords = made(name).loss.keywords
        return keywords["clip_low"], keywords["clip_high"]

    assert bounds("grpo") == bounds("dr_grpo") == (0.2, 0.2)
    assert bounds("dapo") == (0.2, 0.28)
    assert bounds("gspo") == (3e-4, 4e-4)
    assert bounds("cispo")[0] >= 1.0  # the lower side is open
    groups = jnp.asarray([[1.0, 0.0, 0.0, 0.0]])
    by_std, plain = made("grpo").advantage(groups), made("dr_grpo").advantage(groups)
    assert plain.tolist() == [[0.75, -0.25, -0.25, -0.25]]
    assert float(by_std[0, 0]) == pytest.approx(0.75 / (0.5 + 1e-4))
    assert made("online_dpo").loss.keywords == {"beta": 0.1}
    for name in NAMES:
        run = made(name)
        if isinstance(run, settings.PPO | settings.PolicyGradient):
            assert surrogate_inputs(run.loss)


def test_optimizers_of_the_ppo_papers():
    """TF1-style Adam where OpenAI's code of 2019 and 2020 had it (TRAPS 30), ε = 1e-5 there and in 2403.17031."""
    assert made("ppo_ziegler2019").optimizer.func is train.tf1_adam
    assert made("ppo_ziegler2019").optimizer.keywords["eps"] == 1e-5
    assert made("ppo_stiennon2020").optimizer.func is train.tf1_adam
    assert made("ppo_huang2024").optimizer.keywords["eps"] == 1e-5
    run = cli.with_options(made("ppo_huang2024"), ["--optimizer.eps", "1e-8", "--value_loss.clip", "0.0"])
    assert run.optimizer.keywords["eps"] == 1e-8
    assert run.value_loss.keywords["clip"] == 0.0


def test_every_setting_may_be_zero():
    """TRAPS 7: a 0.0 from the command line stays 0.0."""
    zeros = {
        "PPO": ["entropy_coef", "value_coef", "gamma", "lam", "kl_reward", "kl_loss", "score_clip", "target_kl", "ema"],
        "PolicyGradient": ["entropy_coef", "kl_loss", "importance_cap", "missing_eos_score", "missing_eos_penalty"],
        "Imitation": ["threshold", "top_p", "min_p"],
    }
    for kind, names in zeros.items():
        run = getattr(online, kind)(**COMMON)
        changed = cli.with_options(run, [word for name in names for word in (f"--{name}", "0.0")])
        assert all(getattr(changed, name) == 0.0 for name in names)
        assert all(getattr(changed, name) is not None for name in names)


@pytest.mark.parametrize("option", ["--kl_koef", "--loss.clip", "--advantage.eps2", "--reward.nothing", "--env"])
def test_unknown_options_are_errors(option, capsys):
    with pytest.raises(SystemExit) as error:
        cli.with_options(made("grpo"), [option, "1"])
    assert error.value.code == 2
    assert option.lstrip("-").split(".")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("PPO", {"group": 0}, "group must be at least 1"),
        ("PPO", {"epochs": 0}, "epochs must be at least 1"),
        ("PPO", {"minibatches": 3}, "16 rows an iteration cannot be cut into minibatches=3"),
        ("PPO", {"reward": None}, "give a reward"),
        ("PPO", {"slots": 0}, "slots must be at least 1 or None, got 0"),
        ("PolicyGradient", {"group": 4, "slots": 6}, "slots=6 must be a positive multiple of group=4"),
        ("PPO", {"temperature": 0.0}, "temperature=0 always writes the same"),
        ("PPO", {"old_logps": "policy"}, "old_logps must be"),
        ("PPO", {"importance_cap": 2.0}, "set old_logps='trainer'"),
        ("PPO", {"kl_reward": 0.0, "kl_target": 6.0}, "adapts a coefficient that is 0"),
        ("PPO", {"kl_target": 0.0}, "kl_target must be above 0"),
        ("PPO", {"normalize_running": True, "normalize_reference": 8}, "set one of them"),
        (
            "PPO",
            {"pretrain_data": "t.jsonl", "pretrain_batch": 6, "minibatches": 4},
            "pretrain_batch=6 rows cannot be cut",
        ),
        ("PolicyGradient", {"group": 1, "filter_groups": True}, "set group to 2 or more"),
        ("PolicyGradient", {"lag": 1, "filter_groups": True}, "set one of them"),
        ("PolicyGradient", {"batch": 1, "group": 8, "microbatches": 3}, "8 rows an iteration"),
        ("PolicyGradient", {"overlong_buffer": 0}, "overlong_buffer must be at least 1 or None, got 0"),
        ("PolicyGradient", {"overlong_buffer": 64, "max_completion": 64}, "less than max_completion=64"),
        ("PolicyGradient", {"group": 1}, "alone in its group has the advantage 0"),
        ("PolicyGradient", {"max_age": 2}, "is for groups that filter_groups leaves over"),
        ("PolicyGradient", {"lag": -1}, "lag must be at least 0"),
        ("PPO", {"normalize_reference": -5}, "normalize_reference must be at least 0, got -5"),
        ("PPO", {"turn_tokens": 4}, "turn_tokens=4 is for the turns of an environment"),
        (
            "PPO",
            {"reward": None, "environment": (len, len)},
            "environment must be a rljax.environments.turns.Environment or None",
        ),
        ("PPO", {"whiten_over": "epoch"}, "whiten_over must be"),
        ("OnlinePreference", {"group": 1}, "group must be at least 2"),
        ("OnlinePreference", {"kl_reward": 0.1}, "kl_reward=0.1 has no effect on OnlinePreference"),
        ("Imitation", {"kl_target": 6.0, "kl_reward": 0.1}, "has no effect on Imitation"),
    ],
)
def test_settings_that_cannot_work_are_refused(kind, changes, message):
    run = getattr(online, kind)(**COMMON | changes)
    with pytest.raises(ValueError, match=message):
        check(run)


@pytest.mark.parametrize(
    "advantage",
    [
        advantages.greedy_baseline,
        functools.partial(advantages.greedy_baseline),
        lambda rewards, greedy: rewards - greedy[:, None],
    ],
)
def test_a_greedy_baseline_needs_prompts(advantage):
    with pytest.raises(ValueError, match="an environment has no greedy completions"):
        settings.check(made("remax", reward=None, environment=number_guessing(), advantage=advantage))


def test_one_prompt_may_be_cut_into_microbatches_of_its_completions():
    run = online.PolicyGradient(**COMMON | {"batch": 1, "group": 8, "microbatches": 4})
    check(run)


def test_descriptions_are_json_of_a_size():
    """Rewards of any kind: functions, objects, with weights; no array ends up in experiment.json."""

    class Judge:
        def __call__(self, prompts, completions):
            return [0.0] * len(prompts)

    heavy = rewards.on_device(
        lambda params, tokens: params["w"][0] * tokens.mask.sum(1), params={"w": jnp.ones(100_000)}
    )
    for reward in (Judge(), heavy, (rewards.reward(len, weight=2.0), rewards.reward(Judge(), name="judge"))):
        text = json.dumps(program.describe(dataclasses.replace(made("grpo"), reward=reward)))
        assert len(text) < 5_000
        assert "Judge" in text or "lambda" in text


def test_further_stops_are_single_tokens(stories):
    tokenizer = load_tokenizer(stories)
    first, second = policy.named_stops(("<unk>", "."), tokenizer)
    assert tokenizer.convert_ids_to_tokens([first, second]) == ["<unk>", "."]
    with pytest.raises(ValueError, match=r"stop='once upon' is \d tokens to this tokenizer"):
        policy.named_stops(("once upon",), tokenizer)
