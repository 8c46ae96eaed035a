"""Fixtures of the checkpoint tests."""

import shutil

import pytest

from tests.models.make_fixtures import FOLDER


@pytest.fixture
def copy(tmp_path):
    """copy(name): a fixture that may be changed."""

    def make(name):
        target = tmp_path / name
        shutil.copytree(FOLDER / name, target, ignore=shutil.ignore_patterns("golden.npz"))
        return target

    return make
