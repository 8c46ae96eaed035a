"""A self-check that cannot fail is worth nothing: each one is shown something broken."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rljax import losses, selfchecks
from rljax.policy import Policy
from rljax.sampling import generate
from rljax.types import Mean, Output, PreferenceBatch, Tokens
from tests import tiny
from tests.test_sampling import prompts


class Letters:
    """A tokenizer for looking at rows: every id is a letter."""

    def decode(self, ids):
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


def test_companions_finds_a_model_that_attends_to_padding():
    assert selfchecks.companions(policy(), tiny.tokens()).passed

    def leaky(params, ids, segments, *, cache=None):
        out = tiny.model().apply(params, ids, jnp.ones_like(segments), cache=cache)
        return Output(out.hidden, out.cache)

    broken = tiny.model()._replace(apply=leaky)
    strong = jax.tree.map(lambda x: x * 3, tiny.params())
    assert not selfchecks.companions(policy(broken)._replace(params=strong), tiny.tokens()).passed


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


@pytest.mark.parametrize(("needed", "passed"), [(2**20, True), (2**60, False)])
def test_memory(needed, passed):
    class Analysis:
        argument_size_in_bytes, output_size_in_bytes, alias_size_in_bytes = needed, needed, needed
        temp_size_in_bytes = needed

    check = selfchecks.memory(Analysis)
    assert check.passed is passed
    assert selfchecks.memory(None).passed
    assert passed or "microbatches" in check.said
