"""The one exception for mistakes that a user can make and fix."""

import contextlib
import sys
from collections.abc import Iterator


class UserError(ValueError):
    """A mistake outside the code: a wrong option, file or disk.

    Its message names the thing and the fix.  Entry points print it without a traceback and exit with code 2.
    """


@contextlib.contextmanager
def naming(what: object) -> Iterator[None]:
    """Begin the message of any `UserError` with the file or directory at fault, unless it is named already."""
    try:
        yield
    except UserError as error:
        if str(what) in str(error):
            raise
        raise UserError(f"{what}: {error}") from error


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a `UserError` into one line on stderr and exit code 2; everything else passes through."""
    try:
        yield
    except UserError as error:
        lines = (line.strip() for line in str(error).splitlines())  # quoted errors of libraries have several
        print("error:", " ".join(line for line in lines if line), file=sys.stderr, flush=True)
        sys.exit(2)
