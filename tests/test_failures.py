"""Errors on the command line: one paragraph, with the user's own file and line where an exception came out of it."""

import errno
import functools
import io
import sys

import pytest
from rich.console import Console

from rljax import cli, evidence, failures, hosts, options, progress
from rljax.errors import UserError

HEAD = (
    "import jax\nimport jax.numpy as jnp\nimport numpy as np\nfrom rljax import losses, offline, presets\n"  # 4 lines
)


@pytest.fixture
def failing(tmp_path, monkeypatch, capsys):
    """failing(text): (exit status, what is said) of an experiment file with this text after four lines of imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLJAX_TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(text, *options, name="mine_x"):
        (tmp_path / f"{name}.py").write_text(HEAD + text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        status = cli.main(["run", f"{name}.py", *options])
        monkeypatch.delitem(sys.modules, name, raising=False)
        return status, capsys.readouterr().err

    return run


SHAPES = """
@jax.jit
@jax.grad
def my_loss(x):
    inner = jnp.ones((3, 7))
    return (x @ inner).sum()

def main():
    my_loss(jnp.ones((4,)))
"""
INSIDE = """
def main():
    losses.dpo_loss(jnp.ones(3), jnp.ones(3), jnp.ones(3), jnp.ones(2), beta=0.1)
"""
REWARDS = "\n\ndef score(row):\n    return row['answer']\n\ndef main():\n    return [score(row) for row in [{}]]\n"


@pytest.mark.parametrize(
    ("text", "place", "what"),
    [
        (SHAPES, "mine_x.py:10 in my_loss: TypeError: ", "return (x @ inner).sum()"),
        (REWARDS, "mine_x.py:8 in score: KeyError: 'answer'", "return row['answer']"),
        ("def main():\n    [1 / i for i in [0]]\n", "mine_x.py:6 in main: ZeroDivisionError", "1 / i"),
        ("np.zeros(3).reshape(2, 2)\n", "mine_x.py:5: ValueError: cannot reshape", "np.zeros(3)"),
        ("import nonesuch_at_all\n", "mine_x.py:5: ModuleNotFoundError", "nonesuch_at_all"),
        ("open('nowhere.txt')\n", "mine_x.py:5: FileNotFoundError", "nowhere.txt"),
        ("def f(:\n    pass\n", "mine_x.py:5: SyntaxError", "def f(:"),
    ],
)
def test_an_exception_in_a_file_of_the_users_is_said_with_its_line(failing, text, place, what):
    status, said = failing(text)
    assert status in (1, 2)
    assert said.startswith(f"rljax run: {place}")
    assert what in said
    assert "RLJAX_TRACEBACK=1" in said
    assert "Traceback" not in said
    assert said.count("\n") < 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "experiment = offline.SFT(data='d', lerning_rate=1)\n",
            "mine_x.py:5: SFT has no setting lerning_rate; did you m",
        ),
        ("experiment = presets.grpo(model='m', data='d', reward=len, kl_los=1)\n", "did you mean kl_loss?"),
        ("experiment = offline.SFT(data='d')\n", "mine_x.py:5: SFT needs model: give model=…"),
        ("experiment = offline.SFT()\n", "SFT needs model and data: give model=…, data=…"),
        ("experiment = offline.SFT\n", "not the class SFT: call it"),
        ("experiment = {'steps': 3}\n", "`experiment` is a value such as"),
        ("x = 1\n", "defines neither `experiment`"),
    ],
)
def test_an_experiment_that_is_none_is_refused_by_name(failing, text, message):
    status, said = failing(text)
    assert status == 2
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", ["json", "numpy", "rljax"])
def test_a_file_called_like_a_module_does_not_take_its_place(name, tmp_path):
    (tmp_path / f"{name}.py").write_text("experiment = 3\n")
    before = sys.modules.get(name)
    with pytest.raises(UserError, match="give it another name"):
        options.import_file(tmp_path / f"{name}.py")
    assert sys.modules.get(name) is before


def test_an_error_of_ours_says_where_the_user_called():
    """The message first, the place after it, and nothing twice; the other processes get both."""

    def raised(ours):
        """What `ours` raises, called from line 2 of a file of the user's."""
        exec(compile("def mine(call):\n    return call()\n", "/home/me/mine.py", "exec"), space := {})
        source = f"def ours(UserError):\n    {ours}\n"
        exec(compile(source, failures._OURS + "losses.py", "exec"), inner := {})
        with pytest.raises(Exception, match=r".") as error:
            space["mine"](functools.partial(inner["ours"], UserError))
        return error.value

    plain = raised("raise UserError('beta must be above 0')")
    assert failures.paragraph(plain) == "beta must be above 0 (/home/me/mine.py:2 in mine)"
    cause = KeyError("answer")
    cause.__traceback__ = raised("raise KeyError('answer')").__traceback__
    told = UserError("the reward failed in row 3: it raised KeyError: 'answer'.")
    told.__cause__ = cause
    assert failures.paragraph(told) == f"{told} (/home/me/mine.py:2 in mine)"
    agreed = hosts.AgreedError(f"process 1 of 2: {failures.line(told)}")
    assert failures.paragraph(agreed) == f"process 1 of 2: {told} (/home/me/mine.py:2 in mine)"
    agreed.__cause__ = told
    assert failures.paragraph(agreed).count("mine.py:2") == 1


def test_what_is_nobodys_line_keeps_its_traceback(monkeypatch):
    file = failures._OURS + "cli.py"
    exec(compile("def broken(argv):\n    raise RuntimeError('ours')\n", file, "exec"), space := {})
    monkeypatch.setitem(cli.COMMANDS, "report", space["broken"])
    with pytest.raises(RuntimeError, match="ours"):
        cli.main(["report"])


@pytest.mark.parametrize(
    ("raised", "message", "status"),
    [
        ("OSError(28, 'No space left on device', 'runs/x')", "runs/x: No space left on device", 2),
        ("NotADirectoryError(20, 'Not a directory', 'runs/x')", "runs/x: Not a directory", 2),
        ("ImportError('libx is missing')", "libx is missing", 2),
        ("MemoryError('Unable to allocate 7.28 TiB for an array')", "does not suffice: Unable to allocate 7.28 TiB", 1),
        ("RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes')", "--batch", 1),
    ],
)
def test_files_libraries_and_memory_are_a_paragraph(monkeypatch, capsys, raised, message, status):
    monkeypatch.delenv("RLJAX_TRACEBACK", raising=False)
    exec(compile(f"def broken(argv):\n    raise {raised}\n", failures._OURS + "cli.py", "exec"), space := {})
    monkeypatch.setitem(cli.COMMANDS, "report", space["broken"])
    assert cli.main(["report"]) == status
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    monkeypatch.setenv("RLJAX_TRACEBACK", "1")
    with pytest.raises(Exception, match=r".") as error:
        cli.main(["report"])
    assert type(error.value).__name__ == raised.partition("(")[0]


def test_what_would_steer_a_terminal_is_shown():
    text = "red \x1b[31m bell \a c1 \x9b title \x1b]0;x\x07 turned \u202e half \ud800\ttab\nline ünï 漢字 🙂 e\u0301"
    shown = failures.visible(text)
    assert shown.split(" ü")[0] == (
        "red \\x1b[31m bell \\x07 c1 \\x9b title \\x1b]0;x\\x07 turned \\u202e half \\ud800\ttab\nline"
    )
    assert "\x1b" not in failures.paragraph(UserError(text))
    assert failures.line(OSError(errno.ENOENT, "no\x1b[2J")) == "FileNotFoundError: [Errno 2] no\\x1b[2J"


def test_nothing_on_the_screen_steers_it():
    """The progress line, what stays, tables of samples and of evidence."""
    screen = io.StringIO()
    line = progress.Line(2, shown="r\x1b[2J", console=Console(file=screen, width=200))
    bad = "a\x1b]0;title\x07\x9b2J\rb"
    line.status(bad)
    line.update(1, {"loss": 0.5, "r\x1b[2J": 1.0}, {})
    line.samples([{"prompt": bad, f"x{bad}": bad, "completion": 1.0}], title=bad)
    Console(file=screen, width=200).print(
        evidence._heading({"step": 1, "row": 0, "score": 1.0, "rewards": {bad: 1.0}, "finished": True, "prompt": bad})
    )
    text = screen.getvalue()
    assert not set(text) & {chr(c) for c in (*range(9), *range(11, 32), *range(0x7F, 0xA0))}
    assert text.count("\\x1b]0;title\\x07\\x9b2J\\x0db") >= 5
