"""Several processes as one program: how they find each other, agree to stop, and end together where one fails.

A process is one of several by RLJAX_COORDINATOR (host:port), RLJAX_PROCESSES and RLJAX_PROCESS_ID, or else by JAX's own
cluster detection: SLURM, Open MPI, Cloud TPU pods, TPUs on GKE, indexed Kubernetes jobs. RLJAX_PROCESSES=1 says that it
is alone whatever its surroundings look like. Where nothing says so nothing happens here.

What fails on one process ends all of them within seconds, with its reason and its exit status. A process that is not
heard of for RLJAX_TIMEOUT seconds (60) is lost: JAX's coordination service ends the others, which say so (SIGABRT).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import json
import math
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import clusters  # JAX can be asked whether there is a cluster only here
from jax._src.distributed import global_state  # and for the store of keys that its processes share

from rljax import failures
from rljax.errors import UserError

WAIT_TO_MEET = 300  # seconds until all processes have to be there
POLL = 0.5  # seconds between two looks at what others have to say
FAREWELL = 10.0  # seconds in which the others have to hear of a failure
LINGER = 2.0  # seconds that the first stays after all have heard: JAX aborts those who lose it before they have left
HOUR = 3_600_000  # milliseconds
FAILED, HEARD = "rljax/failed", "rljax/heard/"
MET = "rljax-met/"
_ROOMS = itertools.count()  # all processes make the same runs in the same order
_MEETINGS = itertools.count()  # and meet in the same order


def initialize() -> None:
    """Connect to the other processes, if there are any; to be called before anything is computed. UserError for
    RLJAX_ variables that do not say everything.
    """
    if not jax.distributed.is_initialized():
        address, count, number = _by_variables() or (None, _detected(), None)
        if count == 1:
            return
        # JAX's own answer to SIGTERM would take the place of a run's, which saves first.
        jax.config.update("jax_enable_preemption_service", False)
        # A CPU runs what was dispatched side by side, in another order on each process: collectives would mix.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        with _said_after(30, f"waiting up to {WAIT_TO_MEET} s for all {count} processes to meet"):
            jax.distributed.initialize(
                address,
                count,
                number,
                cluster_detection_method="deactivate" if address else None,
                initialization_timeout=WAIT_TO_MEET,
                heartbeat_timeout_seconds=timeout(),
            )
    if _several():
        _listen_for_failures()


def timeout() -> int:
    """Seconds after which a process that is not heard of is lost."""
    return int(os.environ.get("RLJAX_TIMEOUT") or 60)


def _by_variables() -> tuple[str, int, int] | None:
    """(coordinator, processes, this one's number) as the RLJAX_ variables have them; None where they say nothing."""
    names = ("RLJAX_COORDINATOR", "RLJAX_PROCESSES", "RLJAX_PROCESS_ID")
    found = {name: os.environ[name] for name in names if os.environ.get(name)}
    if not found:
        return None
    if found.get("RLJAX_PROCESSES") == "1":
        return "", 1, 0
    count, number = (int(found.get(name, "")) if found.get(name, "").isdecimal() else -1 for name in names[1:])
    if not 0 <= number < count or ":" not in found.get(names[0], ""):
        raise UserError(
            f"one of several processes needs {names[0]}=HOST:PORT (of the first), {names[1]}=2 and {names[2]}=0 or 1 "
            f"(for two); these are {found}"
        )
    return found[names[0]], count, number


def _detected() -> int:
    """How many processes there are by JAX's own cluster detection; 1 where it finds no cluster.

    The network is asked only on a TPU VM (its metadata server) and in an indexed Kubernetes job.
    """
    platforms = jax.config.jax_platforms or ""  # pyright: ignore[reportAttributeAccessIssue]
    for cluster in clusters.ClusterEnv._cluster_types:
        tpu, kubernetes = cluster.__name__.endswith("TpuCluster"), cluster is clusters.K8sCluster
        unlikely = (tpu and "tpu" not in platforms) or (kubernetes and "JOB_COMPLETION_INDEX" not in os.environ)
        if unlikely or cluster.opt_in_only_method:
            continue
        try:
            there = cluster.is_env_present()
        except OSError:  # a machine with TPUs and no metadata server
            continue
        if there:
            # In an interactive shell of an allocation SLURM_NTASKS is the allocation's.
            alone = cluster is clusters.SlurmCluster and os.environ.get("SLURM_STEP_NUM_TASKS") == "1"
            return 1 if alone else cluster.get_process_count()
    return 1


@contextlib.contextmanager
def _said_after(seconds: float, text: str) -> Iterator[None]:
    timer = threading.Timer(seconds, lambda: print(f"rljax: {text}", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _several() -> bool:
    return global_state.client is not None and global_state.num_processes > 1


# --- one stops, all stop ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def agreement() -> Iterator[Callable[[int, str | None], str | None]]:
    """agreed(step, wanted): why to stop after this step, alike on all processes; None: go on.

    wanted: this process's own wish. Every process asks after every step; nobody waits for that until one has a wish.
    Then a thread of each tells the last step that it was asked about, no further step is answered meanwhile, and all
    stop after the first one that none had passed. (The devices may be steps behind, so what they compute cannot ask.)
    """
    if not _several():
        yield lambda step, wanted: wanted
        return
    room, client, me = f"rljax/stop/{next(_ROOMS)}/", _client(), str(global_state.process_id)
    lock, over = threading.Lock(), threading.Event()
    passed, found = -1, None

    def agreed(step: int, wanted: str | None) -> str | None:
        nonlocal passed
        with lock:
            if wanted is not None and found is None:
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # somebody was faster
                    client.key_value_set(f"{room}wanted", wanted)
            passed = step
            return found[0] if found is not None and step >= found[1] else None

    def listen() -> None:
        nonlocal found
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # others are gone, which ends this process too
            while not over.wait(POLL):
                wish = dict(client.key_value_dir_get(room)).get(f"{room}wanted")
                if wish is None:
                    continue
                with lock:
                    client.key_value_set(f"{room}{me}", str(passed))
                    keys = [f"{room}{process}" for process in range(global_state.num_processes)]
                    found = wish, max(int(client.blocking_key_value_get(key, HOUR)) for key in keys) + 1
                return

    thread = threading.Thread(target=listen, name="rljax-stop", daemon=True)
    thread.start()
    try:
        yield agreed
    finally:
        over.set()
        thread.join(timeout=2 * POLL)


# --- meeting on the host ----------------------------------------------------------------------------------------------


def everyone(said: str, seconds: float | None = None) -> list[str]:
    """What each of several processes says at the same point, in their order. No device is asked: those who are early
    wait for the last as long as it takes, or for so many seconds (TimeoutError).
    """
    client, me, number = _client(), global_state.process_id, next(_MEETINGS)
    deadline = math.inf if seconds is None else time.monotonic() + seconds
    client.key_value_set(f"{MET}{number}/{me}", said)
    found = [_said(f"{MET}{number}/{process}", deadline) for process in range(global_state.num_processes)]
    if number:  # whoever is here has left the meeting before
        client.key_value_delete(f"{MET}{number - 1}/{me}")
    return found


def _said(key: str, deadline: float) -> str:
    while True:
        try:
            return _client().blocking_key_value_get(key, 1000)  # between two of these a signal is heard
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            if time.monotonic() > deadline:
                raise TimeoutError(key) from None


# --- one fails, all end -----------------------------------------------------------------------------------------------


def end_all(error: BaseException, status: int) -> None:
    """Of several processes: say what failed here, end the others with it, and leave with this exit status, without
    coming back. Of one: nothing.

    Where another process failed before, or the error is that another one is gone, that is what is said.
    """
    if not _several():
        return
    me, client = global_state.process_id, _client()
    if _is_of_the_connection(error):
        _wait_for(FAILED, 4 * POLL)  # one that failed has said so before it left
        if _failure() is None:
            print(
                f"rljax: process {me} was cut off ({failures.line(error)}); which was lost?",
                file=sys.stderr,
                flush=True,
            )
            _wait_for(FAILED, timeout() + FAREWELL)  # the service ends this process as soon as it knows who is gone
    else:
        told = {"process": me, "status": status, "error": failures.line(error)}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # somebody was faster
            client.key_value_set(FAILED, json.dumps(told))
    first = _failure()
    if first is None or first["process"] == me:
        unexpected = not isinstance(error, KeyboardInterrupt) and failures.paragraph(error) is None
        if unexpected or failures.wanted():
            traceback.print_exception(error)
        first = {"process": me, "status": status, "error": failures.line(error)}
    _leave(first)


@functools.cache
def _listen_for_failures() -> None:
    """In the background, once, until the interpreter ends."""
    over = threading.Event()

    def listen() -> None:
        while not over.wait(POLL):
            try:
                first = _failure()
            except jax.errors.JaxRuntimeError:  # the coordinator is gone: JAX ends this process with that reason
                return
            if first is not None and first["process"] != global_state.process_id:
                _leave(first)

    thread = threading.Thread(target=listen, name="rljax-listen", daemon=True)
    thread.start()
    atexit.register(lambda: (over.set(), thread.join()))


def _leave(first: dict[str, Any]) -> None:
    """End this process, once the others have heard why. Not through the interpreter's end, where JAX waits for them."""
    with _LEAVING:
        print(f"rljax: process {first['process']} failed: {first['error']}", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):
            _client().key_value_set(f"{HEARD}{global_state.process_id}", "", allow_overwrite=True)
            deadline = time.monotonic() + FAREWELL
            for process in range(global_state.num_processes):
                _wait_for(f"{HEARD}{process}", deadline - time.monotonic())
            if global_state.process_id == 0:
                time.sleep(LINGER)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(first["status"])


_LEAVING = threading.Lock()


def _failure() -> dict[str, Any] | None:
    """{"process", "status", "error"} of the first that failed."""
    found = dict(_client().key_value_dir_get("rljax/"))
    return json.loads(found[FAILED]) if FAILED in found else None


def _wait_for(key: str, seconds: float) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _client().blocking_key_value_get(key, max(1, int(seconds * 1000)))


def _is_of_the_connection(error: BaseException) -> bool:
    kind = isinstance(error, jax.errors.JaxRuntimeError | ValueError)
    return kind and re.search(r"(?i)gloo|nccl|unavailable:|connection (reset|closed|refused)", str(error)) is not None


def _client() -> Any:
    return global_state.client
