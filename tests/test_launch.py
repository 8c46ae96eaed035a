"""tpu_scripts: what they send is recorded, and really run, by a `gcloud` and an `srun` that have this machine only."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml

from rljax import distributed, tracking
from tests import compiler
from tests.distributed import cases, pair
from tests.test_programs import state_bits, wait_for_record

SCRIPTS = pair.ROOT / "tpu_scripts"
OPTIONS = [
    "--type",
    "v5litepod-8",
    "--runtime-version",
    "v2-alpha-tpuv5-lite",
    "--spot",
    "--package",
    "rljax-lm==0.1.0",
]
PREFIX = ["compute", "tpus", "queued-resources"]

# A cloud of one slice with two workers: folders that are gone when it is deleted. FAKE_CLOUD/state holds the states
# that the next looks find; the last one stays. A command of ssh runs as the login shell of each worker would run it.
GCLOUD = r"""#!PYTHON
import argparse, json, os, pathlib, shutil, socket, subprocess, sys

cloud = pathlib.Path(os.environ["FAKE_CLOUD"])
with (cloud / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\n")
assert sys.argv[1:4] == ["compute", "tpus", "queued-resources"], sys.argv
parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument("verb", choices=["create", "describe", "delete", "ssh", "scp"])
parser.add_argument("words", nargs="+")
for name in ("zone", "project", "node-id", "node-prefix", "node-count", "accelerator-type", "runtime-version", "format",
             "node", "worker", "command"):
    parser.add_argument("--" + name)
for name in ("spot", "reserved", "force", "recurse", "quiet"):
    parser.add_argument("--" + name, action="store_true")
args = parser.parse_intermixed_args(sys.argv[4:])
state, workers = cloud / "state", [cloud / "worker0", cloud / "worker1"]
if args.verb == "create":
    assert not state.exists(), "ALREADY_EXISTS"
    for worker in workers:
        worker.mkdir()
    state.write_text("WAITING_FOR_RESOURCES ACTIVE")
elif not state.exists():
    sys.exit("ERROR: (gcloud.compute.tpus.queued-resources." + args.verb + ") NOT_FOUND: Resource was not found.")
elif args.verb == "describe":
    first, *later = state.read_text().split()
    print(first)
    if later:
        state.write_text(" ".join(later))
elif args.verb == "delete":
    assert args.force
    state.unlink()
    for worker in workers:
        shutil.rmtree(worker)
elif args.verb == "scp":
    *files, target = args.words
    assert target.endswith(":") and (args.node, args.worker) == ("all", "all")
    for worker in workers:
        for file in files:
            shutil.copy(file, worker)
else:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    running = []
    for number, worker in enumerate(workers[: None if args.worker == "all" else 1]):
        own = {"HOME": str(worker), "PATH": str(cloud / "bin") + ":/usr/bin:/bin", "RLJAX_PROCESS_ID": str(number),
               "RLJAX_COORDINATOR": f"localhost:{port}", "RLJAX_PROCESSES": "2"}
        running.append(subprocess.Popen(["bash", "-c", args.command], cwd=worker, env={**os.environ, **own},
                                        stdin=subprocess.DEVNULL))
    sys.exit(next(filter(None, [process.wait() for process in running]), 0))
"""
# What setup.sh calls on a worker that would change this machine.
PYTHON3 = """#!/bin/sh
echo "$@" >> "$HOME/python3.calls"
case "$*" in
  *"uv venv"*) mkdir -p rljax-env/bin && ln -sf "$FAKE_CLOUD/bin/rljax" rljax-env/bin/rljax ;;
esac
"""
SUDO = """#!/bin/sh
[ "$1 $2 $3" = "mount -t nfs" ] && rmdir "$5" && ln -s "$FAKE_CLOUD/share" "$5"
"""
MOUNTPOINT = """#!/bin/sh
[ -L "$2" ]
"""
RLJAX = """#!/bin/sh
exec PYTHON -m rljax "$@"
"""
ON_WORKERS = {
    "python3": PYTHON3,
    "sudo": SUDO,
    "mount.nfs": "#!/bin/sh\n",
    "mountpoint": MOUNTPOINT,
    "rljax": RLJAX,
}
SRUN = r"""#!PYTHON
import os, signal, subprocess, sys

command = [word for word in sys.argv[1:] if word != "--kill-on-bad-exit=0"]
tasks = [
    subprocess.Popen(command, env={**os.environ, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
                                   "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(task), "SLURM_LOCALID": "0"})
    for task in (0, 1)
]
signal.signal(signal.SIGTERM, lambda *_: [task.send_signal(signal.SIGTERM) for task in tasks])
open("srun.pid", "w").write(str(os.getpid()))
sys.exit(max(128 - status if status < 0 else status for status in [task.wait() for task in tasks]))
"""
EXPERIMENT = """
from rljax import offline, train

experiment = offline.SFT(
    model={model!r}, data={texts!r}, schedule=train.constant, steps=24, batch=4, max_prompt=16, max_completion=16,
    learning_rate=1e-4, eval_every=200, eval_rows=4, save_every=200, samples=1, sample_tokens=2, checks=False,
)
"""


def program(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace("PYTHON", sys.executable))
    path.chmod(0o755)


class Cloud:
    """A folder that stands for the cloud, and the processes that were started for it."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.running = folder, []
        (folder / "share").mkdir()
        program(folder / "path" / "gcloud", GCLOUD)
        for name, text in ON_WORKERS.items():
            program(folder / "bin" / name, text)
        slice_of = {"NAME": "my-slice", "ZONE": "us-west4-a", "PROJECT": "mine", "MOUNT": "10.0.0.2:/share"}
        self.variables = {
            **{
                name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "RLJAX", "CLOUDSDK"))
            },
            **slice_of,
            "PATH": f"{folder / 'path'}:{os.environ['PATH']}",
            "PYTHONPATH": str(pair.ROOT),
            "FAKE_CLOUD": str(folder),
            "XLA_FLAGS": compiler.flags(),
            "RLJAX_CACHE": str(folder.parent / "cache"),
            "JAX_ENABLE_COMPILATION_CACHE": "true",  # five starts of one program: compiled once
            "EVERY": "1",
        }

    def start(self, *command: str, **variables: str) -> subprocess.Popen:
        command = ("bash", str(SCRIPTS / command[0]), *command[1:])
        with (self.folder / f"said.{len(self.running)}").open("w") as said:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={**self.variables, **variables},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.running.append(process)
        return process

    def said(self, process: subprocess.Popen) -> str:
        return (self.folder / f"said.{self.running.index(process)}").read_text()

    def do(self, *command: str, status: int = 0, seconds: float = 60, **variables: str) -> str:
        process = self.start(*command, **variables)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{command} takes more than {seconds} s: {self.said(process)}")
        assert process.returncode == status, self.said(process)
        return self.said(process)

    def calls(self) -> list[list[str]]:
        """The verb and the words of every call so far, without what all have."""
        found = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        assert all(call[:3] == PREFIX for call in found)
        assert all(call[-5:] == ["--zone", "us-west4-a", "--project", "mine", "--quiet"] for call in found)
        return [call[3:-5] for call in found]

    def job(self, worker: int, name: str) -> str:
        path = self.folder / f"worker{worker}" / "rljax-job" / name
        return path.read_text().strip() if path.exists() else ""

    def shut_down(self, worker: int, number: int = signal.SIGTERM) -> None:
        """To all that runs there: the program and the shell around it."""
        pid = int(self.job(worker, "pid"))
        shell = int(pathlib.Path(f"/proc/{pid}/stat").read_text().split()[3])
        for process in (shell, pid):
            os.kill(process, number)

    def ended(self, seconds: float = 250) -> list[str]:
        """The exit status of the run on each worker, once all have one."""
        deadline = time.monotonic() + seconds
        while not all(found := [self.job(worker, "status") for worker in (0, 1)]):
            assert time.monotonic() < deadline, f"it does not end: {self.job(0, 'log')[-3000:]}"
            time.sleep(0.1)
        return found

    def end(self) -> None:
        """What a script has left in the background is of its session."""
        for process in self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.end()


def undisturbed(cloud: Cloud, file: str) -> None:
    """A slice is made, a run begun and ended, the slice deleted."""
    cloud.do("create.sh", *OPTIONS)
    cloud.do("setup.sh", *OPTIONS, "--copy", file)
    cloud.do("run.sh", pathlib.Path(file).name)
    assert cloud.ended() == ["0", "0"], cloud.job(0, "log")
    assert re.findall("^rljax:.*$", cloud.do("status.sh"), re.MULTILINE) == ["rljax:ended:0"] * 2
    assert cloud.job(0, "log").splitlines()[-1] in cloud.do("logs.sh", "--last", "3")
    cloud.do("delete.sh")


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    """(the file, the folder of its run, what the cloud was asked): begun and ended by hand, undisturbed."""
    folder = tmp_path_factory.mktemp("whole")
    file = pair.files(folder / "files", {"sft": EXPERIMENT.format(model=str(small), texts=cases.texts(folder))})["sft"]
    cloud = Cloud(folder)
    try:
        undisturbed(cloud, file)
    finally:
        cloud.end()
    return file, folder / "share" / "sft", cloud.calls()


def same_as_whole(run: pathlib.Path, whole: pathlib.Path) -> None:
    assert state_bits(run) == state_bits(whole)
    rows = [tracking.read_rows(folder / "metrics.jsonl") for folder in (run, whole)]
    assert rows[0] == rows[1]
    assert [row["step"] for row in rows[0]] == list(range(25))


@pytest.mark.parametrize(
    "script", sorted([*SCRIPTS.glob("*.sh"), *SCRIPTS.glob("*.sbatch")]), ids=lambda path: path.name
)
def test_scripts_are_clean_and_small(script):
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
    found = subprocess.run(
        [shellcheck, "--enable=quote-safe-variables", script],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert len(script.read_text().splitlines()) < 60
    assert script.name == "common.sh" or os.access(script, os.X_OK) or script.suffix == ".sbatch"


@pytest.mark.long
def test_a_slice_from_create_to_delete(whole):
    file, run, calls = whole
    assert_undisturbed(file, calls)
    assert [row["step"] for row in tracking.read_rows(run / "metrics.jsonl")] == list(range(25))


def assert_undisturbed(file, calls):
    """The calls of an undisturbed run, and what a worker was told."""
    create, copy, setup, start, status, logs, delete = calls
    assert create == [
        *("create", "my-slice", "--node-id", "my-slice", "--accelerator-type", "v5litepod-8"),
        *("--runtime-version", "v2-alpha-tpuv5-lite", "--spot"),
    ]
    everywhere = ["--node=all", "--worker=all"]
    assert copy == ["scp", file, "my-slice:", "--recurse", *everywhere]
    for call in (setup, start, status):
        assert call[:5] == ["ssh", "my-slice", *everywhere, "--command"]
    assert shlex.split(setup[5])[3:] == ["rljax", "rljax-lm==0.1.0", "10.0.0.2:/share"]
    assert shlex.split(start[5])[3:] == ["rljax", "sft.py"]
    assert logs == ["ssh", "my-slice", "--node=0", "--worker=0", "--command", "tail -n 3 ~/rljax-job/log"]
    assert delete == ["delete", "my-slice", "--force"]


@pytest.mark.long  # with a program that records what it is told: below
def test_a_preempted_run_is_brought_back_and_ends_with_the_same_bits(cloud, whole):
    file, undisturbed, _ = whole
    words = ["--name", 'it\'s $HOME; "a" & b']
    watch = cloud.start("watch.sh", *OPTIONS, "--delete", "--copy", file, "sft.py", *words)
    run = cloud.folder / "share" / words[1]
    wait_for_record(run, 3, watch)
    (cloud.folder / "state").write_text("SUSPENDING")
    for worker in (0, 1):
        cloud.shut_down(worker)
    assert cloud.ended() == ["143", "143"], cloud.job(0, "log")
    stopped = int(max((path.name for path in (run / "checkpoints").iterdir() if path.name.isdecimal()), key=int))
    assert 3 <= stopped < 24
    (cloud.folder / "state").write_text("SUSPENDED")
    deadline = time.monotonic() + 250
    while watch.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert watch.returncode == 0, cloud.said(watch)
    same_as_whole(run, undisturbed)
    verbs = [call[0] for call in cloud.calls() if call[0] in ("create", "delete")]
    assert verbs == ["create", "delete", "create", "delete"]
    assert not (cloud.folder / "worker0").exists()


RECORDS = """#!/bin/sh
printf '%s\\0' "$@" > "$HOME/words"
echo "said by $RLJAX_PROCESS_ID"
trap 'exit 143' TERM
until [ -e "$FAKE_CLOUD/over" ]; do sleep 0.1; done
exit STATUS
"""


def test_a_slice_from_create_to_delete_with_a_program_that_records(cloud):
    (file,) = pair.files(cloud.folder, {"sft": ""}).values()
    program(cloud.folder / "bin" / "rljax", RECORDS.replace("STATUS", "0"))
    (cloud.folder / "over").touch()
    undisturbed(cloud, file)
    assert_undisturbed(file, cloud.calls())


def test_a_slice_that_is_taken_away_is_made_again(cloud):
    program(cloud.folder / "bin" / "rljax", RECORDS.replace("STATUS", "0"))
    watch = cloud.start("watch.sh", *OPTIONS, "--delete", "a.py")

    def wait_for(what):
        deadline = time.monotonic() + 250
        while not what():
            assert watch.poll() is None, cloud.said(watch)
            assert time.monotonic() < deadline, cloud.said(watch)
            time.sleep(0.1)

    wait_for(lambda: all("said by" in cloud.job(worker, "log") for worker in (0, 1)))
    (cloud.folder / "state").write_text("SUSPENDING")
    for worker in (0, 1):
        cloud.shut_down(worker)
    assert cloud.ended() == ["143", "143"], cloud.job(0, "log")
    (cloud.folder / "over").touch()
    (cloud.folder / "state").write_text("SUSPENDED")
    assert watch.wait(250) == 0, cloud.said(watch)
    verbs = [call[0] for call in cloud.calls() if call[0] in ("create", "delete")]
    assert verbs == ["create", "delete", "create", "delete"]
    assert not (cloud.folder / "worker0").exists()


def test_any_words_arrive_as_they_are(cloud):
    """Quotes, spaces, wildcards, substitutions, line ends, empty words and words that look like options."""
    words = [
        "my file.py",
        "--x",
        "",
        "it's",
        '"',
        "$HOME",
        "$(touch bad)",
        "`x`",
        "*",
        "a\nb",
        "\\",
        "–",
        "--dry-run",
        "&",
    ]
    program(cloud.folder / "bin" / "rljax", RECORDS.replace("STATUS", "0"))
    (cloud.folder / "over").touch()
    cloud.do("create.sh", *OPTIONS)
    cloud.do("setup.sh", *OPTIONS)
    cloud.do("run.sh", *words)
    assert cloud.ended() == ["0", "0"]
    for worker in (0, 1):
        sent = (cloud.folder / f"worker{worker}" / "words").read_text().split("\0")[:-1]
        assert sent == ["run", *words]


def test_a_run_is_not_started_twice_and_ends_when_told(cloud):
    program(cloud.folder / "bin" / "rljax", RECORDS.replace("STATUS", "0"))
    cloud.do("create.sh", *OPTIONS)
    cloud.do("setup.sh", *OPTIONS)
    assert re.findall("^rljax:.*$", cloud.do("status.sh"), re.MULTILINE) == ["rljax:absent"] * 2
    cloud.do("run.sh", "a.py")
    assert "at work" in cloud.do("run.sh", "a.py", status=3)
    assert re.findall("^rljax:.*$", cloud.do("status.sh"), re.MULTILINE) == ["rljax:running"] * 2
    assert sorted(re.findall("said by .", cloud.do("logs.sh", "--all", "--last", "5"))) == ["said by 0", "said by 1"]
    cloud.do("stop.sh")
    assert cloud.ended() == ["143", "143"]
    cloud.do("run.sh", "a.py")
    assert re.findall("^rljax:.*$", cloud.do("status.sh"), re.MULTILINE) == ["rljax:running"] * 2
    (cloud.folder / "over").touch()
    assert cloud.ended() == ["0", "0"]
    assert cloud.job(0, "log").count("said by 0") == 2  # what was said before stays


def test_watch_ends_with_the_status_of_a_run_that_failed(cloud):
    """Its last words are shown, it is not begun again, and the slice is given back."""
    program(cloud.folder / "bin" / "rljax", RECORDS.replace("STATUS", "7"))
    (cloud.folder / "over").touch()
    said = cloud.do("watch.sh", *OPTIONS, "--delete", "a.py", status=7)
    assert "said by 0" in said
    assert "said by 1" in said
    assert [call[0] for call in cloud.calls()].count("create") == 1
    assert not (cloud.folder / "state").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])  # the latter as a power cut: no last word
def test_watch_begins_again_where_workers_were_told_to_leave_or_started_again(cloud, number):
    """On the slice that is there; and where a run ended before this watch, which is none of its business."""
    program(cloud.folder / "bin" / "rljax", RECORDS.replace("STATUS", "0"))
    watch = cloud.start("watch.sh", *OPTIONS, "a.py")
    for times in (1, 2):
        deadline = time.monotonic() + 120
        while any(cloud.job(worker, "log").count("said by") < times for worker in (0, 1)):
            assert watch.poll() is None, cloud.said(watch)
            assert time.monotonic() < deadline, cloud.said(watch)
            time.sleep(0.1)
        if times == 1:
            cloud.shut_down(0, number)
            cloud.shut_down(1, number)
    (cloud.folder / "over").touch()
    assert watch.wait(120) == 0
    cloud.do("watch.sh", *OPTIONS, "a.py")
    assert cloud.job(0, "log").count("said by 0") == 3
    assert [call[0] for call in cloud.calls()].count("create") == 1


def test_watch_gives_up_where_nothing_can_be_set_up(cloud):
    program(cloud.folder / "bin" / "python3", "#!/bin/sh\nexit 1\n")
    assert "three times in a row" in cloud.do("watch.sh", *OPTIONS, "a.py", status=2)
    assert [call[0] for call in cloud.calls()].count("ssh") == 2 * 3  # each time after a look
    cloud.do("delete.sh")
    cloud.do("create.sh", *OPTIONS)
    (cloud.folder / "state").write_text("FAILED")
    assert "the request was refused" in cloud.do("watch.sh", *OPTIONS, "a.py", status=2)


def test_a_dry_run_says_what_would_be_asked_and_asks_nothing(cloud):
    """Every printed line is a command that can be run as it is: it asks the same then."""
    words = ["--copy", "it's here.py", "it's here.py", "--x", "$HOME"]
    printed = cloud.do("watch.sh", *OPTIONS, "--dry-run", *words)
    assert not (cloud.folder / "calls").exists()
    lines = re.split(r"^\+ ", printed, flags=re.MULTILINE)[1:]
    asked = [shlex.split(line)[1 + len(PREFIX) : -5] for line in lines]
    assert [call[0] for call in asked] == ["describe", "delete", "create", "scp", "ssh", "ssh", "ssh"]
    assert asked[3] == ["scp", "it's here.py", "my-slice:", "--recurse", "--node=all", "--worker=all"]
    (cloud.folder / "it's here.py").touch()
    program(cloud.folder / "bin" / "rljax", RECORDS.replace("STATUS", "0"))
    (cloud.folder / "over").touch()
    cloud.do("create.sh", *OPTIONS)
    cloud.do("setup.sh", *OPTIONS, *words[:2])
    cloud.do("run.sh", *words[2:])
    assert cloud.calls() == asked[2:6]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["create.sh", "--runtime-version", "r"], "ACCELERATOR_TYPE is missing: say --type v5litepod-16 or set"),
        (["create.sh", "--type", "t"], "RUNTIME_VERSION is missing: say --runtime-version"),
        (["create.sh", *OPTIONS, "--reserved"], "either --spot or --reserved"),
        (["create.sh", *OPTIONS, "--node-count", "many"], "NODE_COUNT=many is not a number of slices"),
        (["watch.sh", *OPTIONS, "--every", "soon", "run.py"], "EVERY=soon is not a number of seconds"),
        (["create.sh", "--bogus"], "there is no option --bogus; create.sh --help lists them"),
        (["create.sh", "--name"], "--name needs a value"),
        (["delete.sh", "--name", ""], "NAME is missing: say --name my-slice or set NAME"),
        (["delete.sh", "--zone", ""], "ZONE is missing"),
        (["setup.sh"], "PACKAGE is missing"),
        (["setup.sh", "--package", "rljax"], "may be another program tomorrow"),
        (["setup.sh", "--package", "rljax[tpu]==0.1.0"], "`rljax` on PyPI is another project"),
        (["setup.sh", "--package", "rljax @ git+https://host/rljax@1a2b"], "ours is called rljax-lm"),
        (["setup.sh", "--package", "git+ssh://git@host/rljax"], "may be another program tomorrow"),
        (["setup.sh", *OPTIONS, "--copy", "nowhere.py"], "there is no nowhere.py to copy"),
        (["run.sh"], "name the experiment file"),
        (["watch.sh", *OPTIONS], "name the experiment file"),
        (["logs.sh", "--last", "few"], "--last few is not a number"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_asked(cloud, command, reason):
    assert reason in cloud.do(*command, status=2)
    assert not (cloud.folder / "calls").exists()


def test_several_slices_are_one_request(cloud):
    said = cloud.do("create.sh", *OPTIONS, "--dry-run", "--node-count", "2")
    assert " create my-slice --node-prefix my-slice --node-count 2 --accelerator-type" in said
    assert "--node-id" not in said


@pytest.mark.parametrize("script", sorted(path.name for path in SCRIPTS.glob("*.sh") if path.name != "common.sh"))
def test_help_names_every_option_that_a_script_reads(cloud, script):
    said = cloud.do(script, "--help")
    assert f"{script} --name my-slice" in said
    assert "common.sh" not in said
    for name in re.findall(
        r"\$\{?(SPOT|RESERVED|ALL|LAST|DELETE|MOUNT|PACKAGE|NODE_COUNT)\b", (SCRIPTS / script).read_text()
    ):
        assert f"--{name.lower().replace('_', '-')}" in said


@pytest.mark.long
def test_slurm_ends_a_run_in_time_puts_it_back_and_resumes_to_the_same_bits(cloud, whole):
    file, undisturbed, _ = whole
    program(cloud.folder / "path" / "srun", SRUN)
    program(cloud.folder / "path" / "scontrol", '#!/bin/sh\necho "$@" > scontrol.said\n')
    job = next(job for job in range(70, 170) if _free(job % 2**12 + 65536 - 2**12))  # JAX makes the port of it
    variables = {"SLURM_JOB_ID": str(job), "RLJAX": str(cloud.folder / "bin" / "rljax")}
    step = cloud.start("slurm.sbatch", file, **variables)
    run = cloud.folder / "runs" / "sft"
    wait_for_record(run, 3, step)
    os.kill(int((cloud.folder / "srun.pid").read_text()), signal.SIGTERM)
    assert step.wait(200) == 143, cloud.said(step)
    assert (cloud.folder / "scontrol.said").read_text() == f"requeue {job}\n"
    (cloud.folder / "scontrol.said").unlink()
    assert "resumed at step" in cloud.do("slurm.sbatch", file, seconds=250, **variables)
    assert not (cloud.folder / "scontrol.said").exists()
    same_as_whole(run, undisturbed)


def test_slurm_puts_back_what_it_ends(cloud):
    program(cloud.folder / "path" / "srun", SRUN)
    program(cloud.folder / "path" / "scontrol", '#!/bin/sh\necho "$@" > scontrol.said\n')
    program(cloud.folder / "bin" / "rljax", RECORDS.replace("STATUS", "0"))
    variables = {"SLURM_JOB_ID": "77", "RLJAX": str(cloud.folder / "bin" / "rljax"), "HOME": str(cloud.folder)}
    step, deadline = cloud.start("slurm.sbatch", "a.py", **variables), time.monotonic() + 60
    while cloud.said(step).count("said by") < 2 or not (cloud.folder / "srun.pid").exists():
        assert step.poll() is None, cloud.said(step)
        assert time.monotonic() < deadline, cloud.said(step)
        time.sleep(0.05)
    os.kill(int((cloud.folder / "srun.pid").read_text()), signal.SIGTERM)
    assert step.wait(60) == 143, cloud.said(step)
    assert (cloud.folder / "scontrol.said").read_text() == "requeue 77\n"
    (cloud.folder / "scontrol.said").unlink()
    (cloud.folder / "over").touch()
    cloud.do("slurm.sbatch", "a.py", **variables)
    assert not (cloud.folder / "scontrol.said").exists()


def test_slurm_is_told_when_to_signal_and_gives_each_process_a_gpu():
    text = (SCRIPTS / "slurm.sbatch").read_text()
    told = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines() if "#SBATCH --" in line
    )
    assert told["signal"] == "TERM@120"
    assert "requeue" in told
    assert told["ntasks-per-node"] == told["gpus-per-node"]
    assert told["open-mode"] == "append"


def test_slurm_leaves_a_run_that_failed_out_of_the_queue(cloud):
    program(cloud.folder / "path" / "srun", "#!/bin/sh\nexit 2\n")
    cloud.do("slurm.sbatch", "a.py", status=2, SLURM_JOB_ID="7")
    assert "name the experiment file" in cloud.do("slurm.sbatch", status=2)


def _free(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("localhost", port)) != 0


@pytest.mark.parametrize("name", ["jobset.yaml", "jobset-gpu.yaml"])
def test_a_jobset_restarts_as_one_what_was_told_to_leave(name):
    jobset = yaml.safe_load((SCRIPTS / name).read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert job["parallelism"] == job["completions"]
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    assert pod["terminationGracePeriodSeconds"] >= 120
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 0
    (rule,) = policy["rules"]
    assert rule == {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
    codes = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert codes == [{"containerName": container["name"], "operator": "In", "values": [143]}]
    assert container["command"][:2] == ["rljax", "run"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts["runs"] == container["command"][container["command"].index("--out") + 1]
    assert {volume["name"] for volume in pod["volumes"]} == set(mounts)


def test_the_machines_of_a_tpu_jobset_have_the_chips_of_its_topology():
    (slices,) = yaml.safe_load((SCRIPTS / "jobset.yaml").read_text())["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert rows * columns == job["completions"] * pod["containers"][0]["resources"]["limits"]["google.com/tpu"]


def test_the_pods_of_a_gpu_jobset_find_each_other(monkeypatch):
    jobset = yaml.safe_load((SCRIPTS / "jobset-gpu.yaml").read_text())
    (nodes,) = jobset["spec"]["replicatedJobs"]
    job = nodes["template"]["spec"]
    first = f"{jobset['metadata']['name']}-{nodes['name']}-0-0.{jobset['metadata']['name']}"
    (container,) = job["template"]["spec"]["containers"]
    for index in range(job["completions"]):
        for variable in container["env"]:
            if "valueFrom" in variable:
                path = variable["valueFrom"]["fieldRef"]["fieldPath"]
                assert path == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
            monkeypatch.setenv(variable["name"], variable.get("value", str(index)))
        assert distributed._by_variables() == (f"{first}:8476", job["completions"], index)
