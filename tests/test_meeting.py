"""Where several processes meet on the host, and whether a run's rows have positions: without a second process."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from rljax import distributed, hosts, losses, models, offline, policy, presets, program, selfchecks, sharding
from rljax.environments import number_guessing
from rljax.models import Rope, hf
from tests.models.make_fixtures import FOLDER


class Store:
    """The store of keys of two processes, in which the other one has said something; time flies."""

    def __init__(self, other):
        self.keys, self.deleted, self.asked = {f"{distributed.MET}{n}/1": text for n, text in other.items()}, [], 0

    def key_value_set(self, key, value):
        self.keys[key] = value

    def key_value_delete(self, key):
        self.deleted.append(key)

    def blocking_key_value_get(self, key, _):
        self.asked += 1
        if key not in self.keys:
            if self.asked > 3 and key.endswith("3/1"):
                self.keys[key] = "!late"
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: nobody said so")
        return self.keys[key]


@pytest.fixture
def store(monkeypatch):
    made = Store({0: "", 1: "!ill", 2: ""})
    monkeypatch.setattr(distributed, "_client", lambda: made)
    monkeypatch.setattr(distributed, "_MEETINGS", itertools.count())
    monkeypatch.setattr(distributed.global_state, "num_processes", 2)
    monkeypatch.setattr(distributed.global_state, "process_id", 0)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    return made


def test_processes_agree_on_the_host(store):
    """What one found stands where none failed; the first one's reason elsewhere; the last is waited for."""

    def fail():
        raise KeyError("here")

    assert hosts.together(lambda: 7) == 7
    with pytest.raises(hosts.AgreedError, match="process 1 of 2: ill"):
        hosts.together(lambda: 7)
    with pytest.raises(hosts.AgreedError, match=r"process 0 of 2: .*KeyError: 'here'"):
        hosts.together(fail)
    with pytest.raises(hosts.AgreedError, match="process 1 of 2: late"):
        hosts.together(lambda: 7)
    assert store.deleted == [f"{distributed.MET}{n}/0" for n in (0, 1, 2)]


def test_one_that_failed_where_others_wait_for_it_does_not_wait_for_them(store):
    """They are in a collective of its call, so that it would wait for ever: its own error ends all."""
    store.keys.clear()

    def fail():
        raise KeyError("in evaluate")

    with pytest.raises(KeyError, match="in evaluate"):
        hosts.together(fail, patience=0.0)


# --- positions --------------------------------------------------------------------------------------------------------

DPO = offline.Preference(
    model="m", data="d", loss=losses.dpo_loss, max_prompt=20, max_completion=20, sample_tokens=20, samples=1
)
PLAY = presets.rloo(
    model="m",
    data="d",
    environment=number_guessing(low=1, high=4, max_turns=2),
    max_prompt=20,
    max_completion=20,
)
TABLE = hf.config(FOLDER / "gpt2")


@pytest.mark.parametrize(
    ("run", "positions", "message"),
    [
        (DPO, 40, None),
        (DPO, 39, r"max_prompt \+ max_completion = 40 tokens, but m has 39 positions"),
        (dataclasses.replace(DPO, sample_tokens=54), 48, r"max_prompt \+ sample_tokens = 74 tokens, but m has 48"),
        (dataclasses.replace(DPO, sample_tokens=54, samples=0), 48, None),
        (PLAY, 52, None),
        (PLAY, 48, r"= 52 tokens \(an environment's max_prompt is rounded up to 32\), but m has 48 positions"),
        (dataclasses.replace(PLAY, sample_tokens=100), 52, None),  # an online run samples as it trains
    ],
)
def test_learned_positions_are_enough_for_rows_and_samples(run, positions, message):
    config = dataclasses.replace(TABLE, max_positions=positions)
    if message is None:
        program.check_positions(run, config)
    else:
        with pytest.raises(ValueError, match=message):
            program.check_positions(run, config)


def test_positions_are_counted_before_weights_are_read(monkeypatch):
    monkeypatch.setattr(policy, "load", lambda *_, **__: pytest.fail("it reads the weights"))
    run = dataclasses.replace(DPO, model=str(FOLDER / "gpt2"), max_prompt=TABLE.max_positions)
    with pytest.raises(ValueError, match=f"has {TABLE.max_positions} positions"):
        program.load_policy(run, sharding.make_mesh(fsdp=1))


@pytest.mark.parametrize("run", [DPO, PLAY])
def test_all_rows_of_a_run_have_the_factors_of_its_longest(run):
    """LongRoPE: a turn's narrow cache and the trainer's wide row rotate alike."""
    config, longest = hf.config(FOLDER / "phi3_longrope"), program.longest_row(run)
    mesh, positions = sharding.make_mesh(fsdp=1), np.arange(8)[None]
    tables = functools.partial(models.rope.tables, positions=positions)
    assert program.configured(run, TABLE, mesh).longest_row is None or TABLE.learned_positions is False
    for limit, same_as in ((longest, 1), (longest - 1, longest)):  # all short, all long
        ropes = tuple(dataclasses.replace(rope, original_max_positions=limit) for rope in config.ropes)
        plain = dataclasses.replace(config, ropes=ropes)
        ours = program.configured(run, plain, mesh)
        assert ours.longest_row == longest
        for width in (8, 4 * longest):
            for found, wanted in zip(tables(ours, length=width), tables(plain, length=same_as), strict=True):
                np.testing.assert_array_equal(found, wanted)
    assert models.build(ours).config.longest_row == longest
    assert "longest_row" in models.COMPUTED  # so that an export is of the model, and a critic computes alike


def test_rows_beyond_what_a_rotary_model_was_made_for_are_noted():
    config = dataclasses.replace(TABLE, learned_positions=False, max_positions=40, ropes=(Rope(),))
    assert selfchecks.positions(config, 40) == []
    (check,) = selfchecks.positions(config, 41)
    assert check.passed
    assert check.said.startswith("note: rows have up to 41 tokens, and the model was made for 40")
    stretched = dataclasses.replace(config, ropes=(Rope(kind="linear", factor=2.0),))
    assert selfchecks.positions(stretched, 41) == selfchecks.positions(TABLE, 10**6) == []
