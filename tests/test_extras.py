"""What messages and pages say about installing works: `rljax` on package indexes is another project."""

import importlib.metadata
import pathlib
import re

import pytest

from rljax import extras

ROOT = pathlib.Path(__file__).parent.parent
PATTERNS = ("README.md", "pyproject.toml", "docs/**/*.md", "rljax/**/*.py", "experiments/**/*.py", "tpu_scripts/*")
WRONG = re.compile(r"pip install [^\n`&]*[\"' ]rljax[\"'\s\[=@].*|(?<![\w-])rljax\[(?:tpu|cuda|plan|gguf|metrics).*")


@pytest.mark.parametrize(("extra", "package"), [("gguf", '"gguf<1,>=0.17"'), ("metrics", '"sacrebleu<3,>=2.4"')])
def test_the_command_names_the_packages_of_the_extra(extra, package):
    assert extras.install(extra).startswith("pip install ")
    assert package in extras.install(extra)


@pytest.mark.parametrize("error", [importlib.metadata.PackageNotFoundError, None])
def test_without_metadata_it_is_the_command_for_a_checkout(monkeypatch, error):
    def requires(name):
        if error is not None:
            raise error(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert extras.install("gguf") == 'pip install -e ".[gguf]" (in a checkout)'


def test_nothing_says_to_install_the_other_project():
    texts = {path: path.read_text() for pattern in PATTERNS for path in ROOT.glob(pattern)}
    assert len(texts) > 100
    assert WRONG.search('run `pip install "rljax[datasets]"`')
    assert {path: found for path, text in texts.items() if (found := WRONG.findall(text))} == {}
