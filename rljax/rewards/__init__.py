"""Rewards: callables that judge completions, ready ones, and how a batch is judged in the background.

@rewards.on_device                                                        # a JAX function of the tokens, or …
def short(tokens): return -tokens.mask.sum(1)

def polite(prompts, completions, *, language): ...                        # … a function of texts and the data's fields

judging = rewards.start(rewards.as_rewards([polite, rewards.numeric_match]), prompts, completions, fields=…, …)
...                                                                       # the device works on
scores = judging.result(timeout=600)
"""

from rljax.rewards.checkpoints import embedding_similarity, from_checkpoint, opened
from rljax.rewards.core import Reward, RewardError, Scores, as_rewards, on_device, reward
from rljax.rewards.device import device_params, judge_on_device, merge, sound
from rljax.rewards.judging import Judgement, check_fields, start, wants
from rljax.rewards.matching import exact_match, format_reward, numeric_match, regex_match
from rljax.rewards.overlap import bleu, chrf, rouge_1, rouge_2, rouge_l, token_f1
from rljax.rewards.pairwise import win_rate
from rljax.rewards.text import length, repetition_penalty, vader_sentiment

__all__ = [
    "Judgement",
    "Reward",
    "RewardError",
    "Scores",
    "as_rewards",
    "bleu",
    "check_fields",
    "chrf",
    "device_params",
    "embedding_similarity",
    "exact_match",
    "format_reward",
    "from_checkpoint",
    "judge_on_device",
    "length",
    "merge",
    "numeric_match",
    "on_device",
    "opened",
    "regex_match",
    "repetition_penalty",
    "reward",
    "rouge_1",
    "rouge_2",
    "rouge_l",
    "sound",
    "start",
    "token_f1",
    "vader_sentiment",
    "wants",
    "win_rate",
]
