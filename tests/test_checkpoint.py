"""Checkpoints: exact bits on any mesh, torn and foreign ones refused, full disks survived."""

import gc
import json
import logging
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rljax import types
from rljax.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parent.parent


def mesh(*shape):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, ("fsdp", "tensor"))


def make_state(seed=0, places=None):
    """A TrainState of every kind of leaf; NaN payloads, -0.0 and denormals included."""
    bits = np.random.default_rng(seed).integers(0, 2**32, (16, 8), dtype=np.uint32)
    params = {
        "embed": {"tokens": bits.view(np.float32)},
        "layers": {
            "kernel": jnp.asarray(bits.astype(np.uint16)[:8].view(jnp.bfloat16)),
            "bias": np.zeros((0, 4), np.float32),
        },
    }
    optimizer = (None, {"count": np.int32(seed), "mu": {"a": np.float16([1, -0.0])}}, np.array([True, False]))
    state = types.TrainState(step=jnp.int32(seed), params=params, opt_state=(optimizer, np.int8([-3])))
    return jax.tree.map(lambda leaf: jax.device_put(leaf, places), state)


def abstract(state, places=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places or x.sharding), state)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_bits_structure_and_extra_survive(tmp_path):
    state, extra = make_state(3), {"fingerprint": "abc", "best": 0.1, "patience": [1, None]}
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert checkpoints.latest() is None
        assert checkpoints.best() is None
        assert checkpoints.save(3, state, extra)
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert checkpoints.latest() == 3
        assert checkpoints.extra(3) == extra
        restored, back = checkpoints.restore(3, abstract(state))
    assert back == extra
    assert_same_bits(restored, state)


def test_random_keys_survive(tmp_path):
    state = {"key": jax.random.key(7), "keys": jax.random.split(jax.random.key(1), 3)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        restored, _ = checkpoints.restore(1, state)
    assert jax.random.normal(restored["key"]) == jax.random.normal(state["key"])
    assert restored["keys"].dtype == state["keys"].dtype
    np.testing.assert_array_equal(jax.random.key_data(restored["keys"]), jax.random.key_data(state["keys"]))


@pytest.mark.parametrize(("saved", "wanted"), [((1, 1), (4, 2)), ((4, 2), (2, 2)), ((8, 1), (1, 1)), ((2, 4), (8, 1))])
def test_restores_on_another_mesh(tmp_path, saved, wanted):
    def place(leaf, on):
        spec = ["fsdp", "tensor"] if leaf.ndim == 2 and leaf.shape[0] else []
        return NamedSharding(mesh(*on), PartitionSpec(*spec))

    state = jax.tree.map(lambda leaf: jax.device_put(leaf, place(leaf, saved)), make_state(1))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x, wanted)), state)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        restored, _ = checkpoints.restore(1, like)
    assert_same_bits(restored, state)
    for leaf, target in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
        assert leaf.sharding == target.sharding


def test_a_part_can_be_restored(tmp_path):
    state = make_state(2)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(2, state, {})
    with Checkpoints(tmp_path, keep=1, read_only=True) as checkpoints:
        part = types.TrainState(step=state.step, params=state.params, opt_state=None)
        restored, _ = checkpoints.restore(2, abstract(part), partial=True)
        assert_same_bits(restored, part)
        with pytest.raises(ValueError, match=r"opt_state.*is not here"):
            checkpoints.restore(2, abstract(part))


def test_training_goes_on_with_donated_buffers(tmp_path):
    """The save copies before it returns: overwriting the donated arrays at once changes nothing in it."""
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 1.5 + 1, s), donate_argnums=0)
    places = NamedSharding(mesh(4, 2), PartitionSpec("fsdp"))
    start = jnp.arange(1 << 18, dtype=jnp.float32)
    for placed in (places, jax.sharding.SingleDeviceSharding(jax.devices()[0])):
        state = {"w": jax.device_put(start, placed), "b": jnp.ones((8,), jnp.bfloat16)}
        expected = {}
        with Checkpoints(tmp_path / str(len(placed.device_set)), keep=9) as checkpoints:
            for index in range(4):
                expected[index] = jax.tree.map(lambda x: np.array(x, copy=True), state)
                checkpoints.save(index, state, {})
                for _ in range(3):
                    state = step(state)
            for index, value in expected.items():
                assert_same_bits(checkpoints.restore(index, abstract(state))[0], value)


def test_keeps_the_last_and_the_best(tmp_path):
    state = {"w": jnp.zeros(3)}
    losses = {1: 0.5, 2: 0.2, 3: 0.2, 4: float("nan"), 5: 0.9, 7: 0.8}
    with Checkpoints(tmp_path, keep=2, best_metric="eval/loss", best_mode="min") as checkpoints:
        for step in range(1, 8):
            metrics = {"eval/loss": losses[step], "other": 1.0} if step in losses else None
            checkpoints.save(step, state, {}, metrics)
        assert checkpoints.best() == 2  # the earliest of equals
    with Checkpoints(tmp_path, keep=2, best_metric="eval/loss", best_mode="min") as checkpoints:
        assert checkpoints.steps() == [2, 6, 7]
        assert (checkpoints.latest(), checkpoints.best()) == (7, 2)
        checkpoints.save(8, state, {}, {"eval/loss": 0.1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["7", "8"]
    with Checkpoints(tmp_path, keep=1, best_metric="eval/loss", best_mode="max") as checkpoints:
        assert checkpoints.best() == 7
        with pytest.raises(ValueError, match=r"best_metric='eval/loss'.*\['loss'\]"):
            checkpoints.save(9, state, {}, {"loss": 0.1})


def test_saving_a_step_twice(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.save(1, {"w": jnp.zeros(3)}, {})
        assert not checkpoints.save(1, {"w": jnp.zeros(3)}, {})
        with pytest.raises(ValueError, match="exists already and holds another state"):
            checkpoints.save(1, {"w": jnp.zeros(3).at[1].set(-0.0)}, {})


def test_saving_a_step_twice_keeps_what_was_last_said_of_it(tmp_path):
    """An evaluation that came late: extra and metrics are those of the second time; metrics are never lost."""
    ranked = {"keep": 1, "best_metric": "eval/loss", "best_mode": "min"}
    with Checkpoints(tmp_path, **ranked) as checkpoints:
        checkpoints.save(1, {"w": jnp.zeros(3)}, {"owed": True})
        assert checkpoints.best() is None
        assert not checkpoints.save(1, {"w": jnp.zeros(3)}, {"owed": False}, {"eval/loss": 0.5})
        assert checkpoints.best() == 1
        assert not checkpoints.save(1, {"w": jnp.zeros(3)}, {"owed": False, "draws": 2})
    with Checkpoints(tmp_path, **ranked) as checkpoints:
        assert checkpoints.extra(1) == {"owed": False, "draws": 2}
        assert checkpoints.best() == 1
        restored, _ = checkpoints.restore(1, {"w": jnp.zeros(3)})
        assert not restored["w"].any()


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"w": jnp.zeros((2, 4)), "n": jnp.int32(0)}, r"w is float32\[2, 3\] there and float32\[2, 4\] here"),
        (
            {"w": jnp.zeros((2, 3), jnp.bfloat16), "n": jnp.int32(0)},
            r"w is float32\[2, 3\] there and bfloat16\[2, 3\] here",
        ),
        ({"w": jnp.zeros((2, 3))}, r"n \(int32\[\] there\) is not here"),
        ({"w": jnp.zeros((2, 3)), "n": jnp.int32(0), "v": jnp.zeros(1)}, r"v \(float32\[1\] here\) is not there"),
    ],
)
def test_another_state_is_refused(tmp_path, like, message):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(5, {"w": jnp.ones((2, 3)), "n": jnp.int32(1)}, {})
        with pytest.raises(ValueError, match=message) as caught:
            checkpoints.restore(5, abstract(like))
    assert str(tmp_path / "5") in str(caught.value)
    assert "experiment.json" in str(caught.value)


def test_what_cannot_be_saved_is_said_at_once(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with pytest.raises(ValueError, match="extra of checkpoint 1 cannot be written as JSON"):
            checkpoints.save(1, {"w": jnp.zeros(1)}, {"path": pathlib.Path()})
        with pytest.raises(ValueError, match=r"layers\.w of the state is a float"):
            checkpoints.save(1, {"layers": {"w": 1.0}}, {})
        with pytest.raises(ValueError, match="has no checkpoint 1; it has: none"):
            checkpoints.restore(1, {"w": jnp.zeros(1)})
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="no folder of checkpoints"):
        Checkpoints(tmp_path / "missing", keep=1, read_only=True)


def test_reading_says_nothing(tmp_path, caplog):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(2)}, {})
    with caplog.at_level(logging.WARNING), Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.latest() == 1
    assert not caplog.text


KILLED = """
import sys, jax, jax.numpy as jnp
from rljax.checkpoint import Checkpoints
state = {"w": jnp.arange(4 << 20, dtype=jnp.float32), "n": jnp.int32(0)}
with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    for step in range(1, 10_000):
        checkpoints.save(step, {"w": state["w"] + step, "n": jnp.int32(step)}, {"step": step})
"""


@pytest.mark.slow
def test_killed_while_saving(tmp_path, caplog):
    """A real kill -9 with an unfinished checkpoint on disk: it is ignored with a notice, the one before it is whole."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], env=environment)
    deadline = time.monotonic() + 60
    try:
        while process.poll() is None and time.monotonic() < deadline:
            names = set(os.listdir(tmp_path))
            if len(names) > 2 and any("tmp" in name for name in names):
                break
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    whole = max(int(path.name) for path in tmp_path.iterdir() if path.name.isdecimal())
    (tmp_path / f"{whole + 1}.orbax-checkpoint-tmp").mkdir(exist_ok=True)  # it may just have been renamed
    like = {"w": jax.ShapeDtypeStruct((4 << 20,), jnp.float32), "n": jax.ShapeDtypeStruct((), jnp.int32)}
    with caplog.at_level(logging.WARNING, "rljax"), Checkpoints(tmp_path, keep=2) as checkpoints:
        assert "never finished" in caplog.text
        assert checkpoints.latest() == whole
        state, extra = checkpoints.restore(whole, like)
        assert extra == {"step": whole}
        assert int(state["n"]) == whole
        checkpoints.save(whole + 1, state, {})
    assert not any("tmp" in path.name for path in tmp_path.iterdir())


def damage(path, how):
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "empty":
        os.truncate(path, 0)
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0x10
        path.write_bytes(bytes(data))


def read_or_refuse(folder, like):
    try:
        with Checkpoints(folder, keep=2) as checkpoints:
            return checkpoints.restore(checkpoints.latest(), like)
    except ValueError as error:
        return error


# Orbax leaves its reading coroutines unfinished when one of them fails.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("how", ["delete", "truncate", "empty", "flip"])
def test_damage_is_never_restored_silently(tmp_path, how):
    """Whichever file of a finished step is damaged: the same bits come back, or an error with the step and the fix."""
    state = {
        "w": jax.random.normal(jax.random.key(0), (4096,)),
        "b": jnp.arange(5),
        "h": jnp.ones((3, 2), jnp.bfloat16),
    }
    with Checkpoints(tmp_path / "good", keep=2) as checkpoints:
        checkpoints.save(1, state, {"a": "b" * 50})
        checkpoints.save(2, state, {"a": "b" * 50})
    files = [
        path.relative_to(tmp_path / "good") for path in sorted((tmp_path / "good" / "2").rglob("*")) if path.is_file()
    ]
    refused = []
    for index, name in enumerate(files):
        folder = tmp_path / str(index)
        shutil.copytree(tmp_path / "good", folder)
        if not (folder / name).stat().st_size:
            continue
        damage(folder / name, how)
        outcome = read_or_refuse(folder, abstract(state))
        if isinstance(outcome, ValueError):
            refused.append(name.parts[1])
            assert str(folder / "2") in str(outcome)
            assert "elete" in str(outcome)
            shutil.rmtree(folder / "2")
            with Checkpoints(folder, keep=2) as checkpoints:
                assert checkpoints.latest() == 1
        else:
            assert_same_bits(outcome[0], state)
            assert how == "flip" or outcome[1] == {"a": "b" * 50}
        del outcome
    gc.collect()  # while the filter above holds
    assert {"state", "rljax"} <= set(refused) or how == "flip"
    assert "state" in refused


def test_other_bits_than_were_saved_are_noticed(tmp_path):
    """Even where the storage reads back without a complaint: here the record is of other bits, in one leaf."""
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"a": jnp.zeros(4), "b": jnp.arange(4)}, {})
    path = tmp_path / "1" / "rljax" / "metadata"
    record = json.loads(path.read_text())
    record["leaves"]["b"]["checksum"] ^= 1
    path.write_text(json.dumps(record))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        with pytest.raises(ValueError, match="b has other bits than were saved; so have 1 of 2 leaves"):
            checkpoints.restore(1, {"a": jnp.zeros(4), "b": jnp.arange(4)})
        assert checkpoints.restore(1, {"a": jnp.zeros(4)}, partial=True)[1] == {}


def test_an_interrupted_deletion_does_not_stop_a_run(tmp_path, caplog):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"w": jnp.zeros(1)}, {})
    shutil.rmtree(tmp_path / "1" / "rljax")
    with caplog.at_level(logging.WARNING, "rljax"), Checkpoints(tmp_path, keep=3) as checkpoints:
        assert "killed while deleting" in caplog.text
        assert checkpoints.steps() == [2, 3]
        checkpoints.save(4, {"w": jnp.zeros(1)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3", "4"]


def test_foreign_folders_are_refused(tmp_path):
    with ocp.CheckpointManager(tmp_path / "other") as manager:
        manager.save(7, args=ocp.args.StandardSave({"w": jnp.zeros(1)}))
    with pytest.raises(ValueError, match=r"7 is not a checkpoint of rljax"):
        Checkpoints(tmp_path / "other", keep=1)
    with pytest.raises(ValueError, match=r"holds things that rljax did not write \(.*_METADATA"):
        Checkpoints(tmp_path / "other" / "7" / "default", keep=1)
    assert (tmp_path / "other" / "7").is_dir()
    record = {"format": 99, "leaves": {}, "metrics": None, "extra": {}}
    (tmp_path / "newer" / "1" / "rljax").mkdir(parents=True)
    (tmp_path / "newer" / "1" / "rljax" / "metadata").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="not in the format"):
        Checkpoints(tmp_path / "newer", keep=1)


def test_a_full_disk_loses_nothing(tmp_path):
    """No file may grow over 1 MB for a while: the background error surfaces at the next call, older steps are safe."""
    small, large = {"w": jnp.arange(8.0)}, {"w": jax.random.normal(jax.random.key(0), (1 << 20,))}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, small, {})
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        try:
            checkpoints.save(2, large, {})  # only starts
            with pytest.raises(OSError, match=r"could not be written.*Make room.*untouched: 1\.") as caught:
                checkpoints.save(3, small, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "File too large" in str(caught.value)
        assert checkpoints.latest() == 1
        np.testing.assert_array_equal(checkpoints.restore(1, abstract(small))[0]["w"], small["w"])
        checkpoints.save(2, large, {})  # there is room again
        checkpoints.wait()
        assert checkpoints.steps() == [2]


def test_errors_of_the_last_save_surface_on_leaving(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {"w": jax.random.normal(jax.random.key(0), (1 << 20,))}

    def run(error=None):
        with Checkpoints(tmp_path / str(error), keep=1) as checkpoints:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
            checkpoints.save(2, large, {})
            if error:
                raise error

    for error, expected in ((None, OSError), (KeyError("the first error"), KeyError)):
        try:
            with pytest.raises(expected):
                run(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Checkpoints cannot be written to"):
        Checkpoints(tmp_path / "file" / "c", keep=1)
