"""Episodes: policies act in an environment or against each other, a batch at a time, in tokens."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import Array
from jax.sharding import Mesh

from rljax import decoding, rewards
from rljax.data import Row
from rljax.environments import actions, transcripts
from rljax.environments.actions import Action
from rljax.environments.calls import Failure, call_all
from rljax.environments.transcripts import Transcript
from rljax.environments.turns import Environment, Episodes, Game, Round, Text, Turn
from rljax.errors import UserError
from rljax.policy import Policy
from rljax.rewards.answers import TOO_LARGE
from rljax.rewards.core import described
from rljax.types import Rollout, Tokens


class _Episode(NamedTuple):
    state: Any
    players: tuple[Transcript, ...]
    failure: str | None = None
    done: bool = False  # by the game
    over: bool = False  # nobody acts any more: done, failed, or out of tokens


class _Limits(NamedTuple):
    """Of tokens: what an action, a prompt, and a whole row may have."""

    max_new_tokens: int
    max_prompt: int
    max_length: int


def play(
    policy: Policy,
    environment: Environment,
    rows: Sequence[Row],
    key: Array,
    *,
    max_new_tokens: int,
    max_prompt: int,
    max_length: int,
    sampling: Mapping[str, Any] | None = None,
    n: int = 1,
    seed: int = 0,
    timeout: float | None = None,
    poll: Callable[[], None] | None = None,
    mesh: Mesh | None = None,
    numbers: Sequence[int] | np.ndarray | None = None,
) -> Episodes:
    """n episodes from each data row, all at the same time; those of row i are i·n to i·n + n − 1 of the result.

    Rows of the rollout are [b, max_length]: the prompt, which keeps its last `max_prompt` tokens, ends in column
      max_prompt, as in `generate`'s rows; then come action, observation, action, … Tokens of the policy keep their ids
      and log-probabilities; everything else is attended and not trained.
    max_new_tokens: of an action. One that is cut, by this or at the end of the row, is answered like any other.
    key: episode i (of all) samples its first action with fold_in(key, i), and later ones with keys from that, so what
      it does depends on no other. With `environments.single_turn` the rollout is exactly that of `sampling.generate`.
    sampling: settings of `generate`; stop_ids are the policy's if there are none among them.
    seed: `reset` of row i gets a number made of it and i.
    timeout: seconds that a reset or step may take; poll: called about ten times a second while they are waited for, and
      before every turn; it raises to stop.
    mesh: of the policy's parameters, if they are on several devices. Of several processes each plays rows of its own.
    numbers: of these rows among all that are played at the same time; None: 0, 1, … With the numbers of all rows, what
      several processes play is what one would.
    An episode ends when the environment says so, after `max_turns` actions, or when the observation leaves no room for
      another token. It is `finished` if the environment said done and the last action ended in a stop token.
    A reset or step that raises, takes too long or answers nonsense ends its own episode. Such a failed episode keeps
      its tokens to look at, and its earlier rewards, but nothing of it is trained: without its end its value is
      unknown. `failures` says of each why it failed.
    """
    return play_against(
        (policy,),
        _as_game(environment),
        rows,
        key,
        max_new_tokens=max_new_tokens,
        max_prompt=max_prompt,
        max_length=max_length,
        sampling=sampling,
        n=n,
        seed=seed,
        timeout=timeout,
        poll=poll,
        mesh=mesh,
        numbers=numbers,
    )[0]


def play_against(
    policies: Sequence[Policy],
    game: Game,
    rows: Sequence[Row],
    key: Array,
    *,
    max_new_tokens: int,
    max_prompt: int,
    max_length: int,
    sampling: Mapping[str, Any] | None = None,
    n: int = 1,
    seed: int = 0,
    timeout: float | None = None,
    poll: Callable[[], None] | None = None,
    mesh: Mesh | None = None,
    numbers: Sequence[int] | np.ndarray | None = None,
) -> tuple[Episodes, ...]:
    """Episodes of several players, as each of them sees them: its own tokens trained, the others' only read.

    policies: one a player; copies of one policy may differ in their parameters or not at all. The other arguments, and
    how an episode ends, are as in `play`. What a player is told before it first acts belongs to its prompt. Its rewards
    are its own plus the shared ones; what it is given before it has acted at all is dropped. Episode i has a row in
    every player's rollout; it is empty for a player who never acted.
    """
    limits = _Limits(max_new_tokens, max_prompt, max_length)
    _check(policies, game, limits)
    call = functools.partial(call_all, timeout=timeout, poll=poll)
    numbers = np.arange(len(rows)) if numbers is None else np.asarray(numbers)
    apart = functools.partial(actions.apart, mesh)
    episodes = apart(functools.partial(_reset, game, rows, numbers, n, seed, call))
    each = np.asarray(numbers[:, None] * n + np.arange(n), np.int32).ravel()
    for turn in range(game.players * game.max_turns):
        player, first = turn % game.players, turn < game.players
        if poll is not None:
            poll()
        episodes, contexts = apart(functools.partial(_heard, episodes, player, policies[player], limits))
        longest = actions.most(mesh, max(map(len, contexts), default=0))[0]
        if not longest:
            break
        written = actions.write(
            policies[player],
            contexts,
            key,
            turn,
            each,
            n=n if turn == 0 else 1,
            width=max_prompt if first else actions.bucket(longest, max_length),
            max_new_tokens=max_new_tokens,
            sampling=sampling or {},
            mesh=mesh,
        )
        reading = functools.partial(actions.taken, policies[player], written, contexts)
        episodes = apart(functools.partial(_answered, game, episodes, player, reading, limits, policies[player], call))
    each_player = enumerate(policies)
    return apart(lambda: tuple(_collect(episodes, player, policy, limits) for player, policy in each_player))


def _check(policies: Sequence[Policy], game: Game, limits: _Limits) -> None:
    if len(policies) != game.players:
        raise UserError(f"the game has {game.players} players, and there are {len(policies)} policies: give one each")
    if game.max_turns < 1 or limits.max_new_tokens < 1 or limits.max_prompt < 1:
        raise UserError(
            f"max_turns={game.max_turns}, max_new_tokens={limits.max_new_tokens} and max_prompt={limits.max_prompt} "
            "must be at least 1"
        )
    if limits.max_length <= limits.max_prompt:
        raise UserError(
            f"max_length={limits.max_length} tokens are those of the whole row, max_prompt={limits.max_prompt} among "
            "them: nothing is left for actions; give more"
        )


def _as_game(environment: Environment) -> Game:
    """A game of one player."""

    def reset(row: Row, seed: int) -> tuple[Any, tuple[Text, ...]]:
        state, prompt = environment.reset(row, seed)
        return state, (prompt,)

    def step(state: Any, player: int, text: str, ids: np.ndarray) -> tuple[Any, Round]:
        del player
        state, turn = environment.step(state, text, ids)
        if not isinstance(turn, Turn):
            raise TypeError(f"step must return (state, Turn), not a {type(turn).__name__} beside the state")
        return state, Round((turn.observation,), (turn.reward,), done=turn.done)

    return Game(reset, step, players=1, max_turns=environment.max_turns)


# --- one turn ---------------------------------------------------------------------------------------------------------


def _reset(
    game: Game, rows: Sequence[Row], numbers: np.ndarray, n: int, seed: int, call: Callable[..., list[Any]]
) -> list[_Episode]:
    def begin(index: int) -> list[_Episode]:
        number = int(np.random.SeedSequence([seed, int(numbers[index])]).generate_state(1)[0])
        state, prompts = game.reset(rows[index], number)
        if len(prompts) != game.players:
            raise UserError(f"reset gave {len(prompts)} prompts for {game.players} players")
        try:
            states = [state, *(copy.deepcopy(state) for _ in range(n - 1))]
        except Exception:  # it holds a connection, a lock, …
            states = [state, *(game.reset(rows[index], number)[0] for _ in range(n - 1))]
        players = tuple(Transcript(prompt) for prompt in prompts)
        return [_Episode(one, players) for one in states]

    found: list[_Episode] = []
    for outcome in call([functools.partial(begin, index) for index in range(len(rows))]):
        if isinstance(outcome, Failure):
            nothing = (Transcript(""),) * game.players
            outcome = [_Episode(None, nothing, failure=f"reset: {outcome.reason}", over=True)] * n
        found += outcome
    return found


def _heard(
    episodes: Sequence[_Episode], player: int, policy: Policy, limits: _Limits
) -> tuple[list[_Episode], list[np.ndarray]]:
    """(the episodes with what the player has heard as tokens, all tokens that it acts on: none where it does not)."""
    found = [_read(episode, player, policy, limits) for episode in episodes]
    return found, [np.zeros(0, np.int32) if one.over else one.players[player].ids for one in found]


def _read(episode: _Episode, player: int, policy: Policy, limits: _Limits) -> _Episode:
    """The episode with what the player has heard as tokens, or over if they leave no room to act."""
    if episode.over:
        return episode
    now, vocab = episode.players[player], policy.model.config.vocab_size
    try:
        read = transcripts.read(now, policy.tokenizer, max_prompt=limits.max_prompt, vocab=vocab)
    except Exception as error:  # ours, or whatever a tokenizer or template raises over a strange text
        what = str(error) if type(error) is UserError else described(error)
        return episode._replace(failure=f"turn {now.actions}: {what}", over=True)
    return episode._replace(over=True) if _room(read, limits) < 1 else _with_player(episode, player, read)


def _answered(
    game: Game,
    episodes: Sequence[_Episode],
    player: int,
    reading: Callable[[], Sequence[Action | None]],
    limits: _Limits,
    policy: Policy,
    call: Callable[..., list[Any]],
) -> list[_Episode]:
    """The episodes after a player's actions and what the game answers, all at the same time."""
    written = reading()
    taken = [
        None
        if action is None
        else actions.cut(action, _room(episode.players[player], limits), policy, episode.players[player].ids)
        for episode, action in zip(episodes, written, strict=True)
    ]
    steps = [
        functools.partial(_step, game, episode.state, player, action)
        for episode, action in zip(episodes, taken, strict=True)
        if action is not None
    ]
    answers = iter(call(steps))
    return [
        episode if action is None else _apply(episode, player, action, next(answers))
        for episode, action in zip(episodes, taken, strict=True)
    ]


def _step(game: Game, state: Any, player: int, action: Action) -> tuple[Any, Round]:
    """What the game answers, checked. Runs in a thread of its own; the ids are a copy that it may do anything with."""
    state, answer = game.step(state, player, action.text, action.ids.copy())
    if not isinstance(answer, Round):
        raise TypeError(f"step must return (state, Round), not a {type(answer).__name__} beside the state")
    if len(answer.observations) != game.players or len(answer.rewards) != game.players:
        raise UserError(
            f"step gave {len(answer.observations)} observations and {len(answer.rewards)} rewards for {game.players} "
            "players"
        )
    numbers = tuple(float(reward) for reward in (*answer.rewards, answer.shared))
    for reward in numbers:
        if not rewards.sound(reward):
            raise UserError(
                f"the reward is {reward:g}, " + (TOO_LARGE if math.isfinite(reward) else "not a finite number")
            )
    return state, answer._replace(rewards=numbers[:-1], shared=numbers[-1], done=bool(answer.done))


def _apply(episode: _Episode, player: int, action: Action, answer: Any) -> _Episode:
    """The episode after an action and its answer."""
    before = episode.players[player]
    acted = transcripts.act(before, action.ids, action.logps, action.text, finished=action.finished)
    episode = _with_player(episode, player, acted)
    if isinstance(answer, Failure):
        return episode._replace(failure=f"turn {before.actions}: {answer.reason}", over=True)
    state, told = answer
    players = []
    for transcript, observation, reward in zip(episode.players, told.observations, told.rewards, strict=True):
        transcript = transcripts.give(transcript, reward + told.shared)
        players.append(transcript if observation is None else transcripts.hear(transcript, observation))
    return episode._replace(state=state, players=tuple(players), done=told.done, over=told.done)


def _with_player(episode: _Episode, player: int, transcript: Transcript) -> _Episode:
    players = (*episode.players[:player], transcript, *episode.players[player + 1 :])
    return episode._replace(players=players)


def _room(transcript: Transcript, limits: _Limits) -> int:
    return limits.max_length - limits.max_prompt - transcript.length


# --- arrays -----------------------------------------------------------------------------------------------------------


def _collect(episodes: Sequence[_Episode], player: int, policy: Policy, limits: _Limits) -> Episodes:
    shape = (len(episodes), limits.max_length)
    ids, segments, mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool)
    logps, given = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    texts, finished = [], []
    for row, episode in enumerate(episodes):
        transcript, column = episode.players[player], limits.max_prompt
        for piece in transcript.pieces[:1]:
            column -= len(piece.ids)
        for piece in transcript.pieces:
            here = slice(column, column + len(piece.ids))
            ids[row, here], segments[row, here] = piece.ids, 1
            if piece.logps is not None:
                given[row, here.stop - 1] = piece.reward
                if episode.failure is None:
                    mask[row, here], logps[row, here] = True, piece.logps
            column = here.stop
        first = transcript.pieces[0].ids if transcript.pieces else ids[row, :0]
        texts.append(decoding.continuation(policy.tokenizer, first, ids[row, limits.max_prompt : column]))
        finished.append(episode.done and transcript.finished and episode.failure is None)
    arrays: dict[str, Any] = {"ids": ids, "segments": segments, "mask": mask}
    rollout: dict[str, Any] = {"logps": logps, "finished": np.asarray(finished, bool)}
    return Episodes(
        rollout=Rollout(tokens=Tokens(**arrays), **rollout),
        rewards=given,
        turns=np.asarray([episode.players[player].actions for episode in episodes], np.int32),
        failures=[episode.failure for episode in episodes],
        texts=texts,
        states=[episode.state for episode in episodes],
    )
