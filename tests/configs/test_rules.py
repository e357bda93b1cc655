"""Options that do not go together, of flow models and of decoupled MeanFlow, each named in a message."""

import pytest

from configs import base, resolve
from configs.errors import UserError

FLOW = {"model.interval_embedder": False, "method.name": "flow"}
DECOUPLED = {"model.name": "dmf_dit", "method.name": "decoupled"}
IMPROVED = {"model.name": "imf_dit", "method.name": "improved"}
TEACHER = DECOUPLED | {"method.guidance_type": "distill", "method.teacher": "runs/flow"}


def config_of(changes):
    config = base.get_config()
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize(
    "changes",
    [
        {},
        FLOW,
        FLOW | {"model.repa_dims": (768,), "model.repa_depth": 4, "data.encoder": "dinov2"},
        FLOW | {"sample.sampler": "sde", "sample.diffusion": "elbo", "sample.cfg_scale": 2.0},
        DECOUPLED,
        DECOUPLED | {"model.dmf_depth": 0, "model.attention": "fused", "model.qk_norm": True},
        DECOUPLED | {"model.dmf_depth": 4, "sample.sampler": "ctm", "sample.gamma": 0.0},
        TEACHER,
        DECOUPLED | {"model.repa_dims": (768,), "model.interval_embedder": True},  # options of dit alone
    ],
)
def test_configs_of_sense(changes):
    assert resolve.check(config_of(changes)).to_dict() == config_of(changes).to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.attention": "flash"}, "model.attention is 'flash'; choose one of plain, fused"),
        ({"method.guidance_type": "cfg"}, "guidance_type is 'cfg'; choose one of default, mg, distill"),
        ({"method.time_sampler": "tan"}, "choose one of logit_normal, uniform, arctan, arctan_official"),
        ({"method.log_variance_pairs": "official"}, "log_variance_pairs is 'official'; choose one of row, all"),
        ({"sample.sampler": "dpm"}, "sample.sampler is 'dpm'; choose one of euler, restart, ctm, heun, sde"),
        ({"sample.diffusion": "vp"}, "sample.diffusion is 'vp'; choose one of sigma, elbo"),
        ({"sample.gamma": 1.5}, r"sample\.gamma is 1\.5; it must be at least 0 and at most 1"),
        ({"sample.shift": -1.0}, r"sample\.shift is -1\.0; it must be a number above 0"),
        ({"sample.shift": 0.0}, r"sample\.shift is 0\.0; it must be a number above 0"),
        ({"sample.shift": float("inf")}, r"sample\.shift is inf; it must be a number above 0"),
        ({"sample.diffusion_scale": -1.0}, r"sample\.diffusion_scale is -1\.0; it must be at least 0"),
        ({"model.dmf_depth": -1}, "model.dmf_depth is -1; it must be at least 0"),
        ({"model.repa_depth": 0}, "model.repa_depth is 0; it must be at least 1"),
        ({"model.projector_dim": 0}, "model.projector_dim is 0; it must be at least 1"),
    ],
)
def test_values_without_sense(changes, message):
    with pytest.raises(UserError, match=message):
        resolve.check(config_of(changes))


@pytest.mark.parametrize("model", [{}, DECOUPLED, IMPROVED])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model.attention_jvp": "fused"},
            "neither cuDNN's nor PyTorch's fused attention has the forward-mode derivative",
        ),
        (
            {"model.attention": "fused", "model.compute_dtype": "float64"},
            "attention is fused and config.model.compute_dtype float64, .*: set --config.model.attention=plain",
        ),
    ],
)
def test_kernels_of_attention_that_cannot_do_it(model, changes, message):
    with pytest.raises(UserError, match=message):
        resolve.check(config_of(model | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (DECOUPLED | {"model.dmf_depth": 5}, r"config\.model\.dmf_depth 5 is more than config\.model\.depth 4"),
        (DECOUPLED | {"model.patch_size": 3}, "does not divide config.model.input_size"),
        (FLOW | {"model.repa_dims": (768,)}, r"config\.model\.repa_depth 8 is more than config\.model\.depth 4"),
        (FLOW | {"model.repa_dims": (0,)}, r"repa_dims is \(0,\); give a whole number above 0 for each encoder"),
        (FLOW | {"model.repa_dims": (768.0,)}, "give a whole number above 0 for each encoder"),
        (FLOW | {"data.encoder": "dinov2"}, "data.encoder is set, which is for REPA"),
        (DECOUPLED | {"model.repa_dims": (768,), "data.encoder": "dinov2"}, "data.encoder is set"),
        (DECOUPLED | {"method.guidance_start": 0.9, "method.guidance_end": 0.1}, "guidance_end are 0.9 and 0.1; they"),
        ({"method.guidance_end": float("nan")}, "guidance_end are 0.0 and nan; they must rise"),
        ({"model.repa_dims": (768,), "model.repa_depth": 1}, "only config.method.name=flow trains the projectors"),
        (FLOW | {"model.name": "dmf_dit"}, "flow cannot use config.model.name dmf_dit: it trains dit$"),
        (FLOW | {"model.name": "unet", "model.attn_resolutions": (), "evaluation.classifier": False,
                 "method.guidance": False}, "flow cannot use config.model.name unet: it trains dit$"),
        (DECOUPLED | {"model.name": "dit"}, "decoupled cannot use config.model.name dit: it trains dmf_dit$"),
        (DECOUPLED | {"method.name": "meanflow"}, "meanflow cannot use config.model.name dmf_dit: .* dit or unet$"),
        (FLOW | {"model.interval_embedder": True}, "interval_embedder is True: .* flow needs a network without it"),
        ({"model.interval_embedder": False}, "interval_embedder is False: meanflow needs it"),
        (TEACHER | {"method.teacher": ""}, "there is no teacher: set --config.method.teacher to the work directory"),
        (FLOW | {"sample.sampler": "restart"},
         "sampler is restart, but a model of config.method.name flow is sampled by one of euler, heun, sde"),
        (FLOW | {"sample.sampler": "ctm"}, "one of euler, heun, sde"),
        ({"sample.sampler": "heun"}, "a model of config.method.name meanflow is sampled by one of euler, restart, ctm"),
        (DECOUPLED | {"sample.sampler": "sde"}, "decoupled is sampled by one of euler, restart, ctm"),
        (DECOUPLED | {"sample.interval": (0.7, 0.0)}, "sample.interval .* must rise"),
        (IMPROVED | {"sample.cfg_scale": 2.0}, "this one is told its scale"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(changes, message):
    with pytest.raises(UserError, match=message):
        resolve.check(config_of(changes))


def test_the_path_of_sampling_is_that_of_training(tmp_path):
    """One value by two names, whichever is set, and read again."""
    for name in ("method.path", "sample.path"):
        config = config_of({name: "cosine"})
        assert config.method.path == config.sample.path == "cosine"
        resolve.open_workdir(tmp_path / name, config, "jax")
        again = resolve.read_workdir(tmp_path / name)
        assert again.method.path == again.sample.path == "cosine"


def test_the_teacher_of_weights_alone_is_a_flow_model_of_the_same_sizes():
    config = config_of(TEACHER | {"model.width": 64, "model.qk_norm": True, "model.dmf_depth": 1})
    before = config.to_dict()
    teacher = resolve.check(resolve.check_teacher(config, None))
    assert (teacher.model.name, teacher.method.name, teacher.model.width) == ("dit", "flow", 64)
    assert teacher.model.qk_norm and not teacher.model.interval_embedder
    assert config.to_dict() == before


def test_a_teacher_of_its_own_config():
    own = config_of(FLOW | {"model.depth": 7})
    teacher = resolve.check_teacher(config_of(TEACHER), own)
    assert teacher.to_dict() == own.to_dict() and teacher is not own


def test_a_teacher_computes_as_its_student_does():
    student = config_of(TEACHER | {"model.attention": "fused", "model.compute_dtype": "bfloat16"})
    teacher = resolve.check_teacher(student, config_of(FLOW))
    assert (teacher.model.attention, teacher.model.compute_dtype) == ("fused", "bfloat16")


@pytest.mark.parametrize("option", ["num_heads", "input_size", "channels", "num_classes"])
def test_a_model_to_start_from_differs_in_what_its_weights_do_not_show(option):
    other = config_of(FLOW)
    other.model[option] *= 2
    with pytest.raises(UserError, match=rf"train\.load_from runs/flow has config\.model\.{option}"):
        resolve.check_alike(config_of(DECOUPLED | {"train.load_from": "runs/flow"}), other, "train.load_from")
    resolve.check_alike(config_of(DECOUPLED | {"train.load_from": "runs/flow"}), None, "train.load_from")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "teacher runs/flow is of config.method.name meanflow, not flow"),
        (DECOUPLED, "teacher runs/flow is of config.method.name decoupled, not flow"),
        (FLOW | {"model.input_size": 16}, r"teacher runs/flow has config\.model\.input_size 16, this model 8"),
        (FLOW | {"model.channels": 4}, r"has config\.model\.channels 4, this model 1"),
        (FLOW | {"method.path": "cosine"}, r"has config\.method\.path cosine, this model linear"),
        (FLOW | {"model.num_classes": 1000}, r"has config\.model\.num_classes 1000, this model 10"),
    ],
)
def test_a_teacher_that_cannot_teach(changes, message):
    with pytest.raises(UserError, match=message):
        resolve.check_teacher(config_of(TEACHER), config_of(changes))
