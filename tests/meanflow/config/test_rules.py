"""Options that do not go together, of flow models, decoupled MeanFlow and Re-MeanFlow, each named in a message."""

import pytest

from configs import digits
from meanflow.config import options, resolve
from meanflow.errors import UserError

FLOW = {"model.interval_embedder": False, "method.name": "flow"}
DECOUPLED = {"model.name": "dmf_dit", "method.name": "decoupled"}
IMPROVED = {"model.name": "imf_dit", "method.name": "improved"}
EDM2 = {"model.name": "edm2", "model.attn_resolutions": (), "method.name": "rectified",
        "method.time_sampler": "re2_truncate"}  # fmt: skip
EDM2_FLOW = EDM2 | FLOW | {"method.time_sampler": "logit_normal"}
RECTIFIED_DIT = {"method.name": "rectified", "method.time_sampler": "re2_truncate"}
TEACHER = DECOUPLED | {"method.guidance_type": "distill", "method.teacher": "runs/flow"}


def config_of(changes):
    config = options.get_config()
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
        EDM2,
        EDM2 | {"method.stage1_steps": 3, "method.stage_order": "guided_first", "train.clip_stage": "guided"},
        EDM2 | {"method.guidance": False, "method.distance_clip": 2.0, "sample.sampler": "velocity"},
        EDM2 | {"method.time_sampler": "uniform", "model.logvar_channels": 8, "model.width": 3},
        EDM2_FLOW | {"model.num_classes": 1, "sample.sampler": "heun", "model.attn_resolutions": (8, 4, 2)},
        RECTIFIED_DIT,
        RECTIFIED_DIT | {"method.time_sampler": "uniform"},
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
        ({"sample.sampler": "dpm"}, "sample.sampler is 'dpm'; choose one of euler, restart, ctm, velocity, heun, sde"),
        ({"sample.diffusion": "vp"}, "sample.diffusion is 'vp'; choose one of sigma, elbo"),
        ({"sample.gamma": 1.5}, r"sample\.gamma is 1\.5; it must be at least 0 and at most 1"),
        ({"sample.shift": -1.0}, r"sample\.shift is -1\.0; it must be a number above 0"),
        ({"sample.shift": 0.0}, r"sample\.shift is 0\.0; it must be a number above 0"),
        ({"sample.shift": float("inf")}, r"sample\.shift is inf; it must be a number above 0"),
        ({"sample.diffusion_scale": -1.0}, r"sample\.diffusion_scale is -1\.0; it must be at least 0"),
        ({"model.dmf_depth": -1}, "model.dmf_depth is -1; it must be at least 0"),
        ({"model.repa_depth": 0}, "model.repa_depth is 0; it must be at least 1"),
        ({"model.projector_dim": 0}, "model.projector_dim is 0; it must be at least 1"),
        ({"data.prefetch": -1}, "data.prefetch is -1; it must be at least 0"),
        ({"model.head_width": 0}, "model.head_width is 0; it must be at least 1"),
        ({"model.logvar_channels": -1}, "model.logvar_channels is -1; it must be at least 0"),
        ({"method.stage_order": "guided"}, "stage_order is 'guided'; choose one of plain_first, guided_first"),
        ({"method.omega_sampler": "power"}, "omega_sampler is 'power'; choose one of constant, uniform"),
        ({"method.stage1_steps": -1}, "method.stage1_steps is -1; it must be at least 0"),
        ({"method.distance_clip": -0.5}, r"method\.distance_clip is -0\.5; it must be at least 0"),
        ({"train.clip_stage": "plain"}, "clip_stage is 'plain'; choose one of all, guided"),
        ({"latents.pixels": "bytes"}, "latents.pixels is 'bytes'; choose one of symmetric, unit"),
        ({"evaluation.convention": "tf"}, "'tf'; choose one of torch_fidelity, jax_meanflow, pytorch_fid"),
        ({"evaluation.num_samples": 1}, "evaluation.num_samples is 1; it must be at least 2"),
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
        (
            {"model.attention_jvp": "flash", "model.compute_dtype": "float64"},
            "attention_jvp is flash and config.model.compute_dtype float64, .*: set --config.model.attention_jvp=plain",
        ),
        (
            {"model.attention_jvp": "flash", "model.width": 1032, "model.num_heads": 4},
            "attention_jvp is flash, which takes heads of at most 256 channels, but config.model.width 1032 over",
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
        (FLOW | {"model.name": "dmf_dit"}, "flow cannot use config.model.name dmf_dit: it trains dit or edm2$"),
        (FLOW | {"model.name": "unet", "model.attn_resolutions": (), "evaluation.classifier": False,
                 "method.guidance": False}, "flow cannot use config.model.name unet: it trains dit or edm2$"),
        (DECOUPLED | {"model.name": "dit"}, "decoupled cannot use config.model.name dit: it trains dmf_dit$"),
        (DECOUPLED | {"method.name": "meanflow"}, "meanflow cannot use config.model.name dmf_dit: .* dit or unet$"),
        (FLOW | {"model.interval_embedder": True}, "interval_embedder is True: .* flow needs a network without it"),
        ({"model.interval_embedder": False}, "interval_embedder is False: meanflow and rectified need it"),
        (TEACHER | {"method.teacher": ""}, "there is no teacher: set --config.method.teacher to the work directory"),
        (FLOW | {"sample.sampler": "restart"},
         "sampler is restart, but a model of config.method.name flow is sampled by one of euler, heun, sde"),
        (FLOW | {"sample.sampler": "ctm"}, "one of euler, heun, sde"),
        ({"sample.sampler": "heun"}, "a model of config.method.name meanflow is sampled by one of euler, restart, ctm"),
        (DECOUPLED | {"sample.sampler": "sde"}, "decoupled is sampled by one of euler, restart, ctm"),
        (DECOUPLED | {"sample.interval": (0.7, 0.0)}, "sample.interval .* must rise"),
        (IMPROVED | {"sample.cfg_scale": 2.0}, "this one is told its scale"),
        (EDM2 | {"model.channel_mult": ()}, r"channel_mult is \(\); give a whole number above 0 for each level"),
        (EDM2 | {"model.channel_mult": (1, 0)}, r"channel_mult is \(1, 0\); give a whole number above 0"),
        (EDM2 | {"model.channel_mult": (1.5,)}, r"channel_mult is \(1\.5,\); give a whole number above 0"),
        (EDM2 | {"model.channel_mult": (1,) * 5}, r"input_size 8 cannot be halved 4 times: .*channel_mult \(1, 1"),
        (EDM2_FLOW | {"model.attn_resolutions": (16, 4)}, r"\(16, 4\) are not among the levels' sizes \[8, 4, 2\]"),
        (EDM2 | {"model.sigma_data": 0.0}, r"sigma_data is 0\.0; it must be a number above 0"),
        (EDM2_FLOW | {"model.sigma_data": float("nan")}, "sigma_data is nan; it must be a number above 0"),
        (EDM2_FLOW | {"method.path": "cosine"}, "is edm2, whose preconditioning is that of config.method.path=linear"),
        (EDM2 | {"model.interval_embedder": False}, "interval_embedder is False: meanflow and rectified need it"),
        (EDM2_FLOW | {"model.interval_embedder": True}, "interval_embedder is True: .* a network without it"),
        (EDM2 | {"method.name": "meanflow"}, "meanflow cannot use config.model.name edm2: it trains dit or unet$"),
        (RECTIFIED_DIT | {"model.name": "dmf_dit"}, "rectified cannot use config.model.name dmf_dit: .* edm2 or dit$"),
        (RECTIFIED_DIT | {"model.interval_embedder": False}, "meanflow and rectified need it"),
        (RECTIFIED_DIT | {"method.path": "cosine"}, "whose trajectories are straight: config.method.path is linear"),
        (EDM2 | {"method.stage1_steps": 3, "method.guidance": False}, "parts plain from guided steps, but .* is False"),
        (EDM2 | {"sample.sampler": "heun"}, "rectified is sampled by one of euler, restart, ctm, velocity"),
        (EDM2_FLOW | {"sample.sampler": "velocity"}, "flow is sampled by one of euler, heun, sde"),
        *((EDM2 | {"method.time_sampler": name}, f"time_sampler is {name}: .*rectified takes re2_truncate or uniform")
          for name in ("logit_normal", "arctan", "arctan_official")),
        *((changes | {"method.time_sampler": "re2_truncate"}, "re2_truncate is for no other method")
          for changes in ({}, FLOW, DECOUPLED, IMPROVED, EDM2_FLOW)),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(changes, message):
    with pytest.raises(UserError, match=message):
        resolve.check(config_of(changes))


METRICS = {"evaluation.inception": "w", "evaluation.reference": "r.npz"}


@pytest.mark.parametrize(
    "changes",
    [
        METRICS | {"evaluation.metrics": ("fid", "is", "kid", "pr", "fd_dinov2")},
        {"evaluation.metrics": ("is",), "evaluation.inception": "w"},
        {"evaluation.metrics": ("fd_dinov2",), "evaluation.reference": "r.pkl"},
        METRICS,
        {"latents.vae": "some/vae"},
        {"latents.shift": (1.0,), "latents.scale": (2.0,)},
        {"model.channels": 4, "latents.shift": (1.0,) * 4, "latents.scale": (2.0,), "latents.pixels": "unit"},
    ],
)
def test_metrics_and_latents_of_sense(changes):
    assert resolve.check(config_of(changes)).to_dict() == config_of(changes).to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (METRICS | {"evaluation.metrics": ("fid", "fvd")}, "metrics has 'fvd'; choose of fid, is, kid, pr, fd_dinov2"),
        *((METRICS | {"evaluation.metrics": (metric,), "evaluation.inception": ""},
           f"metrics is {metric}, but config.evaluation.inception names no weights: python parity/convert.py")
          for metric in ("fid", "is", "kid", "pr")),
        *((METRICS | {"evaluation.metrics": ("is", metric), "evaluation.reference": ""},
           f"metrics is is, {metric}, but config.evaluation.reference names no .*evaluate --make_reference=IMAGES")
          for metric in ("fid", "kid", "pr", "fd_dinov2")),
        *((METRICS | {"evaluation.metrics": ("fid", metric), "evaluation.num_samples": least - 1},
           f"evaluation.num_samples is {least - 1}, but {metric} needs at least {least}")
          for metric, least in (("is", 10), ("pr", 4))),
        ({"latents.scale": (1.0,)}, r"latents of shift \(\): give one number, or one for each of 1 channels"),
        ({"latents.shift": (0.0,), "latents.scale": (0.0,)}, "give numbers, and a scale other than 0"),
        ({"latents.shift": (0.0,), "latents.scale": (1.0, 2.0), "model.channels": 4},
         r"latents of scale \(1.0, 2.0\): give one number, or one for each of 4 channels"),
    ],
)  # fmt: skip
def test_metrics_and_latents_of_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        resolve.check(config_of(changes))


def test_only_networks_without_a_log_variance_of_edm2_are_trained():
    for changes in (EDM2, EDM2_FLOW):
        resolve.check_trainable(config_of(changes))
        with pytest.raises(UserError, match="logvar_channels is 8: no method here trains EDM2's log-variance"):
            resolve.check_trainable(config_of(changes | {"model.logvar_channels": 8}))
    resolve.check_trainable(config_of({"model.logvar_channels": 8}))  # an option of edm2 alone


@pytest.mark.parametrize("option", ["head_width", "sigma_data", "num_classes"])
def test_what_the_weights_of_edm2_do_not_show(option):
    teacher = config_of(EDM2_FLOW | {"model.num_heads": 3})
    config = config_of(EDM2 | {"train.load_from": "runs/teacher"})
    resolve.check_alike(config, teacher, "train.load_from")
    teacher.model[option] *= 2
    with pytest.raises(UserError, match=rf"load_from runs/teacher has config\.model\.{option}"):
        resolve.check_alike(config, teacher, "train.load_from")


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


@pytest.mark.parametrize(
    ("changes", "warned"),
    [({}, True), ({"model.compute_dtype": "bfloat16"}, False), ({"train.matmul_precision": "default"}, False),
     ({"model.attention_jvp": "plain"}, False)],
)  # fmt: skip
def test_a_kernel_that_multiplies_in_tf32_is_named(changes, warned, caplog):
    config = digits.get_config()
    config.update_from_flattened_dict({"model.attention_jvp": "flash"} | changes)
    resolve.check_trainable(config)
    assert ("multiplies float32 in TF32" in caplog.text) == warned
