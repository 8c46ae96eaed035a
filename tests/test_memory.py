"""What a run keeps in memory: the table of docs/scaling.md against the compiler and against the arrays of real runs."""

import functools
import json
import pathlib
import re
from typing import Any, ClassVar

import jax
import pytest

from rljax import losses, offline, online, presets, program, rewards, sharding, tracking
from rljax import plan as planning
from rljax.offline import set_up as offline_set_up
from rljax.online_setup import set_up as online_set_up
from rljax.plan import estimate, programs
from rljax.plan.configs import describe
from tests import compiler
from tests.distributed import cases

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 2,
}


@rewards.on_device
def short(tokens):
    return -tokens.mask.sum(1) / 6


def judged(prompts, completions):
    return [-len(completion) / 6 for completion in completions]


DPO = functools.partial(offline.Preference, loss=functools.partial(losses.dpo_loss, beta=0.1))
# The rows of the table, by their first column.
RUNS = {
    "SFT": offline.SFT,
    "reward model": offline.RewardModel,
    "DPO": DPO,
    "DPO, `--no-cache-reference`": functools.partial(DPO, cache_reference=False),
    "the same, `--offload-reference`": functools.partial(DPO, cache_reference=False, offload_reference=True),
    "DPO, `--dtype bfloat16`": functools.partial(DPO, dtype="bfloat16"),
    "Dr. GRPO": functools.partial(presets.dr_grpo, reward=judged, group=2),
    "GRPO": functools.partial(presets.grpo, reward=judged, group=2, kl_loss=0.04),
    "GRPO, `--offload-reference`": functools.partial(
        presets.grpo, reward=judged, group=2, kl_loss=0.04, offload_reference=True
    ),
    "PPO": functools.partial(presets.ppo_huang2024, reward=judged, minibatches=1),
    "PPO, `--critic shared`": functools.partial(presets.ppo_huang2024, reward=judged, minibatches=1, critic="shared"),
    "PPO, `--ema 0.99`": functools.partial(presets.ppo_huang2024, reward=judged, minibatches=1, ema=0.99),
}
SMALL: dict[str, Any] = {"data": "none.jsonl", "batch": 8, "max_prompt": 8, "max_completion": 8}


def table():
    """{first column: (all that stands, gradient)} of the table in the documentation, bytes per parameter."""
    text = (ROOT / "docs" / "scaling.md").read_text()
    part = text[text.index("### Bytes per parameter") : text.index("## Attention")]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in part.splitlines() if line[:1] == "|"]
    (head, _, *rest) = rows
    assert head[-2:] == ["standing", "gradient"]
    for row in rest:
        assert sum(int(cell) for cell in row[1:-2] if cell) == int(row[-2]), row
    return {row[0]: (int(row[-2]), int(row[-1])) for row in rest}


def test_the_table_has_all_rows():
    assert list(table()) == list(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_the_table_says_what_the_compiler_says(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    run = RUNS[name](model=str(tmp_path), **SMALL)
    mesh = program.make_mesh(run, jax.devices()[:1])
    made = programs.programs(run, mesh, describe(run.model))
    count = sum(x.size for x in jax.tree.leaves(made.held.get("parameters", made.held.get("policy"))))
    standing, gradient = table()[name]
    assert sum(map(estimate.on_device, made.held.values())) / count == pytest.approx(standing, rel=0.01)
    if name in ("DPO, `--no-cache-reference`", "DPO, `--dtype bfloat16`", "PPO, `--critic shared`"):
        update = made.programs[-1]
        with jax.set_mesh(mesh):
            memory = update.function.lower(*update.args).compile().memory_analysis()
        # The update reads the state and the batch, and writes the state in place.
        state = standing - (0 if name.startswith("DPO, `--d") else 4)
        assert memory.argument_size_in_bytes / count == pytest.approx(state, rel=0.02)
        assert memory.alias_size_in_bytes / count == pytest.approx(state, rel=0.02)
        assert memory.temp_size_in_bytes / count > gradient


@pytest.mark.long
def test_temporaries_on_a_tpu_are_a_gradient_and_a_copy_in_bfloat16(tmp_path):
    """Of a model large enough that what a layer needs is little beside it: 0.98 billion parameters on four chips."""
    wide = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 16}
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | wide))
    plan = planning.plan(DPO(model=str(tmp_path), **SMALL), planning.machine("v5p:2x2x1", None))
    (update,) = plan.blocks
    each = update.memory["temporaries"] * 4 / plan.parameters
    assert 6 < each < 8


def metrics(folder):
    kept = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not re.search("second|time|/s$", name)} for row in kept]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["dpo", "whole"])
def test_weights_that_wait_in_host_memory_change_no_bit(kind, small, tmp_path):
    run = {
        "dpo": functools.partial(DPO, data=cases.pairs(tmp_path), cache_reference=False),
        "whole": functools.partial(presets.grpo, data=cases.prompts(tmp_path), reward=short, group=2, kl_loss=0.04),
    }[kind]
    sizes = SMALL | {"steps": 2, "max_prompt": 32, "eval_rows": 4, "eval_every": 2, "save_every": 2, "samples": 0}
    del sizes["data"]
    for name, away in (("device", False), ("host", True)):
        experiment = run(model=str(small), out=str(tmp_path), name=name, offload_reference=away, checks=False, **sizes)
        (offline if kind == "dpo" else online).run(experiment)
    assert metrics(tmp_path / "device") == metrics(tmp_path / "host")
    assert len(metrics(tmp_path / "host")) > 2


@pytest.mark.parametrize("name", ["SFT", "DPO", "the same, `--offload-reference`", "Dr. GRPO", "GRPO", "PPO"])
def test_no_weights_are_alive_that_the_table_does_not_know(name, stories, tmp_path, monkeypatch):
    """After everything is set up but for the compiler, of a real checkpoint."""
    compiler.leave_out(monkeypatch)
    data = cases.texts if name == "SFT" else cases.prompts if "PO" in name and "DPO" not in name else cases.pairs
    settings = SMALL | {"data": data(tmp_path), "eval_rows": 2, "max_prompt": 32}
    run = RUNS[name](model=str(stories), out=str(tmp_path), **settings)
    mesh = program.make_mesh(run, jax.devices()[:1])
    before = {id(x) for x in jax.live_arrays()}
    with jax.set_mesh(mesh), tracking.Tracker(tmp_path / "log", total_steps=1, tensorboard=False) as tracker:
        if hasattr(run, "group"):
            kept: Any = online_set_up(run, mesh, tmp_path, tracker, tracking.Stop(lambda step, wanted: wanted))
        else:
            kept = offline_set_up(run, mesh, tmp_path, tracker)
        alive = [x for x in jax.live_arrays() if id(x) not in before and x.sharding.memory_kind != "pinned_host"]
        state = kept.learner.train if hasattr(kept, "learner") else kept.state
    decoder = state.params.get("policy", state.params)
    count = sum(x.size for x in jax.tree.leaves(decoder))
    assert sum(x.nbytes for x in alive) / count == pytest.approx(table()[name][0], rel=0.02)


def test_devices_without_host_memory_are_an_error(monkeypatch):
    class Device:
        def addressable_memories(self):
            return []

        def __str__(self):
            return "Toaster(0)"

    class Sharding:
        device_set: ClassVar = {Device()}

    class Array:
        sharding = Sharding()

    with pytest.raises(ValueError, match=r"Toaster\(0\) cannot reach pinned host memory"):
        sharding.in_host_memory([Array()])
