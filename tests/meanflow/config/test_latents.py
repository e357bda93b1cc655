"""Conventions of latents: those of the public systems, how messages show them, and which cannot be."""

import json

import numpy as np
import pytest

from meanflow.config import checks, latents, store
from meanflow.config import options as base
from meanflow.config.latents import CONVENTIONS, Convention
from meanflow.errors import UserError

OURS = Convention((1.0, -2.0), (0.5, 0.25))


def config_of(**options):
    config = base.get_config()
    config.model.update(channels=4)
    config.latents.update(options)
    return config


def test_the_scales_of_stable_diffusion_and_of_imm_differ():
    assert CONVENTIONS["sd"] == Convention((0.0,), (0.18215,), "symmetric")
    assert CONVENTIONS["imm"] == Convention((0.0,), (0.18125,), "symmetric")


@pytest.mark.parametrize(
    ("name", "mean", "std", "deviation", "pixels"),
    [
        ("imf", (0.86488, -0.27787343, 0.21616915, 0.3738409), (4.85503674, 5.31922414, 3.93725398, 3.9870003), 1,
         "symmetric"),
        ("edm2", (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28), 0.5, "unit"),
    ],
)  # fmt: skip
def test_the_channels_of_imagenet_get_mean_zero_and_one_deviation(name, mean, std, deviation, pixels):
    shift, scale, reads = CONVENTIONS[name]
    np.testing.assert_allclose((np.array(mean) - shift) * scale, 0, atol=1e-12)
    np.testing.assert_allclose(np.array(std) * scale, deviation, rtol=1e-12)
    assert reads == pixels


@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_config_has_the_convention_that_it_is_given(name):
    config = checks.check(config_of(**CONVENTIONS[name]._asdict()))
    assert latents.of(config) == CONVENTIONS[name]
    assert latents.of(store.from_json(store.to_json(config))) == CONVENTIONS[name]


def test_a_config_without_a_scale_has_none():
    """Its data are pixels, or the dataset says what they are."""
    assert latents.of(base.get_config()) is None
    assert latents.of(config_of(shift=(1.0,), pixels="unit", vae="some/vae")) is None


@pytest.mark.parametrize("name", CONVENTIONS)
def test_the_known_are_called_by_their_names(name):
    assert latents.describe(CONVENTIONS[name]).startswith(f"{name!r} (scale ")


def test_messages_have_all_that_two_conventions_can_differ_in():
    assert latents.describe(CONVENTIONS["sd"]) == "'sd' (scale 0.18215, shift 0, pixels symmetric)"
    assert latents.describe(OURS._replace(pixels="unit")) == "(scale [0.5, 0.25], shift [1, -2], pixels unit)"
    assert latents.short((1 / 3,)) == "0.333333" and latents.short((1.0, 2.5)) == "[1, 2.5]"


@pytest.mark.parametrize("change", [{"scale": (0.18125,)}, {"shift": (0.1,)}, {"pixels": "unit"}])
def test_conventions_that_differ_are_both_named(change):
    sd = CONVENTIONS["sd"]
    latents.check_same(sd, Convention((0,), (0.18215,)), "the config", "w.safetensors")
    other = sd._replace(**change)
    with pytest.raises(UserError) as caught:
        latents.check_same(sd, other, "the config", "w.safetensors")
    message = str(caught.value)
    assert message.startswith(f"the config has latents of the convention {latents.describe(sd)}, but w.safetensors has")
    assert f"w.safetensors has latents of the convention {latents.describe(other)}: " in message
    assert all(f".{name}" in message for name in ("scale", "shift", "pixels"))


def test_no_latents_are_another_convention():
    with pytest.raises(UserError, match="^the config has no latents, but w has latents of the convention 'sd' "):
        latents.check_same(None, CONVENTIONS["sd"], "the config", "w")


@pytest.mark.parametrize("convention", [*CONVENTIONS.values(), OURS])
def test_json_keeps_every_bit(convention):
    again = latents.from_dict(json.loads(json.dumps(latents.to_dict(convention))))
    assert again == convention and isinstance(again.scale, tuple)


@pytest.mark.parametrize(
    "value",
    [
        3, [], "sd", {}, {"shift": [0.0], "scale": [1.0]}, {"shift": 0.0, "scale": [1.0], "pixels": "unit"},
        {"shift": [0.0], "scale": ["a"], "pixels": "unit"}, {"shift": [None], "scale": [1.0], "pixels": "unit"},
    ],
)  # fmt: skip
def test_what_is_no_convention(value):
    with pytest.raises(UserError, match="is not a latent convention: it needs shift, scale and pixels$"):
        latents.from_dict(value)


def test_what_is_no_convention_is_shown_in_short():
    with pytest.raises(UserError) as caught:
        latents.from_dict({"shift": "x" * 10_000})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": (0.0,)}, r"scale \(0\.0,\): give numbers, and a scale other than 0"),
        ({"scale": (1.0, 0.0)}, "a scale other than 0"),
        ({"scale": (float("nan"),)}, "give numbers, and a scale"),
        ({"scale": (float("inf"),)}, "give numbers, and a scale"),
        ({"shift": (float("nan"),)}, "give numbers, and a scale"),
        ({"pixels": "bytes"}, r"pixels 'bytes': choose symmetric \(\[-1, 1\]\) or unit \(\[0, 1\]\)"),
        ({"shift": ()}, r"latents of shift \(\): give one number, or one for each channel$"),
        ({"scale": ()}, r"latents of scale \(\): give one number, or one for each channel$"),
    ],
)
def test_conventions_that_cannot_be(change, message):
    with pytest.raises(UserError, match=message):
        latents.check(OURS._replace(**change))
    with pytest.raises(UserError, match=message):
        latents.from_dict(latents.to_dict(OURS._replace(**change)))


def test_texts_are_no_numbers():
    with pytest.raises(UserError, match=r"shift \('0',\) and scale .*: give numbers"):
        latents.check(OURS._replace(shift=("0",)))


@pytest.mark.parametrize("name", ["shift", "scale"])
def test_numbers_are_for_all_channels_or_for_each(name):
    one = Convention((1.0,), (2.0,))
    for num in (1, 4):
        latents.check(one._replace(**{name: (3.0,) * num}), 4)
    for num in (2, 3, 5):
        with pytest.raises(UserError, match=rf"latents of {name} \(.*or one for each of 4 channels$"):
            latents.check(one._replace(**{name: (3.0,) * num}), 4)
