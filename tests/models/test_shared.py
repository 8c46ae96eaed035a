"""No prompt twice: rows that share their prompt give what each gives alone, in less work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.logprobs import token_logps
from rljax.models import reward_model, share_prompts
from rljax.ops import sequence_sum
from rljax.types import Tokens
from tests.models.test_transformer import VARIANTS, make

N, PROMPT, OWN = 3, 6, 5


def groups(seed=0, count=2):
    """Rows [count·N, PROMPT + OWN]: prompts that end in the last of their columns, completions of all lengths."""
    rng = np.random.default_rng(seed)
    ids, segments = np.full((2, count * N, PROMPT + OWN), 63)
    segments[:] = 0
    for group in range(count):
        prompt = rng.integers(1, 60, rng.integers(1, PROMPT + 1))
        for row in range(group * N, group * N + N):
            own = rng.integers(1, 60, rng.integers(0, OWN + 1))
            here = slice(PROMPT - len(prompt), PROMPT + len(own))
            ids[row, here], segments[row, here] = np.concatenate([prompt, own]), 1
    mask = (segments > 0) & (np.arange(PROMPT + OWN) >= PROMPT)
    return Tokens(ids=jnp.asarray(ids), segments=jnp.asarray(segments), mask=jnp.asarray(mask))


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_hidden_states_are_those_of_the_plain_rows(name):
    model, params, _ = make(name)
    rows = groups()
    plain, shared = (
        jax.jit(m.apply)(params, rows.ids, rows.segments).hidden
        for m in (model, share_prompts(model, n=N, completion=OWN))
    )
    real = np.asarray(rows.segments > 0)
    np.testing.assert_allclose(shared[real], plain[real], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_losses_and_gradients_are_those_of_the_plain_rows(name):
    model, params, _ = make(name)
    rows = groups(1, count=3)
    weight = jnp.arange(1.0, 10.0)

    def loss(model):
        def of(params):
            return jnp.sum(weight * sequence_sum(token_logps(model, params, rows, max_trained=OWN), rows.mask))

        return jax.jit(jax.value_and_grad(of))(params)

    (plain, theirs), (shared, ours) = loss(model), loss(share_prompts(model, n=N, completion=OWN))
    np.testing.assert_allclose(shared, plain, rtol=1e-6)
    assert abs(plain) > 10
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.slow
def test_a_row_that_is_all_padding_does_not_take_the_prompt_away():
    """A row that trains nothing becomes padding, also the first of its group."""
    model, params, _ = make("llama")
    rows = groups(2)
    gone = np.asarray([0, N + 1])
    rows = Tokens(ids=rows.ids, segments=rows.segments.at[gone].set(0), mask=rows.mask.at[gone].set(False))
    plain = token_logps(model, params, rows)
    shared = token_logps(share_prompts(model, n=N, completion=OWN), params, rows)
    np.testing.assert_allclose(shared, plain, atol=1e-5)
    assert (np.asarray(shared)[gone] == 0).all()
    assert (np.asarray(shared)[1] != 0).any()


def test_a_completion_does_not_see_its_neighbours():
    model, params, _ = make("olmo2")
    rows = groups(3)
    other = rows.ids.at[1, PROMPT:].set(7)
    shared = share_prompts(model, n=N, completion=OWN)
    before, after = (shared.apply(params, ids, rows.segments).hidden for ids in (rows.ids, other))
    unmoved = np.arange(len(rows.ids)) != 1
    np.testing.assert_array_equal(before[unmoved], after[unmoved])
    assert (np.asarray(before[1, PROMPT:]) != np.asarray(after[1, PROMPT:])).any()


def test_critics_and_reward_models_take_it_as_well():
    model, params, _ = make("neox")
    rows = groups(4)
    head = {"kernel": jnp.linspace(-1, 1, model.config.hidden_size), "bias": jnp.ones(())}
    shared = share_prompts(model, n=N, completion=OWN)
    for what in ("values", "scores"):
        plain, ours = (getattr(reward_model(m), what)({"model": params, "head": head}, rows) for m in (model, shared))
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


def test_the_prompt_is_computed_once():
    """Products of a long prompt with short completions: as many as there are tokens left."""
    model, params, _ = make("llama")
    rows, prompt, own, n = 8, 120, 8, 4
    ids = jnp.ones((rows, prompt + own), jnp.int32)

    def flops(model):
        return jax.jit(model.apply).lower(params, ids, ids).compile().cost_analysis()["flops"]

    assert flops(share_prompts(model, n=n, completion=own)) < 0.36 * flops(model)  # 152 tokens of 512


def test_what_cannot_be_shared_is_refused():
    model, params, _ = make("llama")
    ids = jnp.ones((4, 8), jnp.int32)
    assert share_prompts(model, n=1, completion=4) is model
    with pytest.raises(ValueError, match="groups of n=3"):
        share_prompts(model, n=3, completion=4).apply(params, ids, ids)
    with pytest.raises(ValueError, match="at least one column of prompt"):
        share_prompts(model, n=2, completion=8).apply(params, ids, ids)
