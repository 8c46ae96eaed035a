"""Plans against bytes and operations worked out by hand, and against what a run really compiles."""

import collections
import dataclasses
import functools
import json
import os
import pathlib
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental import topologies as jax_topologies

from rljax import cli, data, losses, offline, online_setup, presets, program, rewards, sampling, sharding, tracking
from rljax import plan as planning
from rljax.models import unstack
from rljax.plan import costs, estimate, hlo, meshes, programs, topologies
from tests import compiler

ROOT = pathlib.Path(__file__).parent.parent
LLAMA_3_8B = {  # as published
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 128001,
}
LLAMA_3_70B = LLAMA_3_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
SMALL = LLAMA_3_8B | {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}


def write(folder, config, experiment):
    """An experiment file beside the config.json that it names; its path."""
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "experiment.py"
    file.write_text(
        f"import functools\nfrom rljax import losses, offline, presets\nMODEL = {str(folder)!r}\n{experiment}\n"
    )
    return file


DPO = """
experiment = offline.Preference(model=MODEL, data="none.jsonl", loss=functools.partial(losses.dpo_loss, beta=0.1),
    batch=256, max_prompt=512, max_completion=512, remat="full")"""
PPO = """
def length(prompts, completions):
    return [len(text) for text in completions]

experiment = presets.ppo_huang2024(model=MODEL, data="none.jsonl", reward=length, batch=512, minibatches=1, epochs=1,
    max_prompt=512, max_completion=512, remat="full")"""

# The kernel's own count: that of `getrusage` begins with what the parent held when it forked.
PEAK = r"""
import json, pathlib, re, sys
from rljax import cli
status = cli.main(sys.argv[1:])
peak = int(re.search(r"VmHWM:\s*(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"status": status, "rss": peak}))
"""


def planned(file, *options):
    """(the only plan, peak bytes of the process) of the command line, in a process of its own as a user has it."""
    pytest.importorskip("libtpu")
    command = [sys.executable, "-c", PEAK, "plan", str(file), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900, check=True)
    plan, last = done.stdout.strip().splitlines()
    assert json.loads(last)["status"] == 0, done.stderr
    return json.loads(plan)[0], json.loads(last)["rss"]


def weights(c):
    """(parameters that the mesh splits, those of norms, which it does not; of a decoder with unembedding)."""
    d, layers, head = c["hidden_size"], c["num_hidden_layers"], c["hidden_size"] // c["num_attention_heads"]
    attention = 2 * d * d + 2 * d * c["num_key_value_heads"] * head
    split = layers * (attention + 3 * d * c["intermediate_size"]) + 2 * c["vocab_size"] * d
    return split, (2 * layers + 1) * d


# --- large models -----------------------------------------------------------------------------------------------------


def assert_is_dpo(plan, c, chips):
    """A plan of `DPO` with a row for each chip is what is worked out by hand."""
    (update,) = plan["blocks"]
    split, norms = weights(c)
    assert plan["parameters"] == split + norms
    held = 4 * (split // chips + norms)
    assert update["memory"]["parameters"] == held
    assert "initial weights" not in update["memory"]  # cached log-probabilities stand for them
    assert update["memory"]["optimizer"] == 2 * held + 2 * 4  # two moments, two counters
    # One row a chip, of a prompt and both completions: 1536 tokens. A backward pass costs twice a forward one; all but
    # the last product of a layer is computed again for it, and of the unembedding too.
    tokens, depth = 512 + 2 * 512, c["num_hidden_layers"]
    down = depth * c["hidden_size"] * c["intermediate_size"]
    embeddings = c["vocab_size"] * c["hidden_size"]
    layers = split - 2 * embeddings
    scores = depth * 2 * (512 * 512 + 2 * 512 * 1024) * c["hidden_size"]  # queries · keys, weights · values
    # The kernel of attention computes its scores twice forward and, in its two parts, with seven products backward.
    expected = 2 * ((4 * layers - down) * tokens + (2 + 7 / 2) * scores + 4 * embeddings * 2 * 512)
    assert update["flops"] == pytest.approx(expected, rel=0.01)
    # Weights are gathered in bfloat16, forward and backward, keys' and values' apart.
    gathered = {one["axes"]: one["bytes"] for one in update["exchange"] if one["kind"] == "all-gather"}
    keys = depth * 2 * c["hidden_size"] * c["num_key_value_heads"] * 128
    assert gathered["fsdp"] >= 2 * 2 * (layers - keys) * (chips - 1) / chips
    assert gathered["fsdp"] <= 2 * 2 * (split + 4 * embeddings)
    assert plan["fits"]
    assert update["needed"] == sum(update["memory"].values())
    assert update["seconds"]["compute"] == update["flops"] / 197e12
    return held, update


@pytest.mark.long
def test_dpo_of_llama_3_8b_on_256_chips(tmp_path):
    plan, rss = planned(write(tmp_path, LLAMA_3_8B, DPO), "--topology", "v5e:16x16")
    held, update = assert_is_dpo(plan, LLAMA_3_8B, 256)
    assert plan["parameters"] == 8_030_261_248
    assert held < 130e6  # a replicated matrix would show: the smallest has 16.8 MB
    assert update["needed"] < 7 * 2**30
    assert update["binding"] == "compute"
    assert update["step"] == update["seconds"]["compute"]
    assert rss < 4 * 2**30


@pytest.mark.long
def test_ppo_of_70_billion_on_2048_chips(tmp_path):
    """Policy, critic and reference, 280 GB each in float32, and 1.1 TB of moments: planned in a few GB."""
    mesh = "--topology", "v5p:8x16x16", "--mesh.fsdp", "512", "--mesh.tensor", "4"
    plan, rss = planned(write(tmp_path, LLAMA_3_70B, PPO), *mesh)
    assert [block["name"] for block in plan["blocks"]] == ["sampler", "notes (reference, values)", "update"]
    split, norms = weights(LLAMA_3_70B)
    assert plan["parameters"] == split + norms == 70_553_706_496
    held = 4 * (split // 2048 + norms)
    update = plan["blocks"][2]
    head = 4 * (LLAMA_3_70B["hidden_size"] + 1)  # of the critic, in float32
    assert update["memory"]["policy"] == update["memory"]["reference"] == held
    assert update["memory"]["critic"] == held + head
    assert update["memory"]["optimizer"] == 2 * (2 * held + head) + 2 * 4
    assert plan["fits"]
    assert {one["axes"] for one in update["exchange"]} >= {"fsdp", "tensor"}
    assert rss < 8 * 2**30


@pytest.mark.long
def test_what_does_not_fit_says_by_how_much(tmp_path, capsys):
    pytest.importorskip("libtpu")
    file = write(tmp_path, LLAMA_3_8B, DPO)
    assert cli.main(["plan", str(file), "--topology", "v5e:2x4", "--batch", "64"]) == 1
    said = capsys.readouterr().out
    found = re.search(r"does not fit: needs ([\d.]+) GiB of 15.75 GiB, ([\d.]+) GiB over", said)
    assert found
    needed, over = map(float, found.groups())
    assert over == pytest.approx(needed - 15.75, abs=0.02)
    split, norms = weights(LLAMA_3_8B)
    assert needed > 4 * 4 * (split / 8 + norms) / 2**30


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (18.36G) exceeds "
         "available HBM (15.75G).", 18.36 * 2**30),
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 31.20G of "
         "15.75G hbm. Exceeded hbm capacity by 15.45G.", 31.2 * 2**30),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 512.0MiB.", 512 * 2**20),
        ("RESOURCE_EXHAUSTED: Allocation (size=51539607552) would exceed memory (size=17179869184) :: %s1 = inlined",
         48 * 2**30),
        ("INVALID_ARGUMENT: no such thing", None),
    ],
)  # fmt: skip
def test_the_compilers_words_are_understood(message, needed):
    assert estimate.needed_bytes(message) == (None if needed is None else pytest.approx(needed))


# --- the run's own programs -------------------------------------------------------------------------------------------


def bare(lowered):
    """The operations of a lowered program with their shapes, counted; without names and numbers of values, which follow
    from what was traced before, and without what is said of axes of one device and of scalars that are everywhere.
    """
    text = re.sub(r'"(data|context)"(, )?', "", lowered.as_text()).replace(", }", "}")
    text = re.sub(r"\n *sdy.mesh @empty_mesh .*", "", text).replace("@empty_mesh", "@mesh")
    text = re.sub(r"( \{)?sdy.sharding = #sdy.sharding<@mesh, \[\]>,? ?|[{}]", "", text)
    return collections.Counter(re.sub(r"[%@]\w+(#\d+)?", "", text).splitlines())


def bare_hlo(text):
    """HLO without where it comes from, its names numbered in the order in which they come."""
    text = re.sub(r", metadata=\{[^}]*\}", "", text)
    text = re.sub(r"(?ms)^(FileNames|FunctionNames|FileLocations|StackFrames)$.*?^$", "", text)
    text = re.sub(r", entry_computation_layout=.*", "", text)
    numbers: dict[str, int] = {}
    named = r"(?<![\w.])([A-Za-z_][\w-]*)((?:\.\w+)+)"
    return re.sub(named, lambda name: f"{name[1]}.{numbers.setdefault(name[0], len(numbers))}", text)


def test_bare_text_is_still_a_program():
    text = jax.jit(lambda x: x @ x).lower(np.ones((8, 8), np.float32)).compile().as_text()
    assert "op_name" in text
    assert "op_name" not in bare_hlo(text)
    assert "dot(" in bare_hlo(text)
    assert any("dot_general" in line for line in bare(jax.jit(lambda x: x @ x).lower(np.ones((8, 8)))))


@pytest.fixture
def not_compiled(monkeypatch):
    """Two programs are compared without a compiler."""
    compiler.leave_out(monkeypatch)


@pytest.fixture
def story(small, tmp_path):
    rows = [
        {"prompt": "Once upon a time " * 8 + name, "chosen": " was happy.", "rejected": " was sad."}
        for name in "ABCD" * 6
    ]
    return {
        "model": str(small),
        "data": str(data.write_jsonl(tmp_path / "pairs.jsonl", rows)),
        "steps": 2,
        "batch": 8,
        "max_prompt": 32,
        "max_completion": 16,
        "mesh": functools.partial(sharding.make_mesh, fsdp=4, tensor=2),
        "out": str(tmp_path),
    }


def planned_here(run):
    """{name: its lowered program} of a plan for the devices of the tests."""
    mesh = program.make_mesh(run)
    made = programs.programs(run, mesh, planning.describe(run.model))
    with jax.set_mesh(mesh):
        return {one.name: one.function.lower(*one.args) for one in made.programs}


DPO_HERE = functools.partial(offline.Preference, loss=functools.partial(losses.dpo_loss, beta=0.1))
KINDS = {
    "dpo": DPO_HERE,
    "dpo, reference computed with every batch": functools.partial(DPO_HERE, cache_reference=False),
    "kto": offline.Unpaired,
    "reward": functools.partial(offline.RewardModel, microbatches=2),
    "sft": functools.partial(offline.SFT, packing=True),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.long if "computed" in kind else ()) for kind in KINDS]
)
def test_offline_plans_compile_what_a_run_compiles(kind, story, not_compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("RLJAX_CACHE", str(tmp_path / "cache"))
    if kind == "sft":
        texts = [{"text": "Once upon a time there was a cat. " * 9}] * 24
        story |= {"data": str(data.write_jsonl(tmp_path / "texts.jsonl", texts))}
    run = KINDS[kind](**story)
    mesh = program.make_mesh(run)
    with jax.set_mesh(mesh), tracking.Tracker(tmp_path / "log", total_steps=2, tensorboard=False) as tracker:
        setup = offline.set_up(run, mesh, tmp_path / "run", tracker)
        planned = planned_here(run)
        assert bare(planned["update"]) == bare(setup.update.lowered)


@pytest.mark.long
@pytest.mark.parametrize("on_device", [False, True])
def test_online_plans_compile_what_a_run_compiles(on_device, story, tmp_path):
    def length(prompts, completions):
        return [float(len(text)) for text in completions]

    def brief(tokens):
        return -tokens.mask.sum(1).astype("float32")

    reward = rewards.on_device(brief) if on_device else length
    changes = {"epochs": 2, "minibatches": 2, "temperature": 0.7, "group": 2}
    run = presets.ppo_huang2024(reward=reward, **story | changes)
    mesh = program.make_mesh(run)
    with (
        jax.set_mesh(mesh),
        tracking.graceful_stop() as stop,
        tracking.Tracker(tmp_path / "log", total_steps=2, tensorboard=False) as tracker,
    ):
        setup = online_setup.set_up(run, mesh, tmp_path / "run", tracker, stop)
    planned = planned_here(run)
    real = {"iteration": setup.whole} if on_device else {"sampler": setup.sampler.sample, "update": setup.learn}
    for name, compiled in real.items():
        assert bare_hlo(planned[name].compile().as_text()) == bare_hlo(compiled.as_text()), name


def test_reward_models_are_held_too(tmp_path):
    """A critic that starts from a reward model, and that model as the reward: planned from its config."""
    for name, architecture in (("policy", "LlamaForCausalLM"), ("judge", "LlamaForSequenceClassification")):
        (tmp_path / name).mkdir()
        write(tmp_path / name, SMALL | {"architectures": [architecture]}, "")
    judge, fixtures = str(tmp_path / "judge"), pathlib.Path(__file__).parent / "models" / "fixtures"
    encoder = rewards.from_checkpoint(str(fixtures / "encoder_roberta_classifier"), label="POSITIVE", name="mood")
    reward = rewards.from_checkpoint(judge), rewards.from_checkpoint("runs/to-come", name="later"), encoder
    run = presets.ppo_huang2024(model=str(tmp_path / "policy"), data="none.jsonl", reward=reward, critic=judge, batch=8)
    made = programs.programs(run, program.make_mesh(run), planning.describe(run.model))
    split, norms = weights(SMALL)
    no_output = split - SMALL["vocab_size"] * SMALL["hidden_size"]
    held = {name: estimate.on_device(tree) for name, tree in made.held.items()}
    assert held["policy"] == held["reference"] == 4 * (split // 8 + norms)
    head = 4 * (SMALL["hidden_size"] + 1)
    assert held["reward judge"] == 4 * (no_output // 8 + norms) + head
    assert held["critic"] == held["policy"] + head  # it reads with the policy's embedding and has its output matrix
    assert "the reward later is left out" in " ".join(made.notes)
    assert made.notes[-1] == "the reward mood, an encoder, judges texts between the programs: not counted"
    assert "reward mood" not in held
    assert [one.name for one in made.programs] == ["sampler", "notes (reference, values)", "update"]


def test_memory_at_hand_is_what_a_run_is_told(story, tmp_path):
    run = KINDS["sft"](**story)
    found = planning.plan(run, planning.machine(None))
    (update,) = found.blocks
    assert (found.devices, update.limit) == (8, topologies.machine(None).chip.memory)
    module = hlo.parse(planned_here(run)["update"].compile().as_text())
    held = sum(update.memory[name] for name in ("parameters", "optimizer", "batch"))
    assert held == pytest.approx(costs.parameter_bytes(module), rel=1e-3)


def test_the_target_decides_not_the_host(tmp_path, monkeypatch):
    """bfloat16 products, and layers that stay stacked while the sampler runs: for a TPU, planned on a CPU."""
    pytest.importorskip("libtpu")
    write(tmp_path, SMALL, "")
    run = presets.grpo(
        model=str(tmp_path), data="none.jsonl", reward=len, batch=8, group=2, max_prompt=64, max_completion=64
    )
    apart = []
    monkeypatch.setattr(sampling, "unstack", lambda params: apart.append(sharding.platform()) or unstack(params))

    def traced(devices):
        mesh = program.make_mesh(run, devices)
        made = programs.programs(run, mesh, planning.describe(run.model))
        sampler = next(one for one in made.programs if one.name == "sampler")
        assert sampler.loops == {"decode": 63}
        apart.clear()
        with jax.set_mesh(mesh):
            return sampler.function.trace(*sampler.args).jaxpr.pretty_print(use_color=False)

    assert "bf16[" in traced(planning.machine("v5e:2x2").devices)
    assert apart == []
    assert "bf16[" not in traced(None)
    assert set(apart) == {"cpu"}


# --- slices, models, searches -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "devices", "memory"),
    [
        ("v4:2x2x2", 8, 30.75),
        ("v5p:2x2x2", 8, 95.74),
        ("v6e:4x4", 16, 31.25),
        ("tpu7x:2x2x1", 8, 94.75),
        ("v5e:1x1", 1, 15.75),
        ("2xv5e:4x4", 32, 15.75),
        ("v5p:8x16x16", 2048, 95.74),
    ],
)
def test_slices(name, devices, memory):
    pytest.importorskip("libtpu")
    machine = planning.machine(name)
    assert (len(machine.devices), machine.name, machine.chip.memory / 2**30) == (devices, name, pytest.approx(memory))
    kinds = {device.device_kind for device in machine.devices}
    assert kinds == {kind for kind, known in topologies.KINDS.items() if known in name}
    assert sharding.make_mesh(data=-1, fsdp=1, devices=machine.devices).size == devices


def test_slices_lie_along_data():
    pytest.importorskip("libtpu")
    machine = planning.machine("v5e:4x4", 2)
    assert machine.name == "2xv5e:4x4"
    mesh = sharding.make_mesh(data=4, fsdp=-1, devices=machine.devices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert (slices == np.array([0, 0, 1, 1])[:, None, None, None]).all()
    with pytest.raises(ValueError, match="must be a multiple of 2"):
        sharding.make_mesh(data=1, devices=machine.devices)


@pytest.mark.parametrize(
    ("name", "slices", "message"),
    [
        ("v9:4x4", None, "there is no topology 'v9:4x4'.*v5e:16x16"),
        ("v5e", None, "there is no topology 'v5e'"),
        ("v5e:16", None, "has 1 sides, but slices of v5e have 2"),
        ("v5e:0x4", None, "of one chip or more"),
        ("v5e:9x9", None, "knows no slice v5e:9x9"),
        ("2xv5e:4x4", 3, "has 2 slices and slices=3"),
        ("v5e:4x4", 0, "slices=0 must be at least 1"),
        (None, 2, "are of a topology: name one"),
    ],
)
def test_wrong_names(name, slices, message):
    pytest.importorskip("libtpu")
    with pytest.raises(ValueError, match=message):
        planning.machine(name, slices)


def test_two_processes_may_plan_at_a_time():
    """The compiler's library lets one process of a machine have its chips, but none is needed."""
    pytest.importorskip("libtpu")
    assert len(planning.machine("v5e:2x2").devices) == 4
    again = "from jax.experimental import topologies as t; print(len(t.get_topology_desc('v5e:2x2', 'tpu').devices))"
    assert set(topologies.OFFLINE.items()) <= set(os.environ.items())  # which says so to the library
    done = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.stdout == "4\n", done.stderr


def test_without_the_compiler(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(jax_topologies, "get_topology_desc", None)
    assert cli.main(["plan", str(write(tmp_path, SMALL, DPO)), "--topology", "v5e:4x4"]) == 2
    assert 'pip install "jax[tpu]"' in capsys.readouterr().err


def test_only_a_config_is_needed(tmp_path):
    write(tmp_path, SMALL, "")
    folder = planning.describe(str(tmp_path))
    assert folder == planning.describe(str(tmp_path / "config.json"))
    assert folder.stop_ids == (128001,)
    assert folder.config.num_layers == 2
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"architectures": ["Mamba"]}))
    with pytest.raises(ValueError, match="unsupported architecture 'Mamba'"):
        planning.describe(str(tmp_path))
    with pytest.raises(ValueError, match="there is no folder 'nowhere'"):
        planning.describe("nowhere")


@pytest.mark.long
def test_a_search_ranks_what_fits(tmp_path, capsys):
    pytest.importorskip("libtpu")
    file = write(tmp_path, SMALL, DPO.replace("512", "64").replace("256", "8"))
    assert cli.main(["plan", str(file), "--topology", "v5e:2x2", "--search", "--tries", "3", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert len(plans) == 3
    assert len({(*plan["mesh"].values(), plan["microbatches"]) for plan in plans}) == 3
    steps = [plan["step"] for plan in plans]
    assert steps == sorted(steps)
    assert all(np.prod(list(plan["mesh"].values())) == 4 for plan in plans)
    assert cli.main(["plan", str(file), "--topology", "v5e:2x2", "--search", "--tries", "1"]) == 0
    assert re.search(r"--mesh\.fsdp \d+ .* update: \w+ .* fits", capsys.readouterr().out)


def test_a_search_tries_meshes_before_microbatches():
    def guess(fsdp, microbatches, seconds, needed=1.0):
        run = SimpleNamespace(mesh=functools.partial(sharding.make_mesh, fsdp=fsdp), microbatches=microbatches)
        return meshes.Guess(run, needed, seconds)

    large = guess(2, 1, 0.5, 1e15)  # does not fit
    good = [guess(1, 2, 1.0), guess(4, 1, 2.0), guess(1, 1, 1.0), large, guess(2, 2, 3.0)]
    found = meshes._in_order(good, topologies.CHIPS["v5e"])
    assert [(one.run.mesh.keywords["fsdp"], one.run.microbatches) for one in found] == [
        (1, 2),
        (4, 1),
        (2, 2),
        (1, 1),
        (2, 1),
    ]


def test_a_search_drops_what_cannot_be(tmp_path):
    write(tmp_path, SMALL | {"num_key_value_heads": 1}, "")
    run = offline.SFT(model=str(tmp_path), data="none.jsonl", batch=3, mesh=sharding.make_mesh)
    with pytest.raises(ValueError, match=r"no mesh of 8 devices is valid.*cannot be spread"):
        planning.search(dataclasses.replace(run, max_prompt=64, max_completion=64), planning.machine(None), tries=1)
    with pytest.raises(ValueError, match="of rljax's mesh, but this one is"):
        planning.search(dataclasses.replace(run, mesh=lambda: None), planning.machine(None), tries=1)


@pytest.mark.slow
def test_options_are_those_of_the_run(tmp_path, capsys):
    file = write(tmp_path, SMALL, DPO.replace("512", "64"))
    assert cli.main(["plan", str(file), "--batch", "12"]) == 2
    assert "cannot be spread over data×fsdp=8" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["plan", str(file), "--loss.betta", "1"])
    assert (
        cli.main(["plan", str(file), "--batch", "16", "--mesh.fsdp", "4", "--mesh.tensor", "2", "--microbatches", "2"])
        == 0
    )
    said = capsys.readouterr().out
    assert "mesh data=1 fsdp=4 tensor=2 context=1, microbatches=2" in said
    assert "fits" in said
