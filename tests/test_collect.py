"""Prompts in, judged rollouts out: who sees what, which rollouts wait, and that waiting survives a checkpoint."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import collect, data, decoding, judges, policy, prompts, rewards, settings, sharding
from rljax.data import Rows
from rljax.models import resolve
from rljax.types import Rollout, Tokens

WORDS = ["cat", "dog", "tree", "house", "ball", "bird", "car", "hat", "fish", "boat"]
LENGTH = 4


class Never:
    requested = None


@pytest.fixture(scope="module")
def tokenizer(stories):
    return resolve.load_tokenizer(stories)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Rows:
    made = [{"prompt": f"Once there was a {word}" + " and" * (i % 3), "word": word} for i, word in enumerate(WORDS)]
    return data.read(str(data.write_jsonl(tmp_path_factory.mktemp("data") / "p.jsonl", made)))


def write(group, params, asked, key, *, length=LENGTH):
    """A policy without a model: random letters after each prompt, with log-probabilities that tell who wrote them."""
    before = jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), asked)
    new = (len(before.ids), length)
    ids = jax.random.randint(jax.random.fold_in(key, 0), new, 430, 456)
    some = Tokens(
        ids=jnp.concatenate([before.ids, ids], axis=1),
        segments=jnp.concatenate([before.segments, jnp.ones(new, jnp.int32)], axis=1),
        mask=jnp.concatenate([before.mask, jnp.ones(new, bool)], axis=1),
    )
    logps = jnp.where(some.mask, -1.0 * params["version"], 0.0)
    return Rollout(tokens=some, logps=logps, finished=jnp.zeros(new[0], bool))


def make(tokenizer, rows, reward, *, greedy=False, kind=settings.PolicyGradient, **changes) -> collect.Sampler:
    run = kind(
        **{"model": "", "data": "", "reward": reward, "batch": 2, "group": 2, "max_completion": LENGTH} | changes
    )
    mesh, asked = sharding.make_mesh(fsdp=1), rewards.as_rewards(reward)
    start = policy.Policy(None, {}, tokenizer, (2,))  # pyright: ignore[reportArgumentType]
    rolled = jax.eval_shape(
        functools.partial(write, run.group),
        {"version": jnp.ones(())},
        prompts.prompt_tokens(prompts.prompts(run, tokenizer, rows), [0] * run.batch),
        jax.random.key(0),
    )
    local = run.batch * run.group * (run.lag or 1)
    return collect.Sampler(
        run=run,
        mesh=mesh,
        start=start,
        judges=judges.make(asked, tokenizer=tokenizer, mesh=mesh, timeout=30.0, stop=Never(), say=print),
        source=prompts.prompts(run, tokenizer, rows),
        sample=functools.partial(write, run.group),
        greedy=(lambda params, asked: write(1, params, asked, jax.random.key(1))) if greedy else None,
        queue=collect.empty_queue(rolled, [one.name for one in asked], greedy, rows=local),
    )


def by(version: float):
    return {"version": jnp.full((), version, jnp.float32)}


def letters(prompts, completions):
    return [len(set(text)) - 0.25 for text in completions]


# --- one round --------------------------------------------------------------------------------------------------------


def test_batches_of_prompts_are_functions_of_their_number(tokenizer, rows):
    source = make(tokenizer, rows, letters).source
    longest = max(len(source.ids(i)) for i in range(len(rows)))
    assert source.width == -(-longest // 16) * 16
    seen = np.concatenate([source.batch(number) for number in range(5)])
    assert sorted(seen.tolist()) == list(range(10))  # every row once an epoch
    np.testing.assert_array_equal(source.batch(3), source.batch(3))
    tokens = prompts.prompt_tokens(source, source.batch(0))
    for row, index in enumerate(source.batch(0)):
        real = np.asarray(tokens.segments)[row] > 0
        assert real[-1]
        assert (
            tokenizer.decode(np.asarray(tokens.ids)[row][real], skip_special_tokens=True) == rows[int(index)]["prompt"]
        )
    assert not np.asarray(tokens.mask).any()


def test_a_long_prompt_keeps_its_end(tokenizer, rows):
    source = make(tokenizer, rows, letters, max_prompt=4).source
    for i in range(len(rows)):
        assert len(source.ids(i)) == 4
        assert rows[i]["prompt"].endswith(tokenizer.decode(source.ids(i)).strip())


def test_a_reward_sees_the_rows_that_it_judges(tokenizer, rows):
    """Prompt, completion, fields and ids of a row belong together, in groups; None becomes NaN."""
    seen = {}

    def reward(prompts, completions, *, word, prompt_ids, completion_ids):
        seen.update(prompts=prompts, completions=completions, word=word, ids=completion_ids, prompt_ids=prompt_ids)
        return [None if i == 1 else i + 0.5 for i in range(len(prompts))]

    sampler = make(tokenizer, rows, reward)
    a_round = collect.begin(sampler, by(1.0), 3)
    verdict = a_round.judge()()
    indices = np.repeat(sampler.source.batch(3), 2)
    assert seen["prompts"] == [rows[int(i)]["prompt"] for i in indices]
    assert seen["word"] == [rows[int(i)]["word"] for i in indices]
    ids, mask = np.asarray(a_round.rollout.tokens.ids), np.asarray(a_round.rollout.tokens.mask)
    for i, text in enumerate(seen["completions"]):
        asked = tokenizer.decode(seen["prompt_ids"][i], skip_special_tokens=True)
        whole = tokenizer.decode([*seen["prompt_ids"][i], *ids[i][mask[i]]], skip_special_tokens=True)
        assert asked + text == whole
        np.testing.assert_array_equal(seen["ids"][i], ids[i][mask[i]])
        np.testing.assert_array_equal(seen["prompt_ids"][i], sampler.source.ids(int(indices[i])))
    np.testing.assert_array_equal(verdict.total, np.asarray([0.5, np.nan, 2.5, 3.5], np.float32))
    again = collect.begin(sampler, by(1.0), 3).rollout
    np.testing.assert_array_equal(again.tokens.ids, ids)
    assert (np.asarray(collect.begin(sampler, by(1.0), 4).rollout.tokens.ids) != ids).any()


def test_rewards_of_single_tokens_stand_at_their_tokens(tokenizer, rows):
    def each(prompts, completions, *, completion_ids):
        return [
            None if row == 2 else [0.1 * (i + 1) for i in range(len(ids))] for row, ids in enumerate(completion_ids)
        ]

    sampler = make(tokenizer, rows, (each, rewards.reward(letters, weight=2.0)))
    a_round = collect.begin(sampler, by(1.0), 0)
    verdict, mask = a_round.judge()(), np.asarray(a_round.rollout.tokens.mask)
    for i in range(4):
        expected = [0.0] * 4 if i == 2 else [0.1, 0.2, 0.3, 0.4]
        np.testing.assert_allclose(np.asarray(verdict.per_token)[i][mask[i]], expected, rtol=1e-5)
        assert not np.asarray(verdict.per_token)[i][~mask[i]].any()
        single = 0.0 if i == 2 else 1.0
        assert float(verdict.total[i]) == pytest.approx(single + 2 * float(verdict.parts["letters"][i]))


def test_host_and_jax_rewards_make_one_verdict(tokenizer, rows):
    """And the greedy completions are judged by both as well."""

    @rewards.on_device
    def short(tokens):
        return -0.5 * tokens.mask.sum(1)

    sampler = make(tokenizer, rows, (letters, short), greedy=True)
    verdict = collect.begin(sampler, by(1.0), 0).judge()()
    np.testing.assert_allclose(verdict.parts["short"], [-2.0] * 4)
    np.testing.assert_allclose(verdict.total, np.asarray(verdict.parts["letters"]) - 2.0, rtol=1e-6)
    alone = write(1, by(1.0), prompts.prompt_tokens(sampler.source, sampler.source.batch(0)), jax.random.key(1))
    texts = decoding.texts(tokenizer, alone.tokens)
    expected = np.asarray(letters(None, texts)) - 2.0
    np.testing.assert_allclose(verdict.greedy.total, np.repeat(expected, 2), rtol=1e-6)
    assert np.asarray(verdict.greedy.lengths).tolist() == [4] * 4


def test_a_jax_reward_that_is_not_finite_is_refused_with_its_row(tokenizer, rows):
    @rewards.on_device
    def broken(tokens):
        return jnp.where(jnp.arange(tokens.mask.shape[0]) == 2, jnp.nan, 1.0)

    sampler = make(tokenizer, rows, (letters, broken))
    a_round = collect.begin(sampler, by(1.0), 0)
    text = decoding.texts(tokenizer, a_round.rollout.tokens)[2]
    with pytest.raises(rewards.RewardError, match=r"the reward broken failed in row 2: it returned nan") as error:
        a_round.judge()()
    assert repr(text) in str(error.value)
    assert "Once there was a" in str(error.value)


# --- the queue --------------------------------------------------------------------------------------------------------


def loop(sampler, steps, *, saved=False, queue=None, draws=0, start=0):
    """[(ages, versions that wrote, ids)] of the batches that are trained on, as the program collects them."""
    found = []
    for step in range(start, start + steps):
        now, rest, draws = collect.collect(sampler, by(step), queue, draws, step)
        first = -np.asarray(now.rollout.logps)[:, -1]
        found.append((step - now.born, first, np.asarray(now.rollout.tokens.ids)))
        queue = rest()
        if saved:
            queue = collect.padded(queue, sampler.queue)
    return found, queue, draws


@pytest.mark.parametrize("lag", [1, 2])
def test_rollouts_lag_so_many_iterations_behind(tokenizer, rows, lag):
    """Rollouts of step s train at s + lag; the first ones fill the queue; every batch of prompts is used, in order."""
    sampler = make(tokenizer, rows, letters, lag=lag)
    found, queue, draws = loop(sampler, 5)
    ages = [age.tolist() for age, _, _ in found]
    assert ages == [[min(step, lag)] * 4 for step in range(5)]
    for step, (_, version, ids) in enumerate(found):
        assert version.tolist() == [max(0, step - lag)] * 4  # by the weights of that step
        expected = write(2, by(0), collect.place_prompts(sampler, step), jax.random.fold_in(jax.random.key(0), step))
        np.testing.assert_array_equal(ids, expected.tokens.ids)
    assert len(queue.born) == lag * 4
    assert draws == 5 + lag


def contrast(prompts, completions, *, word):
    """Prompts with "cat", "tree" or "hat" are always solved; of the others the first of a pair is."""
    return [1.0 if w in ("cat", "tree", "hat") or i % 2 == 0 else 0.0 for i, w in enumerate(word)]


@pytest.mark.parametrize("max_age", [0, 1, 3])
def test_groups_without_contrast_are_filtered_out(tokenizer, rows, max_age):
    """A batch is full of groups with different rewards; the rest may wait max_age iterations, and is older then."""
    sampler = make(tokenizer, rows, contrast, filter_groups=True, max_age=max_age)
    found, queue, draws = loop(sampler, 8)
    for step, (age, version, ids) in enumerate(found):
        assert ids.shape[0] == 4
        assert age.max() <= max_age
        np.testing.assert_array_equal(version, step - age)
        texts = [sampler.start.tokenizer.decode(row, skip_special_tokens=True) for row in ids]
        assert not any(word in text for text in texts for word in ("cat", "tree", "hat"))
    assert any(age.any() for age, _, _ in found) is (max_age > 0)
    assert draws > 8  # more than one round was needed somewhere
    assert (queue is None) is (max_age == 0)
    if max_age:
        unused = loop(make(tokenizer, rows, contrast, filter_groups=True), 8)[2]
        assert draws < unused  # what waited did not have to be sampled again


def test_no_contrast_at_all_is_an_error(tokenizer, rows):
    sampler = make(tokenizer, rows, lambda prompts, completions: [1.0] * len(prompts), filter_groups=True, max_rounds=3)
    with pytest.raises(ValueError, match="after max_rounds=3 rounds of sampling only 0 of 2 groups"):
        loop(sampler, 1)


def test_a_group_with_one_judged_row_has_no_contrast(tokenizer, rows):
    def half(prompts, completions):
        return [None if i % 2 else float(i) for i in range(len(prompts))]

    sampler = make(tokenizer, rows, half, filter_groups=True, max_rounds=2)
    with pytest.raises(ValueError, match="only 0 of 2 groups"):
        loop(sampler, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"lag": 1}, {"lag": 2}, {"filter_groups": True, "max_age": 2}, {"filter_groups": True}], ids=str
)
def test_a_queue_goes_on_from_its_saved_form(tokenizer, rows, changes):
    """In a fixed shape, with rows that are not there: the same batches follow, to the bit, from any step on."""
    sampler = make(tokenizer, rows, contrast, **changes)
    through, _, _ = loop(sampler, 6)
    for cut in (1, 2, 4):
        _, queue, draws = loop(sampler, cut)
        saved = collect.padded(queue, sampler.queue)
        assert jax.tree.map(np.shape, saved) == jax.tree.map(np.shape, sampler.queue)
        assert (saved.born >= 0).sum() == (0 if queue is None else len(queue.born))  # nothing is lost
        again, _, _ = loop(sampler, 6 - cut, saved=True, queue=saved, draws=draws, start=cut)
        for one, other in zip(through[cut:], again, strict=True):
            for a, b in zip(one, other, strict=True):
                np.testing.assert_array_equal(a, b)


def test_judges_of_later_rollouts_are_awaited_after_the_update(tokenizer, rows):
    """With a lag `collect` gives the batch while the rewards of the rollouts after it are still at work."""
    gate, calls = threading.Event(), []

    def slow(prompts, completions):
        calls.append(len(prompts))
        if len(calls) > 1:
            assert gate.wait(20)
        return [1.0] * len(prompts)

    sampler = make(tokenizer, rows, slow, lag=1)
    now, rest, _ = collect.collect(sampler, by(0), None, 0, 0)
    assert len(now.born) == 4
    gate.set()
    assert len(rest().born) == 4
    assert len(calls) == 2
