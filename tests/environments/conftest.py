"""The tokenizers of the data tests."""

from tests.data.conftest import chatml, fresh, plain

__all__ = ["chatml", "fresh", "plain"]
