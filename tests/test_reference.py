"""Cached reference log-probabilities: found again when nothing that they depend on has changed, and only then."""

import contextlib
import dataclasses
import functools

import jax
import numpy as np
import pytest

from rljax import data, losses, offline, policy, program, reference, sharding

ROWS = [
    {"prompt": f"The {w} was", "chosen": " happy.", "rejected": " sad."} for w in ("cat", "dog", "bird", "car", "sun")
]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RLJAX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def start(stories):
    return policy.load(str(stories), dtype="float32")


def preference(**changes):
    mesh = functools.partial(sharding.make_mesh, fsdp=1)
    settings = {"model": "m", "data": "d", "batch": 2, "max_prompt": 8, "max_completion": 8, "mesh": mesh}
    return offline.Preference(loss=functools.partial(losses.dpo_loss, beta=0.1), **settings | changes)


def key(start, run=None, rows=ROWS):
    return reference._key(start, run or preference(), data.read(rows), False)


def rotated(config, **changes):
    return dataclasses.replace(config, ropes=tuple(dataclasses.replace(rope, **changes) for rope in config.ropes))


def test_the_key_has_all_that_they_depend_on(start, stories):
    first = key(start)
    config = start.model.config
    others = [
        rotated(config, theta=20_000.0),
        rotated(config, kind="linear", factor=2.0),
        dataclasses.replace(config, windows=(4,) * config.num_layers),
        dataclasses.replace(config, norm_eps=1e-3),
        dataclasses.replace(config, compute_dtype="bfloat16"),
        dataclasses.replace(config, attention="xla"),
    ]
    keys = [key(start._replace(model=start.model._replace(config=other))) for other in others]
    for change in (
        lambda t: setattr(t, "bos_token", "."),
        lambda t: setattr(t, "eos_token", "."),
        lambda t: setattr(t, "add_bos_token", True),
        lambda t: setattr(t, "chat_template", "{{ messages[0].content }}"),
        lambda t: t.add_tokens(["zzz"]),
    ):
        tokenizer = policy.load(str(stories), dtype="float32").tokenizer
        change(tokenizer)
        keys.append(key(start._replace(tokenizer=tokenizer)))
    keys += [key(start, preference(**{name: 4})) for name in ("batch", "max_prompt", "max_completion")]
    keys += [key(start, preference(share_prompts=False)), key(start, rows=ROWS[::-1]), key(start, rows=ROWS[:4])]
    keys.append(key(start._replace(params=jax.tree.map(lambda x: -x, start.params))))
    assert len({first, *keys}) == 1 + len(keys)
    for same in (dataclasses.replace(config, remat="full"), dataclasses.replace(config, unroll=1)):
        assert key(start._replace(model=start.model._replace(config=same))) == first


@pytest.mark.slow
def test_batches_in_flight_change_no_bit_and_damaged_files_are_made_again(start, tmp_path, monkeypatch, caplog):
    run, rows = preference(), data.read(ROWS)
    mesh = program.make_mesh(run)
    example = functools.partial(data.preference_example, tokenizer=start.tokenizer, max_prompt=8, max_completion=8)
    pairs = data.memoized(rows, example)

    def collate(indices):
        return data.collate_preference([pairs(i) for i in indices], 16, prompt=8)

    with jax.set_mesh(mesh):
        view = reference.view(start, run, mesh, lambda text: contextlib.nullcontext())
        one_by_one = [view.logps(*jax.tree.map(np.asarray, collate(i))) for i in data.eval_batches(5, 2)]
        expected = np.concatenate([np.asarray(each) for each in one_by_one], axis=1)[:, :5]
        found = view.cached_logps(rows, collate)
        np.testing.assert_array_equal(found, expected)
        (file,) = (tmp_path / "cache" / "reference").glob("*.npy")
        whole = file.read_bytes()
        for damage in (b"", whole[:40], whole[:-4]):
            file.write_bytes(damage)
            np.testing.assert_array_equal(view.cached_logps(rows, collate), expected)
            assert file.read_bytes() == whole
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("RLJAX_CACHE", str(tmp_path / "file"))
        np.testing.assert_array_equal(view.cached_logps(rows, collate), expected)
        assert "are not kept" in caplog.text
