"""The command line: `rljax run | plan | selfcheck | inspect | sample | export | report | reproduce`. Only this
file knows arguments.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
import typing
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import tyro
from rich.console import Console

from rljax import (
    allocator,
    artefacts,
    compare,
    compilation,
    distributed,
    evidence,
    failures,
    hosts,
    offline,
    online,
    papers,
    progress,
)
from rljax import plan as planning
from rljax import report as reports
from rljax.errors import UserError
from rljax.failures import visible
from rljax.options import import_file, read_experiment, with_options

__all__ = ["import_file", "main", "read_experiment", "run_file", "with_options"]

USAGE = """usage: rljax COMMAND …

  run FILE [--field value …]        train what FILE's `experiment` describes (or call its `main`)
  plan FILE [--topology v5e:16x16]  what it would need of a machine, and its best time there, before anybody pays
  selfcheck FILE [--field value …]  only the checks that a run makes before its first step
  inspect RUN [--step N]            what a step did to single tokens: log-probabilities, advantages, ratios
  sample RUN_OR_MODEL               let a run, a checkpoint folder or a named model write
  export RUN FOLDER                 a Hugging Face checkpoint of a run's best (or last) weights
  report RUN …                      write report.md and its plots again; of several runs, a page that compares them
  reproduce [NAME …]                claims of papers: criterion, measured, verdict, and a page for each

`rljax COMMAND --help` lists the options of each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status. Input errors are one paragraph on stderr and status 2.

    argv: left out by a process that is this command's alone: its memory is kept for a run (`allocator`).
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would miss PyTorch, which we do not use
    alone, argv = argv is None, list(sys.argv[1:] if argv is None else argv)
    command = COMMANDS.get(argv[0]) if argv else None
    if command is None:
        wanted = not argv or argv[0] in ("-h", "--help", "help")
        print(USAGE if wanted else f"rljax: there is no command {argv[0]!r}\n\n{USAGE}", file=sys.stderr)
        return 0 if argv and wanted else 2
    with progress.lossy_screen():
        return _call(command, argv, alone)


def _call(command: Callable[[Sequence[str]], int], argv: Sequence[str], alone: bool) -> int:
    try:
        _check_text(argv)
        if alone and command is run:
            allocator.keep_memory()  # first: what connects processes has threads
        if command in (run, selfcheck):
            distributed.initialize()
        if command in (run, selfcheck, reproduce):
            compilation.keep_programs()
        return command(argv[1:])
    except Exception as error:
        status = 2 if isinstance(error, UserError | OSError | ImportError | SyntaxError) else 1
        if not isinstance(error, hosts.AgreedError):  # else all processes leave by themselves
            distributed.end_all(error, status)
        text = failures.paragraph(error)
        if text is None or failures.wanted():
            raise
        print(f"rljax {argv[0]}: {text}", file=sys.stderr)
        return status
    except KeyboardInterrupt as error:
        distributed.end_all(error, 130)
        if failures.wanted():
            raise
        print(f"rljax {argv[0]}: interrupted{f' ({visible(str(error))})' if str(error) else ''}", file=sys.stderr)
        return 130


def _check_text(argv: Sequence[str]) -> None:
    """UserError for a word that no file could be called: what the system hands over can be handed back."""
    for word in argv:
        try:
            os.fsencode(word)
        except UnicodeEncodeError as error:
            raise UserError(f"the argument {word!r} is no text: {error.reason}. Write it anew") from error


def run_file(file: str) -> None:
    """What an experiment file calls at its end, so that `python FILE …` is `rljax run FILE …`."""
    allocator.keep_memory()
    raise SystemExit(main(["run", file, *sys.argv[1:]]))


def run(argv: Sequence[str]) -> int:
    experiment, file = read_experiment(argv, "run")
    compilation.hide_false_alarms()
    status: Any = experiment() if callable(experiment) else program_of(experiment).run(experiment, file)
    return int(status or 0)


def program_of(experiment: Any) -> ModuleType:
    """The program that runs an experiment: where its data come from decides."""
    return online if isinstance(experiment, online.Sampled) else offline


def selfcheck(argv: Sequence[str]) -> int:
    experiment, file = read_experiment(argv, "selfcheck")
    if callable(experiment):
        raise UserError(f"{file} has no `experiment` to check, only a `main` function: use `rljax run {file}`")
    compilation.hide_false_alarms()
    return program_of(experiment).selfcheck(experiment, file)


def plan_run(argv: Sequence[str]) -> int:
    """What an experiment needs of a machine; status 1 where it does not fit."""

    def asked(
        file: tyro.conf.Positional[str],
        topology: str | None = None,
        slices: int | None = None,
        search: bool = False,
        tries: int = 6,
        json: bool = False,
    ) -> dict[str, Any]:
        """Compile an experiment's functions for a machine: memory, exchange between devices, the time at best. Reads
        no weights and no data. All other options are fields of the experiment: see rljax run FILE --help.

        Args:
            file: the experiment file
            topology: TPU slices that nobody has to have (v5e:16x16, v5p:8x16x16, 2xv6e:16x16); else the devices here
            slices: so many of them, which the data-center network connects
            search: try meshes and microbatches, rank those that fit
            tries: how many of them are compiled
            json: everything, in bytes and seconds
        """
        return locals()

    options, fields = tyro.cli(asked, args=list(argv), prog="rljax plan", return_unknown_args=True)
    machine = planning.machine(options["topology"], options["slices"])
    experiment, file = read_experiment([options["file"], *fields], "plan")
    if callable(experiment):
        raise UserError(f"{file} has no `experiment` to plan, only a `main` function")
    say = Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print
    if options["search"]:
        plans = planning.search(experiment, machine, tries=options["tries"], say=say).plans
    else:
        plans = [planning.plan(experiment, machine, say)]
    if options["json"]:
        print(json.dumps([planning.as_json(plan) for plan in plans]))
    else:
        out = _wide()
        planning.show(plans[0], out)
        if options["search"]:
            out.print()
            planning.ranking(plans, out)
    return 0 if plans[0].fits else 1


def _wide() -> Console:
    """As wide as the terminal; into a file or a pipe, wide enough for a table of numbers."""
    return Console(width=None if sys.stdout.isatty() else 110)


def inspect_run(argv: Sequence[str]) -> int:
    """Tokens of a step."""

    def command(run: tyro.conf.Positional[str], step: int | None = None, row: int | None = None) -> int:
        """Show what a step of an online run did to single tokens.

        Args:
            run: the folder of a run
            step: one at which the run evaluated (the last, if none is named)
            row: only this row
        """
        evidence.show(run, step, _wide(), row=row)
        return 0

    return tyro.cli(command, args=list(argv), prog="rljax inspect")


def sample(argv: Sequence[str]) -> int:
    """Let something write."""

    def command(
        source: tyro.conf.Positional[str],
        prompt: tyro.conf.UseAppendAction[list[str]],
        n: int = 1,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        chat: bool = False,
        step: int | None = None,
        seed: int = 0,
    ) -> int:
        """Let a run, a checkpoint folder or a named model continue prompts.

        Args:
            source: the folder of a run or of a checkpoint, or a model's name
            prompt: a text to continue; may be given several times
            n: continuations of each
            temperature: 0 is greedy
            chat: put the prompt through the model's chat template
            step: a run's checkpoint (the best, else the last)
        """
        if not prompt:
            raise UserError('give something to continue: --prompt "Once upon a time"')
        sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        if not 1 <= n <= 10_000:
            raise UserError(f"--n is how many continuations of each prompt: 1 to 10000, not {n}")
        prompts = [text for text in prompt for _ in range(n)]
        rows = artefacts.sample(source, prompts, chat=chat, seed=seed, step=step, **sampling)
        Console().print(progress.sample_table(rows, limit=2000))
        return 0

    return tyro.cli(command, args=list(argv), prog="rljax sample")


def export(argv: Sequence[str]) -> int:
    """A Hugging Face checkpoint of a run."""

    def command(run: tyro.conf.Positional[str], folder: tyro.conf.Positional[str], step: int | None = None) -> int:
        """Write the weights of a run as a Hugging Face checkpoint.

        Args:
            run: the folder of a run
            folder: where to write; must be new, empty or an earlier export
            step: which checkpoint (the best, else the last)
        """
        written = artefacts.export(run, folder, step=step)
        print(visible(f"{folder}: the weights of step {written} of {run}{artefacts.remark(folder)}"))
        return 0

    return tyro.cli(command, args=list(argv), prog="rljax export")


def report(argv: Sequence[str]) -> int:
    """report.md and its plots, or runs in comparison."""

    def command(
        runs: tyro.conf.Positional[tuple[str, ...]],
        out: str | None = None,
        metrics: str = "",
        ignore: str = "",
        interval: typing.Literal["confidence", "range"] = "confidence",
    ) -> int:
        """Write report.md and the plots of a run again; of several runs, a page that compares them (comparison.html).

        Args:
            runs: the folder of a run, or those of several, finished or not: runs/*
            out: where the comparison goes; the folder `comparison` beside the first run
            metrics: which are compared, a,b,c; all that every group has
            ignore: settings a,b,c that may differ, besides seed and name, between runs that are taken for one group
            interval: of a group: the 95% confidence interval of its mean, or its range
        """
        if len(runs) == 1 and [out, metrics, ignore] == [None, "", ""]:
            print(visible(str(reports.write_report(runs[0]))))
        else:
            named = {"metrics": metrics, "ignore": ignore}
            lists = {key: [name.strip() for name in text.split(",") if name.strip()] for key, text in named.items()}
            print(visible(str(compare.write(runs, out=out, interval=interval, **lists))))
        return 0

    return tyro.cli(command, args=list(argv), prog="rljax report")


def reproduce(argv: Sequence[str]) -> int:
    """Claims of papers, with verdicts; status 1 where one fails."""

    def command(
        names: tyro.conf.Positional[tuple[str, ...]] = (),
        seeds: int = 3,
        quick: bool = False,
        folder: str = "experiments/papers",
        out: str | None = None,
    ) -> int:
        """Run reproductions of papers, print claim, criterion, measured and verdict, and write a page for each.

        Args:
            names: which ones, by the names of their files; all if there are none
            seeds: how many seeds, whose mean is judged
            quick: fewer steps or samples, where a reproduction takes long
            folder: where their files are
            out: where the pages go; docs/papers, in a quick run runs/papers
        """
        if seeds < 1:
            raise UserError(f"--seeds must be at least 1, got {seeds}")
        pages, kind = pathlib.Path(out or ("runs/papers" if quick else "docs/papers")), " --quick" if quick else ""
        failed = []
        compilation.hide_false_alarms()
        for file in papers.find(names, pathlib.Path(folder)):
            print(f"{file.stem} …", flush=True)
            done = papers.run(file, import_file, seeds=seeds, quick=quick)
            print(f"{done.title}\n\n{papers.text_table(done.result.checks)}\n")
            page = papers.write_page(done, pages, how=f"rljax reproduce {file.stem} --seeds {seeds}{kind}")
            print(f"{page}: {done.seconds:.1f} s\n", flush=True)
            failed += [] if done.holds else [file.stem]
        print(f"{papers.write_gallery(pages)}; " + (f"FAILED: {', '.join(failed)}" if failed else "all pass"))
        return 1 if failed else 0

    return tyro.cli(command, args=list(argv), prog="rljax reproduce")


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "run": run,
    "plan": plan_run,
    "selfcheck": selfcheck,
    "inspect": inspect_run,
    "sample": sample,
    "export": export,
    "report": report,
    "reproduce": reproduce,
}
