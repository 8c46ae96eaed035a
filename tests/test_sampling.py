"""The sampler: greedy equals the uncached model, its log-probabilities equal the trainer's, rows stand alone."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import logprobs, ops, sampling, sharding
from rljax.filters import Sampling, filter_logits
from rljax.models import RULES, build
from rljax.types import Rollout, Tokens
from tests import tiny

pytestmark = pytest.mark.slow

GENERATE = functools.partial(sampling.generate, tiny.model(), max_new_tokens=6)
TABLE = functools.partial(sampling.generate, tiny.bigram(), max_new_tokens=6)  # where no attention is looked at
STOPS = (3, 7, 11, 12, 13, 14, 15, 16, 17)  # so many that random rows end early
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0}  # given as numbers: one compilation for all values


def table(seed: int = 0):
    """Parameters of `tiny.bigram`, as a model that has layers has them."""
    return tiny.bigram_params(seed) | {"layers": {"0": {}}}


def prompts(rows: int = 4, width: int = 5, *, side: str = "left") -> Tokens:
    """Prompts of 2 to `width` tokens, padded on one side."""
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 61, (rows, width)).astype(np.int32)
    length = np.arange(rows)[:, None] % (width - 1) + 2
    column = np.arange(width)[None]
    real = column >= width - length if side == "left" else column < length
    return Tokens(
        ids=jnp.asarray(ids), segments=jnp.asarray(real.astype(np.int32)), mask=jnp.zeros((rows, width), bool)
    )


def assert_same(got: Rollout, expected: Rollout) -> None:
    """The same tokens, exactly, with the same log-probabilities."""
    jax.tree.map(np.testing.assert_array_equal, got.tokens, expected.tokens)
    np.testing.assert_array_equal(got.finished, expected.finished)
    np.testing.assert_allclose(got.logps, expected.logps, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_equals_the_uncached_model(side):
    """Every greedy token is the argmax of a full forward pass over everything before it."""
    rollout = GENERATE(tiny.params(), prompts(side=side), jax.random.key(0), temperature=0.0)
    tokens = rollout.tokens
    logits = tiny.model().unembed(tiny.params(), tiny.model().apply(tiny.params(), tokens.ids, tokens.segments).hidden)
    for row in range(4):
        real = np.flatnonzero(tokens.segments[row])
        for at, previous in zip(real[1:], real[:-1], strict=True):
            if tokens.mask[row, at]:
                assert int(tokens.ids[row, at]) == int(jnp.argmax(logits[row, previous]))
    assert float(jnp.abs(rollout.logps).max()) == 0.0  # a certain choice has log-probability 0
    assert int(tokens.mask.sum()) == 24


@functools.partial(jax.jit, static_argnums=(0, 3))
def seen(model, params, tokens, settings):
    """(log-probabilities and entropy of the trainer, those of the uncached model, filtered outside of both)."""
    trained, entropy = logprobs.token_logps_and_entropy(model, params, tokens, sampling=settings)
    logits = model.unembed(params, model.apply(params, tokens.ids, tokens.segments).hidden[:, 4:-1])
    early = (jnp.arange(6) < settings.min_new_tokens)[None, :, None]
    forbidden = early & jnp.isin(jnp.arange(61), jnp.asarray(settings.stop_ids, jnp.int32))[None, None]
    cuts = {name: getattr(settings, name) for name in ("top_k", "top_p", "min_p")}
    left = filter_logits(logits, temperature=settings.temperature, forbidden=forbidden, **cuts)
    return trained, entropy, jnp.where(tokens.mask[:, 5:], ops.aligned_logps(left, tokens.ids[:, 5:]), 0.0)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("whole", Sampling()),
        ("table", Sampling(temperature=0.7)),
        ("table", Sampling(temperature=0.0)),
        ("table", Sampling(top_p=0.8)),
        ("table", Sampling(min_p=0.2)),
        ("table", Sampling(top_k=4)),
        (
            "whole",
            Sampling(temperature=1.5, top_k=20, top_p=0.9, min_p=0.05, min_new_tokens=3, stop_ids=STOPS),
        ),
        ("table", Sampling(temperature=0.0, top_k=20, min_new_tokens=3, stop_ids=STOPS)),
    ],
    ids=lambda s: (
        s
        if isinstance(s, str)
        else ",".join(f"{k}={v}" for k, v in dataclasses.asdict(s).items() if v != getattr(Sampling(), k))
    ),
)
def test_logps_are_those_of_the_distribution_and_of_the_trainer(model, settings):
    """TRAPS 20, 21, 22. The distribution is that of the uncached model, filtered outside of sampler and trainer."""
    numbers = {k: v for k, v in dataclasses.asdict(settings).items() if v is not None}
    model, params = (tiny.model(), tiny.params()) if model == "whole" else (tiny.bigram(), table())
    kwargs = NEUTRAL | numbers | {"max_new_tokens": 6}
    rollout = sampling.generate(model, params, prompts(8), jax.random.key(1), **kwargs)
    trained, entropy, expected = seen(model, params, rollout.tokens, settings)
    np.testing.assert_allclose(rollout.logps, trained, atol=1e-5)
    np.testing.assert_allclose(rollout.logps[:, 5:], expected, atol=1e-5)
    assert rollout.tokens.mask[:, 5:8].all() or not settings.min_new_tokens
    assert (float(entropy.max()) > 0) == (settings.temperature > 0)


def test_samples_follow_the_filtered_distribution():
    """Frequencies of the first of n tokens match the probabilities, and what is cut is never drawn."""
    settings, model, params = {"top_k": 20, "top_p": 0.9, "temperature": 0.8}, tiny.bigram(), table()
    one, n = jax.tree.map(lambda x: x[:1], prompts()), 8000
    logits = model.unembed(params, model.apply(params, one.ids, one.segments).hidden[:, -1])
    for kwargs in (settings, settings | {"top_k": None, "top_p": 1.0, "temperature": 1.0}):
        rollout = sampling.generate(model, params, one, jax.random.key(5), max_new_tokens=1, n=n, min_p=0.0, **kwargs)
        p = np.asarray(jax.nn.softmax(filter_logits(logits, **kwargs))[0])
        found = np.bincount(np.asarray(rollout.tokens.ids[:, -1]), minlength=61)
        assert found[p == 0].sum() == 0
        likely = p * n > 5  # Pearson's statistic: its mean is the number of classes less one, its variance twice that
        classes = likely.sum()
        statistic = np.sum((found - p * n)[likely] ** 2 / (p * n)[likely])
        assert statistic < classes + 5 * np.sqrt(2 * classes)


def test_a_token_is_drawn_by_its_weight_also_in_a_large_vocabulary():
    """Two levels of sums: across blocks, and never one without weight."""
    weights = np.zeros(1000, np.float32)
    weights[[0, 127, 128, 700, 999]] = [1, 2, 3, 0.5, 3.5]
    logits = jnp.tile(jnp.log(weights)[None], (20000, 1))
    keys = jax.random.split(jax.random.key(0), 20000)
    draw = jax.jit(functools.partial(sampling._draw, temperature=1.0, top_k=None, top_p=None, min_p=None))
    tokens, logps = draw(logits, keys)
    found = np.bincount(tokens, minlength=1000)
    assert set(np.flatnonzero(found)) == {0, 127, 128, 700, 999}
    np.testing.assert_allclose(found / 20000, weights / 10, atol=0.015)
    np.testing.assert_allclose(logps, np.log(weights[tokens] / 10), atol=1e-5)
    assert jnp.isnan(draw(logits.at[:, 5].set(jnp.nan), keys)[1]).all()  # a broken model is not hidden


def test_n_samples_are_n_rows_of_repeated_prompts():
    many = jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), prompts())
    kwargs = {"stop_ids": STOPS, **NEUTRAL}
    assert_same(
        TABLE(table(), prompts(), jax.random.key(2), n=3, **kwargs),
        TABLE(table(), many, jax.random.key(2), **kwargs),
    )


def test_a_prompt_is_read_once_for_all_its_samples():
    """The matrix products of the prompts have as many rows as there are prompts, not samples."""
    jaxpr = str(jax.make_jaxpr(functools.partial(GENERATE, n=7))(tiny.params(), prompts(), jax.random.key(0)))
    assert "f32[4,5,24]" in jaxpr  # the feed-forward of 4 prompts of 5 tokens
    assert "f32[28,1,24]" in jaxpr
    assert "f32[28,5,24]" not in jaxpr


def test_a_row_depends_neither_on_companions_nor_on_its_place():
    whole = GENERATE(tiny.params(), prompts(), jax.random.key(2), **NEUTRAL)
    empty = jax.tree.map(lambda x: x.at[1:].set(jnp.zeros((), x.dtype)), prompts())
    alone = GENERATE(tiny.params(), empty, jax.random.key(2), **NEUTRAL)
    np.testing.assert_array_equal(whole.tokens.ids[0], alone.tokens.ids[0])
    assert not alone.tokens.mask[1:].any()
    assert not alone.finished[1:].any()

    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(2)))(jnp.arange(4))
    turned = jnp.asarray([2, 0, 3, 1])
    elsewhere = GENERATE(tiny.params(), jax.tree.map(lambda x: x[turned], prompts()), keys[turned], **NEUTRAL)
    assert_same(elsewhere, jax.tree.map(lambda x: x[turned], whole))
    with pytest.raises(ValueError, match="2 keys for 4 rows"):
        GENERATE(tiny.params(), prompts(), keys[:2])


def test_an_old_style_key_is_the_same_key():
    key = jax.random.key(2)
    new, old = (TABLE(table(), prompts(), k, **NEUTRAL) for k in (key, jax.random.key_data(key)))
    assert_same(old, new)


def test_stop_tokens_end_rows_and_are_trained_once():
    free = TABLE(table(), prompts(), jax.random.key(4), **NEUTRAL)
    stops = (int(free.tokens.ids[0, 5]), int(free.tokens.ids[1, 7]))  # row 0 stops at once, row 1 at its third
    rollout = TABLE(table(), prompts(), jax.random.key(4), stop_ids=stops)
    new = np.asarray(rollout.tokens.ids)[:, 5:], np.asarray(rollout.tokens.mask)[:, 5:]
    assert bool(rollout.finished[0])
    assert bool(rollout.finished[1])
    assert new[1][0].tolist() == [True] + [False] * 5
    for ids, mask in zip(*new, strict=True):
        stopped = np.isin(ids, stops) & mask
        assert stopped.sum() <= 1
        if stopped.any():
            assert not mask[np.argmax(stopped) + 1 :].any()
    assert not (np.asarray(rollout.tokens.segments)[:, 5:] > 0)[~new[1]].any()
    assert not np.asarray(rollout.tokens.ids)[:, 5:][~new[1]].any()


def test_one_new_token_and_refused_numbers():
    rollout = sampling.generate(tiny.bigram(), table(), prompts(), jax.random.key(0), max_new_tokens=1)
    assert rollout.tokens.ids.shape == (4, 6)
    assert int(rollout.tokens.mask.sum()) == 4
    refused = functools.partial(sampling.generate, tiny.bigram(), table(), prompts(), jax.random.key(0))
    for kwargs, said in (
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"n": 0}, "n must be at least 1"),
        ({"slots": 3, "n": 2}, "slots=3 must be a positive multiple of n=2"),
        ({"top_k": 0}, "top_k is 0"),
    ):
        with pytest.raises(ValueError, match=said):
            refused(**{"max_new_tokens": 1} | kwargs)


@pytest.mark.parametrize("kind", [float, np.float32, jnp.float32])
def test_numbers_that_no_distribution_has_are_refused(kind):
    """Also where they would be traced: inverted or empty distributions are sampled from without complaint."""
    refused = functools.partial(TABLE, table(), prompts(), jax.random.key(0))
    for name, value in (("temperature", -1), ("temperature", np.nan), ("top_p", 1.5), ("min_p", 2), ("min_p", -1)):
        with pytest.raises(ValueError, match=f"{name} is {float(value)}"):
            refused(**{name: kind(value)})
    traced = jax.jit(lambda t: TABLE(table(), prompts(), jax.random.key(0), temperature=t))
    assert_same(traced(0.7), refused(temperature=kind(0.7)))


@pytest.mark.parametrize(("n", "slots", "whole"), [(1, 2, False), (2, 8, True), (1, 5, False)])
def test_slots_change_nothing_about_the_rows(n, slots, whole):
    """13 prompts, among them an empty one, through fewer slots: the tokens of all rows at once, to the last."""
    many = prompts(13, 7)
    many = dataclasses.replace(many, segments=many.segments.at[4].set(0))
    kwargs = {"n": n, "stop_ids": STOPS, "min_new_tokens": 1, "max_new_tokens": 9}
    generate = functools.partial(*(GENERATE, tiny.params()) if whole else (TABLE, table()))
    plain = generate(many, jax.random.key(0), **kwargs)
    lengths = plain.tokens.mask.sum(1)
    assert len(set(lengths.tolist())) > 4
    assert int(lengths[4 * n]) == 0
    assert_same(generate(many, jax.random.key(0), slots=slots, **kwargs), plain)


def test_windows_and_many_ropes_in_slots():
    """A ring of slots that has wrapped: what a window sees depends on positions, not on where tokens are kept."""
    model = build(dataclasses.replace(tiny.CONFIG, windows=(3, 0)))
    generate = functools.partial(sampling.generate, model, tiny.params(), prompts(9), jax.random.key(1))
    kwargs = {"max_new_tokens": 12, "stop_ids": STOPS}
    assert_same(generate(slots=2, **kwargs), generate(**kwargs))


def test_one_compilation_per_shape():
    """Neither keys, nor numbers, nor weights, nor where the padding is compile anew; another width does, once."""
    sampling._generate.clear_cache()
    for seed, temperature in enumerate((1.0, 0.5, 0.0)):
        for width in (5, 6):
            TABLE(table(seed), prompts(width=width), jax.random.key(seed), temperature=temperature)
    assert sampling._generate._cache_size() == 2


@pytest.mark.parametrize("slots", [None, 2])
def test_caches_are_updated_in_place(slots):
    """No loop of the compiled program copies a buffer of keys or values."""
    settings = {"max_new_tokens": 6, "slots": slots, "stop_ids": STOPS}
    generate = jax.jit(functools.partial(sampling.generate, tiny.model(), **settings))
    compiled = generate.lower(tiny.params(), prompts(), jax.random.key(0)).compile()
    buffer = rf"f32\[{slots or 4},2,11,4\]"
    text = compiled.as_text().split("\nENTRY")[0]  # everything that loops call comes before
    assert re.search(buffer + r"\S* dynamic-update-slice\(", text)
    assert not re.search(buffer + r"\S* copy\(", text)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [pytest.param(None, marks=pytest.mark.long), 4])
def test_a_mesh_samples_the_same(slots):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    params = jax.device_put(tiny.params(), sharding.shardings(tiny.params(), RULES, mesh))
    placed = jax.device_put(prompts(8), sharding.batch_shardings(prompts(8), mesh))
    kwargs = {"stop_ids": STOPS, "top_p": 0.9, "slots": slots, "n": 2}
    expected = GENERATE(tiny.params(), prompts(8), jax.random.key(3), **kwargs)
    with jax.set_mesh(mesh):
        assert_same(jax.device_get(GENERATE(params, placed, jax.random.key(3), **kwargs)), expected)
