"""Logits equal those of transformers (torch, float32), for every family: plain, left-padded, packed and with the KV cache."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models import build, hf, init_cache
from tests.models.make_fixtures import CASES, FOLDER, LENGTH, PADS, SPLIT

TOLERANCE = 1e-4
PREFILL = 11


@functools.lru_cache
def loaded(name: str):
    model, params = hf.load(FOLDER / name, dtype="float32")
    return model, params, dict(np.load(FOLDER / name / "golden.npz"))


def logits_of(model, params, ids, segments):
    @jax.jit
    def run(params, ids, segments):
        return model.unembed(params, model.apply(params, ids, segments).hidden)

    return np.asarray(run(params, jnp.asarray(ids), jnp.asarray(segments)))


def close(got, want):
    assert np.abs(want).max() > 0.5  # the golden says something
    np.testing.assert_allclose(got, want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_full_rows(name):
    model, params, golden = loaded(name)
    close(logits_of(model, params, golden["ids"], np.ones_like(golden["ids"])), golden["logits"])


@pytest.mark.parametrize("name", CASES)
def test_left_padding_is_invisible(name):
    model, params, golden = loaded(name)
    ids, segments = golden["ids"][:1].copy(), np.ones((1, LENGTH), np.int32)
    segments[:, :PADS] = 0
    for junk in (0, 63):
        ids[:, :PADS] = junk
        close(logits_of(model, params, ids, segments)[:, PADS:], golden["padded"])


@pytest.mark.parametrize("name", [name for name in CASES if "longrope" not in name])
def test_packed_documents_do_not_see_each_other(name):
    model, params, golden = loaded(name)
    segments = np.where(np.arange(LENGTH)[None] < SPLIT, 1, 2)
    got = logits_of(model, params, golden["ids"][:1], segments)
    close(got[:, :SPLIT], golden["first"])
    close(got[:, SPLIT:], golden["second"])


def test_longrope_takes_the_short_factors_for_short_rows():
    """And the long ones for long rows (test_full_rows): the two differ, as transformers has them."""
    model, params, golden = loaded("phi3_longrope")
    ids = golden["ids"][:1, :SPLIT]
    close(logits_of(model, params, ids, np.ones_like(ids)), golden["first"])
    assert np.abs(golden["first"] - golden["logits"][:1, :SPLIT]).max() > 100 * TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_cached_steps(name):
    """One prefill, then token by token."""
    model, params, golden = loaded(name)
    step = jax.jit(lambda p, i, c: model.apply(p, i, jnp.ones_like(i), cache=c))
    ids, cache, hidden = jnp.asarray(golden["ids"]), init_cache(model.config, 2, LENGTH), []
    for start, stop in [(0, PREFILL), *((t, t + 1) for t in range(PREFILL, LENGTH))]:
        out, cache = step(params, ids[:, start:stop], cache)
        hidden.append(out)
    close(model.unembed(params, jnp.concatenate(hidden, axis=1)), golden["logits"])


MUTATIONS = {
    "llama": {"norm_eps": 0.5},
    "llama_linear": {"ropes": ()},
    "llama_llama3": {"ropes": ()},
    "llama_yarn": {"ropes": ()},
    "mistral": {"windows": ()},
    "qwen2": {"windows": ()},
    "gemma2": {
        "windows": (),
        "attention_softcap": None,
        "final_softcap": None,
        "attention_scale": None,
        "embed_scale": 1.0,
    },
    "gemma3": {"rope_of_layer": (), "windows": (), "norm_offset": 0.0},
    "gpt2": {"activation": "gelu", "norm_eps": 0.5},
    "gpt_neox": {"parallel_residual": False, "rotary_dim": 0, "activation": "gelu_tanh"},
    "phi3": {"windows": (), "rotary_dim": 0},
}


@pytest.mark.parametrize(
    ("name", "field"), [(n, f) for n, fields in MUTATIONS.items() for f in fields]
)
def test_the_goldens_notice_every_feature(name, field):
    """A golden that a wrong config still meets would prove nothing."""
    model, params, golden = loaded(name)
    value = MUTATIONS[name][field]
    if field == "ropes":
        value = (dataclasses.replace(model.config.ropes[0], kind="default", attention_factor=1.0),)
    wrong = build(dataclasses.replace(model.config, **{field: value}))
    got = logits_of(wrong, params, golden["ids"], np.ones_like(golden["ids"]))
    assert np.abs(got - golden["logits"]).max() > (3e-4 if field == "activation" else 100 * TOLERANCE)


def test_a_real_checkpoint_writes_english(stories):
    """stories260K: likely text is likely, and the first words of a story continue it."""
    model, params = hf.load(stories)
    from rljax.models.resolve import load_tokenizer

    tokenizer = load_tokenizer(stories)
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    ids = np.asarray([tokenizer(text)["input_ids"]])
    logps = jax.nn.log_softmax(logits_of(model, params, ids, np.ones_like(ids)))
    mean = np.take_along_axis(np.asarray(logps)[:, :-1], ids[:, 1:, None], axis=2).mean()
    assert mean > -1.5  # ln 512 = 6.2 is chance
    assert pathlib.Path(stories).is_dir()
