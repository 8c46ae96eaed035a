"""Runs in comparison: groups, means and intervals by hand, and a page that is closed, whatever models wrote."""

import base64
import hashlib
import html.parser
import json
import math
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest

from rljax import cli, compare, overlays, plots, runs

VOID = {"meta", "img", "input", "wbr", "br", "link"}
STUDENT = {2: 12.706205, 3: 4.302653}  # the 0.975 quantile of Student's t at n - 1 degrees of freedom, from a table


def write_run(folder, rows, *, samples=(), seed=0, steps=3, sessions=(), **settings):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    experiment = {"kind": "PPO", "seed": seed, "name": folder.name, "steps": steps, **settings}
    (folder / "experiment.json").write_text(json.dumps(experiment))
    (folder / "manifest.json").write_text(json.dumps({"seed": seed, "sessions": list(sessions)}))
    return folder


def ppo(values, offset=0.0):
    """A record for each value: scores, and twice as much KL; lengths fall."""
    return [
        {"step": step, "objective/scores": value, "objective/kl": 2 * value, "completions/mean_length": 40 - offset}
        for step, value in enumerate(values, 1)
    ]


@pytest.fixture
def six(tmp_path):
    """Two settings with three seeds each. At the last step the first one's scores are 1, 2 and 6."""
    for seed, last in enumerate((1.0, 2.0, 6.0)):
        write_run(tmp_path / "runs" / f"low_{seed}", ppo([0.0, 1.0, last]), seed=seed, kl=0.1, loss={"clip": 0.2})
        write_run(tmp_path / "runs" / f"high_{seed}", ppo([0.0, 0.5, 0.5], seed), seed=seed, kl=0.5, loss={"clip": 0.2})
    return tmp_path / "runs"


def folders(path):
    return sorted(path.iterdir(), reverse=True)


def grouped(path, **how):
    return runs.group(runs.read(folders(path)), **how)


# --- groups -----------------------------------------------------------------------------------------------------------


def test_seeds_and_names_are_one_group_and_nothing_else_is(six):
    groups = grouped(six)
    assert [(group.label, [run.name for run in group.runs]) for group in groups] == [
        ("kl=0.1", ["low_2", "low_1", "low_0"]),
        ("kl=0.5", ["high_2", "high_1", "high_0"]),
    ]
    assert [run.seed for run in groups[0].runs] == [2, 1, 0]
    assert runs.differing(groups) == [("kl", ["0.1", "0.5"])]
    assert [len(group.runs) for group in grouped(six, ignore=("kl",))] == [6]
    write_run(six / "low_3", ppo([1.0]), seed=3, kl=0.1, loss={"clip": 0.2}, new=1)  # what others lack is a difference
    assert [len(group.runs) for group in grouped(six)] == [1, 3, 3]
    assert [len(group.runs) for group in grouped(six, ignore=("new",))] == [4, 3]


def test_labels_are_short_and_told_apart(tmp_path):
    loss = {"function": "rljax.losses.preference.dpo_loss", "beta": 0.1}
    other = {"function": "rljax.losses.preference.ipo_loss", "code": "1cde229da44427f9", "beta": 0.1, "lam": 5}
    for seed in (0, 1):
        write_run(tmp_path / f"a-seed{seed}", [], seed=seed, loss=loss)
        write_run(tmp_path / f"b-seed{seed}", [], seed=seed, loss=other)
    assert [group.label for group in grouped(tmp_path)] == ["loss=ipo_loss, loss.lam=5", "loss=dpo_loss"]
    write_run(tmp_path / "c-seed7", [], seed=7, loss=loss, model="a/rather/long/path/of/some/model")
    assert [group.label for group in grouped(tmp_path)] == ["c", "b", "a"]
    alike = [write_run(tmp_path / folder / "x", [], model=folder * 50) for folder in "pq"]
    assert [group.label for group in runs.group(runs.read(alike))] == ["p/x", "q/x"]


def test_what_the_runs_were_made_with_is_a_difference_too(tmp_path):
    git = {"commit": "c" * 40, "dirty": True}
    new = {"versions": {"jax": "2"}, "devices": {"TPU v5": 8}, "rljax_git": git}
    write_run(tmp_path / "a", [], sessions=[{"versions": {"jax": "0"}}, {"versions": {"jax": "1"}}])
    write_run(tmp_path / "b", [], sessions=[new], seed=1)
    (group,) = grouped(tmp_path)
    found = dict(runs.differing([group]))
    assert found["jax version"] == ["2 / 1"]
    write_run(tmp_path / "c", [], sessions=[new], lr=1)
    found = dict(runs.differing(grouped(tmp_path)))
    assert found["jax version"] == ["2", "2 / 1"]
    assert found["lr"] == ["1", ""]
    write_run(tmp_path / "d", [], sessions=[new | {"rljax_git": None}], lr=2)
    assert dict(runs.differing(grouped(tmp_path)))["code"] == ["", *["cccccccccccc with changes"] * 2]


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_the_mean_and_its_intervals_by_hand(six):
    low, high = grouped(six)
    found = runs.curve(low, "objective/scores")
    assert found.steps.tolist() == [1, 2, 3]
    assert found.values.tolist() == [[0, 1, 6], [0, 1, 2], [0, 1, 1]]
    half = STUDENT[3] * math.sqrt(7 / 3)  # (1, 2, 6): mean 3, sum of squares 4 + 1 + 9 over n - 1 = 2, over n = 3
    band = runs.band(found.values, "confidence")
    np.testing.assert_allclose(band.mean, [0, 1, 3])
    np.testing.assert_allclose(band.low, [0, 1, 3 - half], rtol=1e-6)
    np.testing.assert_allclose(band.high, [0, 1, 3 + half], rtol=1e-6)
    two = runs.band(np.array([[1.0], [3.0]]), "confidence")
    np.testing.assert_allclose([two.low[0], two.high[0]], [2 - STUDENT[2], 2 + STUDENT[2]], rtol=1e-6)  # s = √2, n = 2
    whole = runs.band(found.values, "range")
    assert [whole.mean[2], whole.low[2], whole.high[2]] == [3, 1, 6]
    assert runs.band(np.array([[4.0]]), "confidence") == (4, 4, 4)
    cell = compare._result([low, high], "objective/scores", "confidence")["cells"][0]
    assert cell["text"] == "3.0 ± 6.6"
    assert (cell["value"], cell["step"], cell["n"]) == (3, 3, 3)
    assert cell["best"] == {"value": 3, "text": "3 at 3"}
    assert compare._result([low], "objective/scores", "range")["cells"][0]["text"] == "3 (1 to 6)"
    assert compare._result([high], "objective/scores", "confidence")["cells"][0]["best"]["text"] == "0.5 at 2"
    assert compare._result([high], "objective/kl", "confidence")["cells"][0]["best"] is None  # neither way is better


@pytest.mark.parametrize(
    ("mean", "spread", "text"),
    [
        (108.8, 108.3, "109 ± 108"),
        (5.08, 1.71, "5.1 ± 1.7"),
        (0.5, 0.0123, "0.500 ± 0.012"),
        (2.0, 0.0, "2 ± 0"),
        (3e5, 2e5, "300k ± 200k"),
    ],
)
def test_intervals_are_plain_numbers(mean, spread, text):
    band = runs.Band(*(np.array([x]) for x in (mean, mean - spread, mean + spread)))
    assert compare._with_interval(band, 3, "confidence") == text


def test_a_column_of_training_is_not_one_minibatch(tmp_path):
    """The last tenth of 40 steps, 37 to 40; of an evaluation, which is whole, the last one alone."""
    for seed in range(2):
        write_run(
            tmp_path / f"a_{seed}",
            [{"step": k, "loss": float(k + seed), "eval/loss": float(k)} for k in range(1, 41)],
            seed=seed,
        )
    (group,) = grouped(tmp_path)
    training, held_out = (compare._result([group], name, "range")["cells"][0] for name in ("loss", "eval/loss"))
    assert (training["value"], training["step"]) == (39.0, 40)
    assert held_out["value"] == 40.0
    assert sorted(compare._last(run, "loss") for run in group.runs) == [38.5, 39.5]


def test_means_are_of_the_same_runs_all_along(tmp_path):
    write_run(tmp_path / "a", ppo([1.0, 2.0, 3.0]))
    write_run(tmp_path / "b", ppo([3.0, 4.0]), seed=1)
    write_run(tmp_path / "c", [{"step": 1, "other": 1.0}], seed=2)  # has no scores at all
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "objective/sc')  # being written
    (group,) = grouped(tmp_path)
    found = runs.curve(group, "objective/scores")
    assert found.steps.tolist() == [1, 2]
    assert found.values.mean(0).tolist() == [2, 3]
    assert not len(runs.curve(group, "none").steps)
    (note,) = compare._notes([group])
    assert "Not at their last step: c (1 of 3), b (2 of 3)" in note


def test_a_value_that_is_not_finite_is_a_gap_and_no_number(tmp_path):
    write_run(tmp_path / "a", ppo([1.0, 2.0]))
    write_run(tmp_path / "b", [{"step": 1, "objective/scores": None}, {"step": 2, "objective/scores": 4.0}], seed=1)
    (group,) = grouped(tmp_path)
    mean = runs.band(runs.curve(group, "objective/scores").values, "confidence").mean
    assert math.isnan(mean[0])
    assert mean[1] == 3
    write_run(tmp_path / "c", [{"step": 2, "objective/scores": None}], seed=2)
    cell = compare._result(grouped(tmp_path), "objective/scores", "confidence")["cells"][0]
    assert (cell["text"], cell["value"]) == ("–", None)


def test_long_curves_are_smoothed_run_by_run(tmp_path):
    values = np.random.default_rng(0).normal(size=plots.LONG)
    write_run(tmp_path / "a", ppo(values.tolist()))
    found = runs.smoothed(runs.curve(grouped(tmp_path)[0], "objective/scores"))
    np.testing.assert_allclose(found.values[0], plots.smooth(values))
    short = runs.Curve(np.arange(2), values[None, :2])
    assert runs.smoothed(short) is short


def test_two_runs_of_one_seed_are_said(tmp_path):
    for name in "ab":
        write_run(tmp_path / name, ppo([1.0, 2.0, 3.0]), seed=5)
    (note,) = compare._notes(grouped(tmp_path))
    assert note.startswith("b, a have the same seed, 5")


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pictures_show_mean_interval_and_runs_and_say_so(six):
    groups = grouped(six)
    figure = overlays.over_steps(groups, "objective/scores", "confidence")
    (axis,) = figure.axes
    lines = {line.get_label(): line.get_ydata().tolist() for line in axis.get_lines()}
    assert lines["kl=0.1 (3 runs)"] == [0, 1, 3]
    assert len(axis.get_lines()) == 6 + 2
    assert len(axis.collections) == 2  # the bands
    assert runs.INTERVALS["confidence"] in " ".join(text.get_text() for text in figure.texts)
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("step", "score")
    lowest, highest = axis.get_ylim()
    assert highest <= 6 + 3  # twice the range of the lines, 0 to 6, whatever the interval (3 ± 6.6)
    assert lowest >= -3
    figure = overlays.against(groups, "objective/kl", "objective/scores", "range")
    (axis,) = figure.axes
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert lines["kl=0.1 (3 runs)"].get_xdata().tolist() == [0, 2, 6]
    assert lines["kl=0.1 (3 runs)"].get_ydata().tolist() == [0, 1, 3]
    crosses = [line.get_xydata().tolist() for line in axis.get_lines() if line.get_gid() == overlays.INTERVAL]
    assert crosses[:2] == [[[2, 3], [12, 3]], [[6, 1], [6, 6]]]
    assert runs.INTERVALS["range"] in " ".join(text.get_text() for text in figure.texts)
    assert axis.get_xlabel() == "objective/kl [nats]"


def test_trade_offs_are_of_what_most_groups_have(six, tmp_path):
    write_run(six / "other", [{"step": 1, "kl": 1.0, "reward": 2.0}], lr=1)
    groups = grouped(six)
    assert compare._pair(groups, "", compare.DISTANCES, compare.REWARDS) == ("objective/kl", "objective/scores")
    assert compare._pair(groups[:1], "", compare.DISTANCES, compare.REWARDS) == ("kl", "reward")
    assert compare._pair(groups, "eval/", compare.DISTANCES, compare.REWARDS) is None
    (axis,) = overlays.against(groups, "kl", "reward", "confidence").axes
    assert axis.get_legend_handles_labels()[1] == [f"{groups[0].label} (1 run)"]


def test_names_are_no_mathematics_and_many_groups_are_told_apart(tmp_path):
    for i in range(9):
        write_run(tmp_path / f"r{i}", [{"step": 1, "$x_$": float(i)}, {"step": 2, "$x_$": 1.0}], _a=f"$\\frac{i}$")
    figure = overlays.over_steps(grouped(tmp_path), "$x_$", "range")
    figure.savefig(tmp_path / "x.png")
    lines = [line for line in figure.axes[0].get_lines() if not line.get_label().startswith("_")]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 9


def test_a_constant_that_was_smoothed_has_an_axis_that_can_be_read(tmp_path):
    write_run(tmp_path / "a", ppo([20.3] * 3000), steps=3000)
    (axis,) = overlays.over_steps(grouped(tmp_path), "objective/scores", "range").axes
    np.testing.assert_allclose(axis.get_ylim(), (20.3 * 0.9, 20.3 * 1.1))


# --- the page ---------------------------------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Tags must be closed in their order; texts and attributes are kept."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def text_of(self, tag):
        return [text for where, text in self.texts if where == tag]


HOSTILE = "</blockquote><script>alert(1)</script><img src=x onerror=alert(2)> & {{ 7 * 7 }} \"'\u202e\x00 日本"
SAFE = HOSTILE.replace("\u202e", "").replace("\x00", "")


def test_the_page_is_closed_whatever_models_wrote(six, tmp_path):
    samples = [
        {"step": step, "phase": phase, "prompt": prompt, "completion": f"{phase}{HOSTILE}", "reward": 1.25, "ok": True}
        for step, phase in ((0, "before"), (3, "after"))
        for prompt in (f"p{HOSTILE}", "q")
    ]
    write_run(six / "<b>low_9", ppo([0.0, 1.0, 2.0]), samples=samples, seed=9, kl=0.1, note=HOSTILE)
    write_run(six / "plain", ppo([0.0, 1.0, 2.0]), samples=samples[1:], seed=9, kl=0.1)
    for run in six.iterdir():
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "<i>/x": 1.0}\n')
    path = compare.write(folders(six), out=tmp_path / "out")
    text = path.read_text()
    page = Page(text)
    assert page.tags.count("script") == 1
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    links = [value for _, name, value in page.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert links
    assert all(value.startswith(("data:image/png;base64,", "#")) for value in links), [v[:40] for v in links]
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    assert f"after{SAFE}" in page.text_of("blockquote")
    assert f"before{SAFE}" in page.text_of("blockquote")
    assert f"p{SAFE}" in page.text_of("h3")
    assert any("<b>low_9" in said and "reward 1.25 · ok true" in said for said in page.text_of("p"))
    assert ("code", "<i>/") in page.texts  # a metric's name may break after a slash
    assert "i" not in page.tags
    targets = [value for _, name, value in page.attributes if name == "id"]
    assert len(set(targets)) == len(targets)
    assert {value[1:] for value in links if value.startswith("#")} <= set(targets)
    (policy,) = [value for tag, name, value in page.attributes if tag == "meta" and "default-src" in (value or "")]
    for kind in ("script", "style"):
        content = "".join(page.text_of(kind))
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_tables_have_the_numbers_and_pictures_are_files(six):
    path = compare.write(folders(six), metrics=["objective/scores"])
    assert path == six / "comparison" / "comparison.html"
    text, page = path.read_text(), Page(path.read_text())
    assert page.text_of("h2") == ["Plots", "Results", "Settings that differ", "Runs"]
    assert "3.0 ± 6.6" in page.text_of("td")
    assert "0.50 ± 0.00" not in page.text_of("td")
    assert "low_2" in page.text_of("th")
    drawn = {file.name: file.read_bytes() for file in (path.parent / "plots").iterdir()}
    assert set(drawn) == {
        "objective-scores.png",
        "objective-scores-against-objective-kl.png",
        "completions-mean-length-against-objective-scores.png",
    }
    shown = [base64.b64decode(data) for data in re.findall(r"data:image/png;base64,([^\"]+)", text)]
    assert sorted(shown) == sorted(drawn.values())
    assert all(data.startswith(b"\x89PNG") for data in shown)
    again = compare.write(folders(six), metrics=["objective/scores"])  # the comparison itself is passed over
    assert again == path


def test_samples_stand_side_by_side_for_the_same_prompt(six):
    for run in six.iterdir():
        rows = [(0, "both", "first"), (0, "own", "first"), (3, "both", f"last of {run.name}"), (3, run.name, "mine")]
        lines = [json.dumps({"step": step, "prompt": p, "completion": c}) + "\n" for step, p, c in rows]
        (run / "samples.jsonl").write_text("".join(lines))
    found = compare._samples(grouped(six))
    assert found[0]["prompt"] == "both"
    assert [[one["text"] for one in column] for column in found[0]["columns"]] == [
        ["last of low_2", "last of low_1", "last of low_0"],
        ["last of high_2", "last of high_1", "last of high_0"],
    ]
    assert found[0]["columns"][0][0]["before"] == "first"
    own = next(sample for sample in found if sample["prompt"] == "high_1")
    assert [len(column) for column in own["columns"]] == [0, 1]
    assert own["columns"][1][0]["before"] is None


def test_what_cannot_be_compared_is_said(six, tmp_path, capsys):
    low = six / "low_0"
    with pytest.raises(ValueError, match=r"low_0 is given twice"):
        compare.write([low, six / "low_1", six / "." / "low_0"])
    with pytest.raises(ValueError, match=r"runs is not the folder of a run.*it holds runs: give .*high_0"):
        compare.write([low, six])
    with pytest.raises(ValueError, match=r"low_1 is the folder of a run: write the comparison elsewhere"):
        compare.write([low], out=six / "low_1")
    with pytest.raises(ValueError, match="no run has a metric 'nothing'; there are completions/mean_length, objective"):
        compare.write([low, six / "low_1"], metrics=["nothing"])
    with pytest.raises(ValueError, match="no interval 'sd'; there are confidence, range"):
        compare.write([low], interval="sd")
    with pytest.raises(ValueError, match="name the folder of a run"):
        compare.write([])
    other = write_run(tmp_path / "other", [{"step": 1, "accuracy": 1.0}], lr=1)
    with pytest.raises(ValueError, match=r"no metric in common .*accuracy"):
        compare.write([low, other])
    with (other / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "objective/scores": 1.0}\n')
    page = Page(compare.write([low, other], out=tmp_path / "out").read_text())
    (summary,) = [said for said in page.text_of("summary") if "metric" in said]
    assert summary.startswith("3 metrics are not in all groups")
    assert "accuracy, completions/mean_length, objective/kl" in "".join(page.text_of("details"))
    compare.write([low, other], metrics=["accuracy"], out=tmp_path / "out")  # one that a group lacks, as it was named
    empty = write_run(tmp_path / "empty", [], lr=1)
    with pytest.raises(ValueError, match="nothing is recorded yet in empty"):
        compare.write([empty])
    page = compare.write([low, empty], metrics=["objective/scores"], out=tmp_path / "out").read_text()
    assert "empty (0 of 3)" in page


def test_the_command(six, tmp_path, capsys):
    assert cli.main(["report", str(six / "low_0")]) == 0
    assert capsys.readouterr().out.strip() == str(six / "low_0" / "report.md")
    chosen = ["--metrics", "objective/scores, objective/kl", "--interval", "range", "--ignore", "kl"]
    assert cli.main(["report", *map(str, folders(six)), "--out", str(tmp_path / "out"), *chosen]) == 0
    path = pathlib.Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "out" / "comparison.html"
    text = path.read_text()
    assert "from the smallest run to the largest" in text
    assert "high_0" in text
    assert len(list((tmp_path / "out" / "plots").glob("objective-kl.png"))) == 1
    assert cli.main(["report"]) == 2
    assert "rljax report runs/*" in capsys.readouterr().err


def test_the_script_of_the_page_is_javascript():
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    subprocess.run([node, "--check", str(compare.HERE / "compare.js")], check=True, capture_output=True)
