"""MeanFlow on ImageNet latents: the published runs, one variant each.  Source: arXiv:2505.13447, tables 1, 2 and 4.

    python -m jax_impl.main --config=configs/meanflow_imagenet.py:b4 --workdir=runs/b4

`*` official JAX code; FID-50k of one-step samples unless noted.
"""

from meanflow.config import options
from meanflow.config.latents import CONVENTIONS
from meanflow.config.networks import DIT_SIZES

STEPS_PER_EPOCH = 1_281_167 // 256  # ImageNet's training images at batch 256, the last partial batch dropped

#            size patch omega kappa  interval   epochs   published FID
VARIANTS = {
    "b4_nocfg": ("B", 4, 1.0, 0.00, (0.0, 1.00), 80),  # 61.06
    "b4":       ("B", 4, 3.0, 0.00, (0.0, 1.00), 80),  # 15.53
    "b4_jax":   ("B", 4, 1.0, 0.50, (0.0, 1.00), 240),  # 11.35 *
    "b2":       ("B", 2, 1.0, 0.50, (0.0, 1.00), 240),  # 6.17
    "m2":       ("M", 2, 1.0, 0.50, (0.0, 1.00), 240),  # 5.01
    "l2":       ("L", 2, 0.2, 0.92, (0.0, 0.80), 240),  # 3.84
    "xl2":      ("XL", 2, 0.2, 0.92, (0.0, 0.75), 240),  # 3.43, 2 steps 2.93
    "xl2_plus": ("XL", 2, 0.2, 0.92, (0.3, 0.80), 1000),  # 2 steps 2.20
}  # fmt: skip


def get_config(variant: str = "b4") -> options.Config:
    """Return a published run; `variant` is one of `VARIANTS`.  Raises ValueError for others."""
    if variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r} of meanflow_imagenet; there are {', '.join(VARIANTS)}")
    size, patch_size, omega, kappa, (start, end), epochs = VARIANTS[variant]
    config = options.get_config("dit", "meanflow")
    config.name = f"meanflow_imagenet:{variant}"
    config.data.name = "imagenet_latents"  # the directory written by `jax_impl.encode` or `torch_impl/encode.py`
    config.latents.update(CONVENTIONS["sd"]._asdict(), vae="stabilityai/sd-vae-ft-mse")
    config.data.flip = True
    config.data.num_workers = 8
    config.model.update(DIT_SIZES[size], patch_size=patch_size, input_size=32, channels=4, num_classes=1000)
    config.model.compute_dtype = "bfloat16"  # its rounding is far below the noise of a batch: docs/performance.md
    config.model.attention = "fused"  # 0.9 of the memory: docs/rehearsal.md
    config.method.omega, config.method.kappa = omega, kappa
    config.method.guidance = (omega, kappa) != (1.0, 0.0)
    config.method.guidance_start, config.method.guidance_end = start, end
    config.train.steps = epochs * STEPS_PER_EPOCH
    config.train.sample_every = 10_000
    config.train.checkpoint_every = 10_000
    config.train.log_every = 100
    config.sample.steps = 2 if variant == "xl2_plus" else 1
    config.evaluation.num_samples = 50_000
    config.evaluation.classifier = False
    return config
