"""Tests that start real processes have one cache of reference log-probabilities a module, apart from that of others."""

import dataclasses
import pathlib

import jax
import pytest

from rljax import models
from rljax.models import hf


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The folder of the run that is compared with; processes are given another."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("RLJAX_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def small(stories, tmp_path_factory) -> pathlib.Path:
    """The first two layers of stories260K, with its tokenizer: real weights that compile in half the time."""
    folder = tmp_path_factory.mktemp("small") / "model"
    model, params = hf.load(stories)
    params = {**params, "layers": jax.tree.map(lambda x: x[:2], params["layers"])}
    config = dataclasses.replace(model.config, num_layers=2, source="")
    hf.save(folder, models.build(config), params, tokenizer=stories)
    return folder
