"""Decoupled MeanFlow on ImageNet latents: flow pre-training and the flow map.  Source: arXiv:2510.24474.

    python -m jax_impl.main --config=configs/dmf_imagenet.py:sit_256 --workdir=runs/sit_256
    python -m jax_impl.main --config=configs/dmf_imagenet.py:dmf_256 --workdir=runs/dmf_256 \\
        --config.train.load_from=runs/sit_256

`dmf_...` starts from a flow model: the work directory of `sit_...`, or a released SiT checkpoint, with or without
REPA's projectors, converted by parity/convert.py.
"""

from meanflow.config import options
from meanflow.config.latents import CONVENTIONS
from meanflow.config.networks import DIT_SIZES

STEPS_PER_EPOCH = 1_281_167 // 256  # ImageNet's training images at batch 256, the last partial batch dropped
FLOW_EPOCHS = 800  # as the longest run of REPA; the length for DMF's own flow models is not published

#            input interval    steps     published FID in 1 and 4 steps
VARIANTS = {
    "sit_256": (32, None, FLOW_EPOCHS * STEPS_PER_EPOCH),
    "sit_512": (64, None, FLOW_EPOCHS * STEPS_PER_EPOCH),
    "dmf_256": (32, (0.0, 0.7), 400_000),  # 2.16, 1.51
    "dmf_512": (64, (0.0, 0.8), 800_000),  # 2.12, 1.68
}  # fmt: skip


def get_config(variant: str = "dmf_256") -> options.Config:
    """Return a published run; `variant` is one of `VARIANTS`.  Raises ValueError for others."""
    if variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r} of dmf_imagenet; there are {', '.join(VARIANTS)}")
    input_size, interval, steps = VARIANTS[variant]
    network, method = ("dit", "flow") if interval is None else ("dmf_dit", "decoupled")
    config = options.get_config(network, method)
    config.name = f"dmf_imagenet:{variant}"
    # The directory written by an encode command; for sit_ with --pixels and --config.data.encoder=facebook/dinov2-base,
    # or with your own `features`.
    config.data.name = "imagenet_latents"
    config.latents.update(CONVENTIONS["sd"]._asdict(), vae="stabilityai/sd-vae-ft-ema")
    config.data.num_workers = 8
    config.model.update(DIT_SIZES["XL"], patch_size=2, input_size=input_size, channels=4, num_classes=1000)
    config.model.qk_norm = input_size == 64
    config.model.compute_dtype = "bfloat16"
    config.model.attention = "fused"
    if interval is None:
        flow(config)
    else:
        decoupled(config, interval)
    config.train.steps = steps
    config.train.optimizer = "adamw"
    config.train.clip_norm = 1.0
    config.train.sample_every = config.train.checkpoint_every = 10_000
    config.sample.shift = 1.5 if input_size == 64 else 1.0
    config.evaluation.num_samples = 50_000
    config.evaluation.classifier = False
    return config


def flow(config: options.Config) -> None:
    """Make it a flow model aligned with DINOv2-B."""
    config.model.update(repa_dims=(768,), repa_depth=8, projector_dim=2048)
    # As in REPA.  A batch of samples holds the noise of all steps, a gigabyte at 512 pixels.
    config.sample.update(steps=250, sampler="sde", cfg_scale=1.8, interval=(0.0, 0.7), batch_size=64)


def decoupled(config: options.Config, interval: tuple[float, float]) -> None:
    """Make it decoupled MeanFlow that guides itself inside an interval."""
    config.model.dmf_depth = 20
    config.method.update(time_mean=(0.4, -1.2), time_std=(1.0, 1.0), omega=0.6)
    config.method.guidance_start, config.method.guidance_end = interval
