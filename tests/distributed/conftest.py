"""Tests that start real processes have one cache of reference log-probabilities a module, apart from that of others."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The folder of the run that is compared with; processes are given another."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("RLJAX_CACHE", str(folder))
        yield folder
