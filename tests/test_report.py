"""The report: complete runs, partial ones, and texts that try to be markup."""

import json
import math
import re

import pytest
from matplotlib.figure import Figure

from rljax import plots, report


def fill(folder, *, metrics=(), timing=(), samples=(), experiment=None, manifest=None):
    folder.mkdir(exist_ok=True)
    for name, rows in (("metrics", metrics), ("timing", timing), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, value in (("experiment", experiment), ("manifest", manifest)):
        if value is not None:
            (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def training(steps):
    for step in range(1, steps + 1):
        row = {"step": step, "loss": 1 / step, "rewards/margins": 0.1 * step, "rewards/accuracies": 0.75, "mine": 5.0}
        row |= {"learning_rate": 1e-6, "grad_norm": 2.0, "kl": 0.01 * step, "num_tokens": 1e6 * step}
        yield row | (
            {"eval/loss": 2 / step, "eval/rewards/margins": 1.0 if step == 20 else 0.5} if step % 10 == 0 else {}
        )


def images(text):
    return re.findall(r"!\[[^]]*\]\(<([^>]+)>\)", text)


def cells(text, start):
    """The cells of the table line that starts so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_whole_run(tmp_path):
    manifest = {
        "seed": 3,
        "sessions": [
            {
                "started": "2026-01-01",
                "devices": {"cpu": 8},
                "git": {"commit": "c" * 40, "dirty": True},
                "versions": {"jax": "1"},
            }
        ],
    }
    timing = [{"step": step, "seconds": 0.5, "tokens_per_second": 2000.0} for step in range(2, 61)]
    experiment = {"kind": "Preference", "model": "m", "note": "```\n## not a heading"}
    folder = fill(tmp_path / "run_1", metrics=training(60), timing=timing, experiment=experiment, manifest=manifest)
    figure = Figure()
    figure.subplots().plot([1, 2])
    (tmp_path / "mine.png").write_bytes(b"png")
    path = report.write_report(
        folder,
        sections=[("Verdict", "It **works**.")],
        figures=[("Own plot", figure), ("Other", tmp_path / "mine.png")],
    )
    text = path.read_text()
    assert "Preference of m, 60 records up to step 60, 0.50 s a step, 2k tokens/s" in text
    assert cells(text, "`eval/rewards/margins`")[:4] == ["`eval/rewards/margins` ↑", "0.5 (10)", "0.5 (60)", "1 (20)"]
    assert cells(text, "`loss`")[3] == "0.01667 (60)"
    assert cells(text, "`mine`")[3:] == ["", ""]
    assert cells(text, "`num_tokens`")[2] == "60M (60)"
    assert cells(text, "code")[1] == "cccccccccccc with changes"
    assert "## Verdict\n\nIt **works**." in text
    assert "````json" in text
    names = [name.rpartition("/")[2] for name in images(text)]
    assert names[:3] == ["loss.png", "rewards.png", "distance-from-the-reference.png"]
    assert names[-3:] == ["throughput.png", "own-plot.png", "mine.png"]
    for name in images(text):
        assert (folder / name).stat().st_size
    assert (folder / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_an_empty_run(tmp_path):
    assert report.write_report(tmp_path).read_text().endswith("No metrics were recorded.\n")
    assert "No metrics" in report.write_report(fill(tmp_path / "empty")).read_text()
    with pytest.raises(ValueError, match="There is no run at"):
        report.write_report(tmp_path / "missing")


def test_one_point_and_values_that_are_not_finite(tmp_path):
    folder = fill(tmp_path, metrics=[{"step": 1, "loss": 0.5, "kl": None}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')  # still being written
    text = report.write_report(folder).read_text()
    assert "**`kl` was not finite** at 1 of 1 records (steps 1)" in text
    assert images(text) == ["plots/loss.png"]


HOSTILE = "a | b `c` <script>alert(1)</script>\n\n## d\n![x](y) *e* _f_ &lt; \\| $g$ ~~h~~\t\x1b[31m\r\n- i"


def test_texts_cannot_change_the_page(tmp_path):
    samples = [
        {"step": step, "phase": phase, "prompt": f"{HOSTILE}{i}", "completion": f"{phase}{HOSTILE}", "reward": step / 4}
        for step, phase in ((0, "before"), (2, "middle"), (5, "after"))
        for i in range(2)
    ]
    folder = fill(
        tmp_path / "a|b",
        samples=samples,
        metrics=[{"step": 1, "a|b <i>": 1.0}],
        experiment={"kind": "<b>", "model": "|"},
    )
    text = report.write_report(folder).read_text()
    section = text[text.index("## Samples") : text.index("## Experiment")]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert lines[0] == "| prompt | before (step 0) | after (step 5) | reward |"
    assert len(lines) == 4
    for line in lines[2:]:
        assert line.count("|") == 5
        assert not set("`*_[]~$\\\x1b\t") & set(line)
        assert set(re.findall(r"<[^>]*>", line)) == {"<br>"}
        assert line.endswith("| 0 → 1.25 |")
    outside = text.replace(text[text.index("````" if "````" in text else "```json") :], "")
    assert "<i>" not in outside
    assert "<b>" not in outside


def unescape(text):
    return re.sub(r"&#(\d+);", lambda match: chr(int(match[1])), text).replace("<br>", "\n")


def test_escaped_texts_read_as_they_were():
    kept = HOSTILE.replace("\r\n", "\n").replace("\t", " ").replace("\x1b", "")
    assert unescape(report.escape(HOSTILE)) == kept
    assert report.escape("x" * 100, limit=10) == "xxxxx … xxxxx"


def test_samples_without_phases_are_those_of_the_first_and_last_step(tmp_path):
    rows = [{"step": step, "prompt": "p", "completion": f"c{step}"} for step in (0, 5, 9)]
    text = report.write_report(fill(tmp_path, samples=rows)).read_text()
    assert "| p | c0 | c9 |" in text
    assert "| p | c0 |" in report.write_report(fill(tmp_path, samples=rows[:1])).read_text()
    only = [{"step": 0, "phase": "before", "prompt": "p", "completion": "first"}]
    assert "| p | first |" in report.write_report(fill(tmp_path, samples=only)).read_text()
    other = [{"step": 0, "prompt": "p", "completion": "a"}, {"step": 1, "prompt": "q", "completion": "b"}]
    assert "| q | b |" in report.write_report(fill(tmp_path, samples=other)).read_text()


def test_axes_are_labelled_with_units():
    drawn = dict(plots.draw_curves(list(training(50)), [{"step": 1, "tokens_per_second": 5.0}]))
    assert list(drawn) == [
        "Loss",
        "Rewards",
        "Distance from the reference",
        "Optimisation",
        "More metrics",
        "Throughput",
    ]
    for figure in drawn.values():
        for axis in figure.axes:
            assert axis.get_xlabel() == "step"
            assert axis.get_ylabel()
    assert drawn["Distance from the reference"].axes[0].get_ylabel() == "kl [nats]"
    loss = drawn["Loss"].axes[0]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["loss (smoothed)", "eval/loss"]


def test_smoothing_has_no_bias_and_keeps_gaps():
    assert plots.smooth([3.0] * 5) == pytest.approx([3.0] * 5)
    assert math.isnan(plots.smooth([1.0, math.nan, 2.0])[1])


@pytest.mark.parametrize(
    ("experiment", "metric", "said"),
    [
        ({"kind": "Preference"}, "logps/chosen", "sum over its tokens"),
        ({"kind": "Preference", "average": True}, "logps/chosen", "mean over its tokens) [nats/token]"),
        ({"kind": "Preference", "reference": True}, "rewards/margins", "reward minus the other"),
        ({"kind": "Preference", "reference": True}, "rewards/chosen", "policy log-probability − reference"),
        ({"kind": "Preference", "reference": False}, "eval/rewards/chosen", "(no reference): its mean over preferred"),
        ({"kind": "Preference"}, "eval/reward/mean", "the experiment's own evaluation gives"),
        ({"kind": "RewardModel"}, "eval/reward/mean", "the reward model gives; on held-out data"),
    ],
)
def test_what_a_number_is_depends_on_the_run(tmp_path, experiment, metric, said):
    text = report.write_report(fill(tmp_path, metrics=[{"step": 1, metric: 1.0}], experiment=experiment)).read_text()
    assert said in unescape(cells(text, f"`{metric}`")[-1])


def test_messages_are_shown_as_a_dialogue(tmp_path):
    call = [{"function": {"name": "add", "arguments": {"a": 1}}}]
    prompt = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "content": "2"},
    ]
    samples = [{"step": 1, "prompt": prompt, "completion": "2"}]
    text = report.write_report(fill(tmp_path, metrics=[{"step": 1, "loss": 1.0}], samples=samples)).read_text()
    shown = (
        'user: 1 + 1?<br>assistant: {"tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}<br>tool: 2'
    )
    assert shown in re.sub(r"&#(\d+);", lambda match: chr(int(match[1])), text)


def test_names_with_an_underscore_stay_readable():
    assert report.escape("ppo_happy_2 and _x_ and a__b") == "ppo_happy_2 and &#95;x&#95; and a&#95;&#95;b"


def test_tokens_are_no_rewards():
    """SFT's share of right tokens stands with its loss, without a line at one half."""
    (title, _), *others = plots.draw_curves([{"step": 1, "loss": 1.0, "mean_token_accuracy": 0.2}])
    assert title == "Loss"
    assert not others
