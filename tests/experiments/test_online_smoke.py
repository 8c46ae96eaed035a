"""Two real steps of the online experiments on SmolLM2-135M, on a real tiny checkpoint instead."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from rljax import cli, data, tracking

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
TINY = ["--steps", "2", "--batch", "4", "--eval_rows", "4", "--samples", "2", "--mesh.fsdp", "1"]
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>Tom: {% endif %}"
)


@pytest.fixture
def chatty(stories, tmp_path) -> pathlib.Path:
    """stories260K with a chat template."""
    folder = pathlib.Path(shutil.copytree(stories, tmp_path / "chatty"))
    for file in folder.iterdir():
        file.chmod(0o644)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHAT}))
    return folder


def load(name: str):
    return cli.import_file(EXPERIMENTS / f"{name}.py")


def run(name: str, model: pathlib.Path, out: pathlib.Path, *options: str) -> list[dict]:
    argv = ["run", str(EXPERIMENTS / f"{name}.py"), "--model", str(model), "--out", str(out), *TINY, *options]
    assert cli.main(argv) == 0
    return tracking.read_rows(out / name / "metrics.jsonl")


@pytest.mark.slow
def test_grpo_arithmetic_takes_two_steps(chatty, tmp_path):
    records = run("grpo_arithmetic", chatty, tmp_path, "--max_prompt", "96")
    assert [record["step"] for record in records] == [0, 1, 2]
    assert {"eval/accuracy/train", "eval/accuracy/held_out"} <= set(records[0]) & set(records[2])
    samples = tracking.read_rows(tmp_path / "grpo_arithmetic" / "samples.jsonl")
    assert any(row["prompt"] == "What is 3 + 4?" for row in samples)


@pytest.mark.slow
def test_ppo_sentiment_takes_two_steps(stories, tmp_path):
    records = run("ppo_sentiment", stories, tmp_path)
    assert [record["step"] for record in records] == [0, 1, 2]
    assert records[0]["eval/held_out/kl"] == 0.0
    assert records[2]["loss/value_avg"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["number_guessing", "calculator", pytest.param("question_answering", marks=pytest.mark.long)]
)
def test_environments_take_two_steps(name, chatty, tmp_path):
    records = run(name, chatty, tmp_path, "--max_prompt", "360", "--max_completion", "48")
    assert [record["step"] for record in records] == [0, 1, 2]
    assert records[0]["eval/reward"] is not None


def test_held_out_sums_are_held_out():
    module = load("grpo_arithmetic")
    train, held_out = ({row["prompt"][-1]["content"] for row in module.sums(held_out=held)} for held in (False, True))
    assert len(train) == 80
    assert len(held_out) == 20
    assert not train & held_out
    mirrored = {f"What is {q.split()[4][:-1]} + {q.split()[2]}?" for q in held_out}
    assert mirrored == held_out
    assert all(sum_of(row) == row["answer"] for row in module.sums(held_out=False))


def sum_of(row: dict) -> int:
    words = row["prompt"][-1]["content"].rstrip("?").split()
    return int(words[2]) + int(words[4])


def test_ppo_sentiment_does_not_train_on_what_it_is_judged_by():
    module, dpo = load("ppo_sentiment"), load("dpo_sentiment")
    assert not {row["prompt"] for row in module.openings(None, None)} & set(dpo.HELD_OUT)


@pytest.mark.long
def test_the_sentiment_frontier_has_a_point_for_every_checkpoint(stories, tmp_path):
    """Of a method of each kind; begun again with one more, the runs that stand are looked at and not repeated."""
    argv = ["run", str(EXPERIMENTS / "sentiment_frontier.py"), "--model", str(stories), "--out", str(tmp_path / "runs")]
    argv += ["--steps", "2", "--steps-ppo", "2", "--batch", "8", "--looks", "2", "--openings", "12"]
    for methods in (["dpo-0.1", "ppo-6"], ["dpo-0.1", "unlikelihood"]):
        assert cli.main([*argv, "--methods", *methods]) == 0
        points = tracking.read_rows(tmp_path / "runs" / "frontier.jsonl")
        assert [(point["method"], point["step"]) for point in points] == [(m, s) for m in methods for s in (1, 2)]
        assert all(-1 <= point["reward/mean"] <= 1 and point["kl"] == point["kl"] for point in points)
        assert any(abs(point["kl"]) > 1e-6 for point in points)
    assert (tmp_path / "runs" / "frontier.png").stat().st_size > 10_000
    assert cli.main([*argv, "--methods", "dpo"]) == 2


# --- rlhf_sentiment ---------------------------------------------------------------------------------------------------


def pipeline(stories, shared, out, *options: str) -> subprocess.CompletedProcess[str]:
    """The command as a user types it, on one device."""
    command = [sys.executable, "-m", "rljax", "run", str(EXPERIMENTS / "rlhf_sentiment.py"), "--model", str(stories)]
    command += ["--data", str(shared / "data" / "sentence_polarity" / "sentences.jsonl"), "--out", str(out)]
    command += ["--steps-sft", "2", "--steps-rm", "2", "--steps-ppo", "2", "--openings", "32", "--batch", "8", *options]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_pipeline_hands_on_what_it_learned_and_is_not_run_twice(stories, shared, tmp_path):
    out = tmp_path / "rlhf"
    first = pipeline(stories, shared, out)
    assert first.returncode == 0, first.stderr[-2000:]
    ppo = tracking.read_rows(out / "3-ppo" / "metrics.jsonl")
    assert [record["step"] for record in ppo] == [0, 1, 2]
    assert {"rewards/proxy/mean", "rewards/gold/mean", "objective/kl"} <= set(ppo[1])
    assert ppo[1]["objective/kl"] == pytest.approx(0, abs=1e-4)  # the policy starts at the SFT model
    assert (out / "reward-model" / "config.json").is_file()
    assert (out / "ppo-model" / "config.json").is_file()
    experiment = json.loads((out / "3-ppo" / "experiment.json").read_text())
    assert (experiment["model"], experiment["critic"]) == (str(out / "sft-model"), str(out / "reward-model"))
    gold = load("rlhf_sentiment").GOLD
    for row in data.read(out / "data" / "pairs.jsonl"):
        better, worse = gold([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
        assert better > worse
    page = (out / "report.md").read_text()
    assert "gold reward of the policy" in page
    assert (out / "plots" / "the-pipeline.png").is_file()

    shutil.rmtree(out / "ppo-model")  # as if killed after PPO's last step
    again = pipeline(stories, shared, out)
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.count(": finished") == 2
    assert (out / "report.md").read_text().split("## Environment")[0] == page.split("## Environment")[0]
    other = pipeline(stories, shared, out, "--seed", "1")
    assert other.returncode == 2
    assert "seed was 0 and is 1" in other.stderr


def test_the_pipeline_says_which_data_it_needs(tmp_path):
    module = load("rlhf_sentiment")
    with pytest.raises(ValueError, match=r"no such file.*--data names"):
        module.write_data(str(tmp_path / "none.jsonl"), tmp_path, openings=4, seed=0)
    rows = data.write_jsonl(tmp_path / "rows.jsonl", [{"review": "good"}])
    with pytest.raises(ValueError, match=r"rows.jsonl:1: this row has the fields review"):
        module.write_data(str(rows), tmp_path, openings=4, seed=0)
    some = [{"text": " ".join(["fine"] * 9), "label": 1}] * 20
    with pytest.raises(ValueError, match="not both positive and negative"):
        module.write_data(str(data.write_jsonl(tmp_path / "rows.jsonl", some)), tmp_path, openings=4, seed=0)


def test_the_pipeline_keeps_its_prompts_apart(shared, tmp_path):
    load("rlhf_sentiment").write_data(
        str(shared / "data" / "sentence_polarity" / "sentences.jsonl"), tmp_path, openings=32, seed=0
    )
    texts, prompts, held_out = (
        [next(iter(row.values())) for row in data.read(tmp_path / f"{name}.jsonl")]
        for name in ("sentences", "prompts", "held_out")
    )
    assert (len(prompts), len(held_out)) == (32, 8)
    assert len(texts) > 1000
    assert all(len(prompt.split()) == 4 for prompt in prompts + held_out)
    assert all(8 <= len(text.split()) <= 16 for text in texts)
