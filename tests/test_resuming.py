"""What may change when a run is resumed, and what may not: each row of the table in docs/resuming.md is tried."""

import dataclasses
import functools
import json
import pathlib
import re
import shutil

import pytest

from rljax import data, losses, offline, online, program, resuming, runs, sharding, train

TABLE = pathlib.Path(__file__).parent.parent / "docs" / "resuming.md"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("RLJAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def rows(count=20):
    return [{"prompt": f"Once there was a cat {i}.", "chosen": " Happy.", "rejected": " Sad."} for i in range(count)]


def preference(stories, folder, **changes):
    (folder / "pairs.jsonl").exists() or data.write_jsonl(folder / "pairs.jsonl", rows())
    settings = {
        "loss": functools.partial(losses.dpo_loss, beta=0.1),
        "reference": True,
        "model": str(stories),
        "data": str(folder / "pairs.jsonl"),
        "steps": 4,
        "batch": 4,
        "max_prompt": 32,
        "max_completion": 16,
        "schedule": train.constant,
        "out": str(folder),
        "name": "run",
    }
    return offline.Preference(**settings | changes)


def begun(run, folder, *, step=2, **progress):
    """A run that was killed after a checkpoint of this step: the record of one, without the arrays."""
    resuming.begin(run, folder / "run")
    kept = folder / "run" / "checkpoints" / str(step) / "rljax"
    kept.mkdir(parents=True)
    extra = program.Progress(**progress)._asdict()
    record = {"format": 1, "leaves": {}, "metrics": None, "extra": extra}
    (kept / "metadata").write_text(json.dumps(record))
    (kept.parent / "_CHECKPOINT_METADATA").write_text("{}")
    (folder / "run" / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')


def test_a_first_start_and_the_same_again(stories, tmp_path):
    run = preference(stories, tmp_path)
    begun(run, tmp_path)
    assert resuming.begin(run, tmp_path / "run")
    written = json.loads((tmp_path / "run" / "experiment.json").read_text())
    assert set(written["contents"]) == {"model", "data"}
    assert set(written["contents"]["model"]) == {"weights", "config", "tokenizer"}
    assert written["contents"]["data"]["rows"] == 20
    sessions = json.loads((tmp_path / "run" / "manifest.json").read_text())["sessions"]
    assert [session.get("step") for session in sessions] == [None, 2]


def edited(path, change):
    lines = path.read_text().splitlines()
    path.write_text("\n".join(change(lines)) + "\n")


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [*lines, lines[0]],
        lambda lines: lines[:-1],
        lambda lines: [lines[0].replace("cat", "dog"), *lines[1:]],
        lambda lines: [
            line.replace("chosen", "x").replace("rejected", "chosen").replace("x", "rejected") for line in lines
        ],
        lambda lines: lines[::-1],
    ],
    ids=["appended", "shortened", "edited", "swapped", "reordered"],
)
def test_other_data_are_refused_and_can_be_accepted(stories, tmp_path, change, capsys):
    run = preference(stories, tmp_path)
    begun(run, tmp_path)
    edited(tmp_path / "pairs.jsonl", change)
    with pytest.raises(ValueError, match=r"at step 2 .*data\.sha256 was .* and is .*--accept-changes data"):
        resuming.begin(run, tmp_path / "run")
    assert resuming.begin(dataclasses.replace(run, accept_changes="data"), tmp_path / "run")
    assert "accepted: data.sha256 was" in capsys.readouterr().out
    assert resuming.begin(run, tmp_path / "run")  # what was accepted is the record now
    accepted = json.loads((tmp_path / "run" / "manifest.json").read_text())["sessions"][1]["accepted"]
    assert any(text.startswith("data.sha256 was") for text in accepted)
    with pytest.raises(ValueError, match="'dta' is no field"):
        resuming.begin(dataclasses.replace(run, accept_changes="dta"), tmp_path / "run")


def test_the_same_data_elsewhere_or_written_otherwise_are_the_same(stories, tmp_path, monkeypatch):
    run = preference(stories, tmp_path)
    begun(run, tmp_path)
    (tmp_path / "moved").mkdir()
    data.write_jsonl(tmp_path / "moved" / "p.jsonl.gz", [dict(reversed(row.items())) for row in rows()])
    monkeypatch.chdir(tmp_path / "moved")
    assert resuming.begin(dataclasses.replace(run, data="p.jsonl.gz"), tmp_path / "run")
    shutil.copytree(stories, tmp_path / "moved" / "model")
    assert resuming.begin(dataclasses.replace(run, model="model"), tmp_path / "run")


@pytest.mark.parametrize(
    ("file", "part"), [("model.safetensors", "weights"), ("config.json", "config"), ("tokenizer.json", "tokenizer")]
)
def test_another_model_in_the_folder_is_refused(stories, tmp_path, file, part):
    model = tmp_path / "model"
    shutil.copytree(
        stories, model, copy_function=lambda a, b: pathlib.Path(b).write_bytes(pathlib.Path(a).read_bytes())
    )
    model.chmod(0o755)
    run = preference(model, tmp_path)
    begun(run, tmp_path)
    path = model / file
    content = path.read_bytes()
    if file == "config.json":
        path.write_text(json.dumps({**json.loads(content), "rms_norm_eps": 0.5}))
    else:
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    with pytest.raises(ValueError, match=rf"model\.{part} was .* and is .*--accept-changes model"):
        resuming.begin(run, tmp_path / "run")
    path.write_bytes(content)
    if file == "config.json":
        path.write_text(json.dumps(json.loads(content), indent=7))
    assert resuming.begin(run, tmp_path / "run")


def test_another_body_of_a_loss_is_refused(stories, tmp_path):
    def make(power):
        def loss(chosen, rejected, ref_chosen, ref_rejected):
            return (rejected - chosen) ** power

        return loss

    other = lambda chosen, rejected, ref_chosen, ref_rejected: (rejected - chosen) ** 2  # noqa: E731
    run = preference(stories, tmp_path, loss=make(2))
    begun(run, tmp_path)
    assert resuming.begin(dataclasses.replace(run, loss=make(2)), tmp_path / "run")
    with pytest.raises(ValueError, match=r"loss\.bound\.power was 2 and is 3"):
        resuming.begin(dataclasses.replace(run, loss=make(3)), tmp_path / "run")
    with pytest.raises(ValueError, match=r"loss\.code was .* and is .* \(what it computes\).*--accept-changes loss"):
        resuming.begin(dataclasses.replace(run, loss=other), tmp_path / "run")


# --- the table --------------------------------------------------------------------------------------------------------

OTHER = {  # another value of every field that has a row of its own
    "name": "other",
    "out": "elsewhere",
    "keep": 3,
    "save_every": 7,
    "samples": 1,
    "sample_tokens": 9,
    "checks": False,
    "profile": 1,
    "wandb": True,
    "evidence": 1,
    "reward_timeout": 1.0,
    "max_rounds": 3,
    "on_nan": "skip",
    "accept_changes": "seed",
    "mesh": functools.partial(sharding.make_mesh, fsdp=1),
    "microbatches": 2,
    "attention": "xla",
    "remat": "full",
    "unroll": 1,
    "gather": 1.0,
    "offload_reference": True,
    "share_prompts": False,
    "slots": 8,
    "cache_reference": False,
    "steps": 6,
    "eval_every": 7,
    "seed": 1,
    "learning_rate": 1e-3,
    "batch": 8,
    "max_prompt": 16,
    "dtype": "bfloat16",
    "optimizer": functools.partial(train.adamw, eps=1e-3),
    "clip_norm": None,
    "eval_rows": 3,
    "best": "eval/loss",
    "kl_reward": 0.3,
    "temperature": 0.5,
    "reward": lambda prompts, completions: [1.0] * len(completions),
}


def table():
    """{field: "yes" | "if …" | "no"} of docs/resuming.md."""
    found = {}
    for line in TABLE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 3:
            found |= dict.fromkeys(re.findall(r"`(\w+)`", cells[0]), cells[1])
    return found


def test_the_table_names_the_fields_that_may_change():
    free = {name for name, verdict in table().items() if verdict == "yes"}
    assert free == {*resuming.FREE, *resuming.ROUNDING}
    assert {name for name, verdict in table().items() if verdict == "if"} == set(resuming.EXTENDING)
    assert set(OTHER) <= set(table())


@pytest.mark.parametrize("field", sorted(OTHER))
def test_every_row_of_the_table(stories, tmp_path, field):
    run: program.Run = preference(stories, tmp_path)
    if not hasattr(run, field):
        run = online.PPO(
            model=str(stories), data=run.data, reward=lambda prompts, completions: [0.0] * len(completions), steps=4
        )
    begun(run, tmp_path)
    changed = dataclasses.replace(run, **{field: OTHER[field]})
    if table()[field] == "no":
        with pytest.raises(ValueError, match=rf"another experiment.*\b{field}\b.*--accept-changes {field}"):
            resuming.begin(changed, tmp_path / "run")
        changed = dataclasses.replace(changed, accept_changes=field)
    assert resuming.begin(changed, tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"schedule": train.linear}, {"steps": 6}, "steps was 4 and is 6"),
        ({"schedule": train.cosine}, {"steps": 6}, "steps was 4 and is 6"),
        ({}, {"steps": 1}, "steps was 4 and is 1"),
        ({"best": "eval/loss"}, {"eval_every": 7}, "eval_every was 50 and is 7"),
    ],
)
def test_what_depends_on_the_end_cannot_be_extended(stories, tmp_path, settings, changes, message):
    run = preference(stories, tmp_path, **settings)
    begun(run, tmp_path)
    with pytest.raises(ValueError, match=message):
        resuming.begin(dataclasses.replace(run, **changes), tmp_path / "run")


def test_a_finished_run_says_so_at_once_and_what_differs(stories, tmp_path, capsys):
    run = preference(stories, tmp_path)
    begun(run, tmp_path, step=4, done=True)
    before = (tmp_path / "run" / "manifest.json").read_bytes()
    assert not resuming.begin(run, tmp_path / "run")
    assert "is finished: step 4" in capsys.readouterr().out
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before
    with pytest.raises(ValueError, match=r"another experiment, at step 4 \(loss\.beta was 0\.1 and is 0\.3"):
        resuming.begin(dataclasses.replace(run, loss=functools.partial(losses.dpo_loss, beta=0.3)), tmp_path / "run")
    assert resuming.begin(dataclasses.replace(run, steps=6), tmp_path / "run")  # goes on


def test_a_run_that_trained_nothing_owns_nothing(stories, tmp_path):
    run = preference(stories, tmp_path)
    resuming.begin(run, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 0}\n')
    assert resuming.begin(dataclasses.replace(run, learning_rate=1e-2), tmp_path / "run")


def test_another_machine_is_said(stories, tmp_path, capsys):
    run = preference(stories, tmp_path)
    begun(run, tmp_path)
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["sessions"][0]["versions"]["jaxlib"] = "0.4.1"
    path.write_text(json.dumps(manifest))
    resuming.begin(run, tmp_path / "run")
    assert re.search(r"jaxlib 0\.4\.1 → [\d.]+: from here on, results may differ", capsys.readouterr().out)


def test_classes_of_ones_own(stories, tmp_path):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(offline.SFT):
        packing: bool = True

    class Forgotten(offline.SFT):
        steps = 5

    class Foreign(program.Run):
        pass

    program.check_settings(Mine(model=str(stories), data="d"))
    with pytest.raises(ValueError, match=r"Forgotten sets steps and is no dataclass.*kw_only=True"):
        program.check_settings(Forgotten(model=str(stories), data="d"))
    with pytest.raises(ValueError, match="not Foreign"):
        offline.run(Foreign(model=str(stories), data="d"))


def test_runs_that_differ_in_what_they_hold_are_no_seeds_of_one(stories, tmp_path):
    def made(name, seed, **changes):
        run = preference(stories, tmp_path, name=name, seed=seed, **changes)
        resuming.begin(run, tmp_path / name)
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')

    data.write_jsonl(tmp_path / "more.jsonl", rows(21))
    shutil.copy(tmp_path / "more.jsonl", tmp_path / "copy.jsonl")
    made("a", 0)
    made("b", 1)
    made("c", 2, data=str(tmp_path / "more.jsonl"))
    made("d", 3, data=str(tmp_path / "copy.jsonl"))
    made("e", 4, loss=lambda a, b, c, d: a - b)
    made("f", 5, loss=lambda a, b, c, d: b - a)
    (tmp_path / "g").mkdir()
    for file in ("experiment.json", "metrics.jsonl"):
        shutil.copy(tmp_path / "a" / file, tmp_path / "g" / file)
    sessions = {"seed": 6, "sessions": [{}, {"step": 1, "accepted": ["data.sha256 was x and is y"]}]}
    (tmp_path / "g" / "manifest.json").write_text(json.dumps(sessions))
    found = runs.group(runs.read([tmp_path / name for name in "abcdefg"]))
    assert [[run.name for run in group.runs] for group in found] == [["a", "b"], ["c", "d"], ["e"], ["f"], ["g"]]
