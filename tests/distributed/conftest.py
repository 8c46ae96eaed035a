"""Tests that start real processes have one cache of reference log-probabilities a module, apart from that of others."""

import json
import re

import pytest
from safetensors.numpy import load_file, save_file


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The folder of the run that is compared with; processes are given another."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("RLJAX_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def single(small, tmp_path_factory):
    """The first layer of stories260K, with its tokenizer: every process compiles for itself."""
    folder = tmp_path_factory.mktemp("single") / "model"
    folder.mkdir()
    for file in small.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    tensors = load_file(small / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if not re.search(r"layers\.[1-9]", name)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
