"""The console log of a command: absl's, without the internals of libraries."""

import functools
import sys
from collections.abc import Callable
from typing import Any

from absl import flags, logging

_silent: list[bool] = []
VERBOSE = ("orbax", "jax/_src")  # parts of the paths of their sources


def setup_logging() -> None:
    """Show absl's INFO lines on stderr, whether the program runs under absl's app or not.  Call first in main.

    Orbax and JAX log their internals at that level: of theirs, only warnings are shown, without Orbax's tracebacks,
    since it raises the same errors.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # else absl warns that its flags were not parsed
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(_worth_showing)
    sys.unraisablehook = functools.partial(_show_unless_late, sys.unraisablehook)


def show_only_warnings() -> None:
    """Show no INFO lines from here on: for all processes except the first, whose lines are the same."""
    logging.set_verbosity(logging.WARNING)
    _silent.append(True)


def say(text: str) -> None:
    """Print a line on stderr for whoever waits for a command, but not in processes that `show_only_warnings`."""
    if not _silent:
        print(text, file=sys.stderr)


def _show_unless_late(show: Callable[[Any], None], unraisable: Any) -> None:
    """Show an error that nothing can catch, except late reports of TensorStore, which Orbax no longer awaits."""
    if str(unraisable.exc_value) != "Event loop is closed":
        show(unraisable)


def _worth_showing(record: Any) -> bool:
    if "orbax" in record.pathname and record.exc_info:
        return False
    return record.levelname != "INFO" or not any(name in record.pathname for name in VERBOSE)
