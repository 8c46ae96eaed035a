"""What compiled programs cost, counted from their HLO, against numbers worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from rljax import sharding
from rljax.plan import costs, estimate, hlo, topologies


@functools.cache
def slice_of(name: str):
    pytest.importorskip("libtpu")
    return topologies.machine(name)


PLATFORMS = ["cpu", "tpu"]


def compiled(function, *shapes, platform="cpu"):
    device = jax.devices("cpu")[0] if platform == "cpu" else slice_of("v5e:2x2").devices[0]
    place = SingleDeviceSharding(device)
    args = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]
    return hlo.parse(jax.jit(function).lower(*args).compile().as_text())


def flops(function, *shapes, platform="cpu", loops=None):
    return costs.count(compiled(function, *shapes, platform=platform), loops).flops


F32, BF16 = jnp.float32, jnp.bfloat16


@pytest.mark.parametrize("platform", PLATFORMS)
def test_products_in_nested_scans_count_once_a_round(platform):
    """3 rounds of 7 layers, each a product [128 256] · [256 256]; and one more behind the loops."""

    def layers(x, weights, last):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        def again(x, _):
            return jax.lax.scan(layer, x, weights)[0], None

        return jax.lax.scan(again, x, None, length=3)[0] @ last

    shapes = ((128, 256), F32), ((7, 256, 256), F32), ((256, 512), F32)
    expected = 2 * 128 * 256 * 256 * 7 * 3 + 2 * 128 * 256 * 512
    assert flops(layers, *shapes, platform=platform) == expected
    assert compiled(layers, *shapes, platform=platform)  # XLA's own analysis sees one round:
    own = jax.jit(layers).lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile().cost_analysis()
    assert own["flops"] < expected / 5


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_gradient_of_a_scan(platform):
    """Forward, and for each layer the gradients of its input and of its weights."""

    def loss(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

    counted = flops(jax.grad(loss, argnums=(0, 1)), ((128, 256), F32), ((5, 256, 256), F32), platform=platform)
    assert counted == 3 * 5 * 2 * 128 * 256 * 256


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("equation", ["bhqd,bhkd->bhqk", "bhqk,bhkd->bhqd", "bqhd,bkhd->bhqk", "btd,dhk->bthk"])
def test_batched_products(platform, equation):
    """TPUs write them as convolutions with dilated windows."""
    size = {"b": 4, "h": 8, "q": 128, "k": 256, "d": 64, "t": 96}
    left, right = (tuple(size[axis] for axis in part) for part in equation.split("->")[0].split(","))
    counted = flops(lambda x, y: jnp.einsum(equation, x, y), (left, BF16), (right, BF16), platform=platform)
    assert counted == 2 * np.prod([size[axis] for axis in set(equation) - set(",->")])


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_loop_that_data_end_runs_as_often_as_its_scope_says(platform):
    def write(x, w):
        with jax.named_scope("decode"):
            return jax.lax.while_loop(lambda x: jnp.any(x > 0), lambda x: x @ w, x)

    shapes, once = (((128, 128), F32), ((128, 128), F32)), 2 * 128**3
    assert flops(write, *shapes, platform=platform, loops={"decode": 10}) == 10 * once
    blind = costs.count(compiled(write, *shapes, platform=platform))
    assert blind.flops == once
    assert len(blind.unknown) == 1
    assert blind.unknown[0].endswith("decode/while")


@pytest.mark.parametrize(("first", "end", "step"), [(3, 10, 1), (0, 1, 1), (-4, 4, 1), (2, 21, 3), (12, 2, -2)])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_loops_that_count_in_their_own_way(platform, first, end, step):
    def loop(x, w):
        def going(carry):
            return carry[0] < end if step > 0 else carry[0] > end

        return jax.lax.while_loop(going, lambda carry: (carry[0] + step, jnp.tanh(carry[1] @ w)), (first, x))[1]

    counted = flops(loop, ((128, 128), F32), ((128, 128), F32), platform=platform)
    assert counted == len(range(first, end, step)) * 2 * 128**3


def test_of_branches_the_dearer_one_counts():
    def choose(x, w, going):
        return jax.lax.cond(going, lambda x: x @ w @ w, lambda x: x, x)

    assert flops(choose, ((128, 128), F32), ((128, 128), F32), ((), jnp.bool_)) == 2 * 2 * 128**3


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_scan_reads_the_slice_of_a_stack_that_it_uses(platform):
    """16 layers of 1 MiB: all weights once, not the whole stack in each round."""

    def run(x, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

    counted = costs.count(compiled(run, ((8, 512), F32), ((16, 512, 512), F32), platform=platform)).bytes
    stack = 16 * 512 * 512 * 4
    assert stack <= counted < 3.5 * stack  # read, and where the slice is copied first, written and read again


NESTED = """
%layer (stack: f32[28,512]) -> f32[512] {
  %stack = f32[28,512]{1,0} parameter(0)
  %taken = f32[1,512]{1,0} slice(%stack), slice={[3:4], [0:512]}
  ROOT %flat = f32[512]{0} bitcast(%taken)
}

%same (whole: f32[512]) -> f32[512] {
  %whole = f32[512]{0} parameter(0)
  ROOT %again = f32[512]{0} bitcast(%whole)
}

%product (a: f32[28,512], b: f32[512]) -> f32[512] {
  %a = f32[28,512]{1,0} parameter(0)
  %b = f32[512]{0} parameter(1)
  %one = f32[512]{0} fusion(%a), kind=kLoop, calls=%layer
  %other = f32[512]{0} fusion(%b), kind=kLoop, calls=%same
  ROOT %times = f32[512]{0} multiply(%one, %other)
}

ENTRY %main (x: f32[28,512], y: f32[512]) -> f32[512] {
  %x = f32[28,512]{1,0} parameter(0)
  %y = f32[512]{0} parameter(1)
  ROOT %z = f32[512]{0} fusion(%x, %y), kind=kLoop, calls=%product
}
"""


def test_a_fusion_within_a_fusion_reads_what_it_takes():
    """A layer of a stack, another array through a fusion that changes nothing, and the result: 2,048 bytes each."""
    assert costs.count(hlo.parse(NESTED)).bytes == 3 * 512 * 4


def test_kernels_say_what_they_cost():
    line = (
        '  ROOT %k = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call", '
        'backend_config={"custom_call_config":{"cost_estimate":{"flops":"1234","bytes_accessed":"9"}}}'
    )
    module = hlo.parse(f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %p = f32[8]{{0}} parameter(0)\n{line}\n}}\n")
    assert costs.count(module).flops == 1234


# --- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{{0,1},{2,3}}", [[0, 1], [2, 3]]),
        ("{}", [[0, 1, 2, 3]]),
        ("[2,2]<=[4]", [[0, 1], [2, 3]]),
        ("[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2] {'a','b'}", [[0, 1, 2, 3]]),
        ("mesh['a'=4] {'a':(1)2}", [[0, 2], [1, 3]]),
        ("mesh['a'=4] {'a':(2)2}", [[0, 1], [2, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
    ],
)
def test_groups_in_every_form(written, expected):
    attributes = f", channel_id=1, replica_groups={written}, dimensions={{0}}, use_global_device_ids=true"
    found = hlo.groups(attributes, 4)
    assert sorted(map(sorted, found.tolist())) == expected


def test_pairs_of_a_permutation():
    assert hlo.groups(", source_target_pairs={{0,1},{1,0},{2,3}}", 4).tolist() == [[0, 1], [1, 0], [2, 3]]


# --- collectives ------------------------------------------------------------------------------------------------------


def by_hand(x):
    """f32[128 128] on a device: 64 KiB into each of these."""
    x = jax.lax.psum(x, "data")
    y = jax.lax.all_gather(x, "tensor", axis=0, tiled=True)  # [256 128]
    y = jax.lax.psum_scatter(y * 2, "fsdp", scatter_dimension=0, tiled=True)  # puts 128 KiB in
    return jax.lax.ppermute(y, "tensor", [(0, 1), (1, 0)])  # [128 128]


EXPECTED = {  # bytes that a device sends
    ("all-reduce", "data"): 2 * 65536 * 1 / 2,
    ("all-gather", "tensor"): 65536 * 1,
    ("reduce-scatter", "fsdp"): 131072 * 1 / 2,
    ("collective-permute", "tensor"): 65536,
}


@pytest.mark.parametrize("name", ["here", "v5e:2x4", "tpu7x:2x2x1", "2xv5e:2x2"])
def test_collectives_and_their_axes(name):
    """On tpu7x they run on cores of their own, and between slices they are transfers through the host."""
    machine = topologies.machine(None) if name == "here" else slice_of(name)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, devices=machine.devices[:8])
    everywhere = P(("data", "fsdp", "tensor"))
    mapped = jax.shard_map(by_hand, mesh=mesh, in_specs=everywhere, out_specs=everywhere)
    x = jax.ShapeDtypeStruct((8 * 128, 128), F32, sharding=NamedSharding(mesh, everywhere))
    module = hlo.parse(jax.jit(mapped).lower(x).compile().as_text())
    assert costs.uncounted(module) == ()
    found = estimate.exchanges(costs.count(module).collectives, mesh, machine.chip)
    sent = {(one.kind, one.axes): one.bytes for one in found}
    if name != "here" and ("reduce-scatter", "fsdp") not in sent:  # TPUs may add up everywhere and then slice
        assert sent.pop(("all-reduce", "fsdp")) == 2 * EXPECTED["reduce-scatter", "fsdp"]
        sent["reduce-scatter", "fsdp"] = EXPECTED["reduce-scatter", "fsdp"]
    assert sent == EXPECTED
    assert all(one.count == 1 for one in found)
    assert [one.axes for one in found if one.dcn] == (["data"] if name == "2xv5e:2x2" else [])


def reduced(machine, **sizes):
    """What an all-reduce of 1 MiB over data costs on a machine."""
    mesh = sharding.make_mesh(**sizes, devices=machine.devices)
    one = costs.Collective("all-reduce", 2**20, _over(mesh, 0), "")
    (found,) = estimate.exchanges(((one, 1.0),), mesh, machine.chip)
    return found


def _over(mesh, axis):
    """replica_groups over an axis, as HLO writes them."""
    ids = np.moveaxis(np.arange(mesh.size).reshape(mesh.devices.shape), axis, -1).reshape(-1, mesh.devices.shape[axis])
    return f"replica_groups={{{','.join('{' + ','.join(map(str, group)) + '}' for group in ids)}}}"


def test_between_slices_the_data_center_network_counts():
    """4 devices a slice, all of them on data: first within a slice, then a quarter each between the two."""
    inside, between = reduced(slice_of("v5e:2x2"), data=4, fsdp=1), reduced(slice_of("2xv5e:2x2"), data=8, fsdp=1)
    assert inside.dcn == 0
    assert inside.bytes == 2 * 2**20 * 3 / 4
    assert between.bytes == 2 * 2**20 * 3 / 4 + 2 * 2**20 * 1 / 2 / 4
    assert between.dcn == pytest.approx(2**20 / 4 / (25e9 / 8))


def test_links_of_the_torus():
    """16 × 16 chips of v5e: rings along both sides, so four links of 50 GB/s; along one side two of them."""
    machine = slice_of("v5e:16x16")
    everywhere, side = reduced(machine, data=256, fsdp=1), reduced(machine, data=16, fsdp=16)
    assert everywhere.ici == pytest.approx(2 * 2**20 * 255 / 256 / 200e9)
    assert side.ici == pytest.approx(2 * 2**20 * 15 / 16 / 100e9)
    assert reduced(slice_of("v5e:4x4"), data=4, fsdp=4).ici == pytest.approx(2 * 2**20 * 3 / 4 / 50e9)  # no ring


def test_what_is_no_module():
    with pytest.raises(ValueError, match="no HLO module"):
        hlo.parse("nothing of the kind")
