"""Meshes, rules, and that where arrays live changes nothing about what is computed. Eight fake devices."""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from rljax import sampling, sharding
from rljax.models import RULES, ModelConfig, build, reward_model
from tests import tiny

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_positions=16,
    tied=False,
)


def test_mesh_takes_the_devices_that_are_left():
    mesh = sharding.make_mesh()
    assert dict(mesh.shape) == {"data": 1, "fsdp": 8, "tensor": 1, "context": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert dict(sharding.make_mesh(data=2, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2, "context": 1}
    assert dict(sharding.make_mesh(data=-1, fsdp=1).shape)["data"] == 8
    assert sharding.make_mesh(fsdp=1).size == 1  # a part of the machine


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": 16, "fsdp": 1}, {"data": -1}, {"tensor": 0}, {"fsdp": -2}])
def test_impossible_meshes_say_their_numbers(sizes):
    with pytest.raises(ValueError, match=str(next(iter(sizes.values())))):
        sharding.make_mesh(**sizes)


def test_rules_reach_params_moments_and_abstract_trees():
    params = jax.eval_shape(reward_model(build(CONFIG)).init, jax.random.key(0))
    state = jax.eval_shape(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)).init, params)
    specs, moments = sharding.specs(params, RULES), sharding.specs(state, RULES)
    assert specs["model"]["embed"]["tokens"] == P("tensor", "fsdp")
    assert specs["model"]["unembed"]["kernel"] == P("fsdp", "tensor")
    assert specs["model"]["layers"]["attention"]["out"]["kernel"] == P(None, "tensor", None, "fsdp")
    assert specs["head"]["bias"] == P()
    assert moments[1][0].mu == moments[1][0].nu == specs
    assert moments[1][0].count == P()


def test_the_first_rule_wins_and_a_leaf_without_one_is_named():
    tree = {"layers": {"up": {"kernel": jnp.zeros((2, 4))}}, "step": jnp.zeros(())}
    rules = [("up/kernel$", P("data")), ("kernel$", P("tensor"))]
    assert sharding.specs(tree, rules) == {"layers": {"up": {"kernel": P("data")}}, "step": P()}
    with pytest.raises(ValueError, match=r"'layers/up/kernel' with shape \(2, 4\)"):
        sharding.specs(tree, [("down", P())])


def test_factored_moments_are_replicated():
    params = {"mlp": {"up": {"kernel": jnp.zeros((2, 256, 256))}}}
    state = optax.adafactor(1e-3).init(params)
    specs = sharding.specs(state, RULES)
    assert all(spec == P() for spec in jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)))


def test_a_dimension_that_does_not_divide_is_replicated():
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    tree = {"embed": {"tokens": jax.ShapeDtypeStruct((30, 16), jnp.float32)}}
    placed = sharding.shardings(tree, RULES, mesh)
    assert placed["embed"]["tokens"].spec == P(None, "fsdp")
    with pytest.raises(ValueError, match="'tensr'"):
        sharding.shardings(tree, [("tokens", P("tensr"))], mesh)


def test_batches_are_split_by_rows_and_tokens():
    mesh = sharding.make_mesh(data=2, fsdp=2, context=2)
    batch = {"ids": jnp.zeros((4, 6)), "many": jnp.zeros((4, 3, 6)), "margin": jnp.zeros(4), "kl": jnp.zeros(())}
    specs = {name: place.spec for name, place in sharding.batch_shardings(batch, mesh).items()}
    rows = ("data", "fsdp")
    assert specs == {"ids": P(rows, "context"), "many": P(rows, None, "context"), "margin": P(rows), "kl": P()}
    with pytest.raises(ValueError, match=r"'ids' with shape \(6, 4\)"):
        sharding.batch_shardings({"ids": jnp.zeros((6, 4))}, mesh)


def test_constrain_does_nothing_without_a_mesh_and_pins_with_one():
    x = jnp.arange(24.0).reshape(4, 6)
    assert sharding.constrain(x, "data", None) is x
    mesh = sharding.make_mesh(data=2, tensor=4, fsdp=1)
    with jax.set_mesh(mesh):
        pinned = jax.jit(lambda x: sharding.constrain(x, ("data", "fsdp"), "tensor"))(x)
    np.testing.assert_array_equal(pinned, x)
    assert pinned.sharding.shard_shape(x.shape) == (2, 6)  # 6 columns are not divided by 4


@functools.cache
def packed_rows():
    """A model, packed and padded rows, a loss with its logits, and what one device makes of them."""
    model = build(CONFIG)
    params = model.init(jax.random.key(0))
    ids = jax.random.randint(jax.random.key(1), (8, 12), 0, 64)
    segments = jnp.array([[1] * 12, [0] * 3 + [1] * 4 + [2] * 5, [0] * 12, [1] * 6 + [0] * 6] * 2)

    def loss(params, ids, segments):
        logits = model.unembed(params, model.apply(params, ids, segments).hidden)
        return jnp.where(segments > 0, jax.nn.logsumexp(20 * logits, axis=-1), 0).mean(), logits

    step = jax.value_and_grad(loss, has_aux=True)
    return params, (ids, segments), step, jax.jit(step)(params, ids, segments)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "pinned"),
    [
        ({"data": 2, "tensor": 2}, True),
        ({"data": 2, "tensor": 2}, False),
        ({"fsdp": 8}, True),
        ({"fsdp": 4, "context": 2}, True),
    ],
)
def test_every_mesh_computes_the_same(sizes, pinned):
    """Logits and gradient on one device and on eight, with and without a mesh set for `constrain`."""
    params, tokens, step, ((_, expected), expected_gradient) = packed_rows()
    mesh = sharding.make_mesh(**sizes)
    places = sharding.shardings(params, RULES, mesh)
    placed = jax.device_put(params, places), *jax.device_put(tokens, sharding.batch_shardings(tokens, mesh))
    with jax.set_mesh(mesh) if pinned else contextlib.nullcontext():
        (_, logits), gradient = jax.jit(step, out_shardings=(None, places))(*placed)
    real = (tokens[1] > 0)[..., None]
    np.testing.assert_allclose(np.where(real, logits, 0), np.where(real, expected, 0), atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, expected_gradient)
    assert all(jax.tree.leaves(jax.tree.map(lambda leaf, place: leaf.sharding == place, gradient, places)))


@pytest.mark.slow
@pytest.mark.parametrize("gather", [8.0, 0.0])
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 2, "context": 2}])
def test_a_mesh_writes_the_same(sizes, gather):
    """Tokens and log-probabilities of one device, whether the weights are gathered once or at every token."""
    mesh, prompts = sharding.make_mesh(**sizes), tiny.tokens(8, 8)
    settings = {"max_new_tokens": 6, "gather": gather}
    one = sampling.generate(tiny.model(), tiny.params(), prompts, jax.random.key(0), **settings)
    params = jax.device_put(tiny.params(), sharding.shardings(tiny.params(), RULES, mesh))
    placed = jax.device_put(prompts, sharding.batch_shardings(prompts, mesh))
    with jax.set_mesh(mesh):
        many = sampling.generate(tiny.model(), params, placed, jax.random.key(0), **settings)
    np.testing.assert_array_equal(many.tokens.ids, one.tokens.ids)
    np.testing.assert_allclose(many.logps, one.logps, atol=1e-5)


def test_weights_are_gathered_where_there_is_room():
    """The limit is on bytes of a device, in the dtype of the products; what fsdp does not split stays as it is."""
    mesh, params = sharding.make_mesh(fsdp=4, tensor=2), tiny.params()
    places = sharding.shardings(params, RULES, mesh)
    needed = 2 * sum(
        math.prod(place.shard_shape(x.shape)) * (4 if "fsdp" in place.spec else 1)
        for x, place in zip(jax.tree.leaves(params), jax.tree.leaves(places), strict=True)
    )
    with jax.set_mesh(mesh):
        for limit, dtype in ((needed, jnp.bfloat16), (needed - 1, jnp.float32)):
            make = functools.partial(sharding.gathered, rules=RULES, dtype="bfloat16", limit=limit)
            out = jax.eval_shape(make, params)
            assert out["layers"]["mlp"]["up"]["kernel"].dtype == dtype
            assert out["final_norm"]["scale"].dtype == jnp.float32
