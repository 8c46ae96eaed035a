"""What an experiment is: its settings and code as JSON with secrets masked, and the content of its model and data."""

from rljax.identity.values import base_kind, describe, digest

__all__ = ["base_kind", "describe", "digest"]
