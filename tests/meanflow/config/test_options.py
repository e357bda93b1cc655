"""Every option of every config is read by both trainers, and every config is one that they accept."""

import ast
import pathlib

import pytest

from configs import digits, dmf_imagenet, imf_imagenet, meanflow_cifar10, meanflow_imagenet, remeanflow_imagenet
from meanflow.config import checks, options, store

ROOT = pathlib.Path(__file__).parents[3]
SHARED = (
    "meanflow/commands", "meanflow/data", "meanflow/metrics", "meanflow/sampling", "meanflow/config/latents.py",
    "meanflow/config/stages.py",
)  # fmt: skip
# Options that one implementation has no use for, and why.
ONE_SIDED = {
    "train.compile": "JAX always compiles", "train.compile_backend": "the same",
    "train.num_threads": "JAX has threads of its own",
}  # fmt: skip
CIFAR10 = ("v0", "v1", "reproduction")
CONFIGS = {"base": options.get_config(), "digits": digits.get_config()}
CONFIGS |= {f"meanflow_imagenet:{name}": meanflow_imagenet.get_config(name) for name in meanflow_imagenet.VARIANTS}
CONFIGS |= {f"digits:{name}": digits.get_config(name) for name in digits.VARIANTS}
CONFIGS |= {f"dmf_imagenet:{name}": dmf_imagenet.get_config(name) for name in dmf_imagenet.VARIANTS}
CONFIGS |= {f"imf_imagenet:{name}": imf_imagenet.get_config(name) for name in imf_imagenet.VARIANTS}
CONFIGS |= {f"meanflow_cifar10:{name}": meanflow_cifar10.get_config(name) for name in CIFAR10}
CONFIGS |= {
    f"remeanflow_imagenet:{name}": remeanflow_imagenet.get_config(name) for name in remeanflow_imagenet.VARIANTS
}


def read_attributes(*packages):
    """Return the names of all attributes that the code of the packages reads."""
    names = set()
    for package in packages:
        for path in [ROOT / package, *(ROOT / package).rglob("*.py")]:
            tree = ast.parse(path.read_text() if path.is_file() else "")
            names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    return names


def unread(config, implementation):
    """Return the options that neither the implementation nor the shared packages read."""
    names = read_attributes(implementation, *SHARED)
    ignored = {"name"}  # a label, written into config.json
    return [o for o in store.flatten(config) if o not in ignored and o.split(".")[-1] not in names]


@pytest.mark.parametrize("implementation", ["jax_impl", "torch_impl"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_option_is_read(name, implementation):
    missing = set(unread(CONFIGS[name], implementation))
    assert missing <= set(ONE_SIDED), f"{implementation} never reads {missing - set(ONE_SIDED)}"


def test_an_option_that_nothing_reads_is_found():
    config = options.get_config().unlock()
    config.train.an_option_of_nobody = 1
    assert "train.an_option_of_nobody" in unread(config, "jax_impl")
    assert "train.an_option_of_nobody" in unread(config, "torch_impl")


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_are_accepted_and_survive_json(name):
    config = checks.check(CONFIGS[name])
    assert store.flatten(store.from_json(store.to_json(config))) == store.flatten(config)


@pytest.mark.parametrize(
    ("variant", "omega", "kappa", "interval", "epochs"),
    [
        ("b4_nocfg", 1.0, 0.0, (0.0, 1.0), 80),
        ("b4", 3.0, 0.0, (0.0, 1.0), 80),
        ("b4_jax", 1.0, 0.5, (0.0, 1.0), 240),
        ("l2", 0.2, 0.92, (0.0, 0.8), 240),
        ("xl2", 0.2, 0.92, (0.0, 0.75), 240),
        ("xl2_plus", 0.2, 0.92, (0.3, 0.8), 1000),
    ],
)
def test_published_settings(variant, omega, kappa, interval, epochs):
    config = meanflow_imagenet.get_config(variant)
    m, c = config.method, config.train
    assert (m.omega, m.kappa, (m.guidance_start, m.guidance_end)) == (omega, kappa, interval)
    assert m.guidance == (variant != "b4_nocfg")
    assert c.steps == epochs * 5004
    assert (c.batch_size, c.learning_rate, c.beta1, c.beta2, c.ema_decays) == (256, 1e-4, 0.9, 0.95, (0.9999,))
    assert (m.flow_fraction, m.adaptive_power, m.adaptive_eps) == (0.75, 1.0, 0.01)
    assert (m.time_order, m.time_mean, m.time_std) == ("sorted", (-0.4, -0.4), (1.0, 1.0))
    assert config.data.flip


@pytest.mark.parametrize("variant", CIFAR10)
def test_published_settings_of_cifar10(variant):
    """The figures of py-meanflow and, where it differs, of the reproduction."""
    config, again = meanflow_cifar10.get_config(variant), variant == "reproduction"
    m, net, c, a = config.method, config.model, config.train, config.data.augment
    assert (net.name, net.input_size, net.channels, net.width, net.num_blocks) == ("unet", 32, 3, 128, 4)
    assert (net.channel_mult, net.channel_mult_emb, net.attn_resolutions, net.dropout) == ((2, 2, 2), 4, (16,), 0.2)
    assert (net.embedding_type, net.encoder_type, net.decoder_type) == ("positional", "standard", "standard")
    assert (net.time_embedding, net.qkv_layout, net.channel_mult_noise, net.resample_filter, net.augment_dim) == (
        ("separate", "interleaved", 1, (1, 1), 0) if again else ("joint", "split", 2, (1, 3, 3, 1), 6)
    )
    assert (a.prob, a.xflip, a.yflip, a.scale, a.aniso, a.translate_frac) == (0.0 if again else 0.12, 1e8, 0, 1, 1, 1)
    assert (a.rotate_int, a.rotate_frac, a.translate_int) == (0, 0, 0) and config.data.flip
    assert (m.time_order, m.time_mean, m.time_std) == (
        ("truncated", (-0.6, -4.0), (1.6, 1.6)) if variant == "v1" else ("sorted", (-2.0, -2.0), (2.0, 2.0))
    )
    assert (m.flow_fraction, m.adaptive_power, m.adaptive_eps) == (0.25, 0.75, 1e-3)
    assert not (m.guidance or m.clip_interval or m.label_drop_prob)
    assert (c.batch_size, c.optimizer, c.learning_rate, c.beta1, c.beta2) == (1024, "adam", 6e-4, 0.9, 0.999)
    assert c.schedule == "constant"
    assert (c.warmup_steps, c.warmup_from) == pytest.approx((200 * 50 - 1, 6e-8) if again else (200 * 50, 1e-8))
    assert (c.steps, c.clip_norm, set(c.ema_decays), c.ema_every) == (
        (100_000, 1.0, {0.99995}, 1) if again else (800_000, 0.0, {0.99995, 0.9999, 0.9996}, 16)
    )


@pytest.mark.parametrize(
    ("variant", "sizes", "omega", "interval", "steps"),
    [
        ("b2", (12, 768, 12), 8.0, (0.4, 0.65), 1),
        ("m2", (24, 768, 12), 10.5, (0.4, 0.6), 1),
        ("l2", (32, 1024, 16), 10.5, (0.4, 0.6), 1),
        ("xl2", (48, 1024, 16), 8.0, (0.42, 0.62), 1),
        ("xl2_2step", (48, 1024, 16), 4.0, (0.36, 0.64), 2),
    ],
)
def test_published_settings_of_improved_meanflow(variant, sizes, omega, interval, steps):
    config = imf_imagenet.get_config(variant)
    m, net, c, s = config.method, config.model, config.train, config.sample
    assert (net.depth, net.width, net.num_heads) == sizes
    assert (net.head_depth, net.patch_size, net.mlp_ratio, net.input_size, net.channels) == (8, 2, 8 / 3, 32, 4)
    assert (net.num_class_tokens, net.num_omega_tokens, net.num_interval_tokens, net.num_time_tokens) == (8, 4, 2, 4)
    assert (s.omega, s.interval, s.steps) == (omega, interval, steps)
    assert (m.flow_fraction, m.omega_max, m.omega_power, m.label_drop_prob) == (0.5, 8.0, 1.0, 0.1)
    assert (m.time_mean, m.time_std, m.adaptive_power, m.adaptive_eps) == ((-0.4, -0.4), (1.0, 1.0), 1.0, 0.01)
    assert (c.batch_size, c.learning_rate, c.beta1, c.beta2, c.ema_decays) == (1024, 1e-4, 0.9, 0.95, (0.9999,))
    assert (c.steps, c.warmup_steps, c.schedule, c.cosine_end) == (640 * 1251, 10 * 1251, "constant", "steps")


@pytest.mark.parametrize(
    ("variant", "size", "interval", "steps"),
    [("dmf_256", 32, (0.0, 0.7), 400_000), ("dmf_512", 64, (0.0, 0.8), 800_000)],
)
def test_published_settings_of_decoupled_meanflow(variant, size, interval, steps):
    config, flow = dmf_imagenet.get_config(variant), dmf_imagenet.get_config(variant.replace("dmf", "sit"))
    m, net, c, s = config.method, config.model, config.train, config.sample
    assert (net.name, net.depth, net.width, net.num_heads, net.dmf_depth) == ("dmf_dit", 28, 1152, 16, 20)
    assert (m.guidance_type, m.omega, (m.guidance_start, m.guidance_end)) == ("mg", 0.6, interval)
    assert (m.time_mean, m.time_std, m.flow_time_mean, m.flow_time_std) == ((0.4, -1.2), (1.0, 1.0), 0.0, 1.0)
    assert (m.adaptive_eps, m.log_variance_pairs, c.steps) == (0.01, "row", steps)
    assert s.shift == (1.5 if size == 64 else 1.0)
    assert (flow.model.repa_dims, flow.model.repa_depth, flow.method.repa_coeff) == ((768,), 8, 0.5)
    assert (flow.method.name, flow.model.interval_embedder) == ("flow", False)
    for either in (config, flow):
        m, net, c = either.method, either.model, either.train
        assert (net.input_size, net.patch_size, net.channels, net.qk_norm) == (size, 2, 4, size == 64)
        assert (net.compute_dtype, net.attention, net.attention_jvp) == ("bfloat16", "fused", "plain")
        assert (c.batch_size, c.learning_rate, c.beta1, c.beta2, c.ema_decays) == (256, 1e-4, 0.9, 0.95, (0.9999,))
        assert (c.optimizer, c.clip_norm, c.weight_decay, m.label_drop_prob) == ("adamw", 1.0, 0.0, 0.1)


@pytest.mark.parametrize("size", [256, 512])
def test_decoupled_meanflow_has_the_parameters_of_its_flow_model(size):
    """But for the log-variance: 256 weights and a bias."""
    torch = pytest.importorskip("torch")
    from torch_impl.step import build_net

    with torch.device("meta"):
        nets = [build_net(dmf_imagenet.get_config(f"{kind}_{size}")) for kind in ("sit", "dmf")]
    flow, decoupled = ({name: tuple(p.shape) for name, p in net.named_parameters()} for net in nets)
    flow = {name: shape for name, shape in flow.items() if not name.startswith("projectors.")}
    assert decoupled == flow | {"logvar_linear.weight": (1, 256), "logvar_linear.bias": (1,)}


@pytest.mark.parametrize(("variant", "channels"), [("64", 3), ("512", 4)])
def test_published_settings_of_re_meanflow(variant, channels):
    config, teacher = (remeanflow_imagenet.get_config(name) for name in (variant, f"teacher_{variant}"))
    m, c = config.method, config.train
    assert (m.name, m.time_sampler, m.interval_mean, m.interval_std) == ("rectified", "re2_truncate", -0.8, 1.0)
    assert (m.omega_sampler, m.omega_max, m.distance_clip, m.flow_fraction) == ("uniform", 2.5, 0.87, 0.75)
    assert (m.weighting, m.adaptive_power, m.adaptive_eps, m.label_drop_prob) == ("adaptive", 0.5, 1e-2, 0.1)
    assert (m.stage_order, c.clip_norm, c.clip_stage) == ("plain_first", 1.0, "guided")
    assert (c.optimizer, c.batch_size, c.learning_rate, c.beta1, c.beta2) == ("adam", 128, 2e-4, 0.9, 0.95)
    assert (c.steps, set(c.ema_decays)) == (100_000, {0.9999, 0.999})
    assert (config.model.interval_embedder, teacher.model.interval_embedder) == (True, False)
    for net in (config.model, teacher.model):
        assert (net.name, net.input_size, net.channels, net.width, net.num_blocks) == ("edm2", 64, channels, 192, 3)
        assert (net.channel_mult, net.attn_resolutions, net.head_width) == ((1, 2, 3, 4), (16, 8), 64)


def test_the_parameter_count_of_edm2_is_the_published_one():
    """280.2 million, arXiv:2312.02696 table 2, which counts 280 for S and 125 for XS."""
    torch = pytest.importorskip("torch")
    from torch_impl.step import build_net

    with torch.device("meta"):
        nets = [build_net(remeanflow_imagenet.get_config(f"{kind}_512")) for kind in ("teacher", "guide")]
    counts = [sum(p.numel() for p in net.parameters()) / 1e6 for net in nets]
    assert counts == pytest.approx([280, 125], rel=0.005)


@pytest.mark.parametrize("module", [digits, meanflow_cifar10, imf_imagenet, dmf_imagenet, remeanflow_imagenet])
def test_variants_that_do_not_exist(module):
    with pytest.raises(ValueError, match="no variant 'v9'"):
        module.get_config("v9")


@pytest.mark.parametrize("variant", ["v0", "v1"])
def test_the_parameter_count_of_the_unet_is_the_published_one(variant):
    torch = pytest.importorskip("torch")
    from torch_impl.step import build_net

    with torch.device("meta"):
        net = build_net(meanflow_cifar10.get_config(variant))
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(55, abs=1)


@pytest.mark.parametrize(("variant", "millions"), [("b4", 131), ("b2", 131), ("m2", 308), ("l2", 459), ("xl2", 676)])
def test_parameter_counts_are_the_published_ones(variant, millions):
    torch = pytest.importorskip("torch")
    from torch_impl.step import build_net

    with torch.device("meta"):
        net = build_net(meanflow_imagenet.get_config(variant))
    count = sum(p.numel() for p in net.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.01)
