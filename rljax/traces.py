"""A profile of a few steps, for TensorBoard: what the device computed when, under the names that the code gives."""

from __future__ import annotations

import pathlib
from typing import Any

import jax

SETTLED = 2  # steps that are not traced: the first ones compile, load and fill caches


class Trace:
    """Traces `steps` steps into `folder`, after those in which a run settles. Told of every step by `step`."""

    def __init__(self, folder: pathlib.Path, steps: int):
        self.folder, self._steps, self._seen, self._running = folder, steps, 0, False

    def step(self, made: Any) -> bool:
        """After a step that made these arrays; True when the trace has been written."""
        self._seen += 1
        if self._steps and self._seen == SETTLED:
            jax.block_until_ready(made)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every Python call would slow down what is measured
            jax.profiler.start_trace(self.folder, profiler_options=options)
            self._running = True
        elif self._running and self._seen == SETTLED + self._steps:
            jax.block_until_ready(made)
            self.close()
            return True
        return False

    def close(self) -> None:
        """Write what there is, if the run ends before its time."""
        if self._running:
            jax.profiler.stop_trace()
        self._running = False
