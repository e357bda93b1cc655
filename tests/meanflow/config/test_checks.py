"""Options that do not go together, each named in a message."""

import pytest
import tiny

from configs import digits
from meanflow.config import checks
from meanflow.config.workdir import open_workdir, read_workdir
from meanflow.errors import UserError

FLOW = {"method.name": "flow"}
DECOUPLED = {"model.name": "dmf_dit", "method.name": "decoupled"}
IMPROVED = {"model.name": "imf_dit", "method.name": "improved"}
EDM2 = {"model.name": "edm2", "model.attn_resolutions": (), "method.name": "rectified"}
EDM2_FLOW = EDM2 | FLOW
RECTIFIED_DIT = {"method.name": "rectified"}
TEACHER = DECOUPLED | {"method.guidance_type": "distill", "method.teacher": "runs/flow"}


config_of = tiny.compose


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
    assert checks.check(config_of(changes)).to_dict() == config_of(changes).to_dict()


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
        checks.check(config_of(model | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (DECOUPLED | {"model.dmf_depth": 5}, r"config\.model\.dmf_depth 5 is more than config\.model\.depth 4"),
        (DECOUPLED | {"model.patch_size": 3}, "does not divide config.model.input_size"),
        (FLOW | {"model.repa_dims": (768,)}, r"config\.model\.repa_depth 8 is more than config\.model\.depth 4"),
        (FLOW | {"model.repa_dims": (0,)}, r"repa_dims is \(0,\); give a whole number above 0 for each encoder"),
        (FLOW | {"model.repa_dims": (768.0,)}, "give a whole number above 0 for each encoder"),
        (FLOW | {"data.encoder": "dinov2"}, "data.encoder is set, but REPA is off: set config.model.repa_dims"),
        (DECOUPLED | {"method.guidance_start": 0.9, "method.guidance_end": 0.1}, "start 0.9 is after .*_end 0.1"),
        (FLOW | {"model.interval_embedder": True}, "interval_embedder is True, but config.method.name flow .* without"),
        ({"model.interval_embedder": False}, "interval_embedder is False, but config.method.name meanflow .* with it"),
        (TEACHER | {"method.teacher": ""}, "there is no teacher: set --config.method.teacher to the work directory"),
        (FLOW | {"sample.sampler": "restart"},
         "sampler is 'restart'; choose one of euler, heun, sde"),
        ({"sample.sampler": "heun"}, "sampler is 'heun'; choose one of euler, restart, ctm, velocity"),
        (DECOUPLED | {"sample.interval": (0.7, 0.0)}, "sample.interval .* must rise"),
        (EDM2 | {"model.channel_mult": ()}, r"channel_mult is \(\); give a whole number above 0 for each level"),
        (EDM2 | {"model.channel_mult": (1, 0)}, r"channel_mult is \(1, 0\); give a whole number above 0"),
        (EDM2 | {"model.channel_mult": (1.5,)}, r"channel_mult is \(1\.5,\); give a whole number above 0"),
        (EDM2 | {"model.channel_mult": (1,) * 5}, r"input_size 8 cannot be halved 4 times: .*channel_mult \(1, 1"),
        (EDM2_FLOW | {"model.attn_resolutions": (16, 4)}, r"\(16, 4\) are not among the levels' sizes \[8, 4, 2\]"),
        (EDM2 | {"model.sigma_data": 0.0}, r"sigma_data is 0\.0; it must be a number above 0"),
        (EDM2_FLOW | {"model.sigma_data": float("nan")}, "sigma_data is nan; it must be a number above 0"),
        (EDM2_FLOW | {"method.path": "cosine"}, "is edm2, whose preconditioning is that of config.method.path=linear"),
        (EDM2 | {"model.interval_embedder": False}, "interval_embedder is False, but config.method.name rectified"),
        (EDM2_FLOW | {"model.interval_embedder": True}, "interval_embedder is True, but config.method.name flow"),
        (RECTIFIED_DIT | {"method.path": "cosine"}, "config.method.path is 'cosine'; choose one of linear"),
        (EDM2 | {"method.stage1_steps": 3, "method.guidance": False}, "separates plain from guided steps, .* is False"),
        *((EDM2 | {"method.time_sampler": name}, f"time_sampler is '{name}'; choose one of re2_truncate, uniform")
          for name in ("logit_normal", "arctan", "arctan_official")),
        *((changes | {"method.time_sampler": "re2_truncate"}, "choose one of logit_normal, uniform, arctan, arctan_off")
          for changes in ({}, FLOW, DECOUPLED, IMPROVED, EDM2_FLOW)),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(changes, message):
    with pytest.raises(UserError, match=message):
        checks.check(config_of(changes))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
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
    ],
)
def test_values_without_sense_for_a_unet_are_named(option, value, message):
    config = digits.get_config("unet")
    config.update_from_flattened_dict({option: value})
    with pytest.raises(UserError, match=message):
        checks.check(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.head_depth": 9}, r"head_depth 9 is more than config\.model\.depth"),
        ({"model.width": 36, "model.num_heads": 12}, "must be even, for rotary positions"),
        ({"sample.interval": (0.6, 0.4)}, r"config\.sample\.interval is \(0\.6, 0\.4\); it must rise"),
        ({"sample.interval": (0.6,)}, "give two numbers, the start and the end of the interval"),
    ],
)
def test_mistakes_of_improved_meanflow_are_named(changes, message):
    config = digits.get_config("imf")
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message):
        checks.check(config)


def test_a_network_without_the_head_of_v_can_sample_but_not_be_trained():
    config = digits.get_config("imf")
    checks.check_trainable(config)
    config.model.v_heads = False
    with pytest.raises(UserError, match="can sample but not be trained"):
        checks.check_trainable(checks.check(config))


@pytest.mark.parametrize(("batch", "accumulate", "devices"), [(6, 1, 4), (8, 3, 2)])
def test_batches_that_do_not_divide(batch, accumulate, devices):
    config = digits.get_config()
    config.train.batch_size, config.train.accumulate = batch, accumulate
    with pytest.raises(UserError, match=rf"batch_size {batch} is not divisible by {devices * accumulate}"):
        checks.check_divisible(config, devices, "devices")
    config.train.batch_size = 48
    checks.check_divisible(config, devices, "devices")
    config.train.fsdp = 5
    with pytest.raises(UserError, match="fsdp 5 does not divide"):
        checks.check_divisible(config, devices, "devices")


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
    assert checks.check(config_of(changes)).to_dict() == config_of(changes).to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (METRICS | {"evaluation.metrics": ("fid", "fvd")}, "has 'fvd'; choose from fid, is, kid, pr, fd_dinov2"),
        *((METRICS | {"evaluation.metrics": (metric,), "evaluation.inception": ""},
           f"metrics is {metric}, but config.evaluation.inception names no weights: python -m parity.convert")
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
        checks.check(config_of(changes))


def test_only_networks_without_a_log_variance_of_edm2_are_trained():
    for changes in (EDM2, EDM2_FLOW):
        checks.check_trainable(config_of(changes))
        with pytest.raises(UserError, match="logvar_channels is 8: no method here trains EDM2's log-variance"):
            checks.check_trainable(config_of(changes | {"model.logvar_channels": 8}))


@pytest.mark.parametrize("option", ["head_width", "sigma_data"])
def test_what_the_weights_of_edm2_do_not_show(option):
    teacher = config_of(EDM2_FLOW)
    config = config_of(EDM2 | {"train.load_from": "runs/teacher"})
    checks.check_alike(config, teacher, "train.load_from")
    teacher.model[option] *= 2
    with pytest.raises(UserError, match=rf"load_from runs/teacher has config\.model\.{option}"):
        checks.check_alike(config, teacher, "train.load_from")


def test_classes_to_start_from_without_weights():
    config = config_of({"train.load_classes": "names.json"})
    with pytest.raises(UserError, match=r"load_classes is names\.json, but config\.train\.load_from is empty"):
        checks.check(config)
    config.train.load_from = "w.safetensors"
    checks.check(config)
    with pytest.raises(UserError, match=r"no option config\.train\.load_classes with network unet"):
        config_of({"train.load_classes": "names.json", "model.name": "unet"})


def test_the_path_of_sampling_is_that_of_training(tmp_path):
    """One value by two names, whichever is set, and read again."""
    for name in ("method.path", "sample.path"):
        config = config_of({name: "cosine"})
        assert config.method.path == config.sample.path == "cosine"
        open_workdir(tmp_path / name, config, "jax")
        again = read_workdir(tmp_path / name)
        assert again.method.path == again.sample.path == "cosine"


def test_the_teacher_of_weights_alone_is_a_flow_model_of_the_same_sizes():
    config = config_of(TEACHER | {"model.width": 64, "model.qk_norm": True, "model.dmf_depth": 1})
    before = config.to_dict()
    teacher = checks.check(checks.check_teacher(config, None))
    assert (teacher.model.name, teacher.method.name, teacher.model.width) == ("dit", "flow", 64)
    assert teacher.model.qk_norm and not teacher.model.interval_embedder
    assert config.to_dict() == before


def test_a_teacher_of_its_own_config():
    own = config_of(FLOW | {"model.depth": 7})
    teacher = checks.check_teacher(config_of(TEACHER), own)
    assert teacher.to_dict() == own.to_dict() and teacher is not own


def test_a_teacher_computes_as_its_student_does():
    student = config_of(TEACHER | {"model.attention": "fused", "model.compute_dtype": "bfloat16"})
    teacher = checks.check_teacher(student, config_of(FLOW))
    assert (teacher.model.attention, teacher.model.compute_dtype) == ("fused", "bfloat16")


@pytest.mark.parametrize("option", ["num_heads", "channels"])
def test_a_model_to_start_from_differs_in_what_its_weights_do_not_show(option):
    other = config_of(FLOW)
    other.model.update(num_classes=1000, input_size=16)  # as a run that is fine-tuned may
    checks.check_alike(config_of(DECOUPLED | {"train.load_from": "runs/flow"}), other, "train.load_from")
    other.model[option] *= 2
    with pytest.raises(UserError, match=rf"train\.load_from runs/flow has config\.model\.{option}"):
        checks.check_alike(config_of(DECOUPLED | {"train.load_from": "runs/flow"}), other, "train.load_from")
    checks.check_alike(config_of(DECOUPLED | {"train.load_from": "runs/flow"}), None, "train.load_from")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "teacher runs/flow has config.method.name meanflow, not flow"),
        (DECOUPLED, "teacher runs/flow has config.method.name decoupled, not flow"),
        (FLOW | {"model.input_size": 16}, r"teacher runs/flow has config\.model\.input_size 16, this model 8"),
        (FLOW | {"model.channels": 4}, r"has config\.model\.channels 4, this model 1"),
        (FLOW | {"method.path": "cosine"}, r"has config\.method\.path cosine, this model linear"),
        (FLOW | {"model.num_classes": 1000}, r"has config\.model\.num_classes 1000, this model 10"),
    ],
)
def test_a_teacher_that_cannot_teach(changes, message):
    with pytest.raises(UserError, match=message):
        checks.check_teacher(config_of(TEACHER), config_of(changes))


@pytest.mark.parametrize(
    ("changes", "warned"),
    [({}, True), ({"model.compute_dtype": "bfloat16"}, False), ({"train.matmul_precision": "default"}, False),
     ({"model.attention_jvp": "plain"}, False)],
)  # fmt: skip
def test_a_kernel_that_multiplies_in_tf32_is_named(changes, warned, caplog):
    config = digits.get_config()
    config.update_from_flattened_dict({"model.attention_jvp": "flash"} | changes)
    checks.check_trainable(config)
    assert ("multiplies float32 in TF32" in caplog.text) == warned
