"""Each transform of the augmentation against plain numpy, and the labels that tell of it."""

import math

import numpy as np
import pytest

from meanflow.config import options as base
from meanflow.data import augment
from meanflow.errors import UserError

NEVER = 1.0  # as a uniform draw
SIDE = 16


def options(prob=1.0, **multipliers):
    """Return `config.data.augment` with only the given transforms."""
    c = base.get_config().data.augment
    c.update(dict.fromkeys(augment.NUM_LABELS, 0.0))
    c.update(prob=prob, **multipliers)
    return c


ALL = options(**dict.fromkeys(augment.NUM_LABELS, 1.0))


def nothing(num_images=1):
    """Return draws under which no transform applies, and whose amounts would all be seen."""
    drawn = augment.draw(np.random.default_rng(7), num_images)
    return drawn._replace(apply=np.full_like(drawn.apply, NEVER))


def draws(num_images=1, **amounts):
    """Return draws under which the named transforms apply, and no other; values are shared by all images."""
    result = nothing(num_images)
    apply = np.array([[0.0 if name in amounts else NEVER] * num_images for name in augment.NUM_LABELS])
    arrays = {}
    for name, value in amounts.items():
        arrays[name] = np.broadcast_to(np.array(value).T, getattr(result, name).shape[::-1]).T
    return result._replace(apply=apply, **arrays)


def noise(height=SIDE, width=SIDE, channels=3, seed=0):
    return np.random.default_rng(seed).standard_normal((1, height, width, channels), np.float32)


def smooth(height, width, waves):
    """Return a function of x, y that bilinear reading hardly changes; `waves`: (frequency x, frequency y, phase)."""
    return lambda x, y: sum(np.cos(kx * x / width + ky * y / height + phase) for kx, ky, phase in waves)


def sampled(f, height, width):
    """Return the image [1 h w 1] of f(x, y), positions from the centre."""
    x, y = np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2
    return f(x[None], y[:, None])[None, :, :, None].astype(np.float32)


def apply(images, c=ALL, **amounts):
    """Return the image and the labels {transform: labels} of the first image."""
    got, labels = augment.augment(images, draws(len(images), **amounts), c)
    assert got.dtype == labels.dtype == np.float32
    names = [name for name in augment.NUM_LABELS if c[name] > 0]
    ends = np.cumsum([augment.NUM_LABELS[name] for name in names])[:-1]
    return got, dict(zip(names, np.split(labels[0], ends), strict=True))


def only(labels, name):
    """Return the labels of one transform, once those of all others are seen to be 0."""
    assert all(not value.any() for other, value in labels.items() if other != name)
    return labels[name]


def test_transforms_are_the_options():
    assert {"prob", *augment.NUM_LABELS} == set(base.get_config().data.augment)
    assert {*augment.GEOMETRIC, *augment.COLOUR} < set(augment.NUM_LABELS)


def test_nothing_applies():
    images = noise()
    got, labels = augment.augment(images, nothing(), ALL)
    np.testing.assert_array_equal(got, images)
    np.testing.assert_array_equal(labels, np.zeros((1, 19)))


def test_the_filter_is_orthogonal_and_has_six_vanishing_moments():
    tap = np.arange(12)
    for shift in range(6):
        product = augment.SYM6[2 * shift :] @ augment.SYM6[: 12 - 2 * shift]
        assert product == pytest.approx(float(shift == 0), abs=1e-11)
    for power in range(6):
        assert abs(np.sum((-1.0) ** tap * (tap - 5.5) ** power * augment.SYM6)) < 1e-5
    assert augment.SYM6.sum() == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize(("height", "width"), [(16, 16), (5, 12), (4, 4)])
def test_resampling_by_the_identity(height, width):
    image = noise(height, width)[0]
    np.testing.assert_allclose(augment._resample(image, np.eye(2), np.zeros(2)), image, atol=3e-6)


@pytest.mark.parametrize("drawn", [0, 1])
def test_flips(drawn):
    images = noise(10, 14)
    c = options(xflip=1.0, yflip=1.0)
    got, labels = apply(images, c, xflip=drawn)
    np.testing.assert_array_equal(got, images[:, :, ::-1] if drawn else images)
    assert only(labels, "xflip") == [drawn]
    got, labels = apply(images, c, yflip=drawn)
    np.testing.assert_array_equal(got, images[:, ::-1] if drawn else images)
    assert only(labels, "yflip") == [drawn]


@pytest.mark.parametrize(("turns", "told"), [(0, [0, 0]), (1, [1, 0]), (2, [1, 1]), (3, [0, 1])])
def test_quarter_turns(turns, told):
    images = noise()
    got, labels = apply(images, rotate_int=turns)
    np.testing.assert_array_equal(got, np.rot90(images, turns, axes=(1, 2)))
    np.testing.assert_array_equal(only(labels, "rotate_int"), told)


def test_shift_by_whole_pixels():
    """By at most an eighth: 3 columns of 24, 2 rows of 16; to the right and up, as the official pipe."""
    images = noise(16, 24)
    got, labels = apply(images, options(translate_int=1.0, scale=1.0), translate_int=(0.8, 0.7))  # 1.8 and 0.8 pixels
    np.testing.assert_array_equal(got[:, :-1, 2:], images[:, 1:, :-2])
    np.testing.assert_array_equal(got[:, :-1, :2], images[:, 1:, 2:0:-1])
    np.testing.assert_array_equal(got[:, -1, 2:], images[:, -2, :-2])
    np.testing.assert_allclose(only(labels, "translate_int"), [2 / 3, 1 / 2])


def test_fractional_shift_by_whole_pixels():
    images = noise(32, 32)
    got, labels = apply(images, translate_frac=(3 / 4, -1 / 2))  # of an eighth of 32: 3 to the right, 2 up
    np.testing.assert_allclose(got[:, :-2, 3:], images[:, 2:, :-3], atol=5e-6)
    np.testing.assert_allclose(got[:, :-2, :3], images[:, 2:, 3:0:-1], atol=5e-6)
    np.testing.assert_array_equal(only(labels, "translate_frac"), [3 / 4, -1 / 2])


WAVES = [(5.0, 0.0, 0.3), (0.0, 4.0, 1.0), (3.0, -4.0, 2.0)]
TURN = 0.3  # radians


@pytest.mark.parametrize(
    ("amounts", "source"),
    [
        ({"scale": 1.5}, lambda x, y: (x * 2**-0.3, y * 2**-0.3)),
        ({"rotate_frac": (TURN / math.pi + 1) / 2}, lambda x, y: turned(x, y, TURN)),
        ({"aniso": -1.2, "aniso_rotate": 0.5}, lambda x, y: (x * 2**0.24, y * 2**-0.24)),
        (
            {"aniso": -1.2, "aniso_rotate": 0.49, "aniso_angle": (TURN / math.pi + 1) / 2},
            lambda x, y: turned(*stretched(*turned(x, y, TURN)), -TURN),
        ),
        ({"translate_frac": (0.4, -0.2)}, lambda x, y: (x - 0.05 * 48, y + 0.025 * 40)),
        (
            {"scale": 1.0, "rotate_frac": (TURN / math.pi + 1) / 2, "aniso": -1.2, "aniso_rotate": 0.9}
            | {"translate_frac": (0.4, -0.2)},
            lambda x, y: scaled(*turned(*stretched(x - 0.05 * 48, y + 0.025 * 40), TURN)),
        ),
    ],
    ids=["scale", "rotate", "stretch", "stretch_along_an_axis", "shift", "all"],
)
def test_where_pixels_come_from(amounts, source):
    f = smooth(40, 48, WAVES)
    got, _ = apply(sampled(f, 40, 48), ALL_BUT_TURNS, **amounts)
    want = sampled(lambda x, y: f(*source(x, y)), 40, 48)
    np.testing.assert_allclose(got[:, 12:-12, 12:-12], want[:, 12:-12, 12:-12], atol=0.01)


ALL_BUT_TURNS = options(**(dict.fromkeys(augment.NUM_LABELS, 1.0) | {"rotate_int": 0.0}))


def turned(x, y, angle):
    return math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y


def stretched(x, y):
    return x * 2**0.24, y * 2**-0.24


def scaled(x, y):
    return x * 2**-0.2, y * 2**-0.2


def test_zero_beyond_three_times_the_size():
    got, _ = apply(np.ones((1, 8, 8, 1), np.float32), translate_frac=(40.0, 0.0))  # 40 pixels
    np.testing.assert_array_equal(got, 0)
    got, _ = apply(np.ones((1, 8, 8, 1), np.float32), translate_frac=(4.0, 0.0))
    np.testing.assert_allclose(got, 1, atol=1e-6)


def test_labels_of_angles_and_stretching():
    angle = {"aniso_angle": 0.75, "aniso_rotate": 0.2}
    assert only(apply(noise(), scale=-0.7)[1], "scale") == pytest.approx([-0.7])
    np.testing.assert_allclose(only(apply(noise(), rotate_frac=0.75)[1], "rotate_frac"), [-1, 1], atol=1e-6)
    np.testing.assert_allclose(only(apply(noise(), aniso=-0.7, **angle)[1], "aniso"), [0, -0.7], atol=1e-6)
    np.testing.assert_allclose(only(apply(noise(), hue=0.25)[1], "hue"), [-1, -1], atol=1e-6)


def test_order_of_labels():
    c = options(scale=1.0, lumaflip=1.0, xflip=1.0, translate_frac=1.0)
    assert augment.num_labels(c) == 5
    _, labels = augment.augment(
        noise(), draws(xflip=1, scale=2.0, translate_frac=(3.0, 4.0), lumaflip=1, brightness=5.0), c
    )
    np.testing.assert_array_equal(labels, [[1, 2, 3, 4, 1]])


def test_brightness_adds():
    images = noise()
    got, labels = apply(images, brightness=1.5)
    np.testing.assert_allclose(got, images + 0.3, atol=1e-6)
    assert only(labels, "brightness") == [1.5]


def test_contrast_scales_after_brightness():
    images = noise()
    got, _ = apply(images, contrast=-2.0, brightness=1.0)
    np.testing.assert_allclose(got, (images + 0.2) / 2, atol=1e-6)


def test_lumaflip_mirrors_grey_alone():
    images = noise()
    got, labels = apply(images, lumaflip=1)
    grey = images.mean(axis=3, keepdims=True)
    np.testing.assert_allclose(got, images - 2 * grey, atol=1e-6)
    assert only(labels, "lumaflip") == [1]


def test_hue_turns_red_to_green_to_blue():
    images = noise()
    got, _ = apply(images, hue=(2 / 3 + 1) / 2)  # 120 degrees
    np.testing.assert_allclose(got, np.roll(images, 1, axis=3), atol=1e-6)
    got, _ = apply(images, hue=1 / 4 + 1 / 2)  # 90 degrees
    np.testing.assert_allclose(got.mean(axis=3), images.mean(axis=3), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(got, axis=3), np.linalg.norm(images, axis=3), rtol=1e-5)


def test_saturation_scales_around_grey():
    images = noise()
    got, labels = apply(images, saturation=1.0)
    grey = images.mean(axis=3, keepdims=True)
    np.testing.assert_allclose(got, grey + 2 * (images - grey), atol=1e-5)
    assert only(labels, "saturation") == [1]


def test_colours_of_one_channel():
    """As its grey copy in three channels."""
    images = noise(channels=1)
    amounts = {"brightness": 0.5, "contrast": 1.2, "lumaflip": 1, "hue": 0.9, "saturation": 2.0}
    grey, _ = apply(np.repeat(images, 3, axis=3), **amounts)
    got, _ = apply(images, **amounts)
    np.testing.assert_allclose(got, grey[..., :1], atol=1e-5)


def test_an_image_does_not_depend_on_its_batch():
    images = np.concatenate([noise(seed=seed) for seed in range(4)])
    drawn = augment.draw(np.random.default_rng(0), 4)
    together, labels = augment.augment(images, drawn, ALL)
    for i in range(4):
        alone = augment.Draws(*(a[..., i : i + 1] for a in drawn))
        got, label = augment.augment(images[i : i + 1], alone, ALL)
        np.testing.assert_array_equal(got[0], together[i])
        np.testing.assert_array_equal(label[0], labels[i])


def test_given_images_are_not_changed():
    images = noise()
    before = images.copy()
    augment.augment(images, draws(brightness=1.0, scale=1.0, xflip=1), ALL)
    np.testing.assert_array_equal(images, before)


def test_draws():
    drawn = augment.draw(np.random.default_rng(0), 4000)
    for name, integers in {"xflip": 2, "yflip": 2, "rotate_int": 4, "lumaflip": 2}.items():
        counts = np.bincount(getattr(drawn, name), minlength=integers)
        np.testing.assert_allclose(counts / 4000, 1 / integers, atol=0.04)
    for name in ("apply", "translate_int", "rotate_frac", "aniso_angle", "aniso_rotate", "hue"):
        u = getattr(drawn, name)
        assert 0 <= u.min() < u.max() < 1
        np.testing.assert_allclose([u.mean(), u.std()], [0.5, 12**-0.5], atol=0.02)
    for name in ("scale", "aniso", "translate_frac", "brightness", "contrast", "saturation"):
        normals = getattr(drawn, name)
        np.testing.assert_allclose([normals.mean(), normals.std()], [0, 1], atol=0.05)
    rows = np.concatenate([np.atleast_2d(a) for a in drawn])
    correlation = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlation).max() < 0.08


def test_how_often_transforms_apply():
    """The labels of the CIFAR-10 runs: a flip half of the time, each of the others in 12 of 100."""
    c = base.get_config().data.augment
    c.prob = 0.12
    _, labels = augment.augment(np.zeros((2000, 2, 2, 1), np.float32), augment.draw(np.random.default_rng(0), 2000), c)
    assert labels.shape == (2000, augment.num_labels(c)) == (2000, 6)
    np.testing.assert_allclose((labels != 0).mean(axis=0), [0.5, 0.12, 0.12, 0.06, 0.12, 0.12], atol=0.03)
    assert set(labels[:, 0]) == {0, 1}


def test_without_augmentation():
    c = base.get_config().data.augment
    assert c.prob == 0
    assert augment.num_labels(c) == 0
    images = noise()
    got, labels = augment.augment(images, augment.draw(np.random.default_rng(0), 1), c)
    np.testing.assert_array_equal(got, images)
    assert labels.shape == (1, 0)


def test_errors():
    with pytest.raises(UserError, match="8x6 cannot be turned .*augment.rotate_int=0"):
        apply(noise(8, 6))
    with pytest.raises(UserError, match="4 channels have no colours.*augment.hue=0 --config.data.augment.saturation=0"):
        apply(noise(channels=4), options(hue=1.0, saturation=1.0))
    assert apply(noise(8, 6, 4), options(scale=1.0), scale=1.0)[0].shape == (1, 8, 6, 4)
