"""Really start several JAX processes on this machine, and end them all: what they said is shown where one fails."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from tests import compiler

ROOT = pathlib.Path(__file__).parent.parent.parent


def start(
    command: Sequence[str], folder: pathlib.Path, *, processes: int = 2, devices: int = 4, **variables: str
) -> list[subprocess.Popen]:
    """The same command in every process, as a cluster starts it; what process i says goes to FOLDER/said.i."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "XLA_FLAGS": compiler.flags(devices), "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    shared |= {"RLJAX_COORDINATOR": f"localhost:{port}", "RLJAX_PROCESSES": str(processes), **variables}
    running = []
    for number in range(processes):
        with (folder / f"said.{number}").open("w") as said:
            own = {**shared, "RLJAX_PROCESS_ID": str(number)}
            running.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=own, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
                )
            )
    return running


def end(running: Sequence[subprocess.Popen]) -> None:
    """Whatever a process of these has started goes with it."""
    for process in running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait(running: Sequence[subprocess.Popen], seconds: float) -> list[int | None]:
    """The exit status of each; None for one that had to be ended at the common deadline."""
    deadline = time.monotonic() + seconds
    try:
        while any(process.poll() is None for process in running) and time.monotonic() < deadline:
            time.sleep(0.05)
        found = [process.poll() for process in running]
        for process in running:
            if process.poll() is None:
                process.send_signal(signal.SIGABRT)  # faulthandler says where it was
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)
        return found
    finally:
        end(running)


def said(folder: pathlib.Path, processes: int = 2) -> str:
    """The last words of every process."""
    parts = [f"--- process {i} ---\n{(folder / f'said.{i}').read_text()[-6000:]}" for i in range(processes)]
    return "\n".join(parts)


def run(
    command: Sequence[str],
    folder: pathlib.Path,
    *,
    seconds: float = 240,
    status: Sequence[int | None] | None = None,
    processes: int = 2,
    **settings: str,
) -> str:
    """Run to the end and expect these exit statuses (0 of each); what was said."""
    found = wait(start(command, folder, processes=processes, **settings), seconds)
    assert found == (status or [0] * processes), f"exit statuses {found}\n{said(folder, processes)}"
    return said(folder, processes)


def rljax(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "rljax", *arguments]


def several(*calls: Sequence[str], statuses: Sequence[int] = ()) -> list[str]:
    """One command for many calls of the command line, one after the other: processes take long to start.

    statuses: that the calls have to end with; 0 for those beyond.
    """
    expected = [*statuses, *[0] * (len(calls) - len(statuses))]
    return module("several", json.dumps(list(zip(expected, calls, strict=True))))


def module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"tests.distributed.{name}", *arguments]


def files(folder: pathlib.Path, contents: Mapping[str, str]) -> dict[str, str]:
    """{name: the path of a file with this content}"""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (folder / f"{name}.py").write_text(text)
    return {name: str(folder / f"{name}.py") for name in contents}
