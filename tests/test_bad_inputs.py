"""Whatever is given to the command line, and whatever has become of a run's folder: one paragraph, no traceback."""

import contextlib
import copy
import io
import json
import pathlib
import shutil
import sys
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rljax import cli, compilation, offline, online
from rljax.errors import UserError
from rljax.models import hf_read

FOLDER = pathlib.Path(__file__).parent / "models" / "fixtures"

FUZZ = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NASTY = [
    "",
    " ",
    "0",
    "-1",
    "1e999",
    "nan",
    "inf",
    "10**12",
    str(2**70),
    "None",
    "True",
    "bf16",
    "bananas",
    "../x",
    "/",
    ".",
]
NASTY += ["a" * 300, "\x1b[2J", "ü\u202e", "\ud800", "a/b", "[]", "{}", "-", "--", "1,2", "C:\\x", "~nobody/x", "x\ny"]
VALUES = [None, True, 0, -1, 2**70, 10**400, 1e308, "", "x", "\x1b", [], [None], {}, {"a": []}, [[1]], "9" * 50]


def call(*argv):
    """(exit status, what was printed) of a command; an exception that it lets through fails the test."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            status = cli.main(argv)
        except SystemExit as left:  # tyro's own
            status = left.code
    return status, out.getvalue() + error.getvalue()


def clear(*argv):
    status, said = call(*argv)
    assert status in (0, 2), (argv, status, said)
    assert said.strip(), f"{argv} says nothing"
    assert "Traceback" not in said
    assert "\x1b[2J" not in said
    return status


@pytest.fixture
def quiet(monkeypatch, tmp_path):
    """Nothing is kept for other tests: no compiled programs, no import path, no caches."""
    monkeypatch.setattr(compilation, "keep_programs", lambda: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("RLJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RLJAX_TRACEBACK", raising=False)
    monkeypatch.chdir(tmp_path)


FILE = """
from rljax import losses, offline, presets
import functools
experiment = {}
"""
EXPERIMENTS = {
    "dpo": "offline.Preference(model='nowhere', data='none.jsonl', loss=functools.partial(losses.dpo_loss, beta=0.1))",
    "ppo": "presets.ppo_huang2024(model='nowhere', data='none.jsonl', reward=max)",
}
FIELDS = sorted({name for kind in (offline.Preference, online.PPO) for name in kind.__dataclass_fields__})
OPTION = st.sampled_from(
    [*FIELDS, "loss.beta", "optimizer.b1", "mesh.data", "lerning_rate", "x", "topology", "step", "n"]
)


@settings(FUZZ, max_examples=8)  # reading some sixty options takes half a second
@given(
    command=st.sampled_from(["run", "selfcheck", "plan"]),
    kind=st.sampled_from(sorted(EXPERIMENTS)),
    options=st.lists(st.tuples(OPTION, st.sampled_from(NASTY)), min_size=1, max_size=2),
)
def test_options_of_a_run(quiet, command, kind, options):
    if not pathlib.Path("dpo.py").exists():
        for name, text in EXPERIMENTS.items():
            pathlib.Path(f"{name}.py").write_text(FILE.format(text))
    words = [word for name, value in options for word in (f"--{name.replace('_', '-')}", value)]
    clear(command, f"{kind}.py", *words)


@settings(FUZZ, max_examples=40)
@given(
    command=st.sampled_from(["sample", "export", "report", "inspect", "plan", "run", "reproduce", "fly", ""]),
    words=st.lists(
        st.sampled_from([*NASTY, "--step", "--n", "--prompt", "--seed", "--out", "--row", "--json"]), max_size=3
    ),
)
def test_words_of_any_command(quiet, command, words):
    clear(command, *words)


RECORDS = {
    "experiment.json": json.dumps(
        {"kind": "Preference", "model": "nowhere", "dtype": "float32", "best": None, "best_mode": "max", "steps": 2}
    ),
    "manifest.json": json.dumps(
        {"seed": 0, "sessions": [{"started": "now", "versions": {"jax": "1"}, "devices": {"cpu": 1}}]}
    ),
    "metrics.jsonl": '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n',
    "timing.jsonl": '{"step": 1, "seconds": 0.5}\n',
    "samples.jsonl": '{"step": 1, "prompt": "a\\u001b[2J", "completion": "b", "phase": "before"}\n',
    "evidence.jsonl": '{"step": 1, "row": 0, "prompt": "\\u001b[2J", "score": 1.0, "rewards": {"r": 1.0}, '
    '"finished": true, '
    '"tokens": ["a"], "mask": [true], "logp": [-1.0]}\n',
}


def run_folder(folder):
    folder.mkdir()
    for name, text in RECORDS.items():
        (folder / name).write_text(text)
    (folder / "checkpoints").mkdir()
    return folder


COMMANDS = (["report", "RUN"], ["inspect", "RUN"], ["report", "RUN", "OTHER", "--out", "page"])
COMMANDS += (["export", "RUN", "new"], ["sample", "RUN", "--prompt", "x"], ["export", "RUN", "RUN"])
DAMAGE = st.one_of(
    st.just("gone"),
    st.just("folder"),
    st.binary(max_size=12),
    st.sampled_from(
        [b"", b"[" * 100_000, b"[]", b"null", b"3", b'{"step": 1}\n', b'{"step": "a"}\n', b'{"step": 1, "loss": "x"}\n']
    ),
    st.tuples(st.integers(0, 20), st.sampled_from(VALUES)),  # one value of the record is another
)


def damage(path, how):
    """Make of a file what `how` says."""
    text = path.read_text()
    if how == "gone":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif isinstance(how, bytes):
        path.write_bytes(how)
    else:
        record = json.loads(text.splitlines()[0])
        names = sorted(record)
        record[names[how[0] % len(names)]] = how[1]
        path.write_text(json.dumps(record) + "\n")


@settings(FUZZ, max_examples=40)
@given(name=st.sampled_from(sorted(RECORDS)), how=DAMAGE, command=st.sampled_from(COMMANDS))
def test_damaged_folders_of_runs(quiet, name, how, command):
    with tempfile.TemporaryDirectory(dir=".") as place:
        run, other = run_folder(pathlib.Path(place, "run")), run_folder(pathlib.Path(place, "other"))
        damage(run / name, how)
        words = {"RUN": str(run), "OTHER": str(other), "page": f"{place}/page", "new": f"{place}/new"}
        clear(*(words.get(word, word) for word in command))


@pytest.mark.parametrize(
    "name", ["checkpoints", "metrics.jsonl", ".lock", "tensorboard", "experiment.json", "selfcheck"]
)
def test_files_where_folders_belong_and_folders_where_files_do(quiet, tmp_path, name):
    """Of `run` and the commands that read."""
    (tmp_path / "runs").mkdir()
    folder = run_folder(tmp_path / "runs" / "dpo")
    was_folder = (folder / name).is_dir()
    shutil.rmtree(folder / name) if was_folder else (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir() if name.endswith((".jsonl", ".json", ".lock")) else (folder / name).write_text("")
    (tmp_path / "dpo.py").write_text(FILE.format(EXPERIMENTS["dpo"]))
    assert clear("run", "dpo.py") == 2
    for words in (["report", str(folder)], ["export", str(folder), "new"], ["inspect", str(folder)]):
        clear(*words)


@settings(FUZZ, max_examples=40)
@given(
    name=st.sampled_from(["llama", "gemma3", "phi3_longrope", "gpt_neox", "gpt2"]),
    number=st.integers(0, 60),
    value=st.sampled_from([*VALUES, float("nan"), 1e-320]),
)
def test_values_of_config_json(name, number, value):
    """A config is read, or refused by name."""
    config = json.loads((FOLDER / name / "config.json").read_text())
    keys = sorted(config)
    config[keys[number % len(keys)]] = copy.deepcopy(value)
    with contextlib.suppress(UserError):
        hf_read.config_of(config, "config.json")


def test_a_run_that_recorded_nothing_is_passed_over(quiet, tmp_path):
    folders = [run_folder(tmp_path / name) for name in ("a", "b", "c")]
    for name in RECORDS:
        if name != "experiment.json":
            (folders[1] / name).unlink()
    status, said = call("report", *map(str, folders), "--out", str(tmp_path / "page"))
    assert status == 0, said
    assert f"{folders[1]} is passed over: its run ended before its first record" in said
    status, said = call("report", str(folders[1]), "--out", str(tmp_path / "page"))
    assert (status, "no run has recorded anything yet" in said) == (2, True)


def test_a_home_that_cannot_be_written_keeps_nothing_and_says_so(monkeypatch, tmp_path, capsys):
    import jax

    (tmp_path / "file").write_text("")
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("RLJAX_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    compilation.keep_programs()
    assert "compiled programs are not kept" in capsys.readouterr().err
    assert jax.config.jax_compilation_cache_dir == before
