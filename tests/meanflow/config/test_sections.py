"""Options exist only where they mean something, and every number has a range that is held at both ends."""

import copy
import math
import pickle
import re

import numpy as np
import pytest
import tiny

from configs import digits
from meanflow.config import checks, options, sections
from meanflow.config.methods import METHODS
from meanflow.config.networks import NETWORKS
from meanflow.errors import UserError

RUNS = [(network, name) for name, method in METHODS.items() for network in method.networks]
ALL = options.all_options()
INTERVALS = {key: o.interval for key, o in ALL.items() if isinstance(o, sections.Option) and o.interval}
UNET = options.get_config("unet")
LACKS = "^there is no option config.model.depth with network unet and method meanflow; config.model has attn_res"


@pytest.mark.parametrize(("network", "method"), RUNS)
def test_a_run_has_the_options_of_its_network_and_its_method_alone(network, method):
    config = options.get_config(network, method)
    assert (config.model.name, config.method.name) == (network, method)
    own = {"name", "input_size", "channels", "num_classes", "compute_dtype"} | NETWORKS[network].options(method).keys()
    assert set(config.model) == own
    assert set(config.method) == {"name"} | METHODS[method].options().keys()
    assert ("clip_stage" in config.train) == (method == "rectified")
    assert ("omega" in config.sample) == (method == "improved") != ("cfg_scale" in config.sample)
    assert ("diffusion" in config.sample) == (method == "flow") != ("gamma" in config.sample)
    assert ("encoder" in config.data) == ("repa_dims" in config.model) == ((network, method) == ("dit", "flow"))


def test_networks_and_methods_that_do_not_go_together():
    assert sections.flatten(options.get_config()) == sections.flatten(options.get_config("dit", "meanflow"))
    for names, message in (
        (("vit", "meanflow"), "there is no network 'vit'; choose one of dit, unet, imf_dit, dmf_dit, edm2"),
        (("dit", "ddpm"), "there is no method 'ddpm'; choose one of meanflow, improved, flow, decoupled, rectified"),
        (("unet", "flow"), "the method flow cannot train the network unet: it trains dit or edm2"),
        (("edm2", "meanflow"), "the method meanflow cannot train the network edm2: it trains dit or unet"),
        (("dit", "improved"), "the method improved cannot train the network dit: it trains imf_dit"),
        (("dit", "decoupled"), "the method decoupled cannot train the network dit: it trains dmf_dit"),
        (("dmf_dit", "rectified"), "the method rectified cannot train the network dmf_dit: it trains edm2 or dit"),
    ):
        with pytest.raises(UserError, match=f"^{message}$"):
            options.get_config(*names)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: setattr(c.model, "depth", 3),
        lambda c: c.model.__setitem__("depth", 3),
        lambda c: c.model.update(depth=3),
        lambda c: c.update_from_flattened_dict({"model.depth": 3}),
        lambda c: sections.find(c, "model.depth"),
    ],
)
def test_an_option_that_a_run_lacks_cannot_be_set(change):
    for config in (options.get_config("unet"), copy.deepcopy(UNET), pickle.loads(pickle.dumps(UNET))):
        with pytest.raises(UserError, match=LACKS):
            change(config)
        assert "depth" not in config.model


def test_every_section_names_itself():
    for name in ("train.colour", "data.augment.colour", "colour"):
        path = ".".join(["config", *name.split(".")[:-1]])
        with pytest.raises(UserError, match=f"^there is no option config.{name} with .*; {path} has "):
            sections.find(UNET, name)
    with pytest.raises(UserError, match="there is no option config.depth "):
        sections.find(UNET, "depth.x")


@pytest.mark.parametrize("name", ["model.name", "method.name"])
def test_network_and_method_cannot_be_changed(name):
    config = options.get_config()
    with pytest.raises(UserError, match=rf"^config.{name} is '\w+' and cannot be changed to .x., .*get_config\("):
        config.update_from_flattened_dict({name: "x"})
    config.update_from_flattened_dict({name: sections.find(config, name)})
    config.name = config.data.name = "x"
    with config.unlocked():
        config.model.name = "unet"
    with pytest.raises(UserError, match="there is no option config.model.attention with"):
        checks.check(config)


def test_a_copy_is_locked_and_keeps_the_one_path():
    config = copy.deepcopy(options.get_config())
    config.method.path = "cosine"
    assert config.sample.path == "cosine" and config.is_locked and config.model.is_locked


def test_the_config_of_another_network_and_method():
    config = tiny.compose({
        "model.name": "dmf_dit", "method.name": "decoupled", "model.depth": 7, "model.qk_norm": True, "seed": 3,
        "sample.sampler": "restart", "sample.steps": 5, "method.path": "cosine", "train.clip_norm": 2.0,
    })  # fmt: skip
    before = sections.flatten(config)
    other = options.recompose(config, "dit", "flow")
    assert sections.flatten(other) == sections.flatten(tiny.compose({
        "method.name": "flow", "model.depth": 7, "model.qk_norm": True, "seed": 3, "sample.steps": 5,
        "method.path": "cosine", "train.clip_norm": 2.0,
    }))  # fmt: skip
    assert sections.flatten(config) == before
    student = options.recompose(tiny.compose({"model.name": "edm2", "method.name": "flow"}), "edm2", "rectified")
    assert student.model.interval_embedder and student.method.time_sampler == "re2_truncate"


def test_every_number_has_a_range():
    numbers = {key: o for key, o in ALL.items() if isinstance(default(o), int | float) and not isinstance(o, bool)}
    assert INTERVALS.keys() == numbers.keys()
    assert all(sections.contains(interval, default(ALL[key])) for key, interval in INTERVALS.items())


def default(option):
    return option.default if isinstance(option, sections.Option) else option


def check(key, value):
    """Check one option alone."""
    section = sections.make({"x": value}, "config", "")
    sections.check_values(section, {"x": ALL[key]})


@pytest.mark.parametrize("key", INTERVALS)
def test_a_range_is_held_at_both_ends(key):
    interval = INTERVALS[key]
    refused, accepted = [math.nan, math.inf, -math.inf], []
    for end, direction, closed in zip(
        sections.ends(interval), (-1, 1), (interval[0] == "[", interval[-1] == "]"), strict=True
    ):
        if math.isfinite(end):
            beyond = float(np.nextafter(end, direction * math.inf))
            inside = float(np.nextafter(end, -direction * math.inf))
            refused += [beyond] if closed else [beyond, end]
            accepted += [end, inside] if closed else [inside]
    for value in accepted:
        check(key, value)
    for value in refused:
        with pytest.raises(UserError, match=rf"^config\.x is {re.escape(str(value))}; it must be "):
            check(key, value)


@pytest.mark.parametrize("key", [key for key, o in ALL.items() if isinstance(o, sections.Option) and o.choices])
def test_choices_are_listed(key):
    choices = ALL[key].choices
    assert ALL[key].default == choices[0]
    for value in choices:
        check(key, value)
    with pytest.raises(UserError, match=f"^config.x is 'other'; choose one of {', '.join(choices)}$"):
        check(key, "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method.kappa": 1.0}, "config.method.kappa is 1.0; it must be at least 0 and less than 1"),
        ({"model.name": "unet", "model.dropout": 1.0}, "config.model.dropout is 1.0; it must be at least 0 and less"),
        ({"train.learning_rate": math.inf}, "learning_rate is inf; it must be at least 0 and finite"),
        ({"method.omega": math.nan}, "omega is nan; it must be a finite number"),
        ({"model.name": "imf_dit", "method.name": "improved", "method.omega_max": math.inf},
         "omega_max is inf; it must be at least 1 and finite"),
        ({"sample.shift": 0.0}, "sample.shift is 0.0; it must be a number above 0"),
        ({"method.time_mean": (math.nan, 0.0)}, "time_mean is (nan, 0.0); give two numbers"),
        ({"method.time_std": (1.0, -1.0)}, "time_std is (1.0, -1.0); deviations are at least 0"),
        ({"method.guidance_end": math.nan}, "guidance_end is nan; it must be at least 0 and at most 1"),
        ({"train.ema_decays": (0.9, math.nan)}, "at least one decay in [0, 1)"),
        ({"train.ema_decays": ("0.9",)}, "at least one decay in [0, 1)"),
        ({"train.ema_decays": ()}, "at least one decay in [0, 1)"),
        ({"sample.ema": 1}, "config.sample.ema is 1, but there are 1 EMAs"),
        ({"sample.times": (1.0, math.nan, 0.0)}, "times is (1.0, nan, 0.0): sampling times must fall"),
        ({"sample.times": (1.0, 0.5, 0.5)}, "sampling times must fall"),
        ({"sample.times": (1.5, 0.0)}, "sampling times must fall"),
        ({"sample.interval": (0.0, math.nan)}, "interval"),
    ],
)  # fmt: skip
def test_values_that_are_no_numbers_or_beyond_their_range_are_named(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        checks.check(tiny.compose(changes))


def test_unknown_and_missing_options_are_named():
    config = digits.get_config()
    with config.unlocked():
        config.train.colour = "blue"
    with pytest.raises(UserError, match=r"there is no option config\.train\.colour with network dit"):
        checks.check(config)
    config = digits.get_config()
    with config.unlocked():
        del config.train.steps
    with pytest.raises(UserError, match=r"config\.train\.steps is missing"):
        checks.check(config)
    with pytest.raises(UserError, match="--config is missing"):
        checks.check(None)
