"""The compiled update and sampler, read as text, on five meshes of eight fake devices: what is split, what is sent.

The numbers are those that a mesh implies, so that a weight which is gathered once too often, an array that some device
holds whole, or a state that is copied fails here and not on a pod.
"""

import functools
import json
import math

import jax
import pytest

from rljax import losses, models, offline, plan, presets, program, sampling, sharding
from rljax.plan import costs, estimate, hlo, programs
from tests import tiny

LAYERS, VOCABULARY, HIDDEN, WIDE = 2, 1536, 64, 320
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}
MESHES = {
    "fsdp=8": {"fsdp": 8},
    "data=2 fsdp=4": {"data": 2, "fsdp": 4},
    "fsdp=4 tensor=2": {"fsdp": 4, "tensor": 2},
    "data=2 fsdp=2 tensor=2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp=2 context=2 tensor=2": {"fsdp": 2, "context": 2, "tensor": 2},
}
MARKS = {"data=2 fsdp=2 tensor=2": "slow"}  # the axes of all but the last, whose bounds are wider
PROMPT, COMPLETION, ROWS = 24, 24, 8
LARGE = 16_384  # bytes: no parameter, moment or logits array of this size is whole on any device


def length(prompts, completions):
    return [len(text) for text in completions]


def experiment(kind, folder, mesh):
    (folder / "config.json").write_text(json.dumps(LLAMA))
    common = {
        "model": str(folder),
        "data": "none.jsonl",
        "batch": ROWS,
        "max_prompt": PROMPT,
        "max_completion": COMPLETION,
        "remat": "full",
        "mesh": functools.partial(sharding.make_mesh, **mesh),
    }
    if kind == "dpo":
        return offline.Preference(loss=functools.partial(losses.dpo_loss, beta=0.1), **common)
    return presets.ppo_huang2024(reward=length, minibatches=1, epochs=1, **common)


class Made:
    """The compiled functions of an experiment on a mesh, by name, and the shapes that they were compiled for."""

    def __init__(self, kind, folder, sizes):
        run = experiment(kind, folder, sizes)
        self.mesh = program.make_mesh(run)
        made = programs.programs(run, self.mesh, plan.describe(run.model))
        self.programs = {one.name: one for one in made.programs if one.name in ("update", "sampler")}
        with jax.set_mesh(self.mesh):
            self.compiled = {name: one.function.lower(*one.args).compile() for name, one in self.programs.items()}
        self.modules = {name: hlo.parse(one.as_text()) for name, one in self.compiled.items()}

    def exchange(self, name):
        cost = costs.count(self.modules[name], self.programs[name].loops)
        found = estimate.exchanges(cost.collectives, self.mesh, plan.machine(None).chip)
        return {(one.kind, one.axes): one for one in found}


@functools.cache
def _made(kind, folder, mesh):
    return Made(kind, folder, MESHES[mesh])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


@pytest.fixture(params=[pytest.param(name, marks=getattr(pytest.mark, MARKS.get(name, "long"))) for name in MESHES])
def both(request, folder):
    """(DPO, PPO) on one of the meshes, compiled once for all tests of this file."""
    return _made("dpo", folder, request.param), _made("ppo", folder, request.param)


def weights(layers=LAYERS):
    """(of all layers, of an embedding): elements that fsdp and tensor split."""
    return layers * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * HIDDEN // 2 + 3 * HIDDEN * WIDE), VOCABULARY * HIDDEN


def bytes_over(made, name, kinds, axes):
    """What a device sends in collectives of these kinds over some of these axes and no others."""
    found = made.exchange(name).values()
    return sum(one.bytes for one in found if one.kind in kinds and set(one.axes.split("+")) <= set(axes))


def state_of(made):
    """Parameters and optimizer, as shapes with their shardings."""
    return [leaf for leaf in jax.tree.leaves(made.programs["update"].args[0]) if leaf.size > 1]


# --- memory -----------------------------------------------------------------------------------------------------------


def test_no_large_array_is_whole_on_a_device(both):
    """Every parameter and moment comes and goes in as many parts as fsdp and tensor make."""
    for made in both:
        ways = made.mesh.shape["fsdp"] * made.mesh.shape["tensor"]
        given, _ = made.compiled["update"].input_shardings
        left = made.compiled["update"].output_shardings[0]
        leaves = jax.tree.leaves(made.programs["update"].args[0])
        large = 0
        for leaf, before, after in zip(leaves, *map(jax.tree.leaves, (given[0], left)), strict=True):
            if math.prod(leaf.shape) * leaf.dtype.itemsize >= LARGE:
                large += 1
                assert math.prod(before.shard_shape(leaf.shape)) == leaf.size // ways, leaf.shape
                assert math.prod(after.shard_shape(leaf.shape)) == leaf.size // ways, leaf.shape
        assert large == 3 * 9 * (1 if made is both[0] else 2)  # weights and two moments, of each decoder


def test_logits_are_those_of_the_devices_own_rows_and_tokens(both):
    """Nothing as large as the logits of twice a device's share, in any part of the programs."""
    for made, name in ((both[0], "update"), (both[1], "update"), (both[1], "sampler")):
        shape = made.mesh.shape
        tensor, rows = shape["tensor"], 2 * ROWS // (shape["data"] * shape["fsdp"])
        arrays = {s for part in made.modules[name].computations.values() for one in part.values() for s in one.shapes}
        logits = [s for s in arrays if VOCABULARY in s.dims or VOCABULARY // 2 in s.dims]
        largest = max(math.prod(s.dims) for s in logits if HIDDEN not in s.dims and len(s.dims) > 1)
        assert largest <= rows * COMPLETION * VOCABULARY // tensor
        if name == "update":  # nor are the weights of all layers gathered at once
            assert not any(s.dims == (LAYERS, HIDDEN, WIDE) for s in arrays)


def test_the_state_is_updated_in_place(both):
    for made in both:
        held = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in state_of(made))
        assert held <= made.compiled["update"].memory_analysis().alias_size_in_bytes <= held + 64  # and counters


def test_the_host_has_no_part_in_it(both):
    for made in both:
        for module in made.modules.values():
            for one in (one for part in module.computations.values() for one in part.values()):
                assert one.opcode.removesuffix("-start") not in ("infeed", "outfeed", "send", "recv"), one
                assert "callback" not in one.attributes, one
                assert all(shape.space == 0 for shape in one.shapes), one


@pytest.mark.slow
def test_the_decoding_loop_of_a_tpu_copies_no_cache():
    """Compiled for eight chips: caches are copied into the loop, if at all, and never in it. (CPUs copy them on a mesh
    and not on one device.)
    """
    pytest.importorskip("libtpu")
    mesh = sharding.make_mesh(fsdp=4, tensor=2, devices=plan.machine("v5e:2x4").devices)
    params, prompts = tiny.params(), tiny.tokens(8, 8)
    places = sharding.shardings(params, models.RULES, mesh), sharding.batch_shardings(prompts, mesh)

    def shape(x, place):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

    @jax.jit
    def sample(params, prompts):
        return sampling.generate(tiny.model(), params, prompts, jax.random.key(0), max_new_tokens=5)

    with jax.set_mesh(mesh):
        made = sample.lower(*jax.tree.map(shape, (params, prompts), places)).compile()
    module = hlo.parse(made.as_text())
    inside = [one for name, part in module.computations.items() if name != module.entry for one in part.values()]
    cache = (2, 1, 8 + 5, 4)  # rows and heads of a device
    assert any(cache in [s.dims for s in one.shapes] for one in inside)
    assert not [one for one in inside if one.opcode.startswith("copy") and one.shapes[0].dims == cache]
    assert not [one for one in inside if one.opcode.startswith("all-gather")]  # nor is a weight gathered there


# --- exchange ---------------------------------------------------------------------------------------------------------


def test_weights_are_gathered_for_each_pass_and_no_more(both):
    """Layers forward and backward, embeddings once: (n − 1)/n of their bytes, over fsdp. On three axes the compiler of
    CPUs gathers two of a layer's weights once more.
    """
    for made, decoders in zip(both, (1, 2), strict=True):
        n, tensor = made.mesh.shape["fsdp"], made.mesh.shape["tensor"]
        layers, embedding = weights()
        implied = 4 * (n - 1) / n * (2 * decoders * layers + (decoders + 1) * embedding) / tensor
        again = 4 * (n - 1) / n * decoders * LAYERS * 2 * HIDDEN * WIDE / tensor
        sent = bytes_over(made, "update", ["all-gather"], ["fsdp"])
        three = sum(size > 1 for size in made.mesh.shape.values()) == 3
        assert implied <= sent <= 1.01 * (implied + (again if three else 0))
        count = made.exchange("update")["all-gather", "fsdp"].count
        least = decoders * (2 * 7 * LAYERS + 1) + 1  # weights of a layer in two passes, the embeddings
        assert least <= count <= least + (2 * decoders * LAYERS if three else 0) + 6  # and a few of tokens


def test_gradients_are_added_up_once(both):
    """2 (n − 1)/n of the bytes of all weights, as all-reduces: CPUs have no reduce-scatter."""
    for made, decoders in zip(both, (1, 2), strict=True):
        shape = made.mesh.shape
        n = shape["data"] * shape["fsdp"]
        layers, embedding = weights()
        elements = decoders * layers + (decoders + 1) * embedding
        implied = 2 * 4 * (n - 1) / n * elements / shape["tensor"]
        sent = bytes_over(made, "update", ["all-reduce", "reduce-scatter"], ["data", "fsdp"])
        assert 0.99 * implied <= sent <= 1.01 * implied


def test_activations_are_added_up_over_tensor(both):
    """Of a layer's tokens: attention and MLP forward, attention again, and five inputs of products backward."""
    made = both[0]
    shape = made.mesh.shape
    if shape["tensor"] == 1:
        assert not [axes for _, axes in made.exchange("update") if "tensor" in axes]
        return
    rows = ROWS // (shape["data"] * shape["fsdp"])
    tokens, trained = rows * (PROMPT + 2 * COMPLETION) // shape["context"], 2 * rows * COMPLETION // shape["context"]
    implied = 4 * HIDDEN * ((8 * LAYERS + 1) * tokens + trained)
    sent = bytes_over(made, "update", ["all-reduce", "reduce-scatter", "all-gather"], ["tensor"])
    split = shape["context"] > 1  # keys and values are whole there
    assert implied <= sent <= (2.2 if split else 1.01) * implied


def test_the_sampler_gathers_its_weights_once(both):
    """However many tokens it writes."""
    made = both[1]
    n, tensor = made.mesh.shape["fsdp"], made.mesh.shape["tensor"]
    layers, embedding = weights()
    assert bytes_over(made, "sampler", ["all-gather"], ["fsdp"]) == 4 * (n - 1) / n * (layers + 2 * embedding) / tensor
    assert made.exchange("sampler")["all-gather", "fsdp"].count == 7 + 2
