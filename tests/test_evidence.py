"""What a step did to single tokens: every column by hand, kept as JSON, shown as a table."""

import dataclasses
import functools
import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from rljax import cli, evidence, losses
from rljax.iteration import Trace, Verdict
from rljax.methods import Notes
from rljax.types import PolicyBatch
from tests import tiny
from tests.test_selfchecks import Letters

NAN = float("nan")
CLIP = functools.partial(losses.ppo_clip_loss, clip_low=0.2, clip_high=0.2)


def trace(*, critic=True) -> Trace:
    """Three rows: 3 tokens that ended, 6 that were cut off, 2 that no reward applies to."""
    rollout, rng = tiny.rollout((3, 6, 2), (4, 2, 3)), np.random.default_rng(2)
    mask = np.asarray(rollout.tokens.mask)
    trained = mask & np.asarray([[True], [True], [False]])
    ref, values, per_token, advantages, returns, rewards = (
        jnp.where(mask, x, 0.0) for x in rng.normal(0, 1, (6, *mask.shape)).astype(np.float32)
    )
    total = jnp.asarray([0.7, -1.5, NAN])
    verdict = Verdict(total=total, parts={"kind": total, "short": jnp.asarray([1.0, NAN, NAN])}, per_token=per_token)
    tokens = dataclasses.replace(rollout.tokens, mask=jnp.asarray(trained))
    batch = PolicyBatch(
        tokens=tokens,
        old_logps=jnp.where(trained, rollout.logps, 0.0),
        advantages=jnp.where(trained, advantages, 0.0),
        returns=returns if critic else None,
        rewards=rewards,
    )
    return Trace(rollout, verdict, Notes(ref_logps=ref, values=values if critic else None), batch)


def records(loss=CLIP, count=3, **options):
    made = trace(**options)
    after = made.rollout.logps + jnp.where(made.rollout.tokens.mask, 0.5, 0.0)
    return evidence.rows_of(made, after, Letters(), count, loss), made


def test_every_column_by_hand():
    found, made = records()
    assert [row["row"] for row in found] == [0, 1, 2]
    ids, mask = np.asarray(made.rollout.tokens.ids), np.asarray(made.rollout.tokens.mask)
    for i, row in enumerate(found[:2]):
        at = np.flatnonzero(mask[i])
        assert row["prompt"] == Letters().decode(
            ids[i][: at[0]][np.asarray(made.rollout.tokens.segments)[i, : at[0]] > 0]
        )
        assert row["tokens"] == [Letters().decode([k]) for k in ids[i][at]]
        assert row["mask"] == [True] * len(at)
        for name, array in {
            "logp": made.rollout.logps,
            "ref_logp": made.notes.ref_logps,
            "reward": made.batch.rewards,  # with the score and the KL penalty, not what the reward function gave
            "value": made.notes.values,
            "advantage": made.batch.advantages,
            "return": made.batch.returns,
        }.items():
            np.testing.assert_allclose(row[name], np.asarray(array)[i][at], rtol=1e-5)
        np.testing.assert_allclose(row["ratio"], [np.exp(0.5)] * len(at), rtol=1e-5)
        # e^½ is above 1.2: flat where the advantage is positive, and only there
        assert row["clipped"] == [float(a > 0) for a in np.asarray(made.batch.advantages)[i][at]]
    assert [row["finished"] for row in found] == [True, False, True]
    assert found[0]["score"] == pytest.approx(0.7)
    assert found[0]["rewards"] == {"kind": pytest.approx(0.7), "short": 1.0}
    assert found[1]["rewards"]["short"] is None


def test_a_row_that_no_reward_applies_to_is_shown_and_not_trained():
    found, made = records()
    ids, mask = np.asarray(made.rollout.tokens.ids), np.asarray(made.rollout.tokens.mask)
    assert found[2]["score"] is None
    assert found[2]["tokens"] == [Letters().decode([k]) for k in ids[2][mask[2]]]
    assert found[2]["mask"] == [False, False]


def test_only_what_there_is():
    """No critic, no bounds to clip at, no batch of a policy gradient: fewer columns, not empty ones."""
    found, made = records(losses.reinforce_loss, critic=False)
    assert not {"value", "return", "clipped"} & set(found[0])
    assert "ratio" in found[0]
    plain = made._replace(
        batch=made.rollout.tokens, notes=Notes(), verdict=dataclasses.replace(made.verdict, per_token=None)
    )
    bare = evidence.rows_of(plain, None, Letters(), 1, None)
    assert len(bare) == 1
    assert set(evidence.COLUMNS) & set(bare[0]) == {"logp"}
    assert json.loads(json.dumps(found)) == found


def test_a_step_is_shown_and_others_are_named(tmp_path, capsys):
    found, _ = records()
    with (tmp_path / "evidence.jsonl").open("w") as file:
        for step in (5, 10):
            for row in found:
                file.write(json.dumps({"step": step, **row}) + "\n")
    out = io.StringIO()
    evidence.show(tmp_path, None, Console(file=out, width=160), row=1)
    text = out.getvalue()
    assert "step 10, row 1: score -1.5 (kind -1.5, short –), cut off" in text
    assert "row 0" not in text
    assert text.count("✓") == 6
    assert "ratio: π / π_old after this step's updates" in text
    narrow = io.StringIO()
    evidence.show(tmp_path, None, Console(file=narrow, width=100))
    assert "…" not in narrow.getvalue()  # tokens are folded, numbers are whole
    assert cli.main(["inspect", str(tmp_path), "--step", "5"]) == 0
    assert "step 5, row 0" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path), "--step", "7"]) == 2
    assert "there is no evidence of step 7, only of 5, 10" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path), "--row", "7"]) == 2
    assert "there is no evidence of row 7, only of 0, 1, 2" in capsys.readouterr().err
    assert cli.main(["inspect", str(tmp_path / "nothing")]) == 2
    assert "has no evidence" in capsys.readouterr().err
