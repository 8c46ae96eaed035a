"""Several calls of the command line in one process: `python -m tests.distributed.several '[[STATUS, ["run", …]], …]'`.

Each call has to end with its status.
"""

import json
import os
import sys

import jax

from rljax import cli


def connect() -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    names = ("RLJAX_COORDINATOR", "RLJAX_PROCESSES", "RLJAX_PROCESS_ID")
    address, count, number = (os.environ[name] for name in names)
    jax.distributed.initialize(coordinator_address=address, num_processes=int(count), process_id=int(number))


def main() -> None:
    connect()
    for expected, call in json.loads(sys.argv[1]):
        status = cli.main(call)
        if status != expected:
            print(f"{call} ended with the status {status}", file=sys.stderr)
            raise SystemExit(status or 1)


if __name__ == "__main__":
    main()
