"""Improved MeanFlow on ImageNet latents: the published runs, one variant each.  Source: arXiv:2512.02012.

    python -m jax_impl.main --config=configs/imf_imagenet.py:b2 --workdir=runs/imf_b2

FID-50k of samples at the guidance scale and interval of the variant: official JAX, official PyTorch, paper.
If a batch of 1024 does not fit in memory, add --config.train.accumulate=N: the same result from N smaller batches.
"""

from meanflow.config import options
from meanflow.config.latents import CONVENTIONS

STEPS_PER_EPOCH = 1_281_167 // 1024  # ImageNet's training images at batch 1024, the last partial batch dropped
EPOCHS, WARMUP_EPOCHS = 640, 10
# Depth counts the blocks that lead to u, 8 of them its head; the head of v has 8 more.
SIZES = {
    "B": {"depth": 12, "width": 768, "num_heads": 12},
    "M": {"depth": 24, "width": 768, "num_heads": 12},
    "L": {"depth": 32, "width": 1024, "num_heads": 16},
    "XL": {"depth": 48, "width": 1024, "num_heads": 16},
}

#            size  steps omega  interval     published FID
VARIANTS = {
    "b2":        ("B", 1, 8.0, (0.40, 0.65)),  # 3.37, 3.32, 3.39
    "m2":        ("M", 1, 10.5, (0.40, 0.60)),  # 2.27, 2.26, 2.27
    "l2":        ("L", 1, 10.5, (0.40, 0.60)),  # 1.85, 1.83, 1.86
    "xl2":       ("XL", 1, 8.0, (0.42, 0.62)),  # 1.70, 1.72, 1.72
    "xl2_2step": ("XL", 2, 4.0, (0.36, 0.64)),  # 1.53, 1.54, 1.54
}  # fmt: skip


def get_config(variant: str = "b2") -> options.Config:
    """Return a published run; `variant` is one of `VARIANTS`.  Raises ValueError for others."""
    if variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r} of imf_imagenet; there are {', '.join(VARIANTS)}")
    size, steps, omega, interval = VARIANTS[variant]
    config = options.get_config("imf_dit", "improved")
    config.name = f"imf_imagenet:{variant}"
    config.data.name = "imagenet_latents"  # the directory written by an encode command, with --convention=imf
    config.latents.update(CONVENTIONS["imf"]._asdict(), vae="stabilityai/sd-vae-ft-mse")
    config.data.flip = True
    config.data.num_workers = 8
    config.model.update(SIZES[size], patch_size=2, input_size=32, channels=4, num_classes=1000)
    config.model.update(mlp_ratio=8 / 3, head_depth=8)
    config.model.compute_dtype = "bfloat16"  # its rounding is far below the noise of a batch: docs/performance.md
    config.model.attention = "fused"  # 0.9 of the memory: docs/rehearsal.md
    config.method.flow_fraction = 0.5
    config.train.batch_size = 1024
    config.train.steps = EPOCHS * STEPS_PER_EPOCH
    config.train.warmup_steps = WARMUP_EPOCHS * STEPS_PER_EPOCH
    config.train.sample_every = config.train.checkpoint_every = 10_000
    config.sample.steps, config.sample.omega, config.sample.interval = steps, omega, interval
    config.evaluation.num_samples = 50_000
    config.evaluation.classifier = False
    return config
