"""The bandit experiments meet their papers' numbers, and say so only when the losses are right."""

import pathlib
import sys

import numpy as np
import pytest

from rljax import losses

FOLDER = pathlib.Path(__file__).parents[2] / "experiments"


@pytest.fixture
def bandits(monkeypatch):
    """(kl_bandit_optimum, ipo_vs_dpo_bandit), imported as `rljax reproduce` does it: with their folder on the path."""
    monkeypatch.syspath_prepend(str(FOLDER / "papers"))
    import ipo_vs_dpo_bandit
    import kl_bandit_optimum

    yield kl_bandit_optimum, ipo_vs_dpo_bandit
    for name in ("kl_bandit_optimum", "ipo_vs_dpo_bandit"):
        sys.modules.pop(name)


def verdicts(result) -> dict[str, bool]:
    return {check.claim: check.holds for check in result.checks}


def swap(monkeypatch):
    dpo, ipo = losses.dpo_loss, losses.ipo_loss
    monkeypatch.setattr(losses, "dpo_loss", ipo)
    monkeypatch.setattr(losses, "ipo_loss", dpo)


@pytest.mark.slow
def test_every_algorithm_reaches_its_optimum(bandits):
    table = verdicts(bandits[0].reproduce(seeds=1, quick=True))
    assert len(table) == 11
    assert all(table.values())


@pytest.mark.slow
def test_swapped_losses_miss_their_optima(bandits, monkeypatch):
    swap(monkeypatch)
    table = verdicts(bandits[0].reproduce(seeds=1, quick=True, sampled_steps=100))
    failed = {claim for claim, holds in table.items() if not holds}
    assert failed == {claim for claim in table if "PO, " in claim and "PPO" not in claim}


def test_the_optima_differ_from_each_other_and_from_the_reference(bandits):
    bandit = bandits[0]
    tilts = [np.asarray(bandit.REWARDS) / bandit.BETA, bandit.ipo_tilt(), np.zeros(5)]
    policies = [np.exp(np.asarray(bandit.REF_LOGPS) + tilt) for tilt in tilts]
    policies = [policy / policy.sum() for policy in policies]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.max(np.abs(policies[i] - policies[j])) > 0.05


def test_too_few_samples_for_the_steps_is_an_error(bandits):
    with pytest.raises(ValueError, match="samples=10 must be at least the number of steps, 200"):
        bandits[0].reproduce(seeds=1, quick=True, samples=10)


@pytest.mark.slow
def test_ipo_stays_where_dpo_runs_away(bandits):
    table = verdicts(bandits[1].reproduce(seeds=1, quick=False))
    assert len(table) == 12
    assert all(table.values())


@pytest.mark.slow
def test_swapped_losses_fail_every_row(bandits, monkeypatch):
    swap(monkeypatch)
    table = verdicts(bandits[1].reproduce(seeds=1, quick=False, steps=1000))
    assert len(table) == 12
    assert not any(table.values())


@pytest.mark.parametrize(
    ("data", "action", "expected"),
    [
        ("total order", 0, (0.9644, 0.5627, 0.4484)),
        ("c never wins", 2, (0.0034, 0.1554, 0.2327)),
        ("a over b only", 1, (0.0062, 0.1863, 0.2543)),
    ],
)
def test_least_squares_gives_the_known_answers(bandits, data, action, expected):
    bandit = bandits[1]
    answers = [bandit.exact(bandit.DATA[data], tau)[action] for tau in (0.1, 0.5, 1.0)]
    np.testing.assert_allclose(answers, expected, atol=1e-4)


def test_openings_are_400_varied_neutral_beginnings():
    text = (FOLDER / "openings.txt").read_text(encoding="ascii")
    openings = text.splitlines()
    assert text.endswith("\n")
    assert len(openings) == len({opening.lower() for opening in openings}) == 400
    for opening in openings:
        assert opening == opening.strip()
        assert 3 <= len(opening.split()) <= 9, opening
    assert len({" ".join(opening.lower().split()[:2]) for opening in openings}) >= 350
    vader = pytest.importorskip("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    scores = {opening: vader.polarity_scores(opening)["compound"] for opening in openings}
    assert all(score == 0.0 for score in scores.values()), {k: v for k, v in scores.items() if v}
