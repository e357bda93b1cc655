"""What a work directory keeps of a config, and with which other one its run can go on."""

import pytest

from configs import digits
from meanflow.config import checks, options, store
from meanflow.config.workdir import CONTENTS, FREE, open_workdir, read_workdir
from meanflow.errors import UserError


@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_backends_of_the_compiler(backend, tmp_path):
    """A run may go on with the other one."""
    config = digits.get_config()
    open_workdir(tmp_path, config, "torch")
    config.train.compile_backend = backend
    open_workdir(tmp_path, checks.check(config), "torch")


def test_a_workdir_of_another_config_is_refused_by_option(tmp_path):
    config = digits.get_config()
    open_workdir(tmp_path, config, "jax")
    config.train.learning_rate, config.model.depth = 0.5, 7
    with pytest.raises(UserError) as error:
        open_workdir(tmp_path, config, "jax")
    assert "train.learning_rate (0.001 there, 0.5 here)" in str(error.value)
    assert "model.depth (4 there, 7 here)" in str(error.value)
    assert read_workdir(tmp_path).model.depth == 4


def test_a_workdir_of_another_network_or_method_is_refused(tmp_path):
    open_workdir(tmp_path, digits.get_config("unet"), "jax").close()
    for variant, message in (("", r"model.name \('unet' there, 'dit' here\)"), ("flow", "method.name")):
        with pytest.raises(UserError, match=message):
            open_workdir(tmp_path, digits.get_config(variant), "jax")


def test_a_run_may_go_on_longer_and_log_otherwise(tmp_path):
    config = digits.get_config()
    config.train.schedule = "constant"
    open_workdir(tmp_path, config, "jax")
    config.train.steps, config.train.log_every, config.sample.steps = 9, 3, 4
    open_workdir(tmp_path, config, "jax")
    assert read_workdir(tmp_path).train.steps == 9


def test_free_options_exist():
    flat = options.all_options()
    assert flat.keys() | {key.split(".")[0] for key in flat} >= FREE


@pytest.mark.parametrize("steps", [1500, 600])
def test_a_cosine_schedule_keeps_its_length(tmp_path, steps):
    config = digits.get_config()
    open_workdir(tmp_path, config, "jax")
    config.train.steps = steps
    message = rf"cosine schedule of 1200 steps, and this config one of {steps}.*--config.train.schedule_steps=1200"
    with pytest.raises(UserError, match=message):
        open_workdir(tmp_path, config, "jax")
    config.train.schedule_steps = 1200
    open_workdir(tmp_path, config, "jax")
    open_workdir(tmp_path, config, "jax")
    config.train.steps = config.train.schedule_steps = 1200
    open_workdir(tmp_path, config, "jax")
    config.train.schedule_steps = 1300
    with pytest.raises(UserError, match="1200 steps, and this config one of 1300"):
        open_workdir(tmp_path, config, "jax")
    config.train.schedule = "constant"
    with pytest.raises(UserError, match="train.schedule"):
        open_workdir(tmp_path, config, "jax")


PATHS = dict.fromkeys(CONTENTS, "old/path")


@pytest.mark.parametrize("key", CONTENTS)
def test_what_moved_is_found_by_what_it_holds(tmp_path, key):
    config = digits.get_config("dmf" if key == "method.teacher" else "flow")
    config.update_from_flattened_dict({"data.name": "old/path", key: "old/path"})
    open_workdir(tmp_path, config, "torch", dict.fromkeys(PATHS, "1"))
    config.update_from_flattened_dict({key: "new/path"})
    open_workdir(tmp_path, config, "torch", dict.fromkeys(PATHS, "1"))
    assert store.flatten(read_workdir(tmp_path))[key] == "new/path"
    before = (tmp_path / "config.json").read_text()
    for path, words in [("newer", "names 'newer', which"), ("new/path", "names the same path, which now")]:
        config.update_from_flattened_dict({key: path})
        with pytest.raises(UserError, match=f"with config.{key} 'new/path'; this config {words} holds other data"):
            open_workdir(tmp_path, config, "torch", dict.fromkeys(PATHS, "1") | {key: "2"})
    assert (tmp_path / "config.json").read_text() == before


def test_a_path_of_a_run_without_digests_must_stay(tmp_path):
    config = digits.get_config()
    open_workdir(tmp_path, config, "torch")
    config.data.name = "new/path"
    with pytest.raises(UserError, match="was written with config.data.name 'digits'; this config names 'new/path'"):
        open_workdir(tmp_path, config, "torch", {"data.name": "1"})
    config.data.name = "digits"
    open_workdir(tmp_path, config, "torch", {"data.name": "1"})
    config.data.name = "new/path"
    open_workdir(tmp_path, config, "torch", {"data.name": "1"})


def test_no_message_tells_to_delete_a_run(tmp_path):
    config = digits.get_config()
    open_workdir(tmp_path, config, "torch")
    config.model.depth = 7
    for framework in ("torch", "jax"):
        with pytest.raises(UserError) as error:
            (tmp_path / "checkpoints" / "torch").mkdir(parents=True, exist_ok=True)
            open_workdir(tmp_path, config, framework)
        assert "delete" not in str(error.value)


def test_a_missing_or_damaged_config_is_named(tmp_path):
    with pytest.raises(UserError, match="not the work directory of a run"):
        read_workdir(tmp_path)
    (tmp_path / "config.json").write_text('{"seed": 1')
    with pytest.raises(UserError, match="is damaged"):
        read_workdir(tmp_path)
    (tmp_path / "config.json").write_text('{"seed": 1}')
    with pytest.raises(UserError, match="lacks the section data"):
        read_workdir(tmp_path)


def test_a_workdir_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        open_workdir(tmp_path / "file" / "run", digits.get_config(), "jax")


def test_a_directory_that_is_no_work_directory(tmp_path):
    """Such as one of an official code's checkpoints that train.load_from names."""
    with pytest.raises(UserError, match=r"is not the work directory of a run: .*python -m parity.convert reads them"):
        read_workdir(tmp_path)
