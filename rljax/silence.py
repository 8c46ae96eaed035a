"""Whether a run learns anything at all, read off its records: what is said once, and why."""

from __future__ import annotations

from collections.abc import Mapping

AFTER = 10  # records in a row

# (metric, its value where there is no signal, what that means)
SIGNS = (
    ("grad_norm", 0.0, "the gradient was exactly 0: nothing is learned"),
    ("frac_reward_zero_std", 1.0, "all completions of every prompt scored alike: their advantages are 0"),
    ("rewards/none_ratio", 1.0, "no reward applied to any completion: nothing is trained"),
)


class Silence:
    """Counts records in a row, from the first one on, that give no signal. `see` returns what is to be said now."""

    def __init__(self, total: int):
        self._wait = max(2, min(AFTER, total))
        self._steps = 0
        self._mute: dict[str, str] = {}
        self._constant: dict[str, float] = {}

    def see(self, metrics: Mapping[str, float | None]) -> list[str]:
        """What the records so far have in common, once there are enough of them. metrics: of one step of training."""
        if "loss" not in metrics or self._steps > self._wait:
            return []
        first = self._steps == 0
        mute = {name: text for name, value, text in SIGNS if metrics.get(name) == value}
        constant = {
            name: mean
            for name in metrics
            if name.startswith("rewards/") and name.endswith("/std") and metrics[name] == 0.0
            if (mean := metrics.get(f"{name[:-4]}/mean")) is not None
        }
        self._mute = mute if first else {name: text for name, text in self._mute.items() if name in mute}
        self._constant = constant if first else {k: v for k, v in self._constant.items() if constant.get(k) == v}
        self._steps += 1
        if self._steps != self._wait:
            return []
        self._steps += 1  # said once
        said = [f"in each of the first {self._wait} steps {text} ({name})" for name, text in self._mute.items()]
        same = "in all of the first {} steps the reward {} gave {:g} to everything: it tells nothing apart"
        return said + [
            same.format(self._wait, name.removeprefix("rewards/").removesuffix("/std"), value)
            for name, value in self._constant.items()
        ]
