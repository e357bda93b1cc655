"""Latent conventions: how each public system converts an autoencoder's output to data units.

Data units are (raw - shift) * scale, per channel.  Source: the systems' trainers; 0.18215: arXiv:2112.10752.
"""

import math
from typing import Any, NamedTuple

from meanflow.config import options
from meanflow.errors import UserError

# Per-channel means and standard deviations of raw ImageNet latents.
IMF_MEAN, IMF_STD = (0.86488, -0.27787343, 0.21616915, 0.3738409), (4.85503674, 5.31922414, 3.93725398, 3.9870003)
EDM2_MEAN, EDM2_STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)
BY_OPTIONS = "--config.latents.scale, .shift and .pixels set the config's"


class Convention(NamedTuple):
    """How raw latents become data units; the fields are the options of `config.latents`."""

    shift: tuple[float, ...]  # one for all channels, or one per channel
    scale: tuple[float, ...]
    pixels: str = "symmetric"  # what the autoencoder reads and writes: symmetric [-1, 1] | unit [0, 1]


CONVENTIONS = {
    "sd": Convention((0.0,), (0.18215,)),  # Stable Diffusion: official MeanFlow, decoupled MeanFlow
    "imm": Convention((0.0,), (0.18125,)),  # the PyTorch reproduction of MeanFlow, after IMM
    "imf": Convention(IMF_MEAN, tuple(1 / std for std in IMF_STD)),  # improved MeanFlow
    "edm2": Convention(EDM2_MEAN, tuple(0.5 / std for std in EDM2_STD), "unit"),  # EDM2 and Re-MeanFlow at 512
}


def of(config: options.Config) -> Convention | None:
    """Return the config's convention; None if its data are not latents or it leaves the convention to the dataset."""
    c = config.latents
    return Convention(tuple(c.shift), tuple(c.scale), c.pixels) if c.scale else None


def describe(convention: Convention) -> str:
    """Return a convention formatted for messages."""
    numbers = f"scale {short(convention.scale)}, shift {short(convention.shift)}, pixels {convention.pixels}"
    names = [name for name, known in CONVENTIONS.items() if known == convention]
    return f"{names[0]!r} ({numbers})" if names else f"({numbers})"


def short(values: tuple[float, ...]) -> str:
    """Return numbers formatted for messages; several are put in brackets."""
    texts = [f"{value:.6g}" for value in values]
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"


def check_same(ours: Convention | None, theirs: Convention, whose: str, other: str, way_out: str = BY_OPTIONS) -> None:
    """Raise UserError naming both conventions if they differ.

    whose, other: the owner of each; way_out: what to do.  All three go into the message.
    """
    if ours is None or not same(ours, theirs):
        raise UserError(
            f"{whose} has {f'latents of the convention {describe(ours)}' if ours else 'no latents'}, but {other} has "
            f"latents of the convention {describe(theirs)}: images would come out wrong.  Use matching ones; "
            f"{way_out}"
        )


def same(one: Convention, other: Convention) -> bool:
    """Return whether two conventions are the same; a single number equals that number repeated per channel."""

    def equal(ours: tuple[float, ...], theirs: tuple[float, ...]) -> bool:
        num = max(len(ours), len(theirs))
        return ours * (num // len(ours)) == theirs * (num // len(theirs))

    return one.pixels == other.pixels and equal(one.shift, other.shift) and equal(one.scale, other.scale)


def to_dict(convention: Convention) -> dict[str, Any]:
    """Return a convention as JSON values."""
    return {"shift": list(convention.shift), "scale": list(convention.scale), "pixels": convention.pixels}


def from_dict(value: dict[str, Any]) -> Convention:
    """Return the convention stored as JSON values.  Raises UserError if they are invalid."""
    try:
        shift, scale = (tuple(float(number) for number in value[key]) for key in ("shift", "scale"))
        convention = Convention(shift, scale, value["pixels"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{value!r:.200} is not a latent convention: it needs shift, scale and pixels") from error
    check(convention)
    return convention


def check(convention: Convention, channels: int | None = None) -> None:
    """Raise UserError for invalid values, or if there is neither one number nor one per channel."""
    shift, scale, pixels = convention
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in (*shift, *scale)) or not all(scale):
        raise UserError(f"latents of shift {shift} and scale {scale}: give numbers, and a scale other than 0")
    if pixels not in ("symmetric", "unit"):
        raise UserError(f"latents of pixels {pixels!r}: choose symmetric ([-1, 1]) or unit ([0, 1])")
    each = "channel" if channels is None else f"of {channels} channels"
    for name, values in (("shift", shift), ("scale", scale)):
        if not values or (channels is not None and len(values) not in (1, channels)):
            raise UserError(f"latents of {name} {values}: give one number, or one for each {each}")
