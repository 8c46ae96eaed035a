"""rljax: reinforcement-learning fine-tuning of language models as pure, jitted, sharded JAX functions.

Import the parts by name (`from rljax import losses, ops, offline`); this module imports only the error, so that the
mathematics (`rljax.ops`, `rljax.losses`, `rljax.advantages`) never pulls in Flax, Orbax or transformers.
"""

__version__ = "0.1.0"

from rljax.errors import UserError

__all__ = ["UserError", "__version__"]
