"""The offline program end to end on a real tiny checkpoint: every kind of experiment learns, resumes and exports."""

import dataclasses
import functools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from rljax import artefacts, cli, data, losses, objectives, offline, program, sharding, tasks, tracking, train
from rljax.models import hf
from rljax.types import Mean

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
WORDS = ["cat", "dog", "tree", "house", "ball", "bird", "car", "hat", "fish", "boat"]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("RLJAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    """Happy endings are preferred to sad ones: learnable in a few steps."""
    rng = random.Random(0)
    rows = []
    for _ in range(60):
        name, thing = rng.choice(["Tom", "Lily", "Ben"]), rng.choice(WORDS)
        rows.append(
            {
                "prompt": f"Once there was a {thing}. {name} saw the {thing}.",
                "chosen": f" {name} was very happy.",
                "rejected": f" {name} was very sad.",
            }
        )
    return str(data.write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows))


def common(model, tmp_path, **changes):
    settings = {
        "model": str(model),
        "steps": 6,
        "batch": 4,
        "max_prompt": 32,
        "max_completion": 16,
        "learning_rate": 1e-3,
        "eval_every": 3,
        "save_every": 2,
        "samples": 2,
        "sample_tokens": 4,
        "mesh": functools.partial(sharding.make_mesh, fsdp=1),
        "schedule": train.constant,
        "out": str(tmp_path),
        "name": "run",
    }
    return settings | changes


def last(folder, name):
    return next(row[name] for row in reversed(tracking.read_rows(folder / "metrics.jsonl")) if name in row)


def first(folder, name):
    return next(row[name] for row in tracking.read_rows(folder / "metrics.jsonl") if name in row)


LITTLE = {"steps": 3, "samples": 0, "save_every": 3, "checks": False}  # where only what is learned is looked at
DPO = functools.partial(losses.dpo_loss, beta=0.1)


@pytest.fixture(scope="module")
def dpo(small, pairs, tmp_path_factory) -> pathlib.Path:
    """A run with everything that is on by default."""
    folder = tmp_path_factory.mktemp("dpo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLJAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        settings = common(small, folder, best="eval/loss", best_mode="min")
        assert offline.run(offline.Preference(loss=DPO, data=pairs, **settings)) == 0
    return folder / "run"


def test_dpo_learns_and_exports_a_checkpoint_that_opens_again(small, tmp_path, dpo):
    assert first(dpo, "eval/loss") == pytest.approx(np.log(2), abs=1e-3)
    assert last(dpo, "eval/loss") < 0.6
    assert last(dpo, "eval/rewards/accuracies") > 0.9
    assert {"report.md", "experiment.json", "manifest.json", "samples.jsonl", "tensorboard"} <= set(os.listdir(dpo))
    timing = {row["step"]: row for row in tracking.read_rows(dpo / "timing.jsonl")}
    assert timing[5]["time"] - timing[4]["time"] > timing[5]["seconds"] + 0.002  # the checkpoint of step 4 is left out

    step = artefacts.export(dpo, tmp_path / "exported")
    assert step == 6
    model, params = hf.load(tmp_path / "exported", dtype="float32")
    _, before = hf.load(small)
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), params, before)
    assert max(jax.tree.leaves(moved)) > 1e-4
    assert model.config.vocab_size == 512
    rows = artefacts.sample(str(dpo), ["Once upon a time"], chat=False, max_new_tokens=5, temperature=0.0)
    assert rows[0]["completion"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        pytest.param(functools.partial(losses.ipo_loss, beta=0.1), {"average": True}, id="ipo", marks=pytest.mark.long),
        pytest.param(
            functools.partial(losses.simpo_loss, beta=2.0, gamma=0.5),
            {"average": True, "reference": False},
            id="simpo",
            marks=pytest.mark.long,
        ),
        pytest.param(
            functools.partial(losses.orpo_loss, beta=0.1),
            {"average": True, "reference": False, "nll_weight": 1.0},
            id="orpo",
        ),
        pytest.param(
            functools.partial(losses.cpo_loss, beta=0.1),
            {"reference": False, "nll_weight": 1.0, "nll_average": False},
            id="cpo",
            marks=pytest.mark.long,
        ),
        pytest.param(DPO, {"nll_weight": 1.0, "cache_reference": False}, id="rpo", marks=pytest.mark.long),
    ],
)
def test_every_kind_of_preference_loss_learns(small, tmp_path, pairs, loss, settings):
    experiment = offline.Preference(loss=loss, data=pairs, **common(small, tmp_path, **LITTLE), **settings)
    assert offline.run(experiment) == 0
    assert last(tmp_path / "run", "eval/loss") < first(tmp_path / "run", "eval/loss")
    assert last(tmp_path / "run", "eval/rewards/margins") > first(tmp_path / "run", "eval/rewards/margins")


@pytest.mark.parametrize(
    "changes",
    [
        {"average": True},
        {"reference": False},
        {"nll_weight": 2.0},
        {"nll_weight": 2.0, "nll_average": False},
        {"max_completion": 3},
        {"share_prompts": False},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_settings_of_preferences_reach_the_objective(changes, monkeypatch):
    """What each of them computes is in test_objectives."""
    heard = {}
    monkeypatch.setattr(objectives, "preference", lambda model, loss, **options: heard.update(options))
    plain = offline.Preference(loss=DPO, model="none", data="none")
    tasks.preference_loss(plain, None)
    before = dict(heard)
    tasks.preference_loss(dataclasses.replace(plain, **changes), None)
    renamed = {"max_completion": "max_trained"}
    assert {k for k in heard if heard[k] != before[k]} == {renamed.get(name, name) for name in changes}
    assert all(heard[renamed.get(name, name)] == value for name, value in changes.items())


def assert_same_metrics(one: pathlib.Path, other: pathlib.Path, steps: int) -> None:
    """Of all steps up to this one."""
    rows, others = ([r for r in tracking.read_rows(f / "metrics.jsonl") if r["step"] <= steps] for f in (one, other))
    assert others[-1]["step"] == steps
    for row, found in zip(rows, others, strict=True):
        assert row.keys() == found.keys()
        ties = {"rewards/accuracies", "eval/rewards/accuracies"}  # at step 0 all pairs tie, but for rounding
        names = sorted(row.keys() - ties)
        np.testing.assert_allclose([row[k] for k in names], [found[k] for k in names], rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_a_cached_reference_and_one_on_the_fly_are_the_same(small, tmp_path, pairs, dpo):
    """Same losses to rounding."""
    settings = common(small, tmp_path, **LITTLE)
    assert offline.run(offline.Preference(loss=DPO, data=pairs, cache_reference=False, **settings)) == 0
    assert_same_metrics(dpo, tmp_path / "run", 3)
    assert len(list((pathlib.Path(os.environ["RLJAX_CACHE"]) / "reference").glob("*.npy"))) >= 2


@pytest.mark.long
def test_losses_do_not_depend_on_the_mesh(small, tmp_path, pairs, dpo):
    """Of the offline program: tests/distributed does it with others, and with two processes."""
    settings = common(small, tmp_path, **LITTLE)
    settings["mesh"] = functools.partial(sharding.make_mesh, data=2, fsdp=2, tensor=2)
    assert offline.run(offline.Preference(loss=DPO, data=pairs, **settings)) == 0
    assert_same_metrics(dpo, tmp_path / "run", 3)


@pytest.mark.slow
def test_kto_on_pairs_taken_apart(small, tmp_path, pairs):
    experiment = offline.Unpaired(data=pairs, **common(small, tmp_path, **LITTLE | {"steps": 6}))
    assert offline.run(experiment) == 0
    run = tmp_path / "run"
    assert first(run, "eval/loss") == pytest.approx(0.5, abs=1e-3)  # z0 = 0 and log-ratio 0: 1 − σ(0)
    assert last(run, "eval/loss") < 0.5
    assert last(run, "eval/rewards/chosen") > last(run, "eval/rewards/rejected")


@pytest.mark.slow
def test_reward_model_learns_and_is_normalised(small, tmp_path, pairs):
    experiment = offline.RewardModel(data=pairs, normalize=8, **common(small, tmp_path))
    assert offline.run(experiment) == 0
    run = tmp_path / "run"
    assert last(run, "eval/accuracy") > 0.9
    artefacts.export(run, tmp_path / "exported")
    model, params = hf.load_reward(tmp_path / "exported")
    assert params["head"]["kernel"].shape == (model.config.hidden_size,)
    with pytest.raises(ValueError, match="reward model"):
        artefacts.sample(str(run), ["Hello"], chat=False, max_new_tokens=4)


@pytest.mark.long
def test_best_of_four(small, tmp_path):
    rows = [
        {"prompt": f"The {w}", "completions": [f" is {k}." for k in ("sad", "happy", "old", "wet")], "best": 1}
        for w in WORDS * 4
    ]
    path = data.write_jsonl(tmp_path / "rows.jsonl", rows)
    settings = common(small, tmp_path, **LITTLE | {"steps": 6})
    assert offline.run(offline.RewardModel(loss=losses.best_of_k_loss, data=str(path), **settings)) == 0
    assert last(tmp_path / "run", "eval/accuracy") > 0.9
    with pytest.raises(ValueError, match="best_of_k_loss"):
        offline.run(offline.RewardModel(data=str(path), **settings | {"name": "pairwise"}))


@pytest.mark.slow
@pytest.mark.parametrize("packing", [pytest.param(False, marks=pytest.mark.long), True])
def test_sft_learns(small, tmp_path, packing):
    rows = [{"text": f"{a} and {b} went to the sea."} for a in WORDS for b in WORDS]
    path = data.write_jsonl(tmp_path / "texts.jsonl", rows)
    changes = LITTLE | {"steps": 6, "optimizer": functools.partial(optax.adamw, weight_decay=0.01)}
    settings = common(small, tmp_path, **changes)
    assert offline.run(offline.SFT(data=str(path), packing=packing, **settings)) == 0
    assert last(tmp_path / "run", "eval/loss") < 0.7 * first(tmp_path / "run", "eval/loss")


@pytest.mark.slow
def test_early_stopping_keeps_the_best(small, tmp_path, pairs):
    """A rate that only makes things worse: the run ends after `patience` evaluations and the best is the first."""
    changes = LITTLE | {"steps": 40, "learning_rate": 0.5, "eval_every": 1, "clip_norm": None}
    settings = common(small, tmp_path, **changes)
    experiment = offline.SFT(data=_sft_rows(tmp_path, pairs), best="eval/loss", best_mode="min", patience=2, **settings)
    assert offline.run(experiment) == 0
    steps = [row["step"] for row in tracking.read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert max(steps) < 10


def _sft_rows(tmp_path, pairs) -> str:
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in data.read(pairs)]
    return str(data.write_jsonl(tmp_path / "sft.jsonl", rows))


def test_the_same_run_again_does_nothing_and_another_experiment_is_refused(small, tmp_path, pairs):
    experiment = offline.SFT(data=_sft_rows(tmp_path, pairs), **common(small, tmp_path, **LITTLE))
    offline.run(experiment)
    assert last(tmp_path / "run", "eval/loss") < first(tmp_path / "run", "eval/loss")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert offline.run(experiment) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match=r"learning_rate was 0\.001 and is 0\.1"):
        offline.run(dataclasses.replace(experiment, learning_rate=0.1))


# --- a real process ---------------------------------------------------------------------------------------------------

FILE = """
import functools
from rljax import cli, losses, offline, sharding, train

experiment = offline.Preference(
    loss=functools.partial(losses.dpo_loss, beta=0.1), model={model!r}, data={data!r}, steps=30, batch=4,
    max_prompt=32, max_completion=16, learning_rate=1e-3, eval_every=7, save_every=5, samples=1, sample_tokens=4,
    checks=False, mesh=functools.partial(sharding.make_mesh, fsdp=1), out={out!r},
)
if __name__ == "__main__":
    cli.run_file(__file__)
"""


def start(file: pathlib.Path, *options: str) -> subprocess.Popen:
    """With the programs of this process, bit for bit, and a user's cache of them."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_ENABLE_COMPILATION_CACHE"}
    command = [sys.executable, str(file), *options]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_record(run: pathlib.Path, step: int, process: subprocess.Popen | None = None) -> None:
    """Until the run has written the metrics of `step`."""
    deadline = time.monotonic() + 300
    while not any(row["step"] >= step for row in tracking.read_rows(run / "metrics.jsonl")):
        assert process is None or process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.05)


def state_bits(run: pathlib.Path) -> dict[str, object]:
    """The checksums of all leaves of the last checkpoint, parameters and optimizer state."""
    step = max(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdecimal())
    record = json.loads((run / "checkpoints" / str(step) / "rljax" / "metadata").read_text())
    return {"step": step, **record["leaves"]}


@pytest.mark.long
def test_sigkill_at_a_random_moment_and_sigterm_change_no_bit(small, tmp_path, pairs, capsys):
    """Killed from outside as a process, then told to stop, then left alone, against one that was never stopped."""
    file = tmp_path / "experiment.py"
    file.write_text(FILE.format(model=str(small), data=pairs, out=str(tmp_path)))
    run = tmp_path / "killed"
    process = start(file, "--name", "killed")
    wait_for_record(run, random.randrange(6, 12), process)
    time.sleep(random.random() * 0.05)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, output

    def tell() -> None:
        wait_for_record(run, random.randrange(14, 22))
        os.kill(os.getpid(), signal.SIGTERM)

    teller = threading.Thread(target=tell)
    teller.start()
    assert cli.main(["run", str(file), "--name", "killed"]) == 128 + signal.SIGTERM
    teller.join()
    capsys.readouterr()
    assert cli.main(["run", str(file), "--name", "killed"]) == 0
    assert "resumed at step" in capsys.readouterr().out
    assert cli.main(["run", str(file), "--name", "whole"]) == 0

    assert state_bits(run) == state_bits(tmp_path / "whole")
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert cli.main(["report", str(run)]) == 0


def test_the_logged_rate_is_that_of_the_update_that_was_made():
    """An update without a trained token leaves the schedule where it is, and so does what is logged."""
    run = offline.SFT(model="none", data="none", steps=4, learning_rate=0.4, schedule=train.linear)
    optimizer, schedule = program.make_optimizer(run)
    update = train.make_update(lambda w, tokens: (Mean(total=w * tokens, weight=tokens), {}), optimizer)
    state, rates, moved = train.init_state(np.float32(1.0), optimizer), [], []
    for tokens in (0.0, 2.0, 0.0, 2.0):
        before = float(state.params)
        state, _ = update(state, np.float32(tokens))
        rates.append(program.learning_rate(schedule, state).value())
        moved.append(before - float(state.params))
    np.testing.assert_allclose(rates, [0.4, 0.4, 0.4, 0.3], rtol=1e-6)
    np.testing.assert_allclose(moved, [0.0, 0.4, 0.0, 0.3], rtol=1e-4)  # Adam's step is the rate for one sign


def test_weights_open_without_the_model_that_a_run_began_with(small, tmp_path, monkeypatch):
    """Config and tokenizer are kept in the run's folder: export and samples are the same when the model is gone."""
    for file in small.iterdir():
        (tmp_path / "base").mkdir(exist_ok=True)
        shutil.copyfile(file, tmp_path / "base" / file.name)
    data.write_jsonl(tmp_path / "texts.jsonl", [{"text": f"{word} and a dog."} for word in WORDS * 2])
    monkeypatch.chdir(tmp_path)

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(offline.SFT):
        packing: bool = False

    settings = common("base", tmp_path, **LITTLE | {"steps": 1, "out": "runs"})
    assert offline.run(Mine(data="texts.jsonl", **settings)) == 0
    artefacts.export("runs/run", "one")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path.parent)
    artefacts.export(tmp_path / "runs" / "run", tmp_path / "two")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert artefacts.sample(str(tmp_path / "runs" / "run"), ["The"], chat=False, max_new_tokens=2)
    shutil.rmtree(tmp_path / "runs" / "run" / "model")  # a run of before
    with pytest.raises(ValueError, match=r"began with the model 'base', which is needed"):
        artefacts.open_run(tmp_path / "runs" / "run")
    (tmp_path / "elsewhere").rename(tmp_path / "base")
    assert artefacts.load_run(tmp_path / "runs" / "run")[2] == 1  # from where it was started
