"""The decoder: what a token sees, and that nothing else about its row or its neighbours matters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models import ModelConfig, Rope, build, init_cache, repeat_cache, unstack
from rljax.models.attention import attend, count_positions, visible

LLAMA = ModelConfig(
    vocab_size=64,
    hidden_size=24,
    intermediate_size=40,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=32,
)
VARIANTS = {
    "llama": LLAMA,
    "gemma": dataclasses.replace(
        LLAMA,
        windows=(3, 0),
        ropes=(Rope(), Rope(theta=100.0, kind="linear", factor=8.0)),
        rope_of_layer=(0, 1),
        qk_norm="head",
        norm_offset=1.0,
        post_norm=True,
        activation="gelu_tanh",
        embed_scale=24**0.5,
        attention_scale=0.3,
        attention_softcap=2.0,
        final_softcap=3.0,
        head_dim=10,
    ),
    "gpt2": dataclasses.replace(
        LLAMA,
        learned_positions=True,
        norm="layer",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        gated=False,
        activation="gelu",
        num_kv_heads=4,
    ),
    "neox": dataclasses.replace(
        LLAMA, rotary_dim=4, parallel_residual=True, norm="layer", gated=False, mlp_bias=True, tied=False
    ),
    "olmo2": dataclasses.replace(LLAMA, pre_norm=False, post_norm=True, qk_norm="full", tied=False),
}
A, B, C = [5, 6, 7, 8, 9], [11, 12, 13, 14], [21, 22, 23]  # three documents


@functools.cache
def make(name: str):
    """A model whose every parameter matters: also biases and norms are random, and heads are not all alike."""
    model = build(VARIANTS[name])
    leaves, tree = jax.tree.flatten(jax.eval_shape(model.init, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return (
        model,
        jax.tree.unflatten(tree, noisy),
        jax.jit(lambda p, i, s: model.unembed(p, model.apply(p, i, s).hidden)),
    )


def row(*parts: int | list[int], garbage: int = 0):
    """Ids and segments: an int is so many pads, a list is a document."""
    ids, segments, document = [], [], 0
    for part in parts:
        if isinstance(part, int):
            ids += [garbage] * part
            segments += [0] * part
        else:
            document += 1
            ids += part
            segments += [document] * len(part)
    return ids, segments


def together(ids, segments):
    """The same row as one document."""
    return ids, [min(segment, 1) for segment in segments]


def batch(*rows):
    return tuple(jnp.asarray(field, jnp.int32) for field in zip(*rows, strict=True))


PADDED = batch(
    row(A, B, C),
    row(A, 7),
    row(7, A, garbage=10**9),
    together(*row(3, A[:2], 1, A[2:], 3, garbage=-100)),
    row(B, 8, garbage=63),
    row(9, C, garbage=64),
    row(12, garbage=-1),
    row(2, C, 1, A, 1, garbage=7),
)
WHERE = {  # row -> document -> slots
    0: {"A": range(5), "B": range(5, 9), "C": range(9, 12)},
    1: {"A": range(5)},
    2: {"A": range(7, 12)},
    3: {"A": [3, 4, 6, 7, 8]},
    4: {"B": range(4)},
    5: {"C": range(9, 12)},
    7: {"C": range(2, 5), "A": range(6, 11)},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_a_document_reads_the_same_anywhere(name):
    """Trap 15: packed, left, right or mid-row pads, garbage under them, any companions."""
    _, params, logits = make(name)
    packed = logits(params, *PADDED)
    assert np.isfinite(packed).all()
    alone = {"A": logits(params, *batch(row(A)))[0]}
    for i, documents in WHERE.items():
        for document, slots in documents.items():
            here = packed[i, jnp.asarray(slots)]
            expected = alone.setdefault(document, here)
            np.testing.assert_allclose(here, expected, atol=3e-5, err_msg=f"{document} in row {i}")


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_cached_equals_full(name):
    """Trap 22: the prompt at once, in parts, or token by token; packed and padded; stacked or unstacked layers."""
    model, params, logits = make(name)
    ids, segments = PADDED
    full = np.where((segments > 0)[..., None], logits(params, ids, segments), 0)

    @jax.jit
    def step(params, ids, segments, cache):
        output = model.apply(params, ids, segments, cache=cache)
        return model.unembed(params, output.hidden), output.cache

    for parts, weights in (((5, 1, 1, 5), params), ((1,) * 12, unstack(params))):
        cache, start, pieces = init_cache(model.config, batch=8, length=14), 0, []
        for size in parts:
            piece, cache = step(weights, ids[:, start : start + size], segments[:, start : start + size], cache)
            pieces.append(piece)
            start += size
        assert int(cache.index) == 12
        got = np.where((segments > 0)[..., None], np.concatenate(pieces, axis=1), 0)
        np.testing.assert_allclose(got, full, atol=3e-5, err_msg=str(parts))


def test_repeated_cache_continues_each_row_n_times():
    model, params, logits = make("llama")
    ids, segments = batch(row(A, [1]), together(*row(1, A)))

    @jax.jit
    def twice(params):
        cache = init_cache(model.config, 2, 6)
        cache = model.apply(params, ids[:, :4], segments[:, :4], cache=cache).cache
        rest = (jnp.repeat(x[:, 4:], 2, axis=0) for x in (ids, segments))
        return model.unembed(params, model.apply(params, *rest, cache=repeat_cache(cache, 2)).hidden)

    np.testing.assert_allclose(twice(params), np.repeat(logits(params, ids, segments)[:, 4:], 2, axis=0), atol=3e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma", "gpt2"])
def test_pads_have_no_gradient(name):
    """Trap 9: rows of nothing but pads, and any ids under pads, leave loss and gradient alone and finite."""
    model, params, _ = make(name)
    ids, segments = PADDED

    @jax.jit
    def gradient(params, ids):
        def loss(params):
            logits = model.unembed(params, model.apply(params, ids, segments).hidden)
            return jnp.where(segments > 0, jax.nn.logsumexp(logits, axis=-1), 0).sum()

        return jax.value_and_grad(loss)(params)

    one = gradient(params, ids)
    other = gradient(params, jnp.where(segments > 0, ids, 3))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(one))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(one))  # every parameter is used
    jax.tree.map(np.testing.assert_array_equal, one, other)


@functools.cache
def slope(**how):
    """(loss, gradient) of a model that is computed in this way."""
    params = jax.tree.map(lambda leaf: leaf / 10, make("gemma")[1])
    model, (ids, segments) = build(dataclasses.replace(VARIANTS["gemma"], **how)), PADDED

    def loss(params):
        logits = model.unembed(params, model.apply(params, ids, segments).hidden)
        assert logits.dtype == jnp.float32
        return jnp.where(segments > 0, jax.nn.logsumexp(logits * 4, axis=-1), 0).sum()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"unroll": 1}, marks=pytest.mark.long),
        {"unroll": 2, "remat": "full"},
        {"unroll": 1, "remat": "dots"},
        pytest.param({"remat": "dots"}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_how_it_runs_does_not_change_what_it_is(how):
    """Without a loop, scan, remat by name: equal loss and gradient."""
    (value, gradient), (other, other_gradient) = slope(), slope(**how)
    np.testing.assert_allclose(other, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max()), other_gradient, gradient)


def test_bfloat16_is_equal_to_its_rounding():
    (value, gradient), (coarse, coarse_gradient) = slope(), slope(compute_dtype="bfloat16")
    np.testing.assert_allclose(coarse, value, rtol=2e-3)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(coarse_gradient))
    flat, coarse_flat = (jnp.concatenate([g.ravel() for g in jax.tree.leaves(t)]) for t in (gradient, coarse_gradient))
    assert flat @ coarse_flat > 0.99 * jnp.linalg.norm(flat) * jnp.linalg.norm(coarse_flat)


def test_window_counts_tokens_not_slots():
    """Window 3 in one layer: the query, and the two tokens before it, wherever pads stand."""
    config = dataclasses.replace(LLAMA, num_layers=1, windows=(3,))
    model = build(config)
    params = model.init(jax.random.key(0))
    ids, segments = batch(together(*row([1, 2, 3], 2, [4, 5])))  # positions 0 1 2 - - 3 4

    @jax.jit
    def hidden(ids):
        return model.apply(params, ids, segments).hidden[0, -1]

    base = hidden(ids)
    changes = [bool(jnp.any(hidden(ids.at[0, slot].set(50)) != base)) for slot in range(7)]
    assert changes == [False, False, True, False, False, True, True]


def test_visible_and_positions_by_hand():
    segments = jnp.array([[0, 1, 1, 0, 1, 2, 2, 0]])
    seen = visible(segments, segments)
    assert count_positions(seen).tolist() == [[0, 0, 1, 0, 2, 0, 1, 0]]
    assert seen[0].astype(int).sum(axis=1).tolist() == [0, 1, 2, 0, 3, 1, 2, 0]
    assert seen[0, 4].tolist() == [False, True, True, False, True, False, False, False]
    assert seen[0, 6].tolist() == [False] * 5 + [True, True, False]
    later = visible(segments[:, 5:7], segments, start=5)
    np.testing.assert_array_equal(later[0], seen[0, 5:7])


def test_attend_against_a_loop():
    """Grouped heads: query head i reads key head i // 2. Soft-cap before the mask; a blind query is finite."""
    random = np.random.default_rng(0)
    query = random.normal(size=(1, 4, 3, 2)).astype(np.float32)
    key, value = random.normal(size=(2, 1, 2, 3, 2)).astype(np.float32)
    bias = np.where(np.tril(np.ones((3, 3), bool), k=-1) | (np.arange(3)[:, None] == 2), 0, -1e30).astype(np.float32)
    got = attend(*map(jnp.asarray, (query, key, value)), jnp.asarray(bias)[None, None], scale=0.7, softcap=1.5)
    for head in range(4):
        for i in range(3):
            seen = [j for j in range(3) if bias[i, j] == 0]
            scores = np.array([1.5 * np.tanh(0.7 * query[0, head, i] @ key[0, head // 2, j] / 1.5) for j in seen])
            weights = np.exp(scores) / np.exp(scores).sum()
            if seen:
                expected = sum(w * value[0, head // 2, j] for w, j in zip(weights, seen, strict=True))
                np.testing.assert_allclose(got[0, head, i], expected, atol=1e-6)
    assert np.isfinite(got).all()


def test_final_softcap():
    model, params, logits = make("gemma")
    free = build(dataclasses.replace(model.config, final_softcap=None))
    raw = jax.jit(lambda p, i, s: free.unembed(p, free.apply(p, i, s).hidden))(params, *PADDED)
    np.testing.assert_allclose(logits(params, *PADDED), 3 * np.tanh(raw / 3), atol=1e-5)
    assert np.abs(raw).max() > 3


def test_param_tree_is_the_contract():
    """Names and shapes that converters, sharding rules and checkpoints rely on; found without computing anything."""
    config = dataclasses.replace(
        VARIANTS["gpt2"], qk_norm="full", num_kv_heads=2, gated=True, post_norm=True, tied=False
    )
    tree = jax.eval_shape(build(config).init, jax.random.key(0))
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    attention = {
        "query/kernel": (2, 24, 4, 8),
        "query/bias": (2, 4, 8),
        "key/kernel": (2, 24, 2, 8),
        "key/bias": (2, 2, 8),
        "value/kernel": (2, 24, 2, 8),
        "value/bias": (2, 2, 8),
        "out/kernel": (2, 4, 8, 24),
        "out/bias": (2, 24),
        "query_norm/scale": (2, 4, 8),
        "key_norm/scale": (2, 2, 8),
    }
    mlp = {
        "gate/kernel": (2, 24, 40),
        "gate/bias": (2, 40),
        "up/kernel": (2, 24, 40),
        "up/bias": (2, 40),
        "down/kernel": (2, 40, 24),
        "down/bias": (2, 24),
    }
    norms = [f"{part}_{when}" for part in ("attention", "mlp") for when in ("norm", "post_norm")]
    assert found == {
        "embed/tokens": (64, 24),
        "embed/positions": (32, 24),
        "unembed/kernel": (24, 64),
        "final_norm/scale": (24,),
        "final_norm/bias": (24,),
        **{f"layers/attention/{name}": shape for name, shape in attention.items()},
        **{f"layers/mlp/{name}": shape for name, shape in mlp.items()},
        **{f"layers/{norm}/{part}": (2, 24) for norm in norms for part in ("scale", "bias")},
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}


def test_initial_params():
    config = dataclasses.replace(LLAMA, hidden_size=64, vocab_size=512, norm_offset=1.0, tied=False)
    params = build(config).init(jax.random.key(0))
    np.testing.assert_allclose(params["embed"]["tokens"].std(), 0.02, rtol=0.05)
    np.testing.assert_allclose(params["layers"]["attention"]["query"]["kernel"].std(), 0.02, rtol=0.05)
    np.testing.assert_allclose(params["layers"]["mlp"]["down"]["kernel"].std(), 0.02 / 4**0.5, rtol=0.05)
    assert not params["final_norm"]["scale"].any()  # the gain is 1 + scale
    first, second = params["layers"]["mlp"]["up"]["kernel"]
    assert jnp.any(first != second)


@pytest.mark.slow
def test_seeds_can_be_vmapped():
    """Many small models at once, gradients included, as one batched program."""
    model, params, _ = make("llama")
    ids, segments = batch(row(A, 1), row(B, 2))
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), params)

    def loss(params):
        cache = model.apply(params, ids[:, :3], segments[:, :3], cache=init_cache(LLAMA, 2, 6)).cache
        return model.apply(params, ids[:, 3:], segments[:, 3:], cache=cache).hidden[0, 1].sum()

    losses, gradients = jax.jit(jax.vmap(jax.value_and_grad(loss)))(many)
    np.testing.assert_allclose(losses[0], jax.jit(loss)(params), rtol=1e-4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_equal_configs_compile_once():
    traces = 0

    @functools.partial(jax.jit, static_argnums=0)
    def forward(apply, params, ids, segments):
        nonlocal traces
        traces += 1
        return apply(params, ids, segments).hidden

    _, params, _ = make("llama")
    for _ in range(3):
        again = dataclasses.replace(LLAMA)
        assert build(again) is build(LLAMA)
        forward(build(again).apply, params, *PADDED)
    assert traces == 1


@pytest.mark.parametrize(
    ("layers", "remat", "unroll", "loops"),
    [
        (8, "dots", None, 0),
        (8, "full", None, 1),
        (8, "full", 8, 0),
        (8, "dots", 1, 1),
        (9, "dots", None, 1),
        (9, "none", 9, 0),
    ],
)
def test_a_shallow_model_has_no_loop_over_layers(layers, remat, unroll, loops):
    """Nothing is stacked for the backward pass then."""
    model = build(dataclasses.replace(LLAMA, num_layers=layers, remat=remat, unroll=unroll))
    params = jax.eval_shape(model.init, jax.random.key(0))

    def loss(params):
        return model.apply(params, *PADDED).hidden.sum()

    assert jax.jit(loss).lower(params).as_text().count("stablehlo.while") == loops


@pytest.mark.slow
def test_full_rematerialisation_saves_memory_in_a_shallow_model():
    """Temporaries of a gradient: the layers' inputs are kept, not what is inside."""

    def temporaries(remat):
        model = build(dataclasses.replace(LLAMA, num_layers=8, remat=remat))
        params, ids = jax.eval_shape(model.init, jax.random.key(0)), jnp.ones((8, 128), jnp.int32)
        gradient = jax.grad(lambda params: model.apply(params, ids, ids).hidden.sum())
        return jax.jit(gradient).lower(params).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("full") < temporaries("none") / 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads=3"),
        ({"rotary_dim": 3}, "3 rotated"),
        ({"windows": (1, 2, 3)}, "windows has 3 entries"),
        ({"rope_of_layer": (0, 1)}, "rope_of_layer"),
        ({"unroll": 4}, "unroll=4"),
        ({"unroll": 0}, "unroll=0"),
    ],
)
def test_impossible_configs_say_why(change, words):
    with pytest.raises(ValueError, match=words):
        build(dataclasses.replace(LLAMA, **change))
