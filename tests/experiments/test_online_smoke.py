"""Two real steps of the online experiments on SmolLM2-135M, on a real tiny checkpoint instead."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

from rljax import cli, data, models, options, policy, program, tracking
from rljax.models import hf
from tests import compiler
from tests.traced import traced

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
TINY = ["--steps", "2", "--batch", "4", "--eval_rows", "4", "--samples", "2", "--mesh.fsdp", "1"]
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>Tom: {% endif %}"
)


@pytest.fixture
def chatty(small, tmp_path) -> pathlib.Path:
    """A small model with a chat template."""
    folder = pathlib.Path(shutil.copytree(small, tmp_path / "chatty"))
    for file in folder.iterdir():
        file.chmod(0o644)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHAT}))
    return folder


def load(name: str):
    return cli.import_file(EXPERIMENTS / f"{name}.py")


def command(name: str, model: pathlib.Path, out: pathlib.Path, *more: str) -> list[str]:
    return [str(EXPERIMENTS / f"{name}.py"), "--model", str(model), "--out", str(out), *TINY, *more]


def run(name: str, model: pathlib.Path, out: pathlib.Path, *more: str) -> list[dict]:
    assert cli.main(["run", *command(name, model, out, *more)]) == 0
    return tracking.read_rows(out / name / "metrics.jsonl")


@pytest.mark.long
def test_grpo_arithmetic_takes_two_steps(chatty, tmp_path):
    records = run("grpo_arithmetic", chatty, tmp_path, "--max_prompt", "96")
    assert [record["step"] for record in records] == [0, 1, 2]
    assert {"eval/accuracy/train", "eval/accuracy/held_out"} <= set(records[0]) & set(records[2])
    samples = tracking.read_rows(tmp_path / "grpo_arithmetic" / "samples.jsonl")
    assert any(row["prompt"] == "What is 3 + 4?" for row in samples)


@pytest.mark.long
def test_ppo_sentiment_takes_two_steps(small, tmp_path):
    records = run("ppo_sentiment", small, tmp_path)
    assert [record["step"] for record in records] == [0, 1, 2]
    assert records[0]["eval/held_out/kl"] == 0.0
    assert records[2]["loss/value_avg"] > 0


ENVIRONMENTS = ("number_guessing", "calculator", "question_answering")
LONG_ROWS = ("--max_prompt", "360", "--max_completion", "48")


@pytest.mark.long
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environments_take_two_steps(name, chatty, tmp_path):
    records = run(name, chatty, tmp_path, *LONG_ROWS)
    assert [record["step"] for record in records] == [0, 1, 2]
    assert records[0]["eval/reward"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo_sentiment", "grpo_arithmetic", *ENVIRONMENTS])
def test_settings_fit_together(name, chatty, tmp_path):
    more = LONG_ROWS if name in ENVIRONMENTS else ("--max_prompt", "96")
    experiment, _ = options.read_experiment(command(name, chatty, tmp_path, *more), "run")
    assert len(traced(experiment, tmp_path).held_out) >= 4


@pytest.mark.slow
def test_grpo_arithmetic_measures_its_answers(chatty):
    now = policy.load(str(chatty), dtype="float32")
    found = load("grpo_arithmetic").experiment.evaluate(now, now.params, jax.random.key(0))
    assert found.metrics.keys() == {"accuracy/train", "accuracy/held_out"}
    assert {"What is 3 + 4?"} <= {row["prompt"] for row in found.samples}
    assert len(found.samples) == 160


@pytest.mark.slow
def test_ppo_sentiment_measures_reward_and_kl(small, monkeypatch):
    """As DPO's experiment does, by whose openings both are judged."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    module, now = load("ppo_sentiment"), policy.load(str(small), dtype="float32")
    found = module.experiment.evaluate(now, now.params, jax.random.key(0)).metrics
    assert found.keys() == {"held_out/reward/mean", "held_out/reward/std", "held_out/kl"}
    assert found["held_out/kl"] == 0.0


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
def test_the_sentiment_frontier_has_a_point_for_every_checkpoint(small, tmp_path):
    """Of a method of each kind; begun again with one more, the runs that stand are looked at and not repeated."""
    argv = ["run", str(EXPERIMENTS / "sentiment_frontier.py"), "--model", str(small), "--out", str(tmp_path / "runs")]
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


def pipeline(small, shared, out, *more: str) -> subprocess.CompletedProcess[str]:
    """The command as a user types it, on one device."""
    command = [sys.executable, "-m", "rljax", "run", str(EXPERIMENTS / "rlhf_sentiment.py"), "--model", str(small)]
    command += ["--data", str(shared / "data" / "sentence_polarity" / "sentences.jsonl"), "--out", str(out)]
    command += ["--steps-sft", "2", "--steps-rm", "2", "--steps-ppo", "2", "--openings", "32", "--batch", "8", *more]
    env = os.environ | {"XLA_FLAGS": compiler.QUICK, "JAX_ENABLE_COMPILATION_CACHE": "true"}
    env["JAX_COMPILATION_CACHE_DIR"] = str(out.parent / "compiled")
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_pipeline_hands_on_its_models_and_is_not_run_twice(small, shared, tmp_path, monkeypatch, capsys):
    """With runs that only fit together, and models that have not learned."""
    module, begun = load("rlhf_sentiment"), []
    gold, proxy = ("eval/rewards/gold/mean", "eval/rewards/proxy/mean")
    names = ("eval/accuracy", "rewards/gold/mean", gold, "rewards/proxy/mean", proxy, "objective/kl")

    def run(experiment):
        folder = program.run_folder(experiment, None)
        begun.append((folder.name, traced(experiment, folder) if len(begun) < 3 else None))
        data.write_jsonl(folder / "metrics.jsonl", [{"step": step, **dict.fromkeys(names, 0.5)} for step in range(3)])
        said = {"prompt": "A", "completion": " good film"}
        said = [{"step": step, "phase": phase, **said} for step, phase in ((0, "before"), (2, "after"))]
        data.write_jsonl(folder / "samples.jsonl", said)
        return 0

    def export(folder, target):
        if folder.name != "2-reward-model":
            return shutil.copytree(small, target)
        model, params = hf.load(small, dtype="float32")
        head = models.scalar_head(model.config.hidden_size).init(jax.random.key(1))
        return hf.save_reward(target, model, {"model": params, "head": head}, tokenizer=begun[-1][1].policy.tokenizer)

    monkeypatch.setattr(module.offline, "run", run)
    monkeypatch.setattr(module.online, "run", run)
    monkeypatch.setattr(module.artefacts, "export", export)
    out, sentences = tmp_path / "rlhf", str(shared / "data" / "sentence_polarity" / "sentences.jsonl")
    sizes = {"steps_sft": 2, "steps_rm": 2, "steps_ppo": 2, "openings": 32, "batch": 8}
    pipeline = functools.partial(module.main, data=sentences, model=str(small), out=str(out), **sizes)
    assert pipeline() == 0
    assert [name for name, _ in begun] == ["1-sft", "2-reward-model", "3-ppo"]
    ppo = begun[-1][1].sampler.run
    assert (ppo.model, ppo.critic) == (str(out / "sft-model"), str(out / "reward-model"))
    for row in data.read(out / "data" / "pairs.jsonl"):
        better, worse = module.GOLD([row["prompt"]] * 2, [row["chosen"], row["rejected"]])
        assert better > worse
    assert "gold reward of the policy" in (out / "report.md").read_text()
    assert (out / "plots" / "the-pipeline.png").is_file()
    shutil.rmtree(out / "ppo-model")  # as if killed after PPO's last step
    capsys.readouterr()
    assert pipeline() == 0
    assert capsys.readouterr().out.count(": finished") == 2
    assert [name for name, _ in begun[3:]] == ["3-ppo"]
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        pipeline(seed=1)


@pytest.mark.long
def test_the_pipeline_hands_on_what_it_learned_and_is_not_run_twice(small, shared, tmp_path):
    out = tmp_path / "rlhf"
    first = pipeline(small, shared, out)
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
    again = pipeline(small, shared, out)
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.count(": finished") == 2
    assert (out / "report.md").read_text().split("## Environment")[0] == page.split("## Environment")[0]
    other = pipeline(small, shared, out, "--seed", "1")
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
