"""The frozen networks (autoencoder and Inception) in both frameworks, numpy [b h w c] in and out, and their cases.

float64: both frameworks with the same random weights.  float32: the precision that each loses.
"""

import functools
import types
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from jax_impl import weights as jax_weights
from jax_impl.models import inception as jax_inception
from jax_impl.models import vae as jax_vae
from meanflow.data.latents import autoencoder
from meanflow.metrics import preprocessing
from parity.adapters import with_jax
from parity.checks import Case, Measure
from torch_impl import weights as torch_weights
from torch_impl.models import inception as torch_inception
from torch_impl.models import vae as torch_vae

BOUND = 1e-10  # relative, as in `cases`
RESIZE_BOUND = 1e-12  # a single matrix product
FLOAT32_BOUND = 2e-5  # as for the fixtures
VAE = {"jax": jax_vae, "torch": torch_vae}
INCEPTION = {"jax": jax_inception, "torch": torch_inception}
VAES = {
    "vae": {
        "in_channels": 3, "latent_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    "vae_deep": {
        "in_channels": 1, "latent_channels": 3, "block_out_channels": (6, 12, 18), "layers_per_block": 2,
        "norm_num_groups": 3,
    },
}  # fmt: skip
SIZES = ((37, 50), (299, 8), (320, 301))  # of images to resize: sides are enlarged, reduced or unchanged


def all_cases() -> list[Case]:
    """Return the cases of the frozen networks, in the order of the report."""
    methods = ("encode", "decode")
    float64 = [
        Case(f"float64/{name}/{method}", functools.partial(float64_vae, name, method), "vae")
        for name in VAES
        for method in methods
    ]
    float64 += [Case("float64/inception/features", float64_inception), Case("float64/inception/resize", float64_resize)]
    float32 = [
        Case(f"float32/vae/{method}", functools.partial(float32_vae, "vae", method), "vae") for method in methods
    ]
    return [*float64, *float32]


def float64_vae(name: str, method: str, measure: Measure) -> None:
    """Mean and log-variance, or images."""
    got = {framework: run_vae(framework, name, method, "float64") for framework in VAE}
    for quantity in got["jax"]:
        measure.compare("jax-torch", quantity, got["jax"][quantity], got["torch"][quantity], BOUND)


def float32_vae(name: str, method: str, measure: Measure) -> None:
    """The same in float32, against float64."""
    for framework in VAE:
        want, got = (run_vae(framework, name, method, dtype) for dtype in ("float64", "float32"))
        for quantity in want:
            measure.compare(framework, quantity, got[quantity], want[quantity], FLOAT32_BOUND)


def run_vae(framework: str, name: str, method: str, dtype: str) -> dict[str, np.ndarray]:
    """Return the outputs {quantity: array} of a random autoencoder of `VAES` for random images or latents."""
    settings, rng = VAES[name], np.random.RandomState(5)
    files = autoencoder.Files(settings, vae_weights(settings), "")
    call = vae(framework, files, dtype)
    if method == "decode":
        return {"images": call("decode", rng.normal(size=(2, 4, 6, settings["latent_channels"])))}
    mean, log_variance = call("encode", rng.normal(size=(2, 16, 24, settings["in_channels"])))
    return {"mean": mean, "log-variance": log_variance}


def float64_inception(measure: Measure) -> None:
    """Features and logits of one image, including its resizing."""
    images = np.random.RandomState(6).randint(0, 256, size=(1, 40, 31, 3)).astype(np.uint8)
    drawn, convention = inception_weights(7), preprocessing.CONVENTIONS["torch_fidelity"]
    got = {framework: inception(framework, drawn, "float64")(images, convention) for framework in INCEPTION}
    for name in got["jax"]:
        measure.compare("jax-torch", name, got["jax"][name], got["torch"][name], BOUND)


def float64_resize(measure: Measure) -> None:
    """Images as Inception reads them, under every convention."""
    for height, width in SIZES:
        images = np.random.RandomState(8).randint(0, 256, size=(2, height, width, 1)).astype(np.uint8)
        for name, convention in preprocessing.CONVENTIONS.items():
            got, want = (resized(framework, images, convention, "float64") for framework in INCEPTION)
            measure.compare("jax-torch", f"{name} of {height} x {width}", got, want, RESIZE_BOUND)


def vae(framework: str, files: autoencoder.Files, dtype: str = "float32") -> Callable:
    """Return call(method, x): encoder, moments, encode or decode of an autoencoder.  Raises UserError."""

    def function(net, x, method):
        return getattr(net, method)(x)

    build = functools.partial(VAE[framework].AutoencoderKL, **files.settings)
    run = RUN[framework](build, files.weights, function, dtype)
    return lambda method, x: run(x, method)


def inception(framework: str, canonical: dict, dtype: str = "float32") -> Callable:
    """Return call(images uint8 [b h w c], convention) -> {name: features [b n]}.  Raises UserError."""
    run = RUN[framework](INCEPTION[framework].Inception, canonical, lambda net, x, _: net(x), dtype)
    return lambda images, convention: run(resized(framework, images, convention, dtype), None)


def resized(framework: str, images: np.ndarray, convention: preprocessing.Convention, dtype: str) -> np.ndarray:
    """Return images uint8 [b h w c] as Inception reads them, [b 299 299 3]."""
    module: types.ModuleType = INCEPTION[framework]
    if framework == "jax":
        return np.asarray(module.resized(jnp.asarray(images), convention, jnp.dtype(dtype)))
    return _from_torch(module.resized(_to_torch(images), convention, getattr(torch, dtype)))


def _run_jax(build: Callable, canonical: dict, function: Callable, dtype: str) -> Callable:
    jax.config.update(with_jax.OPTIMIZE_LESS, True)
    net = nnx.eval_shape(functools.partial(build, dtype=jnp.dtype(dtype)))
    graphdef, params = nnx.graphdef(net), jax_weights.from_canonical(net, canonical)

    @functools.partial(jax.jit, static_argnums=2)
    def apply(params, x, how):
        return function(nnx.merge(graphdef, params), x, how)

    return lambda x, how: jax.tree.map(np.asarray, apply(params, jnp.asarray(x, dtype), how))


def _run_torch(build: Callable, canonical: dict, function: Callable, dtype: str) -> Callable:
    with torch.device("meta"):
        net = build(dtype=getattr(torch, dtype))
    net.load_state_dict(torch_weights.from_canonical(net, canonical), assign=True)

    @torch.no_grad()
    def run(x, how):
        return jax.tree.map(_from_torch, function(net, _to_torch(x).to(getattr(torch, dtype)), how))

    return run


RUN = {"jax": _run_jax, "torch": _run_torch}


def _to_torch(a: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(a.transpose(0, 3, 1, 2)))


def _from_torch(a: torch.Tensor) -> np.ndarray:
    return (a.permute(0, 2, 3, 1) if a.ndim == 4 else a).numpy()


def vae_weights(settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return random canonical float64 weights of an autoencoder, non-zero everywhere, that keep activations near 1."""
    with torch.device("meta"):
        shapes = {name: tuple(a.shape) for name, a in torch_vae.AutoencoderKL(**settings).state_dict().items()}
    rng, drawn = np.random.RandomState(9), {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            drawn[name] = rng.normal(0, np.prod(shape[1:]) ** -0.5, shape)
        else:
            drawn[name] = rng.normal(1 if name.endswith("weight") else 0, 0.3, shape)
    drawn["quant_conv.weight"] *= 20  # so that some log-variances are clipped, at both ends
    return drawn


@functools.lru_cache(maxsize=2)
def inception_weights(seed: int) -> dict[str, np.ndarray]:
    """Return random canonical float32 weights of Inception, each drawn from its name and the seed.

    The recipe is that of the golden fixtures: a name's checksum seeds its draw, so the order does not matter.
    """
    with torch.device("meta"):
        shapes = {name: tuple(a.shape) for name, a in torch_inception.Inception().state_dict().items()}
    return {name: _drawn(name, shape, seed).astype(np.float32) for name, shape in shapes.items()}


def _drawn(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    drawn = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0xFFFFFFFF).standard_normal(shape)
    if name.endswith("conv.weight"):
        return drawn * np.sqrt(2 / np.prod(shape[1:]))
    if name.endswith("bn.weight"):
        return 1 + 0.1 * drawn
    if name.endswith("running_var"):
        return np.exp(0.2 * drawn)
    return drawn / np.sqrt(2048) if name == "fc.weight" else 0.1 * drawn
