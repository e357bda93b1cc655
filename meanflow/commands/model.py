"""A trained model in a few lines of Python: the half of `jax_impl.load` and `torch_impl.load` that they share.

model = torch_impl.load("runs/imf")                      # or jax_impl.load: the same call, the same images
images = model.sample(16, labels=[207, 360], steps=1)    # uint8 [16 h w 3]
"""

import copy
import json
import pathlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np

from meanflow.commands import sample, snapshots
from meanflow.commands.frozen_networks import FrozenNetworks
from meanflow.config import checks, latents, options, store
from meanflow.data.latents import autoencoder, units
from meanflow.errors import UserError, naming
from meanflow.sampling import grids
from meanflow.weights import fitting, hub, reading

PER_CALL = ("omega", "interval", "seed", "batch_size")  # options of `config.sample` that need no other sampler
Weights = dict[str, np.ndarray]


class Network(NamedTuple):
    """A framework's network with its weights."""

    net: Any
    # config -> sampler (None, noise [b h w c], labels [b], c, fresh) -> images [b h w c], see `commands.sample`
    make_sampler: Callable[[options.Config], sample.Sampler]
    velocity: Callable[..., np.ndarray]  # (z [b h w c], t [b], r [b], labels [b], {condition: [b]}) -> [b h w c]
    precision: Callable[[], AbstractContextManager]  # the precision of the config, while it computes


class Framework(NamedTuple):
    """What a framework adds to `load`."""

    read_run: Callable[[pathlib.Path, int, int | None], tuple[options.Config, Weights]]  # `checkpoints.read_weights`
    make_network: Callable[[options.Config, Weights, Any], Network]  # the last is the device, None for the default
    frozen: FrozenNetworks
    make_encoder: Callable[[Any, str], Callable]  # see `autoencoder.make_encoder`
    conditions: Callable[[options.Config], dict[str, float]]  # of its network, see `sampling_conditions` of the method


class Model:
    """A trained network and its config.  `load` makes one.

    config: of the run or of the published network.  net: the framework's network, an nnx.Module or torch.nn.Module.
    kind: where the weights come from, and which of several entries was taken.
    """

    def __init__(self, config: options.Config, weights: Weights, kind: str, framework: Framework, device: Any):
        """weights: canonical.  device: the framework's, None for its default."""
        self.config, self.kind = config, kind
        self._framework = framework
        self._network = framework.make_network(config, weights, device)
        self._samplers: dict[str, sample.Sampler] = {}
        self._frozen: dict[str, Any] = {}

    @property
    def net(self) -> Any:
        """The framework's network, with its weights."""
        return self._network.net

    def sample(self, num: int, labels: Sequence[int] = (), *, decode: bool = True, **given: Any) -> np.ndarray:
        """Return `num` images uint8 [num h w c]; those of a model of latents are decoded.

        labels: classes to cycle through; random if empty.  decode: False for the samples themselves, float32
        [num h w c] in data units.  given: any option of `config.sample` (steps, omega, interval, seed, sampler ...).
        Image i depends on the seed and i alone.  Raises UserError for options that the model does not have.
        """
        config = self._with(given)
        key = json.dumps({k: v for k, v in config.sample.to_dict().items() if k not in PER_CALL}, default=list)
        with self._network.precision():
            if key not in self._samplers:
                self._samplers[key] = self._network.make_sampler(config)
            parts = sample.batches(config, self._samplers[key], None, num, labels, progress=False)
            images = np.concatenate([images for _, images, _ in parts])
        if not decode:
            return images
        return grids.to_uint8(self.decode(images) if latents.of(config) else images)

    def velocity(self, z: np.ndarray, t: Any, r: Any, labels: Any, **given: Any) -> np.ndarray:
        """Return the average velocity u(z, t, r) [b h w c] of z [b h w c], from t to r; a flow model ignores r.

        t, r: times in [0, 1], 1 is noise.  labels: classes, `config.model.num_classes` for none.  Each is [b], or one
        for all rows.  given: what else the network is told, by name: omega, t_min, t_max; of the config by default.
        """
        z = np.asarray(z)
        t, r, y = one_per_row(t, len(z)), one_per_row(r, len(z)), one_per_row(labels, len(z), np.int32)
        sample.check_labels(y.tolist(), self.config.model.num_classes)
        conditions = self._framework.conditions(self.config)
        unknown = sorted(given.keys() - conditions.keys())
        if unknown:
            known = ", ".join(conditions) or "z, t, r and labels"
            raise UserError(f"this network is not told {unknown[0]}, only {known}")
        told = {name: one_per_row(a, len(z)) for name, a in (conditions | given).items()}
        with self._network.precision():
            return self._network.velocity(z, t, r, y, told)

    def encode(self, images: np.ndarray, seed: int | None = None) -> np.ndarray:
        """Return latents float32 [b h w c], in data units, of images uint8 [b H W 3].

        seed: of the noise of the encoder's distribution; None for its mean.
        """
        convention = self._convention()
        if "encode" not in self._frozen:
            self._frozen["encode"] = self._framework.make_encoder(self._autoencoder(), convention.pixels)
        with self._network.precision():
            moments = self._frozen["encode"](np.asarray(images))
        raw, _ = np.split(moments, 2, axis=-1)
        if seed is not None:
            noise = np.random.default_rng(seed).standard_normal(raw.shape, np.float32)
            raw = units.sample_posterior(moments, noise)
        return np.asarray(units.to_data_units(raw, convention), np.float32)

    def decode(self, z: np.ndarray) -> np.ndarray:
        """Return images float32 [b H W 3], about [-1, 1], of latents [b h w c] in data units."""
        convention = self._convention()
        if "decode" not in self._frozen:
            self._frozen["decode"] = self._framework.frozen.make_decoder(self._autoencoder(), convention)
        with self._network.precision():
            return self._frozen["decode"](np.asarray(z, np.float32))

    def _autoencoder(self) -> Any:
        if not self.config.latents.vae:
            raise UserError("this model makes latents, and nothing says of which autoencoder: load it with vae=")
        return autoencoder.read(self.config.latents.vae)

    def _convention(self) -> latents.Convention:
        convention = latents.of(self.config)
        if convention is None:
            raise UserError("this model makes images, not latents: there is nothing to encode or decode")
        return convention

    def _with(self, given: dict[str, Any]) -> options.Config:
        """Return the config with options of `config.sample`.  Raises UserError for those that it lacks."""
        unknown = sorted(given.keys() - set(self.config.sample))
        if unknown:
            raise UserError(f"this model is sampled by {', '.join(sorted(self.config.sample))}, not by {unknown[0]}")
        config = copy.deepcopy(self.config)
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        if "steps" in given:
            given.setdefault("times", ())
        config.sample.update(given)
        return checks.check(config)


def one_per_row(value: Any, num: int, dtype: Any = np.float32) -> np.ndarray:
    """Return one number, or [num], as an array [num].  Raises UserError for anything else."""
    array = np.asarray(value, dtype)
    if array.shape not in ((), (num,)):
        raise UserError(f"values of shape {array.shape} for {num} rows: give one, or one for each")
    return np.array(np.broadcast_to(array, num))


def load(
    source: str | pathlib.Path,
    framework: Framework,
    *,
    ema: int | None = None,
    step: int | None = None,
    time: str | None = None,
    config: str | options.Config | None = None,
    vae: str | None = None,
    device: Any = None,
    dtype: str | None = None,
    **model: Any,
) -> Model:
    """Return the model of a work directory, canonical weights, or any file that `weights.reading` reads.

    source: a path, or an address on the hub.  ema: which EMA, -1 for the raw parameters; None for the first, or what
    there is.  step: of several checkpoints.  time: see `times.settle`.  config: a config, or its file, FILE.py:variant;
    None for that of the run, or else the published network of these sizes.  vae: the autoencoder of a model of latents.
    device: the framework's; None for its default.  dtype: `config.model.compute_dtype`.  model: other options of
    `config.model`, such as num_heads, which weights do not show.  Raises UserError.
    """
    given = store.load_file(config) if isinstance(config, str) else config
    chosen, weights, kind = read(source, framework, given, reading.Choice(ema, "", step, time), model)
    if dtype is not None:
        chosen.model.compute_dtype = dtype
    if vae is not None:
        chosen.latents.vae = vae
    chosen, weights = sample.without_v_heads(checks.check(chosen), weights)
    with naming(source):
        return Model(chosen, weights, kind, framework, device)


def read(
    source: str | pathlib.Path,
    framework: Framework,
    given: options.Config | None,
    choice: reading.Choice,
    model: dict[str, Any],
) -> tuple[Any, Weights, str]:
    """Return the config, the canonical weights and the kind of a run or of anything else.  As `load`; raises as it."""
    if hub.is_address(source) or not snapshots.is_run(source):
        return reading.network(source, given, choice, model)[:3]
    config, weights = framework.read_run(pathlib.Path(source), choice.ema or 0, choice.step)
    config = copy.deepcopy(given if given is not None else config)
    config.model.update(model)
    return *fitting.fit(checks.check(config), weights), "work directory"
