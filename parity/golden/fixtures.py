"""Golden fixtures: outputs of the official code, one .npz per system, read so that no output goes unchecked.

A fixture holds `config` (JSON), `param/NAME`, `in/...` and the results `out/...`, `grad/CASE/NAME`, `init/NAME`.
Results are grouped into cases; each family of systems registers functions that run a group.
"""

import functools
import json
import pathlib
import zipfile
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from meanflow.errors import UserError
from parity.checks import Case
from parity.golden import augment, dit, dmf, edm2, imf, inception, metrics, optim, sit, unet, vae

RESULTS = ("out/", "grad/", "init/")
# Modules by the `system` in a fixture's config; new families add theirs.
SYSTEMS = {
    "sit_torch": sit, "meanflow_dit_flax": dit, "ema_lr_optim": optim,
    "edm_augment_torch": augment, "meanflow_unet_torch": unet, "sit_cifar_unet_torch": unet,
    "imf_dit_flax": imf, "imf_dit_torch": imf, "dmf_sit_torch": dmf,
    "dmf_dmft_torch": dmf, "dmf_dmft_qknorm_torch": dmf,
    "remeanflow_edm2_torch": edm2, "edm2_reflow_torch": edm2, "vae": vae, "vae_flax": vae,
    "latent_scaling": vae, "inception_fid": inception, "metrics": metrics,
}  # fmt: skip


class MissingKey(UserError):
    """A fixture lacks an array or a setting that its system requires."""


class Settings(dict):
    """A JSON object, or a union of two, whose missing keys are reported by name."""

    def __or__(self, other):
        return Settings(super().__or__(other))

    def __missing__(self, key):
        raise MissingKey(f"the fixture's config has no {key!r}")


class Fixture:
    """The arrays and settings of one file; arrays are read on demand.  Raises UserError."""

    def __init__(self, path: pathlib.Path):
        self.path, self.name = path, path.stem
        try:
            self.arrays = np.load(path, allow_pickle=False)  # a lazy mapping: the file stays open
            text = str(self.arrays["config"]) if "config" in self.arrays else ""
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"cannot read {path} as a golden fixture: {error}") from error
        try:
            self.config = json.loads(text, object_hook=Settings)
        except json.JSONDecodeError as error:
            raise UserError(f"{path} has no JSON under the key 'config': is it a golden fixture?") from error
        self.system = self.config.get("system", self.name)
        self.used: set[str] = set()

    def get(self, key: str) -> np.ndarray:
        """Return an array and mark it as used.  Raises MissingKey, or UserError if it is damaged."""
        if key not in self.arrays:
            raise MissingKey(f"{self.name} has no {key!r}")
        self.used.add(key)
        try:
            return self.arrays[key]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"cannot read {key!r} of {self.path}, which may be damaged: {error}") from error

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        """Return {rest of the key: array} for all keys that begin with `prefix`, and mark them as used."""
        keys = [key for key in self.arrays if key.startswith(prefix)]
        return {key.removeprefix(prefix): self.get(key) for key in keys}

    def results(self) -> list[str]:
        """Return the keys of all results."""
        return [key for key in self.arrays if key.startswith(RESULTS)]


class Plan(NamedTuple):
    """The cases that a directory of fixtures calls for."""

    cases: list[Case]
    keys: dict[str, tuple[Fixture, list[str]]]  # by case: the results it must check
    not_covered: list[str]  # golden/FILE of unknown systems, golden/FILE/KEY of results that belong to no case


def plan(directory: pathlib.Path) -> Plan:
    """Return the cases of all fixtures in a directory.  Raises UserError if there are none or one is unreadable."""
    paths = sorted(directory.glob("*.npz")) if directory.is_dir() else []
    if not paths:
        raise UserError(f"{directory} holds no golden fixture (*.npz)")
    result = Plan([], {}, [])
    for path in paths:
        fixture = Fixture(path)
        if fixture.system not in SYSTEMS:
            result.not_covered.append(f"golden/{fixture.name}")
            continue
        try:
            plan_fixture(fixture, SYSTEMS[fixture.system], result)
        except MissingKey as error:
            raise UserError(f"{path} is not a fixture of {fixture.system}: {error}") from error
    return result


def plan_fixture(fixture: Fixture, system, result: Plan) -> None:
    """Add the cases of one fixture, first those that its config promises: `system.groups(fixture)`."""
    groups: dict[str, list[str]] = {group: [] for group in system.groups(fixture)}
    for key in fixture.results():
        groups.setdefault(group_of(key), []).append(key)
    for group, keys in groups.items():
        run = runner(system, group)
        if run is None:
            result.not_covered.extend(f"golden/{fixture.name}/{key}" for key in keys)
            continue
        case = Case(f"golden/{fixture.name}/{group}", functools.partial(run, fixture), fixture.name)
        result.cases.append(case)
        result.keys[case.name] = (fixture, keys)


def group_of(key: str) -> str:
    """Return the case of a result: out/loss/a/u and grad/a/w -> loss/a, out/fwd/u -> fwd, init/w -> init."""
    kind, *parts = key.split("/")
    if kind == "init":
        return "init"
    if kind == "grad":
        return f"loss/{parts[0]}"
    whole = {"loss": 2, "time": 2, "sample": 2, "lr": 2, "opt": 1, "ema": 1}  # components that name the case
    return "/".join(parts[: whole.get(parts[0], 1)])


def runner(system, group: str) -> Callable | None:
    """Return the function (fixture, measure) that runs a group, bound to the group's second component if it has one.

    A system whose groups are named by the fixture has a single runner, `*`, which gets the whole name.
    """
    kind, *name = ["*", group] if "*" in system.RUNNERS else group.split("/", 1)
    run = system.RUNNERS.get(kind)
    if run is None or not name:
        return run
    return lambda fixture, measure: run(fixture, name[0], measure)
