"""Plans against bytes and operations worked out by hand, and against what a run really compiles."""

import collections
import functools
import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from rljax import cli, data, losses, offline, online_setup, presets, program, rewards, sharding, tracking
from rljax import plan as planning
from rljax.plan import estimate, programs
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
