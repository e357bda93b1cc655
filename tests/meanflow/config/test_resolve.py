"""Checks of a config, and what the work directory keeps of it."""

import pytest

from configs import digits
from meanflow.config import options, resolve
from meanflow.errors import UserError


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("method.path", "curved", "config.method.path is 'curved'; choose one of linear, cosine"),
        ("method.flow_fraction", 1.5, "at least 0 and at most 1"),
        ("train.steps", 0, "config.train.steps is 0"),
        ("train.ema_decays", (), "at least one decay"),
        ("train.ema_decays", (1.5,), "at least one decay"),
        ("train.ema_decays", ("0.9",), "at least one decay"),
        ("model.patch_size", 3, "does not divide config.model.input_size"),
        ("model.num_heads", 3, "multiple of model.num_heads"),
        ("sample.ema", 1, "there are 1 EMAs"),
    ],
)
def test_values_without_sense_are_named(option, value, message):
    config = digits.get_config()
    config.update_from_flattened_dict({option: value})
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        resolve.check(config)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("model.name", "vit", "choose one of dit, unet"),
        ("model.encoder_type", "wide", "choose one of standard, skip, residual"),
        ("method.time_order", "random", "choose one of sorted, truncated"),
        ("method.time_mean", (-0.4,), r"config.method.time_mean is \(-0.4,\); give two numbers, for t and for r"),
        ("method.time_mean", ("a", 0.0), "give two numbers, for t and for r"),
        ("method.time_std", (1.0, 1.0, 1.0), "config.method.time_std is .*; give two numbers"),
        ("method.guidance", True, "a network without classes, which cannot be guided: set --config.method.guidance=F"),
        ("sample.cfg_scale", 2.0, "and --config.sample.cfg_scale=1"),
        ("evaluation.classifier", True, "set --config.evaluation.classifier=False"),
        ("model.width", 6, "config.model.width 6 must be a multiple of 4"),
        ("model.channel_mult", (1, 0), "give a whole number above 0 for each level"),
        ("model.channel_mult", (1, 1.5), "give a whole number above 0 for each level"),
        ("model.attn_resolutions", (16,), r"\(16,\) are not among the levels' sizes \[8, 4\]"),
        ("model.dropout", 1.0, "config.model.dropout is 1; it must be less"),
        ("model.dropout", -0.1, "config.model.dropout is -0.1; it must be at least 0"),
        ("data.augment.prob", 1.5, "at least 0 and at most 1"),
        ("train.ema_every", 0, "config.train.ema_every is 0; it must be at least 1"),
        ("train.compile_backend", "eager", "choose one of inductor, aot_eager"),
    ],
)
def test_values_without_sense_for_a_unet_are_named(option, value, message):
    config = digits.get_config("unet")
    config.update_from_flattened_dict({option: value})
    with pytest.raises(UserError, match=message):
        resolve.check(config)


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_backends_of_the_compiler(backend, tmp_path):
    """A run may go on with the other one."""
    config = digits.get_config()
    resolve.open_workdir(tmp_path, config, "torch")
    config.train.compile_backend = backend
    resolve.open_workdir(tmp_path, resolve.check(config), "torch")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method.name": "meanflow"}, "meanflow cannot use config.model.name imf_dit: it trains dit or unet"),
        ({"model.name": "dit"}, "improved cannot use config.model.name dit: it trains imf_dit"),
        ({"model.head_depth": 9}, r"head_depth 9 is more than config\.model\.depth"),
        ({"model.width": 36, "model.num_heads": 12}, "must be even, for rotary positions"),
        ({"sample.cfg_scale": 2.0}, "this one is told its scale"),
        ({"sample.omega": 0.5}, r"config\.sample\.omega is 0\.5; it must be at least 1"),
        ({"sample.omega": float("nan")}, r"config\.sample\.omega is nan; it must be at least 1"),
        ({"model.num_heads": 0}, r"config\.model\.num_heads is 0; it must be at least 1"),
        ({"sample.interval": (0.6, 0.4)}, r"config\.sample\.interval is \(0\.6, 0\.4\); it must rise"),
        ({"sample.interval": (0.6,)}, "give two numbers, the start and the end of the interval"),
        ({"method.omega_max": 0.5}, r"config\.method\.omega_max is 0\.5; it must be at least 1"),
    ],
)
def test_mistakes_of_improved_meanflow_are_named(changes, message):
    config = digits.get_config("imf")
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        resolve.check(config)


def test_a_network_without_the_head_of_v_can_sample_but_not_be_trained():
    config = digits.get_config("imf")
    resolve.check_trainable(config)
    config.model.v_heads = False
    with pytest.raises(UserError, match="can sample but not be trained"):
        resolve.check_trainable(resolve.check(config))


def test_a_transformer_does_not_mind_the_options_of_a_unet():
    config = digits.get_config()
    config.update_from_flattened_dict({"model.dropout": 1.0, "model.channel_mult": (), "sample.cfg_scale": 2.0})
    resolve.check(config)


def test_unknown_and_missing_options_are_named():
    config = digits.get_config()
    config.train.colour = "blue"
    with pytest.raises(UserError, match=r"config\.train\.colour is unknown"):
        resolve.check(config)
    config = digits.get_config()
    del config.train.steps
    with pytest.raises(UserError, match=r"config\.train\.steps is missing"):
        resolve.check(config)
    with pytest.raises(UserError, match="--config is missing"):
        resolve.check(None)


@pytest.mark.parametrize(("batch", "accumulate", "devices"), [(6, 1, 4), (8, 3, 2)])
def test_batches_that_do_not_divide(batch, accumulate, devices):
    config = digits.get_config()
    config.train.batch_size, config.train.accumulate = batch, accumulate
    with pytest.raises(UserError, match=rf"batch_size {batch} is not divisible by {devices * accumulate}"):
        resolve.check_divisible(config, devices, "devices")
    config.train.batch_size = 48
    resolve.check_divisible(config, devices, "devices")
    config.train.fsdp = 5
    with pytest.raises(UserError, match="fsdp 5 does not divide"):
        resolve.check_divisible(config, devices, "devices")


def test_a_workdir_of_another_config_is_refused_by_option(tmp_path):
    config = digits.get_config()
    resolve.open_workdir(tmp_path, config, "jax")
    config.train.learning_rate, config.model.depth = 0.5, 7
    with pytest.raises(UserError) as error:
        resolve.open_workdir(tmp_path, config, "jax")
    assert "train.learning_rate (0.001 there, 0.5 here)" in str(error.value)
    assert "model.depth (4 there, 7 here)" in str(error.value)
    assert resolve.read_workdir(tmp_path).model.depth == 4


def test_a_run_may_go_on_longer_and_log_otherwise(tmp_path):
    config = digits.get_config()
    config.train.schedule = "constant"
    resolve.open_workdir(tmp_path, config, "jax")
    config.train.steps, config.train.log_every, config.sample.steps = 9, 3, 4
    resolve.open_workdir(tmp_path, config, "jax")
    assert resolve.read_workdir(tmp_path).train.steps == 9


def test_free_options_exist():
    flat = resolve.flatten(options.get_config())
    assert flat.keys() | {key.split(".")[0] for key in flat} >= resolve.FREE


@pytest.mark.parametrize("steps", [1500, 600])
def test_a_cosine_schedule_keeps_its_length(tmp_path, steps):
    config = digits.get_config()
    resolve.open_workdir(tmp_path, config, "jax")
    config.train.steps = steps
    message = rf"cosine schedule of 1200 steps, and this config one of {steps}.*--config.train.schedule_steps=1200"
    with pytest.raises(UserError, match=message):
        resolve.open_workdir(tmp_path, config, "jax")
    config.train.schedule_steps = 1200
    resolve.open_workdir(tmp_path, config, "jax")
    resolve.open_workdir(tmp_path, config, "jax")
    config.train.steps = config.train.schedule_steps = 1200
    resolve.open_workdir(tmp_path, config, "jax")
    config.train.schedule_steps = 1300
    with pytest.raises(UserError, match="1200 steps, and this config one of 1300"):
        resolve.open_workdir(tmp_path, config, "jax")
    config.train.schedule = "constant"
    with pytest.raises(UserError, match="train.schedule"):
        resolve.open_workdir(tmp_path, config, "jax")


PATHS = {"data.name": "old/data", "method.teacher": "old/teacher", "data.encoder": "old/encoder"}


@pytest.mark.parametrize("key", resolve.CONTENTS)
def test_what_moved_is_found_by_what_it_holds(tmp_path, key):
    config = digits.get_config()
    config.update_from_flattened_dict(PATHS)
    resolve.open_workdir(tmp_path, config, "torch", dict.fromkeys(PATHS, "1"))
    config.update_from_flattened_dict({key: "new/path"})
    resolve.open_workdir(tmp_path, config, "torch", dict.fromkeys(PATHS, "1"))
    assert resolve.flatten(resolve.read_workdir(tmp_path))[key] == "new/path"
    before = (tmp_path / "config.json").read_text()
    for path, words in [("newer", "names 'newer', and that"), ("new/path", "names the same path, which by now")]:
        config.update_from_flattened_dict({key: path})
        with pytest.raises(UserError, match=f"is of config.{key} 'new/path'; this config {words} holds something else"):
            resolve.open_workdir(tmp_path, config, "torch", dict.fromkeys(PATHS, "1") | {key: "2"})
    assert (tmp_path / "config.json").read_text() == before


def test_a_path_of_a_run_without_digests_must_stay(tmp_path):
    config = digits.get_config()
    resolve.open_workdir(tmp_path, config, "torch")
    config.data.name = "new/path"
    with pytest.raises(UserError, match="is of config.data.name 'digits'; this config names 'new/path'"):
        resolve.open_workdir(tmp_path, config, "torch", {"data.name": "1"})
    config.data.name = "digits"
    resolve.open_workdir(tmp_path, config, "torch", {"data.name": "1"})
    config.data.name = "new/path"
    resolve.open_workdir(tmp_path, config, "torch", {"data.name": "1"})


def test_no_message_tells_to_delete_a_run(tmp_path):
    config = digits.get_config()
    resolve.open_workdir(tmp_path, config, "torch")
    config.model.depth = 7
    for framework in ("torch", "jax"):
        with pytest.raises(UserError) as error:
            (tmp_path / "checkpoints" / "torch").mkdir(parents=True, exist_ok=True)
            resolve.open_workdir(tmp_path, config, framework)
        assert "delete" not in str(error.value)


def test_a_missing_or_damaged_config_is_named(tmp_path):
    with pytest.raises(UserError, match="not the work directory of a run"):
        resolve.read_workdir(tmp_path)
    (tmp_path / "config.json").write_text('{"seed": 1')
    with pytest.raises(UserError, match="is damaged"):
        resolve.read_workdir(tmp_path)
    (tmp_path / "config.json").write_text('{"seed": 1}')
    with pytest.raises(UserError, match="lacks the section data"):
        resolve.read_workdir(tmp_path)


def test_a_workdir_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        resolve.open_workdir(tmp_path / "file" / "run", digits.get_config(), "jax")


def test_a_directory_that_is_no_work_directory(tmp_path):
    """Such as one of an official code's checkpoints that train.load_from names."""
    with pytest.raises(UserError, match=r"is not the work directory of a run: .*\.  .*parity/convert.py reads them"):
        resolve.read_workdir(tmp_path)
