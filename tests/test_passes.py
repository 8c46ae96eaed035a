"""`epochs`: passes over the rows of a data set, as steps, and what is said where rows are held out."""

import functools

import pytest
from rich.console import Console

from rljax import data, losses, offline, program, progress

DPO = functools.partial(losses.dpo_loss, beta=0.1)
ROWS = [{"prompt": f"Q{i}", "chosen": " yes", "rejected": " no"} for i in range(40)]


@pytest.fixture
def given(tmp_path):
    return {"model": "no-such-model", "data": str(data.write_jsonl(tmp_path / "rows.jsonl", ROWS)), "batch": 8}


@pytest.mark.parametrize(
    ("kind", "epochs", "steps"),
    [  # 4 of 40 prompts are held out: 36 pairs, which Unpaired takes apart
        (functools.partial(offline.Preference, loss=DPO), 1, 5),  # 4.5 batches
        (functools.partial(offline.Preference, loss=DPO), 2, 9),
        (functools.partial(offline.Preference, loss=DPO), 0.01, 1),
        (offline.RewardModel, 0.5, 3),
        (offline.Unpaired, 1, 9),
    ],
)
def test_passes_are_steps(given, kind, epochs, steps):
    found = offline.check(kind(**given, epochs=epochs))
    assert (found.steps, found.epochs) == (steps, None)
    assert offline.check(kind(**given, steps=steps)) == found  # one experiment, however it was said


def test_the_schedule_ends_where_the_passes_do(given):
    run = offline.check(offline.Preference(loss=DPO, **given, epochs=2, learning_rate=1.0))
    _, schedule = program.make_optimizer(run)
    assert float(schedule(8)) == pytest.approx(1 / 9)
    assert float(schedule(9)) == 0


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"data": lambda policy, key: ROWS}, "data is a function"),
        ({"packing": True}, "packing puts several texts into a row"),
        ({"overlong": "drop"}, "leaves rows out"),
        ({"epochs": 0.0}, "epochs must be .*above 0 or None"),
        ({"epochs": float("nan")}, "epochs must be .*above 0 or None"),
    ],
)
def test_rows_that_cannot_be_counted_are_refused(given, changes, why):
    with pytest.raises(ValueError, match=why):
        offline.check(offline.SFT(**{**given, "epochs": 2.0} | changes))


def test_a_number_of_rows_beside_held_out_rows_is_said_to_do_nothing(given, tmp_path):
    held = str(data.write_jsonl(tmp_path / "held.jsonl", [{**row, "prompt": f"other {row['prompt']}"} for row in ROWS]))
    run = offline.Preference(loss=DPO, **given, eval_data=held)
    rows = data.read(given["data"])
    assert program.split_rows(run, rows)[1] == []
    _, (said,) = program.split_rows(offline.Preference(loss=DPO, **given, eval_data=held, eval_rows=7), rows)
    assert said == f"eval_rows=7 is for rows set aside: all 40 of {held} are held out"


def test_held_out_values_are_shown_on_a_line_that_stays(capsys):
    line = progress.Line(2, shown="accuracy", console=Console(width=80))
    line.update(1, {"loss": 0.5, "eval/loss": 0.25, "eval/accuracy": 0.75, "eval/other": 1.0}, {})
    assert capsys.readouterr().out == "step 1: eval/loss 0.25  eval/accuracy 0.75\nstep 1/2  loss 0.5\n"
