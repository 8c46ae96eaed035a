"""Two real steps of every experiment file, on a real tiny checkpoint and rows in the format that it reads."""

import gzip
import itertools
import pathlib

import pytest

from rljax import cli, options, tracking
from tests.traced import traced

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
TINY = ["--steps", "2", "--batch", "4", "--samples", "2", "--sample_tokens", "4", "--mesh.fsdp", "1"]

OPTIONS = {
    "dpo_sentiment": ["--data.openings", "16"],
    "simpo": ["--data", "{shared}/data/hh_rlhf/harmless-base-test.jsonl.gz"],
    "sft_sentences": ["--data", "{shared}/data/sentence_polarity/sentences.jsonl"],
    "sft_gsm8k": ["--data.path", "{shared}/data/gsm8k/test.jsonl"],
    "reward_model_hh": ["--data", "{shared}/data/hh_rlhf/harmless-base-test.jsonl.gz", "--normalize", "4"],
}


def command(name, small, shared, tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setenv("RLJAX_CACHE", str(tmp_path / "cache"))
    more = [option.format(shared=_begins(shared, tmp_path)) for option in OPTIONS[name]]
    if name in ("simpo", "reward_model_hh"):
        more += ["--eval_rows", "4"]
    if name == "reward_model_hh":
        more += ["--max_prompt", "48", "--max_completion", "16"]
    if "warmup=" in (EXPERIMENTS / f"{name}.py").read_text():
        more += ["--schedule.warmup", "0"]
    return [str(EXPERIMENTS / f"{name}.py"), "--model", str(small), "--out", str(tmp_path), *TINY, *more]


def _begins(shared: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The first rows of each file that an experiment reads, under its name."""
    for source in {word.removeprefix("{shared}/") for one in OPTIONS.values() for word in one if "/" in word}:
        (folder / source).parent.mkdir(parents=True, exist_ok=True)
        read = gzip.open if source.endswith(".gz") else open
        with (
            read(shared / source, "rt", encoding="utf-8") as whole,
            read(folder / source, "wt", encoding="utf-8") as few,
        ):
            few.writelines(itertools.islice(whole, 300))
    return folder


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_two_steps(name, small, shared, tmp_path, monkeypatch):
    assert cli.main(["run", *command(name, small, shared, tmp_path, monkeypatch)]) == 0
    records = tracking.read_rows(tmp_path / name / "metrics.jsonl")
    assert [record["step"] for record in records] == [0, 1, 2]
    assert all(record["loss"] is not None for record in records[1:])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_settings_fit_the_data(name, small, shared, tmp_path, monkeypatch):
    experiment, _ = options.read_experiment(command(name, small, shared, tmp_path, monkeypatch), "run")
    task = traced(experiment, tmp_path).task
    assert task.tokens(task.batch(0)).mask.any()  # something is trained


def test_every_experiment_with_an_experiment_is_smoked():
    texts = {path.stem: path.read_text() for path in EXPERIMENTS.glob("*.py")}
    offline = {name for name, text in texts.items() if "\nexperiment = offline." in text}
    others = {name for name, text in texts.items() if "\nexperiment = " in text} - offline
    smoked = "".join(path.read_text() for path in pathlib.Path(__file__).parent.glob("test_*online*.py"))
    assert offline == set(OPTIONS)
    assert not {name for name in others if f'"{name}"' not in smoked}
