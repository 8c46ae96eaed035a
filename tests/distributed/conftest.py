"""Tests that start real processes have one cache of reference log-probabilities a module, apart from that of others."""

import pytest

from tests.models.folders import first_layers


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
    return first_layers(small, tmp_path_factory.mktemp("single") / "model", 1)
