"""Several calls of the command line in one process: `python -m tests.distributed.several '[[STATUS, ["run", …]], …]'`.

Each call has to end with its status. ["checkpoints", SOURCE, FOLDER] is a call of `checkpoint_files`.
"""

import faulthandler
import gc
import json
import pathlib
import sys

import jax
from matplotlib.figure import Figure

from rljax import cli, distributed
from tests.distributed import checkpoint_files


def connect() -> None:
    faulthandler.enable()  # where it was, if it is ended at a deadline
    jax.config.update("jax_numpy_rank_promotion", "raise")
    distributed.initialize()
    # As in tests/conftest.py: what is imported stays, and nobody looks at the pictures of reports.
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    Figure.savefig = lambda figure, file, **_: None if hasattr(file, "write") else pathlib.Path(file).touch()


def checkpoints(source: str, folder: str) -> int:
    checkpoint_files.main(source, pathlib.Path(folder))
    return 0


def main() -> None:
    connect()
    for expected, call in json.loads(sys.argv[1]):
        status = checkpoints(*call[1:]) if call[0] == "checkpoints" else cli.main(call)
        if status != expected:
            print(f"{call} ended with the status {status}", file=sys.stderr)
            raise SystemExit(status or 1)


if __name__ == "__main__":
    main()
