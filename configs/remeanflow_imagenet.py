"""Re-MeanFlow on ImageNet: 64x64 pixels, and 512x512 in latents.  Source: Re-MeanFlow, 2025; Xinxi-Zhang/Re-MeanFlow.

    python parity/convert.py edm2-img512-s.pkl teacher.safetensors
    python parity/convert.py edm2-img512-xs.pkl guide.safetensors
    python -m jax_impl.reflow --teacher=teacher.safetensors --config=configs/remeanflow_imagenet.py:teacher_512 \\
        --guide=guide.safetensors --guide_config=configs/remeanflow_imagenet.py:guide_512 --guidance=2 \\
        --labels=dataset --output=couplings
    python -m jax_impl.time_embedding --teacher=teacher.safetensors \\
        --config=configs/remeanflow_imagenet.py:teacher_512 --output=start.safetensors
    python -m jax_impl.main --config=configs/remeanflow_imagenet.py:512 --config.data.name=couplings \\
        --config.train.load_from=start.safetensors --workdir=runs/remeanflow_512

Latents are EDM2's: Stable Diffusion's VAE on images in [0, 1], normalised per channel (the convention `edm2` in
meanflow/config/latents.py); an encode command makes them with --convention=edm2 --image_size=512.  Labels index the
sorted synsets; TFDS's imagenet_resized orders them differently, so its labels do not match released networks.

64, 512              the student: published FID in one step 2.87, 3.03
teacher_64, _512     EDM2-S as released, a flow model
guide_64, _512       EDM2-XS as released, its autoguidance network
"""

from meanflow.config import options
from meanflow.config.latents import CONVENTIONS

#        input channels
DATA = {"64": (64, 3), "512": (64, 4)}
REAL = {"64": "imagenet_64", "512": "imagenet_edm2_latents"}  # your own directories or TFDS names, with EDM2's labels
WIDTHS = {"teacher": 192, "guide": 128}  # EDM2-S and EDM2-XS
VARIANTS = (*DATA, *(f"{kind}_{size}" for kind in WIDTHS for size in DATA))
STAGE1_STEPS = 50_000  # half of the run; none of our sources says where the published run changes its stage


def get_config(variant: str = "512") -> options.Config:
    """Return a published run or a model that it needs, one of `VARIANTS`.  Raises ValueError for others."""
    if variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r} of remeanflow_imagenet; there are {', '.join(VARIANTS)}")
    kind, _, size = variant.rpartition("_")
    input_size, channels = DATA[size]
    config = options.get_config("edm2", "flow" if kind else "rectified")
    config.name = f"remeanflow_imagenet:{variant}"
    config.data.num_workers = 8
    if channels == 4:
        config.latents.update(CONVENTIONS["edm2"]._asdict(), vae="stabilityai/sd-vae-ft-mse")
    config.model.update(input_size=input_size, channels=channels, num_classes=1000, head_width=64)
    config.model.update(width=WIDTHS[kind or "teacher"], channel_mult=(1, 2, 3, 4), channel_mult_noise=1)
    config.model.update(channel_mult_emb=4, num_blocks=3, attn_resolutions=(16, 8), compute_dtype="bfloat16")
    if kind:
        released(config, size)
    else:
        student(config, size)
    config.train.sample_every = config.train.checkpoint_every = 10_000
    config.sample.batch_size = 64
    config.evaluation.num_samples = 50_000
    config.evaluation.classifier = False
    return config


def released(config: options.Config, size: str) -> None:
    """Make it a released EDM2 network: one time, with its log-variance."""
    config.data.name = REAL[size]
    config.model.logvar_channels = 128
    config.model.compute_dtype = "float32"  # rounding errors would stay in the couplings
    config.sample.update(steps=32, sampler="heun")


def student(config: options.Config, size: str) -> None:
    """Make it Re-MeanFlow, from couplings and fitted time embeddings."""
    config.data.name = "couplings"  # their directory
    config.evaluation.dataset = REAL[size]
    config.method.update(interval_mean=-0.8, interval_std=1.0)
    config.method.update(flow_fraction=0.75, omega_sampler="uniform", omega_max=2.5, distance_clip=0.87)
    config.method.update(adaptive_power=0.5, adaptive_eps=1e-2, stage1_steps=STAGE1_STEPS, stage_order="plain_first")
    config.train.update(steps=100_000, batch_size=128, learning_rate=2e-4, clip_norm=1.0, clip_stage="guided")
    config.train.ema_decays = (0.9999, 0.999)
