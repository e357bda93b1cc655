"""MeanFlow on CIFAR-10 pixels, unconditional: the published runs, one variant each.

    python -m jax_impl.main --config=configs/meanflow_cifar10.py:v1 --workdir=runs/cifar10

v0            the paper's run, arXiv:2505.13447, appendix A; FID of one-step samples 2.92
v1            the later run of Gsunshine/py-meanflow, with other times: 2.8 to 2.9; 0.21 s per step on eight H200
              (published)
reproduction  zhuyu-cs/MeanFlow, branch cifar10, with its own variant of the U-Net: 6.35 after 100 000 steps.  It leaves
              batch size, flips and the length of the warm-up to its user: here they are those of the other runs

If a batch of 1024 does not fit in memory, add --config.train.accumulate=N: the same result from N smaller batches.
"""

from meanflow.config import options

STEPS_PER_EPOCH = 50  # rounded, as published: 16 000 epochs are 800 000 steps


def get_config(variant: str = "v1") -> options.Config:
    """Return a published run: `v0`, `v1` or `reproduction`.  Raises ValueError for others."""
    if variant not in ("v0", "v1", "reproduction"):
        raise ValueError(f"no variant {variant!r} of meanflow_cifar10; there are v0, v1, reproduction")
    config = options.get_config("unet", "meanflow")
    config.name = f"meanflow_cifar10:{variant}"
    config.data.name = "cifar10"
    config.data.flip = True
    config.data.num_workers = 8
    config.data.augment.prob = 0.12
    config.model.update(input_size=32, channels=3, num_classes=10, width=128, dropout=0.2, augment_dim=6)
    config.method.guidance = False
    config.method.label_drop_prob = 0.0
    config.method.flow_fraction = 0.25
    config.method.time_mean, config.method.time_std = (-2.0, -2.0), (2.0, 2.0)
    config.method.clip_interval = False
    config.method.adaptive_power, config.method.adaptive_eps = 0.75, 1e-3
    config.train.batch_size = 1024
    config.train.steps = 16_000 * STEPS_PER_EPOCH
    config.train.learning_rate, config.train.beta2 = 6e-4, 0.999
    config.train.warmup_steps, config.train.warmup_from = 200 * STEPS_PER_EPOCH, 1e-8
    config.train.ema_decays, config.train.ema_every = (0.9999, 0.99995, 0.9996), 16
    config.train.sample_every = config.train.checkpoint_every = 10_000
    config.train.evaluate_every = 50_000
    config.evaluation.num_samples = 50_000
    config.evaluation.classifier = False
    config.evaluation.every_ema = True
    if variant == "v1":
        config.method.time_order = "truncated"
        config.method.time_mean, config.method.time_std = (-0.6, -4.0), (1.6, 1.6)
    if variant == "reproduction":
        config.data.augment.prob = 0.0
        config.model.update(augment_dim=0, time_embedding="separate", qkv_layout="interleaved", channel_mult_noise=1)
        config.model.resample_filter = (1, 1)
        config.train.steps = 100_000
        num_warmup = config.train.warmup_steps  # (step + 1) / num_warmup of the rate, step from 0
        config.train.warmup_steps = num_warmup - 1
        config.train.warmup_from = config.train.learning_rate / num_warmup
        config.train.clip_norm = 1.0
        config.train.ema_decays, config.train.ema_every = (0.99995,), 1
    return config
