"""What is not finite ends a run: the device tells it with every update, the host reads it one step late."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rljax import hosts
from rljax.train import FAULTS, Faults, OnNan
from rljax.types import Mean, Metrics, Params

IN_A_ROW = 10  # steps that were left out entirely, after which "skip" ends a run as well
SKIPPED = "updates/skipped"
FIX = "Lower the learning rate, set clip_norm, look at the rows of that step, or use dtype and compute_dtype float32"


class NotFiniteError(hosts.AgreedError):
    """A loss, a gradient or a weight that is not finite; all processes raise it at the same step.

    good: whether the state is, since all such updates were left out.
    """

    good = False


class Watch:
    """Looks at the faults of every step once the next one is under way, so that no step waits for it.

    total: the steps of the run. in_a_row: how many were left out entirely up to now. latest: the last checkpoint.
    """

    def __init__(self, rule: OnNan, params: Params, *, total: int, in_a_row: int, latest: Callable[[], int | None]):
        paths = jax.tree_util.tree_leaves_with_path(params)
        self.in_a_row = in_a_row
        self._names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in paths]
        self._skips, self._most, self._latest = rule == "skip", min(IN_A_ROW, total), latest
        self._pending: list[tuple[int, Faults]] = []

    def take(self, step: int, metrics: Metrics) -> Metrics:
        """Keep the faults of `step` to be looked at; the metrics that are left to log."""
        faults: Any = metrics[FAULTS]
        for leaf in jax.tree.leaves(faults):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        self._pending.append((step, faults))
        rest = {name: value for name, value in metrics.items() if name != FAULTS}
        return rest | {SKIPPED: Mean(total=faults.left_out, weight=jnp.ones(()))} if self._skips else rest

    def check(self) -> None:
        """Raise NotFiniteError where a step before the last one has to end the run."""
        while len(self._pending) > 1:
            self._judge(*self._pending.pop(0))

    def settle(self) -> None:
        """Wait for the last step as well: before its state is saved or looked at."""
        while self._pending:
            self._judge(*self._pending.pop(0))

    def _judge(self, step: int, faults: Faults) -> None:
        found: Any = hosts.whole(faults)
        if not found.leaves.any():
            self.in_a_row = 0
            return
        self.in_a_row = self.in_a_row + 1 if found.left_out == found.updates else 0
        if self._skips and self.in_a_row < self._most:
            return
        error = NotFiniteError(self._said(step, found.leaves > 0))
        error.good = self._skips
        raise error

    def _said(self, step: int, leaves: np.ndarray) -> str:
        number = len(self._names)
        parts = ["the loss"] if leaves[0] else []
        parts += self._first("the gradient of", leaves[1 : number + 1])
        parts += [] if self._skips and parts else self._first("the weights", leaves[number + 1 :])
        what = f"{' and '.join(parts)} {'is' if parts == ['the loss'] else 'are'} not finite"
        if self._skips:
            return (
                f"step {step}: {what}, and the last {self.in_a_row} steps were left out for such a reason "
                f"(on_nan='skip'), so the run learns nothing any more and ends here, saved. {FIX}."
            )
        latest = self._latest()
        kept = "nothing was saved yet" if latest is None else f"the checkpoint of step {latest} is the last good one"
        return (
            f"step {step}: {what}. The run ends, and nothing is saved from this step on: {kept}, and the same command "
            f"goes on from there. {FIX}; --on-nan skip leaves such updates out."
        )

    def _first(self, what: str, wrong: Sequence[Any] | np.ndarray) -> list[str]:
        """["the weights embed.tokens (and of 3 more leaves)"]: of those that are wrong."""
        names = [name for name, bad in zip(self._names, wrong, strict=True) if bad]
        more = f" (and {len(names) - 1} more leaves)" if len(names) > 1 else ""
        return [f"{what} {names[0]}{more}"] if names else []
