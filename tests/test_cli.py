"""The command line: every field an option, every function's keyword too, everything else an error in one paragraph."""

import dataclasses
import functools

import pytest

from rljax import cli, losses, offline, presets, program, sharding
from rljax.errors import UserError

DPO = offline.Preference(model="m", data="d.jsonl", loss=functools.partial(losses.dpo_loss, beta=0.1))


def test_fields_and_keyword_arguments_are_options():
    changed = cli.with_options(
        DPO,
        [
            "--steps",
            "7",
            "--loss.beta",
            "0.5",
            "--mesh.tensor",
            "2",
            "--schedule.warmup",
            "3",
            "--optimizer.b2",
            "0.9",
            "--average",
        ],
    )
    assert (changed.steps, changed.average) == (7, True)
    assert changed.loss.keywords["beta"] == 0.5
    assert changed.loss.func is losses.dpo_loss
    assert changed.mesh.keywords["tensor"] == 2
    assert changed.mesh.func is sharding.make_mesh
    assert changed.schedule.keywords["warmup"] == 3
    assert changed.optimizer.keywords["b2"] == 0.9
    assert cli.with_options(DPO, []) == DPO


def test_a_field_of_several_values_is_an_option_too():
    run = presets.grpo(model="m", data="d.jsonl", reward=len)
    assert cli.with_options(run, ["--stop", "###", "\n"]).stop == ("###", "\n")
    stopped = dataclasses.replace(run, stop=("###",))
    assert cli.with_options(stopped, []).stop == ("###",)
    assert cli.with_options(stopped, ["--stop"]).stop == ()


def test_a_whole_number_default_may_become_a_fraction_and_zero_stays_zero():
    """TRAPS 7."""
    whole = dataclasses.replace(DPO, loss=functools.partial(losses.dpo_loss, beta=1))
    assert cli.with_options(whole, ["--loss.beta", "0.5"]).loss.keywords["beta"] == 0.5
    assert cli.with_options(whole, ["--loss.beta", "0.0"]).loss.keywords["beta"] == 0.0
    assert cli.with_options(DPO, ["--learning_rate", "0.0", "--clip_norm", "None"]).learning_rate == 0.0


def test_a_keyword_without_a_default_is_an_option_that_has_to_be_given(capsys):
    bare = dataclasses.replace(DPO, loss=losses.dpo_loss)
    assert cli.with_options(bare, ["--loss.beta", "0.3"]).loss.keywords == {"beta": 0.3}
    assert cli.with_options(bare, []).loss is losses.dpo_loss
    with pytest.raises(ValueError, match=r"loss=dpo_loss needs beta: say --loss\.beta …, or loss=functools\.partial"):
        program.check_settings(bare)

    def reward(prompts, completions, *, answer: str):
        return [float(answer in text) for text in completions]

    judged = presets.grpo(model="none", data="none.jsonl", reward=reward)
    assert cli.with_options(judged, []).reward is reward  # the data gives the answers
    program.check_settings(judged)
    with pytest.raises(SystemExit):
        cli.with_options(judged, ["--reward.answer", "4"])
    assert "reward.answer" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--stepz", "--loss.betta", "--loss.delta", "--optimizer.beta2"])
def test_unknown_options_are_errors(option, capsys):
    with pytest.raises(SystemExit) as error:
        cli.with_options(DPO, [option, "1"])
    assert error.value.code == 2
    assert option.lstrip("-").split(".")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": 2, "profile": 1}, "profile=1 traces steps after the first 2"),
        ({"batch": 6, "microbatches": 4}, "cannot be cut into microbatches=4"),
        ({"best_mode": "up"}, "best_mode must be"),
        ({"patience": 3}, "patience needs to know"),
        ({"remat": "all"}, "remat must be"),
        ({"attention": "flash"}, "attention must be"),
        ({"learning_rate": -1.0}, "learning_rate must be at least 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        program.check_settings(dataclasses.replace(DPO, **change))


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/tmp/x", ".", "", "..", "a\nb", "a\x1b[2J", "link", "link/deeper"]
)
def test_a_name_that_leads_out_of_the_runs_is_refused(name, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere")
    run = dataclasses.replace(DPO, out=str(tmp_path / "runs"), name=name)
    with pytest.raises(UserError, match=r"must be the name of a folder|is a link to .*elsewhere"):
        program.run_folder(run, "x.py")


def test_a_name_may_be_a_folder_deeper_and_out_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    for name, folder in (("a", "a"), ("group/a", "group/a"), (None, "x")):
        run = dataclasses.replace(DPO, out=str(tmp_path / "runs"), name=name)
        assert program.run_folder(run, "x.py") == tmp_path / "runs" / folder
    (tmp_path / "runs" / "a").write_text("")
    for change in ({"name": "a"}, {"name": "a/b"}, {"out": str(tmp_path / "runs" / "a")}):
        with pytest.raises(UserError, match="is a file"):
            program.run_folder(dataclasses.replace(run, **change), "x.py")


def test_a_batch_that_does_not_fit_the_mesh_is_refused():
    with pytest.raises(ValueError, match=r"batch=6 .* cannot be spread over data×fsdp=8"):
        program.make_mesh(dataclasses.replace(DPO, batch=6))


def test_a_batch_that_no_machine_holds_says_what_it_needs():
    with pytest.raises(UserError, match=r"need about [\d,]+ GiB .* this machine has \d+ GiB: lower batch=2000000000"):
        program.make_mesh(dataclasses.replace(DPO, batch=2_000_000_000))


def test_input_errors_are_one_paragraph(tmp_path, capsys):
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1\n")
    cases = {
        (): "usage",
        ("fly",): "no command 'fly'",
        ("run",): "name the experiment file",
        ("run", str(tmp_path / "missing.py")): "there is no experiment file",
        ("run", str(empty)): "defines neither `experiment`",
        ("export", str(tmp_path), "x"): "not the folder of a run",
        ("report", str(tmp_path / "nothing")): "no run at",
    }
    for argv, message in cases.items():
        assert cli.main(argv) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    assert cli.main(["--help"]) == 0


def test_a_file_with_main_is_called(tmp_path, capsys):
    file = tmp_path / "hello.py"
    file.write_text("def main(*, times: int = 1) -> int:\n    print('hello ' * times)\n    return 3\n")
    assert cli.main(["run", str(file), "--times", "2"]) == 3
    assert capsys.readouterr().out.strip() == "hello hello"


def test_describe_is_json_with_functions_by_name():
    described = program.describe(DPO)
    assert described["kind"] == "Preference"
    assert described["loss"] == {"function": "rljax.losses.preference.dpo_loss", "beta": 0.1}
    assert described["mesh"] == {"function": "rljax.sharding.make_mesh"}


@pytest.mark.parametrize("command", ["report", "export", "sample", "run"])
def test_a_word_that_is_no_text_is_named(command, capsys):
    assert cli.main([command, "\ud800"]) == 2
    assert capsys.readouterr().err.startswith(f"rljax {command}: the argument '\\ud800' is no text")
