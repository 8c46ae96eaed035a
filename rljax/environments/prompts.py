"""One prompt, one answer: prompts with a reward, and questions with answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rljax import rewards
from rljax.data import Row, prompt_row
from rljax.environments.calls import leave_if_given_up
from rljax.environments.turns import Environment, Text, Turn
from rljax.errors import UserError

Reward = Callable[..., Any] | Sequence[Callable[..., Any]]


def row_prompt(row: Row) -> Text:
    """The row's field "prompt", a text or messages."""
    return prompt_row(row)["prompt"]


def single_turn(reward: Reward, *, prompt: Callable[[Row], Text] = row_prompt) -> Environment:
    """Prompts with a reward, the trivial environment.

    reward: one or several, as `rewards.reward` describes them, asked about one completion at a time (prompt_ids is
      empty: environments see no tokens of prompts). Where none applies the reward is 0. prompt: row -> what to
      continue; the row's other fields go to the reward.
    """
    several = host_rewards(reward)

    def reset(row: Row, seed: int) -> tuple[tuple[Text, dict[str, Any]], Text]:
        del seed
        text = prompt(row)
        fields = {name: value for name, value in row.items() if name != "prompt"}
        rewards.check_fields(several, list(fields))
        return (text, fields), text

    def step(state: Any, text: str, ids: np.ndarray) -> tuple[Any, Turn]:
        asked, fields = state
        return state, Turn(None, judge(several, asked, text, ids, fields), done=True)

    return Environment(reset, step, max_turns=1)


def question_prompt(row: Row) -> str:
    return f"Question: {row['question']}\nAnswer:"


def question_answering(reward: Reward, *, prompt: Callable[[Row], Text] = question_prompt) -> Environment:
    """Rows {"question", "answer"}, answered in one turn.

    reward: judges the answer by the field "answer", a text or a list of accepted ones: `exact_match`, `token_f1`,
      `bleu` or `rouge_l` of `rljax.rewards`, or any other. prompt: row -> a text, or messages for a chat model.
    """

    def checked(row: Row) -> Text:
        for field in ("question", "answer"):
            if row.get(field) is None:
                raise UserError(f"question answering needs rows with 'question' and 'answer'; {field!r} is missing")
        return prompt(row)

    return single_turn(reward, prompt=checked)


def host_rewards(reward: Reward) -> tuple[rewards.Reward, ...]:
    """What an environment judges texts with, checked when it is made."""
    several = rewards.as_rewards(reward)
    for one in several:
        if one.on_device:
            raise UserError(
                f"the reward {one.name} is a JAX function of a batch of tokens, and an environment judges one text "
                "at a time: give it a function of prompts and completions, or run without an environment"
            )
    return several


def judge(several: tuple[rewards.Reward, ...], prompt: Text, text: str, ids: np.ndarray, fields: Mapping) -> float:
    """The weighted sum of host rewards of one completion; 0 where none applies."""
    columns = {name: [value] for name, value in fields.items()}
    nothing = [np.zeros(0, np.int32)]
    said = rewards.start(
        several,
        [prompt],
        [text],
        fields=columns,
        prompt_ids=nothing,
        completion_ids=[ids],
        raw_completions=[getattr(text, "raw", text)],
        prompt_texts=[getattr(text, "prompt", "")],
    )
    total = float(said.result(timeout=None, poll=leave_if_given_up).total[0])
    return 0.0 if math.isnan(total) else total
