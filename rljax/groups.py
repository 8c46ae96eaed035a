"""Which rows of an online run share a prompt that is computed once: the completions of a prompt are neighbours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from rljax.models import share_prompts
from rljax.types import LanguageModel


class Shares(NamedTuple):
    """How many neighbouring rows share a prompt."""

    notes: int = 1  # when a rollout is annotated
    update: int = 1

    def models(self, run: Any) -> tuple[Callable[[LanguageModel], LanguageModel], ...]:
        """What makes a model that of the notes, and that of the update."""
        share = functools.partial(share_prompts, completion=run.max_completion)
        return functools.partial(share, n=self.notes), functools.partial(share, n=self.update)


NONE = Shares()


def shares(run: Any, shards: int) -> Shares:
    """All that a run may share. shards: over how many devices rows are split, each of which needs whole groups.

    Episodes share as completions do: the copies of one have one `reset`, whose prompt stands in the same columns.
    """
    if not run.share_prompts:
        return NONE
    whole = run.batch % (run.minibatches * run.microbatches * shards) == 0
    return Shares(run.group, together(run) if whole else 1)


def together(run: Any) -> int:
    """How many neighbouring rows stay together in minibatches: those of a group, where each minibatch can have whole
    ones and there is no pretraining text beside them.
    """
    whole = run.batch % run.minibatches == 0 and not getattr(run, "pretrain_data", None)
    return run.group if whole else 1
