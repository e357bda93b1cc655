"""Fixtures of EDM's pixel augmentation: images and labels for the stored draws.

Both trainers use the implementation in `meanflow/data/augment.py`, so one check covers both: its framework is
`jax-torch`.
"""

import numpy as np

from meanflow.config import options as base
from meanflow.data import augment
from meanflow.errors import UserError
from parity.checks import Measure

BOUND = 1e-4  # the official result itself varies with the batch by up to 5e-5
# Keys of the stored draws by our names.  NAME_u goes with NAME_i, NAME_n or NAME_w and decides whether to transform.
KEYS = {
    "xflip": "xflip_i", "yflip": "yflip_i", "rotate_int": "rotint_i", "translate_int": "transint_w",
    "scale": "scale_n", "rotate_frac": "rot_w", "aniso": "aniso_n", "translate_frac": "translate_n",
    "brightness": "bright_n", "contrast": "contrast_n", "lumaflip": "luma_i", "hue": "hue_w", "saturation": "sat_n",
}  # fmt: skip
ANISO_KEYS = {"aniso_angle": "aniso_r", "aniso_rotate": "aniso_ru"}


def groups(fixture) -> list[str]:
    """Return the cases that the fixture must have."""
    return list(fixture.config["cases"])


def images(fixture, case: str, measure: Measure) -> None:
    """CASE: the augmented images, and the labels passed to the network."""
    c = options(fixture.config["cases"][case]["kwargs"])
    given = fixture.get(f"in/{case}/images").transpose(0, 2, 3, 1)
    got, labels = augment.augment(given, draws(fixture, case, len(given), c), c)
    measure.compare("jax-torch", "images", got.transpose(0, 3, 1, 2), fixture.get(f"out/{case}/images"), BOUND)
    measure.compare("jax-torch", "labels", labels, fixture.get(f"out/{case}/labels"), BOUND)


def options(kwargs: dict[str, float]) -> base.Config:
    """Return `config.data.augment` for the official pipe's arguments; unnamed transforms are off, and p defaults to 1.

    Raises UserError for an argument that is not a transform.
    """
    c = base.get_config().data.augment
    values = dict.fromkeys(KEYS, 0.0) | {"p": 1.0} | kwargs
    c.prob = float(values.pop("p"))
    for name, value in values.items():
        if name not in KEYS:
            raise UserError(f"{name} is not a transform of the augmentation; there are {', '.join(KEYS)}")
        c[name] = float(value)
    return c


def draws(fixture, case: str, num_images: int, c: base.Config) -> augment.Draws:
    """Return the stored draws; those of disabled transforms are not stored and become 0."""
    result = {key: np.zeros_like(a) for key, a in augment.draw(np.random.default_rng(0), num_images)._asdict().items()}
    for row, (name, key) in zip(result["apply"], KEYS.items(), strict=True):
        if c[name] > 0:
            row[:] = fixture.get(f"in/{case}/{key[:-1]}u").ravel()
            for field, stored in ({name: key} | (ANISO_KEYS if name == "aniso" else {})).items():
                result[field] = fixture.get(f"in/{case}/{stored}").reshape(result[field].shape)
    return augment.Draws(**result)


RUNNERS = {"*": images}
