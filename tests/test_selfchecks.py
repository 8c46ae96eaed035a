"""A self-check that cannot fail is worth nothing: each one is shown something broken."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rljax import losses, selfchecks, views
from rljax.filters import Sampling
from rljax.policy import Policy
from rljax.sampling import generate
from rljax.types import Mean, Output, PreferenceBatch, Rollout, Tokens
from tests import tiny
from tests.test_sampling import prompts


class Letters:
    """A tokenizer for looking at rows: every id is a letter."""

    def decode(self, ids, **_):
        return "".join(chr(97 + int(i) % 26) for i in ids)

    def convert_ids_to_tokens(self, ids):
        return [f"<{i}>" for i in ids]


def policy(model=None) -> Policy:
    return Policy(model or tiny.model(), tiny.params(), Letters(), (2,))


def rows(ids, segments, mask) -> Tokens:
    return Tokens(ids=np.array([ids]), segments=np.array([segments]), mask=np.array([mask], bool))


def test_trained_tokens_are_shown_and_judged():
    good = selfchecks.trained_tokens(rows([3, 4, 5, 2, 0], [1, 1, 1, 1, 0], [0, 0, 1, 1, 0]), Letters(), (2,))
    assert good.passed
    assert "de⟦fc⟧" in good.said
    no_stop = selfchecks.trained_tokens(rows([3, 4, 5, 6, 0], [1, 1, 1, 1, 0], [0, 0, 1, 1, 0]), Letters(), (2,))
    assert not no_stop.passed
    assert "stop token" in no_stop.said
    nothing = selfchecks.trained_tokens(rows([3, 4, 5, 2, 0], [1, 1, 1, 1, 0], [0] * 5), Letters(), (2,))
    assert not nothing.passed
    padding = selfchecks.trained_tokens(rows([3, 4, 5, 2, 0], [1, 1, 1, 1, 0], [0, 0, 1, 1, 1]), Letters(), (2,))
    assert not padding.passed
    first = selfchecks.trained_tokens(rows([3, 4, 5, 2, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]), Letters(), (2,))
    assert not first.passed


def test_what_is_only_unusual_is_a_note():
    """A row without a trained token among others; rows that are cut have no end. Other rows have to have one."""
    one, cut, ends = ([3, 4, 5, 6, 0], [1, 1, 1, 1, 0], [0, 0, 1, 1, 0]), [0, 1, 1, 1, 1], [3, 4, 5, 2, 0]
    some = Tokens(
        ids=np.array([[3] * 5, ends]), segments=np.array([[1] * 5, one[1]]), mask=np.array([[0] * 5, one[2]], bool)
    )
    found = selfchecks.trained_tokens(some, Letters(), (2,))
    assert found.passed
    assert found.note
    assert found.name == "trained_tokens"
    assert "1 of 2 rows train no token" in found.said
    assert "de⟦fc⟧" in found.said
    full = selfchecks.trained_tokens(rows([3] * 5, [1] * 5, cut), Letters(), (2,))
    assert full.passed
    assert full.note
    assert "all are cut at the row's end" in full.said
    assert selfchecks.trained_tokens(rows(*one), Letters(), (2,), budget=2).note
    assert not selfchecks.trained_tokens(rows(*one), Letters(), (2,), budget=3).passed


def test_pairs_without_a_difference_and_labels_of_one_kind():
    one, mask = np.array([[3, 4, 5, 2]]), np.array([[0, 0, 1, 1]], bool)

    def compared(*completions):
        ids = np.array([[[3, 4, *c] for c in pair] for pair in completions])
        return Tokens(ids=ids, segments=np.ones_like(ids), mask=np.broadcast_to(mask[0], ids.shape))

    assert not selfchecks.contrast(compared([(5, 2), (5, 2)])).passed
    some = selfchecks.contrast(compared([(5, 2), (5, 2)], [(5, 2), (6, 2)]))
    assert (some.passed, some.note, some.name) == (True, True, "contrast")
    assert not selfchecks.contrast(compared([(5, 2), (6, 2)])).note
    two = Tokens(ids=np.repeat(one, 2, 0), segments=np.ones((2, 4), int), mask=np.repeat(mask, 2, 0))
    assert [selfchecks.labels(np.array(x, bool), two).note for x in ([1, 1], [1, 0], [0, 0])] == [True, False, True]


def test_a_controller_that_cannot_follow_is_a_note():
    assert selfchecks.kl_controller(1.00016**200).note
    assert not selfchecks.kl_controller(1.01**200).note


def test_a_check_is_waived_by_its_name():
    failed = selfchecks.Check(False, "they differ", name="sampler"), selfchecks.Check(True, "odd", note=True)
    lines: list[str] = []
    assert not selfchecks.report(failed, lines.append)
    assert selfchecks.report(failed, lines.append, "memory, sampler")
    assert lines == ["✗ they differ", "• odd", "✗ (waived) they differ", "• odd"]
    with pytest.raises(ValueError, match=r"a check failed \(above\).* --waive sampler"):
        selfchecks.require(failed, lines.append, "memory")
    with pytest.raises(ValueError, match="there is no check samplers; they are trained_tokens, companions,"):
        selfchecks.waived("samplers")


def test_companions_finds_a_model_that_attends_to_padding():
    assert selfchecks.companions(policy(), tiny.tokens()).passed

    def leaky(params, ids, segments, *, cache=None):
        out = tiny.model().apply(params, ids, jnp.ones_like(segments), cache=cache)
        return Output(out.hidden, out.cache)

    broken = tiny.model()._replace(apply=leaky)
    strong = jax.tree.map(lambda x: x * 3, tiny.params())
    assert not selfchecks.companions(policy(broken)._replace(params=strong), tiny.tokens()).passed


@pytest.mark.slow
def test_sampler_finds_log_probabilities_of_another_temperature():
    """TRAPS 20."""
    sharp = policy()._replace(params=jax.tree.map(lambda x: x * 3, tiny.params()))
    make = functools.partial(generate, sharp.model, sharp.params, prompts(), jax.random.key(0), max_new_tokens=6)
    assert selfchecks.sampler(sharp, make()).passed
    assert not selfchecks.sampler(sharp, make(temperature=0.5)).passed


def test_first_loss_is_that_of_equal_models():
    class Run:
        loss = functools.partial(losses.dpo_loss, beta=0.1)
        reference, nll_weight = True, 0.0

    batch = tiny.pairs()
    assert isinstance(batch, PreferenceBatch)
    loss = lambda value: {"loss": Mean(total=jnp.asarray(8 * value), weight=jnp.asarray(8.0))}  # noqa: E731
    check = selfchecks.first_loss(Run, loss(np.log(2)), batch)
    assert check.passed
    assert "ln 2" in check.said
    assert not selfchecks.first_loss(Run, loss(0.8), batch).passed


def test_learning_rate():
    assert selfchecks.learning_rate(optax.linear_schedule(1e-3, 0.0, 50), 50).passed
    assert not selfchecks.learning_rate(optax.constant_schedule(0.0), 50).passed
    assert not selfchecks.learning_rate(optax.linear_schedule(1e-3, -1e-3, 50), 50).passed
    assert not selfchecks.learning_rate(lambda step: float("nan"), 50).passed
    for schedule, said in (
        (optax.linear_schedule(1e-5, 0.0, 100_000), True),  # of a longer run (TRAPS 23)
        (optax.linear_schedule(1e-5, 0.0, 100), False),
        (optax.cosine_decay_schedule(1e-5, 100), False),
        (optax.constant_schedule(1e-5), False),
    ):
        check = selfchecks.learning_rate(schedule, 100)
        assert check.passed
        assert ("goes on after the run" in check.said) is said


def test_how_far_a_moving_average_follows_is_said():
    short, long = selfchecks.moving_average(0.992, 24), selfchecks.moving_average(0.992, 500)
    assert "at the end 82% initial ones: it hardly follows so short a run" in short.said  # 0.992²⁴ = 0.8247
    assert long.said.endswith("at the end 2% initial ones")
    assert short.passed
    assert long.passed


@pytest.mark.parametrize(("needed", "passed"), [(2**20, True), (2**60, False)])
def test_memory(needed, passed):
    class Analysis:
        argument_size_in_bytes, output_size_in_bytes, alias_size_in_bytes = needed, needed, needed
        temp_size_in_bytes = needed

    check = selfchecks.memory(Analysis)
    assert check.passed is passed
    assert selfchecks.memory(None).passed
    assert passed or "microbatches" in check.said


# --- of online runs ---------------------------------------------------------------------------------------------------


def written(ids, mask, finished) -> Rollout:
    """One row: two prompt tokens, then what was written."""
    tokens = rows([3, 4, *ids], [1, 1, *(1 if m is not None else 0 for m in mask)], [0, 0, *(m or 0 for m in mask)])
    return Rollout(tokens=tokens, logps=np.zeros((1, 2 + len(ids))), finished=np.array([finished]))


def test_sampled_tokens_are_shown_and_judged():
    """The stop token (2) is trained once where a completion ended, nothing after it, no prompt (TRAPS 16)."""
    check = functools.partial(selfchecks.sampled_tokens, tokenizer=Letters(), stop_ids=(2,))
    good = check(written([5, 2, 0], [1, 1, None], True))
    assert good.passed
    assert "de⟦fc⟧" in good.said
    assert "1 of 1 completions ended, 1 of them in a trained stop token" in good.said
    assert check(written([2, 0, 0], [1, None, None], True)).passed  # an immediate end
    cut = check(written([5, 6, 7], [1, 1, 1], False))
    assert cut.passed
    assert "max_completion may be short" in cut.said
    for broken in (
        written([5, 2, 0], [1, 0, None], True),  # the stop token is not trained
        written([5, 2, 9], [1, 1, 1], True),  # something after it is
        written([2, 9, 9], [1, 1, 1], False),
        written([5, 6, 7], [0, 0, 0], False),  # nothing is
    ):
        assert not check(broken).passed
    padding = written([5, 2, 0], [1, 1, None], True)
    assert not check(
        dataclasses.replace(padding, tokens=rows([3, 4, 5, 2, 0], [1, 1, 1, 1, 0], [0, 0, 1, 1, 1]))
    ).passed
    turns = written([5, 2, 5, 2], [1, 1, 1, 1], True)  # an environment that said nothing between two actions
    assert not check(turns).passed
    assert check(turns, single_turn=False).passed


@pytest.mark.slow
def test_sampler_finds_filters_that_the_trainer_does_not_know():
    """TRAPS 21: log-probabilities of what top-k left are recomputed under the same top-k, or do not agree."""
    sharp = policy()._replace(params=jax.tree.map(lambda x: x * 2, tiny.params()))
    settings = {"temperature": 0.7, "top_k": 5}
    rollout = generate(sharp.model, sharp.params, prompts(), jax.random.key(0), max_new_tokens=6, **settings)
    assert selfchecks.sampler(sharp, rollout, Sampling(**settings)).passed
    assert not selfchecks.sampler(sharp, rollout, Sampling(temperature=0.7)).passed
    assert not selfchecks.sampler(sharp, rollout).passed


def test_same_policy_finds_the_smallest_difference():
    """Exactly 0, or the run stops: one weight that differs in its last bits is enough (TRAPS 24)."""
    look = jax.jit(
        lambda params, tokens: views.of_policy(tiny.model(), sampling=Sampling(temperature=0.7))(params, tokens).logps
    )
    rollout = Rollout(tokens=tiny.tokens(), logps=jnp.zeros((8, 12)), finished=jnp.zeros(8, bool))
    same = selfchecks.same_policy(look, tiny.params(), tiny.params(), rollout)
    assert same.passed
    assert "KL of a first rollout 0, ratios 1 to 1" in same.said
    nearly = jax.tree.map(lambda x: x * (1 + 1e-5), tiny.params())
    other = selfchecks.same_policy(look, tiny.params(), nearly, rollout)
    assert not other.passed
    assert "the weights of policy and reference differ" in other.said


def test_ratios_compare_the_update_with_what_came_before_it():
    """An update whose view forgets the temperature starts at other ratios than 1 (TRAPS 20, 29)."""
    warm, plain = (views.of_policy(tiny.model(), sampling=Sampling(temperature=t)) for t in (0.7, 1.0))
    look = jax.jit(lambda params, tokens: warm(params, tokens).logps)
    rollout = Rollout(tokens=tiny.tokens(), logps=jnp.zeros((8, 12)), finished=jnp.zeros(8, bool))
    now = Policy(tiny.model(), tiny.params(), None, ())
    assert selfchecks.same_ratios(now, look, warm, {"policy": tiny.params()}, rollout).passed
    assert not selfchecks.same_ratios(now, look, plain, {"policy": tiny.params()}, rollout).passed


def test_why_a_surrogate_is_zero_is_said():
    class Run:
        whiten_advantages, group = True, 1

    assert "near 0: advantages have mean 0" in selfchecks.first_surrogate(Run).said
    Run.whiten_advantages = False
    assert "near −mean(advantage)" in selfchecks.first_surrogate(Run).said
