"""The online experiments on a tiny checkpoint, and those on random transformers: bandits with known ends, a sweep."""

import dataclasses
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import advantages, cli, options, tracking
from tests.traced import traced

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
STORIES = (
    "cispo",
    "dapo",
    "dr_grpo",
    "gspo",
    "online_dpo",
    "ppo_tiny",
    "raft",
    "reinforce_plus_plus",
    "remax",
    "rloo",
)


@pytest.fixture
def load(monkeypatch):
    """Import an experiment as `rljax run` does, with its folder on the path."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    yield lambda name: cli.import_file(EXPERIMENTS / f"{name}.py")
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(EXPERIMENTS) in str(sys.modules[name].__file__):
            sys.modules.pop(name)


# --- stories ----------------------------------------------------------------------------------------------------------


def command(name, model, out) -> list[str]:
    sizes = ["--steps", "2", "--batch", "4", "--eval_rows", "4", "--samples", "2", "--max_completion", "24"]
    return [str(EXPERIMENTS / f"{name}.py"), "--model", str(model), "--out", str(out), "--mesh.fsdp", "1", *sizes]


@pytest.mark.long
@pytest.mark.parametrize("name", STORIES)
def test_two_steps(name, small, tmp_path):
    assert cli.main(["run", *command(name, small, tmp_path)]) == 0
    records = tracking.read_rows(tmp_path / name / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2]
    learned = [record for record in records[1:] if record.get("pairs/tied") != 1]  # pairs that tie have no loss
    assert learned
    assert all(np.isfinite(record["loss"]) for record in learned)
    assert {"objective/scores", "objective/kl"} <= set(records[1])
    assert abs(records[1]["objective/kl"]) < 1e-3  # nothing was learned before the first rollout


@pytest.mark.slow
@pytest.mark.parametrize("name", STORIES)
def test_settings_fit_together(name, small, tmp_path):
    experiment, _ = options.read_experiment(command(name, small, tmp_path), "run")
    assert len(traced(experiment, tmp_path).held_out) == 4


@pytest.mark.parametrize("name", STORIES)
def test_files_stay_a_page(name, load):
    text = (EXPERIMENTS / f"{name}.py").read_text()
    assert len(text.splitlines()) <= 60
    experiment = load(name).experiment
    assert experiment.batch * experiment.group == 64  # they spend the same number of samples an iteration
    assert "arXiv:" in text


def test_happy_words_count_once_and_only_as_words(load):
    happy = load("ppo_tiny").happy
    texts = ["Happy, happy! They smiled.", "unhappy", "", "a kind friend; friends LOVE to play", "They laughed.\nFun!"]
    assert happy([""] * 5, texts) == [2, 0, 0, 5, 2]


def test_openings_are_all_different(load):
    prompts = [row["prompt"] for row in load("ppo_tiny").openings(None, None)]
    assert len(prompts) == len(set(prompts)) == 576
    assert load("ppo_tiny").happy(prompts, prompts) == [0] * 576


# --- bandits ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def bandit(load):
    return load("policy_bandit")


def problem(bandit, tokens: int, seed: int = 0):
    """(reference [prompt, first, second], rewards) in float64."""
    rng = np.random.default_rng(seed)
    ref = rng.uniform(0.2, 1, (bandit.PROMPTS, 8, 8)) * (np.arange(8) == 0 if tokens == 1 else 1)
    if tokens == 2:
        ref[:, bandit.END, 1:] = 0
    return ref / ref.sum((1, 2), keepdims=True), bandit.TABLE.astype(np.float64)


def spread(x: np.ndarray, possible: np.ndarray) -> float:
    """How far from constant x is over what is possible after each prompt."""
    return max(np.ptp(row[where]) for row, where in zip(x, possible, strict=True))


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_answers_meet_their_conditions(bandit, tokens):
    ref, r = problem(bandit, tokens)
    possible, beta = ref > 0, bandit.BETA
    with np.errstate(divide="ignore", invalid="ignore"):
        best = bandit.tilted(ref, r)
        assert spread(r - beta * np.log(best / ref), possible) < 1e-12
        pi = bandit.forward(ref, r)
        assert spread(r - beta * (1 - ref / pi), possible) < 1e-10  # E[(r − β (1 − π_ref/π)) ∇ log π] = 0
        pi = bandit.standardised(ref, r)
        mean = (pi * r).sum((1, 2), keepdims=True)
        sigma = np.sqrt((pi * (r - mean) ** 2).sum((1, 2), keepdims=True))
        assert spread(r / sigma - beta * (1 - ref / pi), possible) < 1e-8
        pi = bandit.stepwise(ref, r)
        first, ref_first = pi.sum(2), ref.sum(2)
        given, ref_given = pi / first[:, :, None], ref / ref_first[:, :, None]
        expected = (given * r).sum(2)
        assert spread(expected - beta * np.log(first / ref_first), ref_first > 0) < 1e-12
        inside = r - beta * np.log(given / ref_given)
        assert max(spread(inside[:, a], possible[:, a]) for a in range(8)) < 1e-12
    for answer in (bandit.tilted, bandit.forward, bandit.standardised, bandit.stepwise):
        np.testing.assert_allclose(answer(ref, r).sum((1, 2)), 1, atol=1e-9)
    if tokens == 1:
        np.testing.assert_allclose(bandit.stepwise(ref, r), best, atol=1e-12)
    else:
        assert np.abs(bandit.stepwise(ref, r) - best).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 2])
def test_completions_are_all_there_is(bandit, tokens):
    params = bandit.MODEL.init(jax.random.key(0))
    pi = np.exp(np.asarray(jax.jit(bandit.completion_logps, static_argnums=1)(params, tokens), np.float64))
    np.testing.assert_allclose(pi.sum((1, 2)), 1, atol=1e-5)
    assert (pi > 0).sum() == bandit.PROMPTS * (8 if tokens == 1 else 1 + 7 * 8)


def train(bandit, name: str, *, steps: int, samples: int):
    """(π, π_ref) of one seed of a case."""
    case = next(case for case in bandit.CASES if case.name == name)
    sizes = {"batch": bandit.PROMPTS, "group": samples, "max_prompt": 2, "max_completion": case.tokens}
    given = {"model": "", "data": "", "reward": bandit.looked_up, "learning_rate": 5e-3}
    fit = functools.partial(bandit.fit, run=case.preset(**sizes, **given, **case.settings), steps=steps)
    ref, pi = jax.device_get(jax.jit(fit)(jax.random.key(3)))
    return np.exp(np.asarray(pi, np.float64)), np.exp(np.asarray(ref, np.float64))


@pytest.mark.slow
def test_rloo_comes_near_the_optimum(bandit):
    pi, ref = train(bandit, "RLOO", steps=60, samples=64)
    best = bandit.tilted(ref, bandit.TABLE.astype(np.float64))
    assert np.abs(ref - best).max() > 0.2
    assert np.abs(pi - best).max() < 0.05


@pytest.mark.parametrize(("end", "status"), [("answer", 0), ("elsewhere", 1)])
def test_an_end_is_judged(bandit, capsys, monkeypatch, end, status):
    """Of runs that have nothing but an end: each answer, or the optimum where something else is predicted."""
    ref = {tokens: problem(bandit, tokens, seed=5)[0] ** 8 for tokens in (1, 2)}  # with opinions: all ends are apart
    ref = {tokens: pi / pi.sum((1, 2), keepdims=True) for tokens, pi in ref.items()}
    case = iter(bandit.CASES)

    def fit(key, run, steps):
        answer = next(case).answer if end == "answer" else bandit.tilted
        found = ref[run.max_completion], answer(ref[run.max_completion], bandit.TABLE.astype(np.float64))
        return tuple(jnp.log(jnp.asarray(pi, jnp.float32)) for pi in found)

    monkeypatch.setattr(bandit, "fit", fit)
    assert bandit.main(seeds=1) == status
    printed = capsys.readouterr().out
    predicted = sum(case.answer is not bandit.tilted for case in bandit.CASES)
    assert printed.count("FAIL") == 2 * predicted * status
    assert printed.count(" pass") == len(bandit.CASES) + predicted * (1 - 2 * status)


@pytest.mark.long
@pytest.mark.parametrize(
    ("in_loss", "sizes"),  # where the loss has a KL of noise, more samples are needed to come near
    [(False, {"steps": 150, "samples": 128, "learning_rate": 6e-3}), (True, {})],
    ids=["KL in the reward", "KL in the loss"],
)
def test_algorithms_end_where_they_should(bandit, capsys, monkeypatch, in_loss, sizes):
    cases = [case for case in bandit.CASES if ("in the loss" in case.name) == in_loss]
    monkeypatch.setattr(bandit, "CASES", cases)
    assert bandit.main(seeds=1, **sizes) == 0
    printed = capsys.readouterr().out
    assert "FAIL" not in printed
    predicted = sum(case.answer is not bandit.tilted for case in bandit.CASES)
    assert printed.count(" pass") == len(bandit.CASES) + predicted >= 4


@pytest.mark.long
def test_a_wrong_kl_misses_the_optimum(bandit, capsys, monkeypatch):
    right = advantages.shape_rewards
    half = lambda *args, kl_coef, **kwargs: right(*args, kl_coef=0.5 * kl_coef, **kwargs)  # noqa: E731
    monkeypatch.setattr(advantages, "shape_rewards", half)
    assert bandit.main(seeds=1, steps=150, samples=128, only="RLOO, two tokens") == 1
    assert "FAIL" in capsys.readouterr().out


# --- sixteen seeds ----------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_seed_among_others_is_the_seed_alone(load):
    module = load("ppo_seeds")
    run = dataclasses.replace(module.RUN, steps=3, batch=8)
    rates = (1e-3, 3e-3)
    together = module.sweep(run, seeds=3, learning_rates=rates)
    assert together["reward"].shape == together["kl"].shape == (2, 3, 3)
    alone = jax.jit(functools.partial(module.curves, run=run))(jax.random.split(jax.random.key(0), 3)[1], rates[1])
    for name, values in alone.items():
        np.testing.assert_allclose(together[name][1, 1], values, rtol=1e-3, atol=1e-5)
    assert np.ptp(together["kl"][0, :, -1]) > 1e-4  # seeds differ
    assert np.abs(together["kl"][0, :, -1] - together["kl"][1, :, -1]).min() > 1e-4  # and so do learning rates


@pytest.mark.slow
def test_a_sweep_is_over_rates_and_seeds(load, monkeypatch):
    module = load("ppo_seeds")
    run, rates = dataclasses.replace(module.RUN, steps=3, batch=8), (1e-3, 3e-3)
    fitting = jax.eval_shape(functools.partial(module.curves, run=run), jax.random.key(0), rates[0])
    assert fitting["reward"].shape == fitting["kl"].shape == (3,)

    def curves(key, rate, run):
        return {"reward": rate * jnp.arange(run.steps), "kl": jax.random.uniform(key, (run.steps,))}

    monkeypatch.setattr(module, "curves", curves)
    together = module.sweep(run, seeds=3, learning_rates=rates)
    alone = curves(jax.random.split(jax.random.key(0), 3)[1], rates[1], run)
    for name, values in alone.items():
        np.testing.assert_allclose(together[name][1, 1], values, rtol=1e-6)
        assert together[name].shape == (2, 3, 3)


def test_the_reward_counts_on(load):
    module = load("ppo_seeds")
    ids = np.array([[3, 4, 5, 6, 0, *[9] * 9], [1, 15, 0, 1, *[2, 3] * 5]], np.int32)
    mask = np.broadcast_to(np.arange(14) >= 2, (2, 14))
    tokens = module.Tokens(ids=ids, segments=np.ones_like(ids), mask=mask)
    np.testing.assert_allclose(module.counts(tokens), [2 / 12, 8 / 12])


def test_the_band_is_students(load):
    mean, half = load("ppo_seeds").band(np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [4.0, 0.0]]))
    np.testing.assert_allclose(mean, [2.5, 0])
    np.testing.assert_allclose(half, [3.1824 * 1.29099 / 2, 0], rtol=1e-4)  # t of 3 degrees of freedom, by table


@pytest.mark.long
def test_the_sweep_draws_its_curves(load, tmp_path, capsys):
    assert load("ppo_seeds").main(seeds=2, steps=3, batch=8, out=str(tmp_path)) == 0
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "4 runs of 3 iterations" in capsys.readouterr().out


def test_one_seed_has_no_confidence(load):
    with pytest.raises(ValueError, match="seeds=1 must be at least 2"):
        load("ppo_seeds").main(seeds=1)


# --- self-play --------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("copies", [False, True])
def test_self_play_takes_two_steps(load, capsys, copies):
    status = load("self_play").main(steps=2, episodes=8, copies=copies)
    printed = capsys.readouterr().out
    assert "step   0  coins paid" in printed
    assert "step   1  coins paid" in printed
    assert printed.splitlines()[-1] == ("FAIL" if status else "pass")
