"""Building blocks of a config: options with defaults and allowed values, in sections that reject unknown options."""

import itertools
import math
from typing import Any, NamedTuple, TypeAlias

import ml_collections

from meanflow.errors import UserError

Config: TypeAlias = Any  # a Section; type checkers cannot see its options
FIXED = ("config.model.name", "config.method.name")  # options that determine which other options exist


class Option(NamedTuple):
    """An option restricted to some values of its type."""

    default: Any
    interval: str = ""  # for numbers; [ and ] include the end, ( and ) exclude it; NaN is always outside
    choices: tuple[str, ...] = ()


Options: TypeAlias = dict[str, Any]  # {name: an `Option`, a default, or the options of a nested section}


def number(default: float, interval: str) -> Option:
    """Return an option for a number in an interval, written like "[0, 1)"."""
    return Option(default, interval=interval)


def choice(*choices: str) -> Option:
    """Return an option for one of several words; the first is the default."""
    return Option(choices[0], choices=choices)


class Section(ml_collections.ConfigDict):
    """Options of a run.  Once locked, setting an unknown option, or the network or method, raises UserError."""

    origin: tuple[str, str]  # its dotted name, and a phrase naming the network and method

    def __init__(self, *args: Any, path: str = "", run: str = "", **kwargs: Any):
        """path, run: see `origin`."""
        object.__setattr__(self, "origin", (path, run))
        super().__init__(*args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        object.__setattr__(self, "origin", state["origin"])

    def __setitem__(self, key: str, value: Any) -> None:
        if self.is_locked and key not in self:
            raise self.lacks(key)
        name = f"{self.origin[0]}.{key}"
        if self.is_locked and name in FIXED and value != self[key]:
            raise UserError(
                f"{name} is {self[key]!r} and cannot be changed to {value!r}, which has other options: choose another "
                "config file or variant, or call get_config(network=..., method=...) in a file of your own"
            )
        super().__setitem__(key, value)

    def lacks(self, key: str) -> UserError:
        """Return the error for an option that this section does not have."""
        path, run = self.origin
        return UserError(f"there is no option {path}.{key} with {run}; {path} has {', '.join(self)}")


def make(options: Options, path: str, run: str) -> Section:
    """Build a section from options, each set to its default.  path, run: see `Section`."""
    section = Section(path=path, run=run)
    for name, value in options.items():
        if isinstance(value, dict):
            section[name] = make(value, f"{path}.{name}", run)
        else:
            section[name] = value.default if isinstance(value, Option) else value
    return section


def find(config: Config, name: str) -> Any:
    """Return the value of a dotted option.  Raises UserError if the config has no such option."""
    value = config
    for part in name.split("."):
        if not isinstance(value, Section) or part not in value:
            raise (value if isinstance(value, Section) else config).lacks(part)
        value = value[part]
    return value


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return {dotted option: value} for a config or nested dicts."""
    flat = {}
    for key, value in config.items():
        nested = isinstance(value, (dict, ml_collections.ConfigDict))
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def check_values(section: Config, options: Options) -> None:
    """Raise UserError for options that are missing, unknown, not among their choices or outside their interval."""
    path, _ = section.origin
    for name in section:
        if name not in options:
            raise section.lacks(name)
    for name, allowed in options.items():
        if name not in section:
            raise UserError(f"{path}.{name} is missing")
        value = section[name]
        if isinstance(allowed, dict):
            check_values(value, allowed)
        elif not is_choice(value, allowed):
            raise UserError(f"{path}.{name} is {value!r}; choose one of {', '.join(allowed.choices)}")
        elif isinstance(allowed, Option) and allowed.interval and not contains(allowed.interval, value):
            finite = " and finite" if value == math.inf and allowed.interval[0] == "[" else ""
            raise UserError(f"{path}.{name} is {value}; it must be {describe(allowed.interval)}{finite}")


def is_choice(value: Any, allowed: Any) -> bool:
    """Return whether a value is among the option's choices; True if it has none."""
    return not isinstance(allowed, Option) or not allowed.choices or value in allowed.choices


def ends(interval: str) -> tuple[float, float]:
    """Return the two ends of an interval."""
    least, most = interval[1:-1].split(", ")
    return float(least), float(most)


def contains(interval: str, value: float) -> bool:
    """Return whether a value is in the interval."""
    least, most = ends(interval)
    after = value >= least if interval[0] == "[" else value > least
    return after and (value <= most if interval[-1] == "]" else value < most)


def describe(interval: str) -> str:
    """Return the interval in words: "at least 0 and less than 1"."""
    least, most = ends(interval)
    if math.isinf(least):
        return "a finite number"
    words = f"at least {least:.0f}" if interval[0] == "[" else f"a number above {least:.0f}"
    if math.isinf(most):
        return words
    return f"{words} and {'at most' if interval[-1] == ']' else 'less than'} {most:.0f}"


def falls(values: tuple[float, ...]) -> bool:
    """Return whether there are at least two values, strictly decreasing."""
    return len(values) > 1 and all(a > b for a, b in itertools.pairwise(values))


def pair(value: object, key: str, what: str) -> tuple[float, float]:
    """Return `value` if it is two finite numbers.  Raises UserError naming the option `key` and their meaning."""
    if not isinstance(value, tuple) or len(value) != 2 or not all(is_number(v) for v in value):
        raise UserError(f"config.{key} is {value}; give two numbers, {what}")
    return value


def is_number(value: object) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)
