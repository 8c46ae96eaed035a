"""`python -m rljax` is `rljax`."""

import signal
import sys


def main() -> int:
    """The command line. Ctrl-C while it is being imported, which takes seconds, ends the process without a word."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from rljax import cli

    signal.signal(signal.SIGINT, before)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
