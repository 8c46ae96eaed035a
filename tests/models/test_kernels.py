"""Attention by kernels equals attention by XLA: splash interpreted on the CPU, and both compiled for their devices.

Tolerance: float32 to 1e-5 of the largest value, gradients alike; bfloat16 as close to float32 as XLA's own.
"""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import sharding
from rljax.logprobs import token_logps
from rljax.models import RULES, build, init_cache, kernels, share_prompts
from rljax.models.attention import attend, biases, count_positions, visible
from rljax.models.cache import lengthen
from rljax.plan import costs, hlo, topologies
from rljax.types import Tokens
from tests.models.test_transformer import VARIANTS

LENGTH = 300  # three blocks of 128 with some to fill up


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernels, "LARGEST", 128)


def rows():
    """i32[4 LENGTH]: left and right padding, packed documents, a full row, and one that is all padding."""
    segments = np.zeros((4, LENGTH), np.int32)
    segments[0, 40:290] = 1
    segments[1, :90], segments[1, 90:150], segments[1, 150:280] = 1, 2, 3
    segments[2] = 1
    return jnp.asarray(segments)


def tensors(queries, keys, *, heads=4, groups=2, size=16, dtype=jnp.float32):
    draw = functools.partial(jax.random.normal, dtype=jnp.float32)
    shapes = (4, heads, queries, size), (4, groups, keys, size), (4, groups, keys, size)
    return [
        draw(key, shape).astype(dtype)
        for key, shape in zip(jax.random.split(jax.random.key(0), 3), shapes, strict=True)
    ]


def by_xla(query, key, value, queries, keys, *, scale, softcap, window):
    seen = visible(queries, keys, keys.shape[1] - queries.shape[1])
    whole = count_positions(visible(keys, keys))
    bias = biases((window,), seen, whole[:, -queries.shape[1] :], whole)[0]
    return attend(query, key, value, bias, scale=scale, softcap=softcap)


def compared(fn, args, real, **how):
    """(values and gradients of a weighted sum) over real tokens."""

    def loss(*args):
        out = jnp.where(real[:, None, :, None], fn(*args, **how), 0).astype(jnp.float32)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape))), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*args)
    return [np.asarray(x, np.float32) for x in (out, *gradients)]


def close(ours, theirs, tolerance=1e-5):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


CASES = [
    pytest.param(LENGTH, 4, None, 0, id="causal"),
    pytest.param(LENGTH, 1, 1.5, 130, id="window-softcap"),
    pytest.param(100, 2, None, 150, id="offset-window"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "groups", "softcap", "window"), CASES)
def test_splash_is_the_attention_of_xla(queries, groups, softcap, window):
    keys = rows()
    how = {"scale": 0.3, "softcap": softcap, "window": window}
    args = *tensors(queries, LENGTH, groups=groups), keys[:, -queries:], keys
    real = args[3] > 0
    ours = compared(functools.partial(kernels.attend, "splash"), args, real, **how)
    theirs = compared(by_xla, args, real, **how)
    assert np.abs(theirs[0]).max() > 0.5
    assert all(np.isfinite(x).all() for x in ours)
    close(ours, theirs)


MESHES = [
    {"data": 2, "fsdp": 1, "tensor": 2, "context": 2},
    pytest.param({"fsdp": 2, "tensor": 4}, marks=pytest.mark.long),  # twice as many as key heads
    pytest.param({"fsdp": 8}, marks=pytest.mark.long),  # twice as many as rows
    {"fsdp": 1, "context": 8},  # each has 128 queries: most of them fill up, and are further than a window from a token
]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_mesh_does_not_change_it(sizes):
    devices = jax.devices()[: np.prod(list(sizes.values()))]
    how, segments = {"scale": 0.3, "softcap": None, "window": 130}, rows()
    args = *tensors(LENGTH, LENGTH), segments, segments
    with jax.set_mesh(sharding.make_mesh(**sizes, devices=devices)):
        ours = compared(functools.partial(kernels.attend, "splash"), args, segments > 0, **how)
    close(ours, compared(by_xla, args, segments > 0, **how))


@pytest.mark.slow
def test_splash_in_bfloat16_is_as_exact_as_xla():
    how, segments = {"scale": 0.25, "softcap": None, "window": 0}, rows()
    args = *tensors(LENGTH, LENGTH, dtype=jnp.bfloat16), segments, segments
    exact = compared(by_xla, [x.astype(jnp.float32) for x in args[:3]] + [segments, segments], segments > 0, **how)
    ours = compared(functools.partial(kernels.attend, "splash"), args, segments > 0, **how)
    theirs = compared(by_xla, args, segments > 0, **how)
    for x, a, b in zip(exact, ours, theirs, strict=True):
        assert np.linalg.norm(a - x) <= 1.5 * np.linalg.norm(b - x) < 0.02 * np.linalg.norm(x)


# --- models -----------------------------------------------------------------------------------------------------------


def model_of(name, kernel, **how):
    config = dataclasses.replace(VARIANTS[name], max_positions=LENGTH, attention=kernel, **how)
    if config.windows:
        config = dataclasses.replace(config, windows=(70, 0))
    return build(config)


def trained(model, mesh=None):
    """(loss, hidden states, gradients) of rows of documents."""
    segments = rows()
    ids = jax.random.randint(jax.random.key(1), segments.shape, 1, 60)
    params = jax.tree.map(lambda x: 10 * x if x.ndim > 2 else x, build(model.config).init(jax.random.key(0)))

    def loss(params):
        hidden = jnp.where(segments[..., None] > 0, model.apply(params, ids, segments).hidden, 0)
        return jnp.sin(hidden * 3).sum(), hidden

    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        (value, hidden), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return [np.asarray(x) for x in (value, hidden, *jax.tree.leaves(gradients))]


@pytest.mark.long
def test_a_model_is_the_same_with_splash_on_a_mesh():
    """Two layers, one with a window, and a soft cap, rematerialised: loss, hidden states and gradients."""
    theirs = trained(model_of("gemma", "xla"))
    mesh = sharding.make_mesh(fsdp=2, tensor=2, context=2)
    ours = trained(model_of("gemma", "splash", remat="dots"), mesh)
    assert np.abs(theirs[1]).max() > 1
    close(ours, theirs, 2e-5)


@pytest.mark.slow
def test_reading_prompts_into_a_cache_is_the_same_with_splash():
    """The cache is as long as the prompts, so that it holds all that they see; the next token sees it by XLA."""
    segments = rows()
    ids = jax.random.randint(jax.random.key(1), segments.shape, 1, 60)

    def read(kernel):
        model = model_of("gemma", kernel)
        params = jax.tree.map(lambda x: 10 * x if x.ndim > 2 else x, model.init(jax.random.key(0)))

        def whole(params):
            cache = init_cache(model.config, 4, LENGTH, capacity=LENGTH + 1)
            out = model.apply(params, ids, segments, cache=cache)
            later = model.apply(params, ids[:, :1], segments[:, -1:], cache=lengthen(out.cache)).hidden
            return jnp.where(segments[..., None] > 0, out.hidden, 0), jnp.where(segments[:, -1:, None] > 0, later, 0)

        kernels_run = str(jax.make_jaxpr(whole)(params)).count("pallas_call")
        return [np.asarray(x) for x in jax.jit(whole)(params)], kernels_run

    (theirs, none), (ours, some) = read("xla"), read("splash")
    assert none == 0
    assert some >= model_of("gemma", "splash").config.num_layers
    assert np.abs(theirs[1]).max() > 1
    close(ours, theirs, 2e-5)


@pytest.mark.long
def test_shared_prompts_are_the_same_with_splash():
    """Two groups of three completions; windows reach back from completions into prompts, which are padded in front."""
    prompt, own, n = 180, 120, 3
    segments = np.zeros((6, prompt + own), np.int32)
    for row, (start, end) in enumerate([(60, 300), (60, 230), (60, 190), (0, 280), (0, 0), (0, 300)]):
        segments[row, start:end] = 1
    ids = np.random.default_rng(0).integers(1, 60, segments.shape)
    ids[:, :prompt] = np.repeat(ids[::n, :prompt], n, axis=0)
    mask = (segments > 0) & (np.arange(prompt + own) >= prompt)
    tokens = Tokens(ids=jnp.asarray(ids), segments=jnp.asarray(segments), mask=jnp.asarray(mask))

    def found(kernel, share):
        model = model_of("gemma", kernel)
        params = jax.tree.map(lambda x: 5 * x if x.ndim > 2 else x, model.init(jax.random.key(0)))
        model = share_prompts(model, n=n, completion=own) if share else model
        weights = jnp.arange(1.0, 7.0)[:, None]

        def loss(params):
            logps = token_logps(model, params, tokens, max_trained=own)
            return jnp.sum(weights * logps), logps

        (_, logps), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return [np.asarray(x) for x in (logps, *jax.tree.leaves(gradients))]

    theirs = found("xla", False)
    assert np.abs(theirs[0]).max() > 3
    close(found("splash", True), theirs, 2e-5)


def test_no_scores_and_no_bias_are_held():
    model, segments = model_of("gemma", "splash"), rows()

    def traced(model):
        return str(jax.make_jaxpr(model.apply)(model.init(jax.random.key(0)), segments, segments))

    assert "f32[2,4,1,300,300]" in traced(model_of("gemma", "xla"))
    assert not re.search(r"f32\[[\d,]*300,300\]", traced(model))


@pytest.mark.slow
def test_a_cache_is_read_by_xla():
    """Decoding, and reading the prompt before it, is the same to the last bit."""
    ids = jax.random.randint(jax.random.key(2), (2, 300), 1, 60)

    def read(kernel):
        model = model_of("llama", kernel)
        params = model.init(jax.random.key(0))
        return model.apply(params, ids, jnp.ones_like(ids), cache=init_cache(model.config, 2, 301)).hidden

    np.testing.assert_array_equal(read("splash"), read("xla"))


# --- which one --------------------------------------------------------------------------------------------------------

BF16 = dataclasses.replace(VARIANTS["llama"], compute_dtype="bfloat16")


@pytest.mark.parametrize(
    ("platform", "change", "length", "chosen"),
    [
        ("cpu", {}, 1024, "xla"),
        ("tpu", {}, 1024, "splash"),
        ("tpu", {}, 128, "xla"),
        ("tpu", {"attention": "xla"}, 1024, "xla"),
        ("tpu", {"attention": "splash"}, 128, "splash"),
        ("tpu", {"attention_softcap": 30.0, "windows": (64, 0)}, 1024, "splash"),
        ("tpu", {"compute_dtype": "float32"}, 1024, "xla"),
        ("gpu", {}, 1024, "cudnn"),
        ("gpu", {"compute_dtype": "float32"}, 1024, "xla"),
        ("gpu", {"attention_softcap": 30.0}, 1024, "xla"),
        ("gpu", {"head_dim": 10}, 1024, "xla"),
        ("gpu", {"head_dim": 512}, 1024, "xla"),
        ("gpu", {}, 1023, "xla"),
    ],
)
def test_the_platform_and_the_case_choose(monkeypatch, platform, change, length, chosen):
    monkeypatch.setattr(kernels, "platform", lambda: platform)
    monkeypatch.setattr(kernels, "_generation", lambda: 9.0)
    assert kernels.choose(dataclasses.replace(BF16, **change), length, length) == chosen


@pytest.mark.parametrize(
    ("platform", "change", "message"),
    [
        ("gpu", {"attention": "splash"}, "runs on TPUs"),
        ("tpu", {"attention": "splash", "compute_dtype": "float32"}, "compute_dtype is float32"),
        ("tpu", {"attention": "cudnn"}, "needs NVIDIA GPUs of compute capability 8.0"),
        ("gpu", {"attention": "cudnn", "compute_dtype": "float32"}, "compute_dtype is float32"),
        ("gpu", {"attention": "cudnn", "attention_softcap": 30.0}, "no soft cap"),
        ("gpu", {"attention": "cudnn", "head_dim": 12}, "head_dim is 12"),
    ],
)
def test_a_kernel_that_cannot_says_why(monkeypatch, platform, change, message):
    monkeypatch.setattr(kernels, "platform", lambda: platform)
    monkeypatch.setattr(kernels, "_generation", lambda: 9.0)
    with pytest.raises(ValueError, match=rf"attention='{change['attention']}' cannot be used here: .*{message}"):
        kernels.choose(dataclasses.replace(BF16, **change), 1024, 1024)


def test_other_gpus_keep_xla(monkeypatch):
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    assert kernels._generation() == 0  # as of the CPUs here
    assert kernels.choose(BF16, 1024, 1024) == "xla"


def test_key_heads_are_repeated_where_the_mesh_splits_more_heads():
    assert kernels.key_copies(32, 8, 8) == kernels.key_copies(9, 3, 1) == 1
    assert kernels.key_copies(32, 8, 16) == 2
    assert kernels.key_copies(12, 6, 4) == 2  # lcm: twelve, three for each of the four
    assert kernels.key_copies(9, 3, 2) == 1  # all of them everywhere


# --- compiled for what is not here ------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(("unroll", "times"), [pytest.param(1, 1, id="loop"), pytest.param(None, 2, id="no loop")])
def test_compiled_for_a_tpu_no_scores_are_held(monkeypatch, unroll, times):
    """The gradient of two layers on four chips, each with a row of 1,024 tokens: three kernels, which a plan counts."""
    pytest.importorskip("libtpu")
    monkeypatch.setattr(kernels, "LARGEST", 512)
    mesh = sharding.make_mesh(devices=topologies.machine("v5e:2x2").devices, fsdp=4)
    sizes = {"hidden_size": 256, "num_layers": 2, "num_heads": 8, "num_kv_heads": 4, "head_dim": 128}
    model = build(dataclasses.replace(BF16, **sizes, remat="dots", unroll=unroll))
    params = jax.eval_shape(model.init, jax.random.key(0))
    placed = sharding.shardings(params, RULES, mesh)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, placed)
    ids = jax.ShapeDtypeStruct((4, 1024), jnp.int32, sharding=jax.NamedSharding(mesh, jax.P("fsdp")))

    def loss(params, ids):
        return model.apply(params, ids, ids).hidden.astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(loss)).lower(params, ids).compile().as_text()
    assert not re.search(r"\[(\d+,)*(4|8),1024,1024\]", text)
    module = hlo.parse(text)
    found = [one for part in module.computations.values() for one in part.values() if one.opcode == "custom-call"]
    phases = [re.search("splash_mha_(fwd|dkv|dq)", one.scope) for one in found]
    expected = sorted(["fwd", "dkv", "dq"] * times)  # "dots" does not compute it twice
    assert sorted(phase[1] for phase in phases if phase) == expected
    # In blocks of 512, three of four are computed. Two products forward; dkv four, dq three.
    attention = 2 * 2 * (2 + 4 + 3) * (0.75 * 1024**2) * 8 * 128
    others = costs.count(hlo.parse(text.replace("scores_", ""))).flops
    assert costs.count(module).flops - others == attention


def on_gpus(monkeypatch, generation=9.0):
    monkeypatch.setattr(kernels, "platform", lambda: "gpu")
    monkeypatch.setattr(kernels, "_generation", lambda: generation)


@pytest.mark.parametrize("sizes", [None, {"fsdp": 2, "tensor": 2, "context": 2}], ids=str)
def test_lowered_for_a_gpu_the_call_is_cudnns(monkeypatch, sizes):
    """Two windows, forward and gradient; the forward call is kept and not made again."""
    on_gpus(monkeypatch)
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91300)
    config = dataclasses.replace(BF16, windows=(64, 0), remat="dots", max_positions=512)
    model, ids = build(config), jnp.ones((4, 512), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0))

    def loss(params):
        return model.apply(params, ids, ids).hidden.astype(jnp.float32).sum()

    with contextlib.nullcontext() if sizes is None else jax.set_mesh(sharding.make_mesh(**sizes)):
        text = jax.jit(jax.value_and_grad(loss)).trace(params).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @__cudnn\$fmhaScaleBiasSoftmax(Backward)?\(", text)
    assert calls.count("") == calls.count("Backward")
    assert len(calls) in (4, 8)  # a branch for each window, in one function of both layers or (jax 0.12) in each layer
    assert not re.search(r"tensor<[\dx]*512x512xf32>", text)


@pytest.mark.parametrize(("queries", "groups", "softcap", "window"), [case for case in CASES if not case.values[2]])
def test_what_cudnn_is_asked_for_is_the_attention_of_xla(monkeypatch, queries, groups, softcap, window):
    """Its mask, layout and windows, computed by JAX's own implementation of the same call."""
    asked = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **how: asked(*a, **how | {"implementation": "xla"}))
    keys = rows()
    args = *tensors(queries, LENGTH, groups=groups), keys[:, -queries:], keys
    how = {"scale": 0.3, "softcap": None, "window": window}
    ours = compared(functools.partial(kernels.attend, "cudnn"), args, args[3] > 0, **how)
    close(ours, compared(by_xla, args, args[3] > 0, **how))


def test_cudnns_products_are_counted():
    """Two of its scores forward, five backward; causal ones are half of them."""
    shape = "bf16[2,512,4,64]{3,2,1,0}"
    said = '"intermediate_tensor_shape":{"tuple_shapes":[],"dimensions":["2","4","512","512"]},"mask_type":'

    def count(kind, mask):
        call = f'{shape} custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax{kind}", backend_config={{'
        lines = [
            "ENTRY %main () -> bf16[] {",
            f"  %q = {shape} parameter(0)",
            f'  ROOT %c = {call}{said}"{mask}"}}',
            "}",
        ]
        return costs.count(hlo.parse("\n".join(lines))).flops

    scores = 2 * 4 * 512 * 512 * 64
    assert count("", "NO_MASK") == 2 * 2 * scores
    assert count("", "CAUSAL") == 2 * scores
    assert count("Backward", "CAUSAL") == 5 * scores
