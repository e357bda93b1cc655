"""The command line that all commands share: absl flags, and configs by `--config=FILE[:variant]`."""

import os
import sys
from collections.abc import Callable

from absl import app, flags
from ml_collections import config_flags

from meanflow.config import options, paths
from meanflow.config.resolve import flatten
from meanflow.errors import UserError, exit_on_user_error

FILES = ("config", "guide_config")  # flags of config files
_CONFIG = config_flags.DEFINE_config_file("config", None, "Python file of the run, e.g. configs/digits.py[:variant].")
_WORKDIR = flags.DEFINE(paths.WRITTEN, "workdir", None, "Directory of the run: config, checkpoints, logs, samples.")


def config():
    """Return the config of `--config`, its overrides applied, or None without the flag."""
    return _CONFIG.value


def workdir() -> str:
    """Return `--workdir`, absolute.  Raises UserError if it is not given, or cannot be a directory."""
    if not _WORKDIR.value:
        raise UserError("--workdir is missing: name the directory of the run, e.g. --workdir=runs/digits")
    return paths.check_directory(_WORKDIR.value, "workdir")


def run(main: Callable[[], None]) -> None:
    """Parse the command line and call `main`; what the user got wrong becomes one line and exit code 2."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(_help())
        return
    with exit_on_user_error():
        app.run(lambda _: main(), flags_parser=_parse)


def overrides(argv: list[str]) -> list[str]:
    """Return the dotted options that `--config.OPTION=VALUE` arguments name."""
    return [a.split("=")[0].removeprefix("--config.") for a in argv if a.startswith("--config.")]


def _help() -> str:
    program = sys.modules["__main__"]
    return "\n".join(
        [
            str(program.__doc__),
            flags.FLAGS.module_help("meanflow.config.flags"),
            flags.FLAGS.main_module_help(),
            "\n  --config.SECTION.OPTION=VALUE overrides an option; meanflow/config/options.py lists them.",
        ]
    )


def _with_files(argv: list[str]) -> list[str]:
    """Return the arguments, config files as --config=FILE[:variant] with `~` expanded.

    Raises UserError if there is no such file or it cannot be a config.
    """
    found, rest = [], iter(argv)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag.lstrip("-") not in FILES or not flag.startswith("-"):
            found.append(argument)
            continue
        value = paths.expand(value if equals else next(rest, ""))
        path = value.split(":", 1)[0]
        if not os.path.isfile(path):
            raise UserError(f"there is no config file {path}; configs/digits.py is one that is")
        if not path.endswith(".py"):
            raise UserError(f"--{flag.lstrip('-')}={path} is not a config file, FILE.py[:variant]")
        found.append(f"{flag}={value}")
    return found


def _parse(argv: list[str]) -> list[str]:
    argv = _with_files(argv)
    try:
        rest = flags.FLAGS(argv)
    except SyntaxError as error:
        raise UserError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    except ImportError as error:
        raise UserError(f"a config file cannot be imported: {error}") from error
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        unknown = [name for name in overrides(argv) if name not in flatten(options.get_config())]
        if unknown:
            raise UserError(
                f"there is no option config.{unknown[0]}; meanflow/config/options.py lists the options"
            ) from error
        reason = [line for line in str(error).splitlines() if line.strip()][-1].strip()
        raise UserError(f"{reason}  (--help lists the flags, meanflow/config/options.py the options)") from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: flags are written --name=value")
    return rest
