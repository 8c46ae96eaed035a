"""Two players: every token of both rows written out, and scores by arithmetic."""

import functools

import jax
import numpy as np
import pytest

from rljax import environments, logprobs, policy
from rljax.environments import Game, Round, play_against, split_coins
from tests import tiny
from tests.environments import chain

LIMITS = {"max_new_tokens": 2, "max_prompt": 4, "max_length": 14}


def echo(*, rewards, shared=0.0, rounds=2):
    """Each player hears the other's tokens; rewards[i] are given after move i."""

    def reset(row, seed):
        return 0, (np.asarray([20, 1]), np.asarray([30]))

    def step(state, player, text, ids):
        heard = [None, None]
        heard[1 - player] = ids
        done = state + 1 == 2 * rounds
        return state + 1, Round(tuple(heard), rewards[state], shared if done else 0.0, done)

    return Game(reset, step, players=2, max_turns=rounds)


# The first player writes 2 and stops after 1, and 3 and stops after anything the other says; the other 40 and 41.
FIRST = {1: 2, 2: 4, 41: 3, 3: 4}
SECOND = {4: 40, 40: 41, 41: 4}


def test_each_player_trains_its_own_tokens():
    rewards = [(0.0, 0.5), (0.25, 1.0), (0.0, 0.0), (2.0, -1.0)]
    first, second = play_against(
        (chain.policy(FIRST), chain.policy(SECOND)), echo(rewards=rewards, shared=10.0), [{}], chain.key(), **LIMITS
    )
    assert first.rollout.tokens.ids.tolist() == [[0, 0, 20, 1, 2, 4, 40, 41, 3, 4, 0, 0, 0, 0]]
    assert second.rollout.tokens.ids.tolist() == [[0, 30, 2, 4, 40, 41, 3, 4, 40, 41, 0, 0, 0, 0]]
    assert np.flatnonzero(first.rollout.tokens.mask).tolist() == [4, 5, 8, 9]
    assert np.flatnonzero(second.rollout.tokens.mask).tolist() == [4, 5, 8, 9]
    # Rewards land on a player's latest action; 0.5 came before the second player had done anything.
    assert first.rewards[0, [5, 9]].tolist() == [0.25, 12.0]
    assert second.rewards[0, [5, 9]].tolist() == [1.0, 9.0]
    assert np.count_nonzero(first.rewards) == np.count_nonzero(second.rewards) == 2
    assert [first.turns.tolist(), second.turns.tolist()] == [[2], [2]]
    assert [first.rollout.finished.tolist(), second.rollout.finished.tolist()] == [[True], [False]]


def test_a_player_without_a_turn_has_an_empty_row():
    def step(state, player, text, ids):
        return state, Round((None, None), (1.0, 1.0), done=True)

    game = Game(lambda row, seed: (0, (np.asarray([1]), np.asarray([1]))), step, 2, 3)
    first, second = play_against((chain.policy(FIRST),) * 2, game, [{}, {}], chain.key(), **LIMITS)
    assert first.rewards.sum(1).tolist() == [1, 1]
    assert not second.rollout.tokens.segments.any()
    assert not second.rewards.any()
    assert second.turns.tolist() == [0, 0]


def test_a_failure_ends_the_episode_for_both():
    def step(state, player, text, ids):
        if state["bad"] and player == 1:
            raise RuntimeError("no move")
        return state, Round((ids, ids), (0.0, 0.0))

    game = Game(lambda row, seed: (row, (np.asarray([1]),) * 2), step, 2, 1)
    both = play_against((chain.policy(FIRST),) * 2, game, [{"bad": True}, {"bad": False}], chain.key(), **LIMITS)
    for player in both:
        assert [failure is None for failure in player.failures] == [False, True]
        assert player.rollout.tokens.mask.any(1).tolist() == [False, True]


@pytest.mark.slow
def test_copies_of_a_real_model_agree_with_the_trainer():
    """Two copies with different weights: each row's log-probabilities are those of its own player."""
    players = [policy.Policy(tiny.model(), tiny.params(seed), chain.TOKENIZER, ()) for seed in (0, 1)]
    trainer = jax.jit(functools.partial(logprobs.token_logps, tiny.model()))
    game = echo(rewards=[(0.0, 0.0)] * 4)
    both = play_against(players, game, [{}, {}], chain.key(), **LIMITS)
    for own, other, played in zip(players, players[::-1], both, strict=True):
        tokens = played.rollout.tokens
        np.testing.assert_allclose(played.rollout.logps, trainer(own.params, tokens), atol=1e-4)
        assert np.abs(played.rollout.logps - trainer(other.params, tokens)).max() > 0.1
    heard, said = (episodes.rollout.tokens for episodes in both)
    for row in range(2):  # what one has heard is what the other said
        observed = (heard.segments > 0) & ~heard.mask
        assert heard.ids[row][observed[row]][2:].tolist() == said.ids[row][said.mask[row]].tolist()[:2]


def test_the_number_of_players_is_checked():
    with pytest.raises(ValueError, match="the game has 2 players, and there are 1 policies"):
        play_against((chain.policy(FIRST),), split_coins(), [{}], chain.key(), **LIMITS)


# --- split the coins --------------------------------------------------------------------------------------------------


def moves(game, *claims):
    state, prompts = game.reset({}, 0)
    rounds = []
    for i, claim in enumerate(claims):
        state, answer = game.step(state, i % 2, claim, np.asarray([1]))
        rounds.append(answer)
    return prompts, rounds


def test_claims_that_fit_are_paid():
    prompts, rounds = moves(split_coins(coins=10, shared=0.5), " 8, thanks", "5", "6", "I want 3")
    assert prompts[0] == prompts[1] + "\nI want"
    assert [r.observations for r in rounds] == [
        (None, "\nThe other player wants 8. I want"),
        ("\nThe other player wants 5. I want", None),
        (None, "\nThe other player wants 6. I want"),
        (None, None),
    ]
    assert [r.done for r in rounds] == [False, False, False, True]
    assert rounds[3].rewards == (0.6, 0.3)
    assert rounds[3].shared == pytest.approx(0.45)
    assert all(r.rewards == (0.0, 0.0) for r in rounds[:3])


def test_without_agreement_there_is_nothing():
    _, rounds = moves(split_coins(max_turns=2), "9", "9", "11", "9")
    assert rounds[2].observations == (None, "\nThe other player says nothing of use. I want")
    assert rounds[3] == Round((None, None), (0.0, 0.0), done=True)


def test_claims_may_take_all_there_is():
    _, rounds = moves(split_coins(coins=10, shared=0.5), "7", "3")
    assert rounds[1] == Round((None, None), (0.7, 0.3), 0.5, done=True)


def test_a_withdrawn_claim_is_not_paid():
    _, rounds = moves(split_coins(), "5", "9", "what?", "5")
    assert not rounds[3].done


def test_splitting_in_a_chat():
    prompts, rounds = moves(split_coins(chat=True), "9")
    assert [message["role"] for message in prompts[0]] == ["system", "user"]
    assert [message["role"] for message in prompts[1]] == ["system"]
    told = rounds[0].observations[1]
    assert told == [{"role": "user", "content": "The other player wants 9. How many do you want?"}]


@pytest.mark.slow
def test_two_real_players_split_coins(small):
    """Text, a real tokenizer and checkpoint: the rows say what the rewards say."""
    llama = policy.load(str(small))
    both = play_against(
        (llama, llama),
        split_coins(coins=9, max_turns=1, shared=1.0),
        [{}] * 4,
        chain.key(),
        max_new_tokens=2,
        max_prompt=176,
        max_length=192,
        sampling={"temperature": 1.5, "top_k": 50},
    )
    assert "The other player" not in both[0].texts[0]
    prompt = both[1].rollout.tokens.ids[0, :176]
    assert "The other player" in llama.tokenizer.decode(prompt)
    assert all(episodes.failures == [None] * 4 for episodes in both)
    assert [e.turns.tolist() for e in both] == [[1] * 4] * 2
    assert environments.split_coins
