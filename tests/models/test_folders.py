"""Where a model is written: never over another one, whole at every moment, and nothing is left beside it."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from rljax.errors import UserError
from rljax.models import folders, hf_write

OWN = hf_write.OWN_FILES


def write(path, text="new"):
    """A model of one tensor, by replace_folder."""

    def fill(new):
        hf_write.write_tensors(new, [("x", 4, lambda: np.zeros(1, np.float32))])
        (new / "config.json").write_text(text)

    folders.check_target(path, OWN)
    folders.replace_folder(path, fill)


def text(path):
    return (path / "config.json").read_text()


def test_only_what_we_wrote_is_replaced(tmp_path):
    write(tmp_path / "out", "one")
    write(tmp_path / "out", "two")
    assert text(tmp_path / "out") == "two"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    save_file({"x": np.ones(1, np.float32)}, theirs / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="that no export of this program wrote"):
        folders.check_target(theirs, OWN)
    for damaged in (b"", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0[]"):
        (theirs / "model.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match="that no export"):
            folders.check_target(theirs, OWN)
    (theirs / "model.safetensors").unlink()
    (theirs / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="that no export"):
        folders.check_target(theirs, OWN)


def test_what_a_run_reads_is_never_written_to_whoever_wrote_it(tmp_path):
    write(tmp_path / "base")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    reads = {"model": tmp_path / "base", "critic": "no such folder", "loss": "rljax.losses.dpo_loss"}
    for target in (tmp_path / "base", tmp_path / "link", tmp_path / "x" / ".." / "base"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="is what this run reads as its model"):
            folders.check_target(target, OWN, reads=reads)
    folders.check_target(tmp_path / "other", OWN, reads=reads)


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_exchanged_in_one_piece(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda one, other: False)
    write(tmp_path / "out", "one")
    number = os.stat(tmp_path / "out").st_ino
    (tmp_path / "link").symlink_to("out")
    write(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert text(tmp_path / "out") == "two"
    assert os.stat(tmp_path / "out").st_ino != number
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "out"]


def test_a_kernel_that_cannot_exchange_is_told_from_a_disk_that_fails(tmp_path, monkeypatch):
    write(tmp_path / "out", "one")
    (tmp_path / "new").mkdir()
    assert folders._exchange(tmp_path / "new", tmp_path / "out")
    with pytest.raises(OSError, match="No such file") as error:
        folders._exchange(tmp_path / "gone", tmp_path / "out")
    assert error.value.errno == errno.ENOENT


KILLED = """
import os, pathlib, signal, sys
from rljax.models import folders
path, where = pathlib.Path(sys.argv[1]), sys.argv[2]
def fill(new):
    (new / "config.json").write_text("two")
    if where == "filling":
        os.kill(os.getpid(), signal.SIGKILL)
if where == "between":
    folders._exchange = lambda one, other: False
    rename = pathlib.Path.rename
    def then_die(self, target):
        rename(self, target)
        os.kill(os.getpid(), signal.SIGKILL)
    pathlib.Path.rename = then_die
folders.replace_folder(path, fill)
"""


@pytest.mark.parametrize("where", ["filling", "between"])
def test_what_a_killed_export_left_is_cleaned_up_by_the_next(tmp_path, where):
    write(tmp_path / "out", "one")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out"), where], check=False)
    assert done.returncode == -9
    (left,) = (file for file in tmp_path.iterdir() if file.name.startswith(".out."))
    assert (tmp_path / "out").exists() == (where == "filling")
    (tmp_path / ".out.notebook").write_text("somebody's")
    (tmp_path / ".out.mine1234").mkdir()
    (tmp_path / ".out.mine1234" / "thesis.tex").write_text("somebody's")
    seen = []
    folders.replace_folder(tmp_path / "out", lambda new: seen.append(text(tmp_path / "out")))
    assert seen == ["one" if where == "filling" else "two"]  # a whole one before the new one is there
    assert not left.exists()
    assert (tmp_path / ".out.notebook").exists()
    assert (tmp_path / ".out.mine1234" / "thesis.tex").exists()


def test_a_draft_that_somebody_writes_stays(tmp_path):
    def fill(new):
        write(tmp_path / "out", "inner")
        assert new.is_dir()
        (new / "config.json").write_text("outer")

    folders.replace_folder(tmp_path / "out", fill)
    assert text(tmp_path / "out") == "outer"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_the_old_one_and_nothing_beside_it(tmp_path):
    write(tmp_path / "out", "one")

    def fill(new):
        (new / "config.json").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device", str(new))

    with pytest.raises(OSError, match="No space left"):
        folders.replace_folder(tmp_path / "out", fill)
    assert text(tmp_path / "out") == "one"
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_names_as_long_as_file_systems_take_them(tmp_path):
    for name in ("x" * 255, "é" * 127):
        write(tmp_path / name)
        write(tmp_path / name, "two")
        assert text(tmp_path / name) == "two"
    assert len(list(tmp_path.iterdir())) == 2


def test_metadata_stays_what_transformers_reads(tmp_path):
    write(tmp_path / "out")
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    head = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert head["__metadata__"]["format"] == "pt"
