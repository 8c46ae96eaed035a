"""The error that is the user's to mend."""

__all__ = ["UserError"]


class UserError(ValueError):
    """What the user can mend: one paragraph with the offending value and the fix.

    The command line prints it without a traceback and exits with status 2; every other exception keeps its traceback.
    """
