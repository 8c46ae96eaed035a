"""A batch of three rows for rewards to judge."""

import numpy as np

from rljax import rewards

PROMPTS = ["What is 2 + 2?", [{"role": "user", "content": "Hi"}], "Say nothing."]
COMPLETIONS = ["It is 4.", "Hello!", ""]
FIELDS = {"answer": ["4", None, "x"], "level": [1, 2, 3]}
PROMPT_IDS = [np.arange(5, dtype=np.int32), np.arange(3, dtype=np.int32), np.arange(4, dtype=np.int32)]
COMPLETION_IDS = [np.arange(4, dtype=np.int32), np.arange(2, dtype=np.int32), np.arange(0, dtype=np.int32)]


def begin(given, *, completions=COMPLETIONS, **changes):
    batch = {"fields": FIELDS, "prompt_ids": PROMPT_IDS, "completion_ids": COMPLETION_IDS, **changes}
    return rewards.start(rewards.as_rewards(given), PROMPTS, completions, **batch)


def judge(given, *, timeout=10.0, **waiting):
    return begin(given).result(timeout=timeout, **waiting)
