"""What the README says is run: its Python snippets, its experiment, its commands."""

import functools
import json
import pathlib
import re
import subprocess

import jax.numpy as jnp
import pytest

from rljax import cli, data, online, presets, rewards, sharding, tracking
from rljax.environments import Turn
from rljax.types import Tokens

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_first_snippet_is_the_simpo_experiment():
    code = (ROOT / "experiments" / "simpo.py").read_text()
    assert SNIPPETS[0].strip() == code.split('"""\n', 1)[1].strip()
    assert len(code.splitlines()) < 40


@pytest.mark.slow
def test_snippets_run_and_print_what_they_say(capsys):
    space = {}
    exec(SNIPPETS[1], space)
    printed = capsys.readouterr().out
    said = [float(x) for x in re.search(r"# \[(.*?)\]", SNIPPETS[1]).group(1).split()]
    assert jnp.allclose(jnp.array([float(x) for x in printed.strip(" []\n").split()]), jnp.array(said), atol=1e-3)
    exec(SNIPPETS[2], {})
    assert "grad_norm" in capsys.readouterr().out


@pytest.mark.slow
def test_the_online_snippet_is_an_experiment_that_runs(small, tmp_path):
    file = tmp_path / "happy.py"
    file.write_text(SNIPPETS[3])
    short = ["--steps", "1", "--batch", "4", "--max-completion", "8", "--no-checks", "--mesh.fsdp", "1"]
    argv = ["run", str(file), "--model", str(small), "--out", str(tmp_path), *short]
    assert cli.main(argv) == 0
    assert (tmp_path / "happy" / "report.md").exists()
    space = {}
    exec(SNIPPETS[4], space)
    everything = jnp.ones((2, 3), bool)
    assert space["brief"](Tokens(ids=everything.astype(int), segments=everything, mask=everything)).shape == (2,)


def test_the_environment_snippet_says_what_a_word_is_worth():
    space = {}
    exec(SNIPPETS[5], space)
    word, prompt = space["rhyming"].reset({"word": "cat"}, 0)
    assert prompt == "Say a word that rhymes: "
    for said, turn in ((" hat", Turn(" Right.", 1.0, True)), (" dog", Turn(" No, again: ", 0.0, False))):
        assert space["rhyming"].step(word, said, None) == (word, turn)


@pytest.mark.long
def test_the_environment_snippet_trains(small, tmp_path):
    """tests/test_online.py trains in others."""
    space = {}
    exec(SNIPPETS[5], space)
    experiment = presets.grpo(
        model=str(small),
        data=str(data.write_jsonl(tmp_path / "words.jsonl", [{"word": word} for word in ("cat", "day", "sun") * 8])),
        environment=space["rhyming"],
        turn_tokens=4,
        max_completion=40,
        steps=1,
        batch=4,
        eval_rows=2,
        checks=False,
        mesh=functools.partial(sharding.make_mesh, fsdp=1),
        out=str(tmp_path),
        name="rhyming",
    )
    assert online.run(experiment) == 0
    assert len(tracking.read_rows(tmp_path / "rhyming" / "metrics.jsonl")) == 2


def test_presets_and_rewards_that_are_named_exist():
    for name in re.findall(r"^\| (`.*?) \| (?:PPO|policy gradients|group-rel|pairs)", README, re.MULTILINE):
        for preset in re.findall(r"`(\w+)`", name):
            assert hasattr(presets, preset), preset
    ready = README.split("Ready ones in")[1].split("**")[0].split("A reward that is")[0]
    for name in set(re.findall(r"`(\w+)`", ready)) - {"rljax"}:
        assert hasattr(rewards, name), name


def test_files_and_fields_that_are_named_exist():
    for path in re.findall(r"(?:experiments|docs|benchmarks|tests)/[\w/.]*\w", README):
        assert (ROOT / path).exists(), path
    for command in re.findall(r"^rljax run (\S+) (.*)$", README, re.MULTILINE):
        experiment, _ = cli.read_experiment([str(ROOT / command[0]), *command[1].split()], "run")
        assert experiment.loss.keywords["beta"] == 2.5
        assert experiment.epochs == 3


def test_the_first_pairs_are_pairs(tmp_path):
    command = re.search(r"^(python3 -c '.*?) > pairs.jsonl$", README, re.MULTILINE | re.DOTALL).group(1)
    rows = subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout
    (tmp_path / "pairs.jsonl").write_text(rows)
    assert len(data.read(tmp_path / "pairs.jsonl")) == 64
    assert json.loads(rows.splitlines()[0]) == {"prompt": "2 plus one is", "chosen": " 3.", "rejected": " 1."}


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("[!_]*.py")), ids=lambda p: p.stem)
def test_every_experiment_can_be_read(path):
    experiment, _ = cli.read_experiment([str(path)], "run")
    assert experiment is not None
    assert "rljax run experiments/" in path.read_text()
