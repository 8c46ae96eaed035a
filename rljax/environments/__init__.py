"""Environments: what a policy acts in, for one turn or several, and games of policies against each other.

episodes = environments.play(
    policy, environments.number_guessing(high=9), rows, key, max_new_tokens=8, max_prompt=64, max_length=192, n=4
)
episodes.rollout, episodes.rewards                                       # f32[b t] beside it: one reward an action
"""

from rljax.environments.coins import split_coins
from rljax.environments.dialogue import conversations, customer_service
from rljax.environments.episodes import play, play_against
from rljax.environments.guessing import best_score, guessing, number_guessing
from rljax.environments.prompts import question_answering, single_turn
from rljax.environments.tools import calculator, exercises
from rljax.environments.turns import Environment, Episodes, Game, Round, Text, Turn

__all__ = [
    "Environment",
    "Episodes",
    "Game",
    "Round",
    "Text",
    "Turn",
    "best_score",
    "calculator",
    "conversations",
    "customer_service",
    "exercises",
    "guessing",
    "number_guessing",
    "play",
    "play_against",
    "question_answering",
    "single_turn",
    "split_coins",
]
