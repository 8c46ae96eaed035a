"""Logits equal those of transformers (torch, float32), for every family: plain, left-padded, packed, cached."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models import build, hf, init_cache
from rljax.models.resolve import load_tokenizer
from tests.models.make_fixtures import CASES, FOLDER, LENGTH, PADS, SPLIT

TOLERANCE = 1e-4
PREFILL = 11


@functools.cache
def loaded(name):
    model, params = hf.load(FOLDER / name, dtype="float32")
    return model, params, dict(np.load(FOLDER / name / "golden.npz"))


def logits_of(model, params, ids, segments):
    """Operation by operation: those of all families are much the same, while each has a program of its own."""
    with jax.disable_jit():
        hidden = model.apply(params, jnp.asarray(ids), jnp.asarray(segments)).hidden
        return np.asarray(model.unembed(params, hidden))


@functools.cache
def rows(name):
    """All rows in one batch, which also shows that they do not see each other: two full, two padded, one packed."""
    model, params, golden = loaded(name)
    ids, segments = golden["ids"][[0, 1, 0, 0, 0]], np.ones((5, LENGTH), np.int32)
    segments[2:4, :PADS] = 0
    ids[2, :PADS], ids[3, :PADS] = 0, 63
    segments[4, SPLIT:] = 2
    return logits_of(model, params, ids, segments)


def close(got, want):
    assert np.abs(want).max() > 0.5  # the golden says something
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_full_rows(name):
    close(rows(name)[:2], loaded(name)[2]["logits"])


@pytest.mark.parametrize("name", CASES)
def test_left_padding_is_invisible(name):
    for row in (2, 3):
        close(rows(name)[row : row + 1, PADS:], loaded(name)[2]["padded"])


@pytest.mark.parametrize("name", [name for name in CASES if "longrope" not in name])
def test_packed_documents_do_not_see_each_other(name):
    close(rows(name)[4:, :SPLIT], loaded(name)[2]["first"])
    close(rows(name)[4:, SPLIT:], loaded(name)[2]["second"])


def test_longrope_takes_the_short_factors_for_short_rows():
    """And the long ones for long rows (test_full_rows): the two differ, as transformers has them."""
    model, params, golden = loaded("phi3_longrope")
    ids = golden["ids"][:1, :SPLIT]
    close(logits_of(model, params, ids, np.ones_like(ids)), golden["first"])
    assert np.abs(golden["first"] - golden["logits"][:1, :SPLIT]).max() > 100 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_cached_steps(name):
    """One prefill, then token by token, then the others at once."""
    model, params, golden = loaded(name)
    step = lambda p, i, c: model.apply(p, i, jnp.ones_like(i), cache=c)  # noqa: E731
    ids, cache, hidden = jnp.asarray(golden["ids"]), init_cache(model.config, 2, LENGTH), []
    with jax.disable_jit():
        for start, stop in itertools.pairwise([0, *range(PREFILL, PREFILL + 4), LENGTH]):
            out, cache = step(params, ids[:, start:stop], cache)
            hidden.append(out)
        close(model.unembed(params, jnp.concatenate(hidden, axis=1)), golden["logits"])


PLAIN = "the first rope without its scaling"
MUTATIONS = [
    ("llama", {"norm_eps": 0.5}),
    ("llama_linear", {"ropes": PLAIN}),
    ("llama_llama3", {"ropes": PLAIN}),
    ("llama_yarn", {"ropes": PLAIN}),
    ("mistral", {"windows": ()}),
    ("qwen2", {"windows": ()}),
    ("gemma2", {"attention_softcap": None}),
    ("gemma2", {"final_softcap": None}),
    ("gemma2", {"attention_scale": None}),
    ("gemma2", {"embed_scale": 1.0}),
    ("gemma3", {"rope_of_layer": ()}),
    ("gemma3", {"windows": ()}),
    ("gemma3", {"norm_offset": 0.0}),
    ("gpt2", {"activation": "gelu"}),
    ("gpt_neox", {"parallel_residual": False}),
    ("gpt_neox", {"rotary_dim": 0}),
    ("phi3", {"windows": ()}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "change"), MUTATIONS)
def test_the_goldens_notice_every_feature(name, change):
    """A golden that a wrong config still meets would prove nothing."""
    model, params, golden = loaded(name)
    if change.get("ropes") == PLAIN:
        change = {"ropes": (dataclasses.replace(model.config.ropes[0], kind="default", attention_factor=1.0),)}
    wrong = build(dataclasses.replace(model.config, **change))
    got = logits_of(wrong, params, golden["ids"], np.ones_like(golden["ids"]))
    assert np.abs(got - golden["logits"]).max() > (3 if "activation" in change else 100) * TOLERANCE


@pytest.mark.slow
def test_a_real_checkpoint_knows_english(stories):
    """stories260K: a likely text is likely."""
    model, params = hf.load(stories)
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    ids = np.asarray([load_tokenizer(stories)(text)["input_ids"]])
    logps = np.asarray(jax.nn.log_softmax(logits_of(model, params, ids, np.ones_like(ids))))
    mean = np.take_along_axis(logps[:, :-1], ids[:, 1:, None], axis=2).mean()
    assert mean > -1.5  # chance is -6.2
