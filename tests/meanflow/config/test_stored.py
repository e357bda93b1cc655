"""What earlier code wrote is what this code reads: the config of a run of each system, and the values of every recipe.

stored/SYSTEM.json: config.json of tiny runs of config version 1; version0.json: of digits:imf, from before there were
versions.  presets.json: the options of that time, their defaults and, by recipe, what differs from them.
"""

import importlib
import json
import pathlib
import shutil

import pytest
import tiny

from meanflow.config import checks, options, sections, store
from meanflow.config.methods import METHODS
from meanflow.config.workdir import check_workdir
from meanflow.errors import UserError

HERE = pathlib.Path(__file__).parent
PRESETS = json.loads((HERE / "presets.json").read_text())
SINCE = {"train.load_classes": ""}  # options added since, by default without effect
DEFAULTS = PRESETS.pop("defaults") | SINCE
FUSED = {"model.attention": "fused"}  # the same function in less memory
CHANGED = {"meanflow_imagenet": FUSED, "imf_imagenet": FUSED}  # what recipes set otherwise since
STORED = {path.stem: path for path in (HERE / "stored").glob("*.json")}
# What makes a config of helpers/tiny.py that of the run.
RUNS = {
    "meanflow": {},
    "unet": {
        "model.name": "unet", "model.width": 16, "model.channel_mult": (1, 1), "model.attn_resolutions": (4,),
        "model.dropout": 0.1, "data.augment.prob": 0.12,
    },
    "improved": {"model.name": "imf_dit", "method.name": "improved"},
    "flow": {"method.name": "flow"},
    "decoupled": {"model.name": "dmf_dit", "method.name": "decoupled"},
    "rectified": {"model.name": "edm2", "method.name": "rectified", "data.name": "couplings"},
}  # fmt: skip


def as_json(config):
    """Return {dotted option: value as JSON has it} of a config or of nested dicts."""
    return json.loads(json.dumps(sections.flatten(config)))


def of_others(network, method):
    """Return the options of networks and methods that a run with these does not have."""
    return options.all_options().keys() - sections.flatten(options.sections(network, method)).keys()


@pytest.mark.parametrize("system", STORED)
def test_a_stored_config_keeps_its_values_and_loses_the_options_of_others(system):
    content = json.loads(STORED[system].read_text())
    assert content.pop("version", 0) == (system != "version0")
    content.pop("content", None)
    before, config = as_json(content), checks.check(store.read_file(STORED[system]))
    now = as_json(config)
    assert {key: now[key] for key in before.keys() & now.keys()} == {key: before[key] for key in before if key in now}
    assert before.keys() - now.keys() <= of_others(config.model.name, config.method.name)
    assert len(now) < 120 < 150 < len(before)
    added = {key: now[key] for key in now.keys() - before.keys()}
    assert added.items() <= DEFAULTS.items()
    assert (system == "version0") == bool(added.keys() - SINCE.keys())


@pytest.mark.parametrize("system", RUNS)
def test_a_run_of_today_goes_on_in_a_stored_one(system, tmp_path):
    shutil.copy(STORED[system], tmp_path / "config.json")
    network, method, changes = tiny.split(RUNS[system] | {"train.steps": 9})
    config = tiny.make(network, method, changes)
    check_workdir(tmp_path, config, "jax")
    config.train.batch_size = 32
    with pytest.raises(UserError, match=r"another config: train\.batch_size \(16 there, 32 here\)\."):
        check_workdir(tmp_path, config, "jax")


def test_the_values_of_stored_runs():
    """By hand, one each that its recipe set."""
    read = {system: store.read_file(path) for system, path in STORED.items()}
    assert (read["unet"].model.dropout, read["unet"].model.channel_mult) == (0.1, (1, 1))
    assert (read["improved"].model.num_class_tokens, read["version0"].model.num_class_tokens) == (1, 2)
    assert (read["flow"].model.interval_embedder, read["meanflow"].model.interval_embedder) == (False, True)
    assert (read["decoupled"].model.dmf_depth, read["meanflow"].train.ema_decays) == (1, (0.9, 0.99))
    assert (read["rectified"].method.stage1_steps, read["rectified"].train.clip_stage) == (2, "guided")


@pytest.mark.parametrize(("key", "value"), [("model.name", "vit"), ("method.name", "improved")])
def test_a_stored_network_or_method_that_does_not_exist_or_fit(key, value):
    content = json.loads(STORED["meanflow"].read_text())
    section, name = key.split(".")
    content[section][name] = value
    with pytest.raises(UserError, match="^run/config.json: (there is no network 'vit'|the method improved cannot)"):
        store.from_json(json.dumps(content), "run/config.json")


def test_options_of_others_are_refused_once_no_run_stores_them():
    content = json.loads(store.to_json(options.get_config()))
    content["model"]["dropout"] = 0.1
    with pytest.raises(UserError, match="options that this code does not know: model.dropout"):
        store.from_json(json.dumps(content))


@pytest.mark.parametrize(
    ("network", "method"), [(network, name) for name, method in METHODS.items() for network in method.networks]
)
def test_every_option_has_the_default_that_it_had(network, method):
    """But for what had to be set before: a flow model has no embedding of t - r, and Re-MeanFlow times of its own."""
    own = {"model.name": network, "method.name": method}
    own |= {"model.interval_embedder": False} if method == "flow" else {}
    own |= {"method.time_sampler": "re2_truncate"} if method == "rectified" else {}
    now = as_json(options.get_config(network, method))
    assert now == {key: (DEFAULTS | own)[key] for key in now}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_recipe_has_the_values_that_it_had_among_all_options(preset):
    name, _, variant = preset.partition(":")
    get_config = importlib.import_module(f"configs.{name}").get_config
    config = get_config(variant) if variant else get_config()
    before, now = DEFAULTS | PRESETS[preset] | CHANGED.get(name, {}), as_json(config)
    assert now == {key: before[key] for key in now}
    gone = before.keys() - now.keys()
    assert gone == of_others(config.model.name, config.method.name)
    assert not gone & PRESETS[preset].keys()  # it set none of them


def test_every_recipe_is_compared():
    for path in (HERE.parents[2] / "configs").glob("[a-z]*.py"):
        module = importlib.import_module(f"configs.{path.stem}")
        variants = getattr(module, "VARIANTS", ("v0", "v1", "reproduction"))
        assert {f"{path.stem}:{v}" if v else path.stem for v in variants} <= PRESETS.keys()
