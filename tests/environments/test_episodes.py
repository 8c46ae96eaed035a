"""Episodes in tokens: every id, mask, log-probability and reward written out, and equal to sampler and trainer."""

import functools
import threading

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rljax import decoding, logprobs, models, policy, sampling, sharding
from rljax.environments import Environment, Turn, play, single_turn
from rljax.filters import Sampling
from tests import tiny
from tests.environments import chain

pytestmark = pytest.mark.slow

ROWS = [{"prompt": [20, 21, 1]}, {"prompt": [30, 5]}, {"prompt": [9]}]
# After 1 the policy writes 2, 3 and stops; after 5 it stops at once; after 9 it never stops; 12 makes it write 6, 7, 8.
TABLE = {1: 2, 2: 3, 5: chain.STOP, 9: 10, 10: 9, 11: 5, 12: 6, 6: 7, 7: 8, 8: 9}


def counting(observe, rewards, *, done_after, max_turns=8):
    """An environment that answers from lists by the number of the turn; its state is the actions so far."""

    def reset(row, seed):
        return (), np.asarray(row["prompt"])

    def step(state, text, ids):
        state, turn = (*state, ids.tolist()), len(state)
        done = turn + 1 == done_after
        return state, Turn(None if done else observe[turn], rewards[turn], done)

    return Environment(reset, step, max_turns)


def played(environment, rows=ROWS, **changes):
    settings = {"max_new_tokens": 3, "max_prompt": 4, "max_length": 16, **changes}
    return play(chain.policy(TABLE), environment, rows, chain.key(), **settings)


def test_the_layout_of_a_scripted_case():
    """Three episodes, their tokens written out: stops, an action cut by its budget, text of the environment."""
    observations = [np.asarray([13, 11]), np.asarray([12])]
    episodes = played(counting(observations, [0.25, -0.5, 1.0], done_after=3))
    tokens, stop = episodes.rollout.tokens, chain.STOP
    assert tokens.ids.tolist() == [
        [0, 20, 21, 1, 2, 3, stop, 13, 11, 5, stop, 12, 6, 7, 8, 0],
        [0, 0, 30, 5, stop, 13, 11, 5, stop, 12, 6, 7, 8, 0, 0, 0],
        [0, 0, 0, 9, 10, 9, 10, 13, 11, 5, stop, 12, 6, 7, 8, 0],
    ]
    assert ["".join(".-+"[kind] for kind in row) for row in tokens.segments + tokens.mask] == [
        ".---+++--++-+++.",
        "..--+--++-+++...",
        "...-+++--++-+++.",
    ]
    rewards = np.zeros((3, 16), np.float32)
    rewards[0, [6, 10, 14]] = rewards[1, [4, 8, 12]] = rewards[2, [6, 10, 14]] = [0.25, -0.5, 1.0]
    np.testing.assert_array_equal(episodes.rewards, rewards)
    assert episodes.turns.tolist() == [3, 3, 3]
    assert episodes.failures == [None] * 3
    assert episodes.rollout.finished.tolist() == [False] * 3  # done, but their last actions were cut
    assert episodes.states[1] == ([stop], [5, stop], [6, 7, 8])
    np.testing.assert_allclose(episodes.rollout.logps, 0, atol=1e-20)  # certain choices
    assert [x.dtype for x in jax.tree.leaves(episodes.rollout)] == [np.int32, np.int32, bool, np.float32, bool]


def test_done_finished_and_cut():
    """Finished: the environment says done, and the policy ended its last action itself."""
    assert played(counting([], [1.0], done_after=1)).rollout.finished.tolist() == [True, True, False]
    short = played(counting([], [1.0], done_after=1), max_length=6)  # two tokens of room
    assert short.rollout.finished.tolist() == [False, True, False]
    assert short.rollout.tokens.ids.tolist()[0] == [0, 20, 21, 1, 2, 3]
    assert short.rewards[:, 5].tolist() == [1, 0, 1]
    assert short.rewards[1, 4] == 1


def test_the_last_turn_and_the_budget_end_episodes_unfinished():
    observe = [np.asarray([13, 11])] * 9
    episodes = played(counting(observe, [1.0] * 9, done_after=None, max_turns=2))
    assert episodes.turns.tolist() == [2, 2, 2]
    assert not episodes.rollout.finished.any()
    assert episodes.rollout.tokens.ids[1].tolist() == [0, 0, 30, 5, 4, 13, 11, 5, 4, *[0] * 7]  # nothing behind it
    episodes = played(counting(observe, [1.0] * 9, done_after=None), max_length=12)
    # Row 1 has 8 tokens of room: 1 + 2 + 2 + 2 leave one token, where the next action is cut.
    assert episodes.rollout.tokens.ids[1].tolist() == [0, 0, 30, 5, 4, 13, 11, 5, 4, 13, 11, 5]
    assert episodes.turns.tolist() == [2, 3, 2]  # the others have 8 − 3 − 2 − 2 = 1, not enough to read 2 more
    assert episodes.rollout.tokens.ids[0].tolist() == [0, 20, 21, 1, 2, 3, 4, 13, 11, 5, 4, 0]
    assert episodes.failures == [None] * 3
    episodes = played(counting(observe, [1.0] * 9, done_after=None), max_length=11)  # reading would fill row 1
    assert episodes.turns.tolist() == [2, 2, 2]
    assert episodes.rollout.tokens.ids[1].tolist() == [0, 0, 30, 5, 4, 13, 11, 5, 4, 0, 0]


def test_episodes_of_different_length():
    """An episode that is done stays as it is while the others go on."""

    def step(state, text, ids):
        return state - 1, Turn(None if state == 1 else np.asarray([12]), float(state), done=state == 1)

    episodes = played(
        Environment(lambda row, seed: (row["turns"], np.asarray([5])), step, 5), [{"turns": 1}, {"turns": 2}]
    )
    assert episodes.rollout.tokens.ids.tolist() == [
        [0, 0, 0, 5, 4, *[0] * 11],
        [0, 0, 0, 5, 4, 12, 6, 7, 8, *[0] * 7],
    ]
    assert episodes.turns.tolist() == [1, 2]


# --- with the real checkpoint -----------------------------------------------------------------------------------------

PROMPTS = [{"prompt": text} for text in ("Once upon a time", "Lily", "The big dog was", "One day, a girl")]


@pytest.fixture(scope="module")
def llama(stories):
    return policy.load(str(stories))


def storyteller(turns):
    """Row i goes on for turns[i] actions; the state is the actions so far."""

    def reset(row, seed):
        return (), row["prompt"]

    def step(state, text, ids):
        state = (*state, ids.tolist())
        done = len(state) == turns
        return state, Turn(None if done else " Then he said", 1.0, done)

    return Environment(reset, step, 4)


LIMITS = {"max_new_tokens": 4, "max_prompt": 12, "max_length": 32}


SETTINGS = {"temperature": 1.5, "top_k": 100, "top_p": 0.95, "min_new_tokens": 2, "stop_ids": (410, 432, 291, 261, 2)}


@pytest.fixture(scope="module")
def told(llama):
    return play(llama, storyteller(3), PROMPTS, jax.random.key(3), sampling=SETTINGS, **LIMITS)


def test_log_probabilities_are_the_trainers(llama, told):
    """TRAPS 15, 20, 21, 22: on rows of several turns, cut and filtered, as logprobs.token_logps has them."""
    tokens = told.rollout.tokens
    trainer = functools.partial(logprobs.token_logps, llama.model, sampling=Sampling(**SETTINGS))
    np.testing.assert_allclose(told.rollout.logps, jax.jit(trainer)(llama.params, tokens), atol=1e-4)
    assert (told.rollout.logps[tokens.mask] < -0.01).mean() > 0.9
    assert told.turns.tolist() == [3] * 4
    starts = np.diff(tokens.mask * 1, axis=1, prepend=0) == 1
    assert starts.sum(1).tolist() == [3] * 4  # turns are runs of the mask
    assert 24 <= tokens.mask.sum() < 48  # some stopped before their budget, none before two tokens


def test_generated_tokens_are_never_tokenised_again(llama, told):
    """TRAPS 18: the rows hold what the environment was handed, which the tokenizer would not make of its text."""
    again = 0
    for row, actions in enumerate(told.states):
        kept = told.rollout.tokens.ids[row][told.rollout.tokens.mask[row]]
        assert kept.tolist() == [token for ids in actions for token in ids]
        texts = [llama.tokenizer.decode(ids) for ids in actions]
        again += sum(
            llama.tokenizer.encode(text, add_special_tokens=False) == ids
            for text, ids in zip(texts, actions, strict=True)
        )
    assert again < 12


def test_a_single_turn_is_exactly_what_generate_gives(llama):
    def length(prompts, completions, *, word):
        return [len(text) + len(w) for text, w in zip(completions, word, strict=True)]

    key, stops = jax.random.key(11), (432, 261, 262, 2)
    rows = [{**row, "word": "ab"} for row in PROMPTS]
    settings = {"temperature": 0.9, "top_p": 0.9, "stop_ids": stops}
    episodes = play(llama, single_turn(length), rows, key, sampling=settings, n=3, **{**LIMITS, "max_length": 16})
    prompts = policy.left_pad([np.asarray(llama.tokenizer.encode(row["prompt"])) for row in PROMPTS], rows=4, width=12)
    rollout = sampling.generate(llama.model, llama.params, prompts, key, max_new_tokens=4, n=3, **settings)
    jax.tree.map(np.testing.assert_array_equal, episodes.rollout, jax.device_get(rollout))
    assert 0 < episodes.rollout.finished.sum() < 12
    texts = decoding.texts(llama.tokenizer, rollout.tokens)
    assert episodes.texts == texts
    assert episodes.rewards.sum(1).tolist() == [len(text) + 2 for text in texts]
    last = [np.flatnonzero(mask)[-1] for mask in episodes.rollout.tokens.mask]
    assert (episodes.rewards != 0).argmax(1).tolist() == last


def test_an_episode_does_not_depend_on_its_companions():
    """Alone, or beside episodes that end earlier or later, it samples the same tokens."""

    def reset(row, seed):
        return (row["turns"], ()), np.arange(row["turns"], 9)[:4]

    def step(state, text, ids):
        left, words = state
        return (left - 1, (*words, tuple(ids))), Turn(np.asarray([50]), float(left), done=left == 1)

    random = policy.Policy(tiny.model(), tiny.params(), chain.TOKENIZER, (0,))
    run = functools.partial(
        play, random, Environment(reset, step, 4), key=jax.random.key(7), max_new_tokens=3, max_prompt=4, max_length=24
    )
    alone = run([{"turns": 3}, {}, {}])  # rows without turns fail, and are empty
    beside = run([{"turns": 3}, {"turns": 1}, {"turns": 4}])
    assert alone.states[0] == beside.states[0]
    for a, b in zip(jax.tree.leaves(alone.rollout.tokens), jax.tree.leaves(beside.rollout.tokens), strict=True):
        np.testing.assert_array_equal(a[0], b[0])
    np.testing.assert_allclose(alone.rollout.logps[0], beside.rollout.logps[0], atol=1e-5)
    words = beside.states[0][1]
    assert len(set(words)) == 3  # every turn draws with keys of its own


def test_a_mesh_changes_nothing():
    """Three rows over eight devices, two samples each: what fills up the devices' shares is cut off."""
    environment = counting([np.asarray([13, 11]), np.asarray([12])], [0.25, -0.5, 1.0], done_after=3)
    mesh, start = sharding.make_mesh(data=2, fsdp=4), chain.policy(TABLE)
    params = jax.device_put(start.params, NamedSharding(mesh, PartitionSpec()))
    settings = {"max_new_tokens": 3, "max_prompt": 4, "max_length": 16, "n": 2}
    spread = play(start._replace(params=params), environment, ROWS, chain.key(), mesh=mesh, **settings)
    jax.tree.map(np.testing.assert_array_equal, spread.rollout, played(environment, n=2).rollout)


def test_copies_share_a_reset_and_rows_do_not():
    def reset(row, seed):
        return seed, np.asarray(row["prompt"])

    environment = Environment(reset, lambda state, text, ids: (state, Turn(None, done=True)), 1)
    run = functools.partial(played, environment, ROWS[:2], n=2)
    seeds, again, other = run(seed=1).states, run(seed=1).states, run(seed=2).states
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
    assert again == seeds
    assert not set(seeds) & set(other)


@pytest.mark.long
def test_the_copies_of_an_episode_can_share_their_prompt(llama):
    """A model that reads a prompt once for its copies has the same log-probabilities, also where a reset failed and
    where copies end after different turns: what `groups.shares` relies on.
    """

    def reset(row, seed):
        if row["prompt"] == "Lily":
            raise RuntimeError("nobody is at home")
        return 0, row["prompt"]

    def step(state, text, ids):
        return state + 1, Turn(" Then he said", 1.0, done=state == 2 or ids[0] % 2 == 0)

    n, environment = 3, Environment(reset, step, 4)
    episodes = play(llama, environment, PROMPTS, jax.random.key(3), sampling=SETTINGS, n=n, **LIMITS)
    tokens = episodes.rollout.tokens
    prompts = tokens.ids[:, : LIMITS["max_prompt"]].reshape(len(PROMPTS), n, -1)
    assert (prompts == prompts[:, :1]).all()
    assert [len(set(turns)) > 1 for turns in episodes.turns.reshape(-1, n)].count(True) >= 2
    assert tokens.segments.any(1).tolist() == [*[True] * n, *[False] * n, *[True] * 2 * n]
    shared = models.share_prompts(llama.model, n=n, completion=LIMITS["max_length"] - LIMITS["max_prompt"])
    ours, plain = (
        jax.jit(functools.partial(logprobs.token_logps, model))(llama.params, tokens) for model in (shared, llama.model)
    )
    np.testing.assert_allclose(ours[tokens.mask], plain[tokens.mask], atol=1e-5)
    assert (plain[tokens.mask] < -0.01).mean() > 0.9


def test_a_step_may_change_its_state():
    """Each copy has a state of its own, also one that cannot be copied, for which reset is called again."""

    def run(extra):
        seeds = []

        def reset(row, seed):
            seeds.append(seed)
            return {"said": [], "seed": seed, **extra()}, np.asarray(row["prompt"])

        def step(state, text, ids):
            state["said"].append(ids.tolist())
            return state, Turn(np.asarray([12]), float(len(state["said"])), done=len(state["said"]) == 2)

        return played(Environment(reset, step, 3), ROWS[:2], n=3), seeds

    for extra, resets in ((dict, 2), (lambda: {"lock": threading.Lock()}, 6)):
        episodes, seeds = run(extra)
        assert [len(state["said"]) for state in episodes.states] == [2] * 6
        assert episodes.rewards.sum(1).tolist() == [3.0] * 6
        assert len({id(state) for state in episodes.states}) == 6
        assert len(seeds) == resets
        assert len(set(seeds)) == 2


# --- failures ---------------------------------------------------------------------------------------------------------


def breaking(release):
    """What goes wrong in the second turn is in the row."""

    def reset(row, seed):
        if row["fault"] == "reset":
            raise RuntimeError("no such room")
        return (row["fault"], 0), np.asarray([5])

    def step(state, text, ids):
        fault, turn = state
        state = (fault, turn + 1)
        if turn == 1 and fault == "raise":
            raise RuntimeError("the door is locked")
        if turn == 1 and fault == "hang":
            release.wait(30)
        observation = "" if turn == 0 and fault == "empty" else np.asarray([12])
        reward = {"nan": float("nan"), "huge": None}.get(fault, 1.0) if turn == 1 else 0.5
        answer = Turn(observation, reward, done=turn == 1)
        return state, tuple(answer) if fault == "tuple" else answer

    return Environment(reset, step, 4)


def test_failures_end_their_own_episodes():
    release = threading.Event()
    faults = ["none", "raise", "hang", "nan", "huge", "tuple", "empty", "reset", "none"]
    episodes = played(breaking(release), [{"fault": fault} for fault in faults], timeout=0.5)
    release.set()
    reasons = dict(zip(faults, episodes.failures, strict=True))
    assert [reason is None for reason in episodes.failures] == [True, *[False] * 7, True]
    assert reasons["raise"].startswith("turn 1: RuntimeError: the door is locked (test_episodes.py:")
    assert reasons["hang"] == "turn 1: no answer within 0.5 seconds"
    assert "the reward is nan" in reasons["nan"]
    assert reasons["tuple"].startswith("turn 0: TypeError: step must return (state, Turn), not a tuple")
    assert "turn 1: the observation has no tokens" in reasons["empty"]
    assert reasons["reset"].startswith("reset: RuntimeError: no such room")
    tokens = episodes.rollout.tokens
    good = [0, 0, 0, 5, 4, 12, 6, 7, 8, *[0] * 7]
    assert tokens.ids[0].tolist() == tokens.ids[8].tolist() == good
    assert tokens.ids[1].tolist() == tokens.ids[2].tolist() == good  # kept to look at, masked out
    assert tokens.ids[5].tolist() == [0, 0, 0, 5, 4, *[0] * 11]
    assert not tokens.segments[7].any()
    assert tokens.mask.any(1).tolist() == [True, *[False] * 7, True]
    assert episodes.rewards.sum(1).tolist() == [1.5, 0.5, 0.5, 0.5, 0.5, 0, 0.5, 0, 1.5]
    assert episodes.rollout.finished.tolist() == [False] * 9


def test_an_observation_that_the_tokenizer_refuses_ends_its_own_episode():
    def reset(row, seed):
        return row["say"], np.asarray([5])

    def step(say, text, ids):
        return say, Turn(say, 0.5, done=say is None)

    failures = played(Environment(reset, step, 2), [{"say": "\ud800"}, {"say": None}]).failures
    assert failures[0] is not None
    assert failures[0].startswith("turn 1: ")
    assert failures[1] is None


def test_all_episodes_may_fail():
    episodes = played(breaking(threading.Event()), [{"fault": "reset"}] * 2)
    assert all(failure.startswith("reset: RuntimeError: no such room") for failure in episodes.failures)
    assert not episodes.rollout.tokens.mask.any()


def test_a_poll_may_stop_it():
    def poll():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        played(counting([], [1.0], done_after=1), poll=poll)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 4}, "nothing is left for actions"),
        ({"max_prompt": 0}, "must be at least 1"),
        ({"max_new_tokens": 0}, "must be at least 1"),
    ],
)
def test_impossible_limits(changes, message):
    with pytest.raises(ValueError, match=message):
        played(counting([], [1.0], done_after=1), **changes)


def test_no_rows_no_episodes():
    assert played(counting([], [1.0], done_after=1), []).rollout.tokens.ids.shape == (0, 16)
