"""Several calls of the command line in one process: `python -m tests.distributed.several '[[STATUS, ["run", …]], …]'`.

Each call has to end with its status.
"""

import faulthandler
import json
import sys

import jax

from rljax import cli, distributed


def connect() -> None:
    faulthandler.enable()  # where it was, if it is ended at a deadline
    jax.config.update("jax_numpy_rank_promotion", "raise")
    distributed.initialize()


def main() -> None:
    connect()
    for expected, call in json.loads(sys.argv[1]):
        status = cli.main(call)
        if status != expected:
            print(f"{call} ended with the status {status}", file=sys.stderr)
            raise SystemExit(status or 1)


if __name__ == "__main__":
    main()
