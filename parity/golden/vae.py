"""Fixtures of the autoencoder (diffusers' PyTorch and Flax networks) and of what each system does to its latents."""

import functools

import numpy as np

from jax_impl import autoencoder as jax_autoencoder
from meanflow.config.latents import CONVENTIONS
from meanflow.data.latents import autoencoder, units
from meanflow.sampling import grids
from meanflow.weights.names import flax_tree_to_canonical
from parity.adapters import frozen_networks
from parity.checks import Measure
from parity.golden.network import BOUND, nhwc
from torch_impl import autoencoder as torch_autoencoder

AUTOENCODERS = {"jax": jax_autoencoder, "torch": torch_autoencoder}
QUANTITIES = {
    "vae": ("encoder_h", "moments", "mean", "logvar", "std", "sample", "decode"),
    "vae_flax": ("mean_nhwc", "logvar_nhwc", "std_nhwc", "decode"),
}
# Systems of `latent_scaling`: the convention of their latents, and whether the second half of the moments they read is
# a standard deviation or a log-variance.
SYSTEMS = {
    "gs_meanflow": ("sd", "std"), "dmf": ("sd", "std"), "zhuyu": ("imm", "logvar"), "imf_jax": ("imf", "std"),
    "imf_torch": ("imf", "std"), "remf": ("edm2", "std"),
}  # fmt: skip
ROUNDINGS = {"gs_imf_jax": "shift", "remf_rgb": "shift", "imf_torch": "round", "pymf": "floor", "zhuyu_dmf": "floor"}
SIBLING = "vae.npz"  # the fixture whose autoencoder `latent_scaling` uses
# Truncating near a multiple of 1/255 turns float32's last bit into one level: allow 5 of 1000 pixels, or two.
SHARE_OFF_BY_ONE, PIXELS_OFF_BY_ONE = 0.005, 2


def groups(fixture) -> list[str]:
    """Return the cases that the fixture must have."""
    return [*SYSTEMS, "u8"] if fixture.system == "latent_scaling" else list(QUANTITIES[fixture.system])


def files(fixture) -> autoencoder.Files:
    """Return a fixture's autoencoder, from PyTorch or Flax.  Raises UserError for an unknown one."""
    weights = fixture.under("param/")
    if fixture.system == "vae_flax":
        weights = flax_tree_to_canonical(weights)
    return autoencoder.of(autoencoder.settings(fixture.config["vae"], fixture.name), weights, fixture.name)


def network(quantity: str, fixture, measure: Measure) -> None:
    """One quantity of the networks."""
    given = files(fixture)
    key = "z" if quantity == "decode" else "x"
    inputs, want = nhwc(fixture.get(f"in/{key}")), fixture.get(f"out/{quantity}")
    want = want if quantity.endswith("_nhwc") else nhwc(want)
    for framework in frozen_networks.VAE:
        call = frozen_networks.vae(framework, given)
        got = compute(call, quantity.removesuffix("_nhwc"), inputs, fixture)
        measure.compare(framework, quantity, got, want, BOUND)


def compute(call, quantity: str, inputs: np.ndarray, fixture) -> np.ndarray:
    """Return one quantity [b h w c] computed by `call`."""
    if quantity in ("decode", "moments"):
        return call(quantity, inputs)
    if quantity == "encoder_h":
        return call("encoder", inputs)
    mean, log_variance = call("encode", inputs)
    std = np.exp(log_variance / 2)
    if quantity == "sample":
        return units.sample_posterior(np.concatenate([mean, std], -1), nhwc(fixture.get("in/eps")))
    return {"mean": mean, "logvar": log_variance, "std": std}[quantity]


def system(name: str, fixture, measure: Measure) -> None:
    """Everything a system does to latents (one shared implementation) and to pixels (both frameworks)."""
    convention, second = CONVENTIONS[SYSTEMS[name][0]], SYSTEMS[name][1]
    for key in fixture.under(f"out/{name}/"):
        want = fixture.get(f"out/{name}/{key}")
        if key in ("encode_pixels", "decode_u8"):
            for framework in AUTOENCODERS:
                coded(framework, f"{name}/{key}", convention, fixture, measure)
        else:
            got = latent(key, convention, second, fixture)
            got = got.transpose(0, 3, 1, 2) if got.ndim == 4 and not key.endswith("_nhwc") else got
            measure.compare("jax-torch", key, got, want, BOUND)


def latent(key: str, convention, second: str, fixture) -> np.ndarray:
    """Return the result of one operation on latents, [b h w c], or [c] for EDM2's constants."""
    if key == "decode_input":
        return units.to_raw(nhwc(fixture.get("in/z")), convention)
    if key == "rgb_encode":
        return nhwc(fixture.get("in/u8")).astype(np.float32) / 127.5 - 1
    if key in ("scale", "bias"):
        shift, scale = np.array(convention.shift), np.array(convention.scale)
        return scale if key == "scale" else -shift * scale
    mean, spread = np.split(nhwc(fixture.get(f"in/mean_{second}")), 2, axis=-1)
    spread = spread if second == "std" else np.exp(spread / 2)
    raw = units.sample_posterior(np.concatenate([mean, spread], -1), nhwc(fixture.get("in/eps")))
    return units.to_data_units(raw, convention)


def coded(framework: str, quantity: str, convention, fixture, measure: Measure) -> None:
    """Moments of uint8 images, or uint8 images decoded from latents, with the sibling fixture's autoencoder."""
    given, module = files(type(fixture)(fixture.path.parent / SIBLING)), AUTOENCODERS[framework]
    key, want = quantity.split("/")[1], nhwc(fixture.get(f"out/{quantity}"))
    if key == "encode_pixels":
        got = module.make_encoder(given, convention.pixels)(nhwc(fixture.get("in/u8")))
        measure.compare(framework, key, got, want, BOUND)
    else:
        images = module.make_decoder(given, convention)(nhwc(fixture.get("in/z_edm2")))
        levels(framework, key, grids.to_uint8(images, "floor"), want, measure)


def levels(framework: str, key: str, got: np.ndarray, want: np.ndarray, measure: Measure) -> None:
    """Compare truncated uint8 images: no value may be off by more than one level, and few by one."""
    off = np.abs(got.astype(int) - want) if got.shape == want.shape else np.array([np.inf])
    measure.add(framework, f"{key} (largest difference of levels)", off.max(), 1.0)
    allowed = max(SHARE_OFF_BY_ONE, PIXELS_OFF_BY_ONE / off.size)
    measure.add(framework, f"{key} (share of pixels that differ)", (off > 0).mean(), allowed)


def rounding(fixture, measure: Measure) -> None:
    """Images in [-1, 1] converted to uint8 as each system does it."""
    images = fixture.get("in/img")
    for name, want in fixture.under("out/u8/").items():
        if name not in ROUNDINGS:
            measure.add("jax-torch", f"{name} (no such rounding is known)", np.inf, 0.0)
            continue
        levels("jax-torch", name, grids.to_uint8(images, ROUNDINGS[name]), want, measure)


RUNNERS = {name: functools.partial(network, name) for names in QUANTITIES.values() for name in names}
RUNNERS |= {name: functools.partial(system, name) for name in SYSTEMS} | {"u8": rounding}
