"""The command line shared by all commands: absl flags, and configs given as `--config=FILE[:variant]`."""

import os
import sys
from collections.abc import Callable

from absl import app, flags
from ml_collections import config_flags

from meanflow.config import paths
from meanflow.config.sections import find
from meanflow.config.store import load_file
from meanflow.errors import UserError, exit_on_user_error

FILES = ("config", "guide_config")  # flags that name config files
_CONFIG = config_flags.DEFINE_config_file("config", None, "Python file of the run, e.g. configs/digits.py[:variant].")
_WORKDIR = flags.DEFINE(paths.WRITTEN, "workdir", None, "Directory of the run: config, checkpoints, logs, samples.")


def config():
    """Return the config of `--config` with overrides applied, or None without the flag."""
    return _CONFIG.value


def workdir() -> str:
    """Return `--workdir` as an absolute path.  Raises UserError if it is missing or cannot be a directory."""
    if not _WORKDIR.value:
        raise UserError("--workdir is missing: name the directory of the run, e.g. --workdir=runs/digits")
    return paths.check_directory(_WORKDIR.value, "workdir")


def run(main: Callable[[], None]) -> None:
    """Parse the command line and call `main`.  User errors print one line and exit with code 2."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(_help())
        return
    with exit_on_user_error():
        app.run(lambda _: main(), flags_parser=_parse)


def _help() -> str:
    program = sys.modules["__main__"]
    return "\n".join(
        [
            str(program.__doc__),
            flags.FLAGS.module_help("meanflow.config.flags"),
            flags.FLAGS.main_module_help(),
            "\n  --config.SECTION.OPTION=VALUE overrides an option of the config file.  In meanflow/config, options.py"
            "\n  lists the options of all runs, networks.py and methods.py those of one network or method.",
        ]
    )


def _with_files(argv: list[str]) -> list[str]:
    """Return the arguments with config files written as --config=FILE[:variant] and `~` expanded.

    Raises UserError if a file does not exist or is not a .py file.
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
            raise UserError(f"there is no config file {path}; name a recipe, such as configs/digits.py")
        if not path.endswith(".py"):
            raise UserError(f"--{flag.lstrip('-')}={path} is not a config file, FILE.py[:variant]")
        found.append(f"{flag}={value}")
    return found


def _check_configs(argv: list[str]) -> None:
    """Raise UserError if a config file fails to load or an override names an option its config does not have."""
    configs = {}
    for argument in argv:
        name, _, value = argument.lstrip("-").partition("=")
        flag, _, option = name.partition(".")
        if name in FILES:
            configs[name] = load_file(value)
        elif flag in configs:
            find(configs[flag], option)


def _parse(argv: list[str]) -> list[str]:
    argv = _with_files(argv)
    try:
        rest = flags.FLAGS(argv)
    except SyntaxError as error:
        raise UserError(f"{error.filename}, line {error.lineno}: {error.msg}") from error
    except ImportError as error:
        raise UserError(f"a config file cannot be imported: {error}") from error
    except UserError:
        raise
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        _check_configs(argv)
        reason = [line for line in str(error).splitlines() if line.strip()][-1].strip()
        raise UserError(f"{reason}  (--help lists the flags)") from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: flags are written --name=value")
    return rest
