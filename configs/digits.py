"""MeanFlow on the 8x8 digits of scikit-learn, small enough for a laptop.

    python -m jax_impl.main --config=configs/digits.py --workdir=runs/digits
    torchrun torch_impl/train.py --config=configs/digits.py:unet --workdir=runs/digits_unet

(no variant)  a class-conditional transformer, 1.3 M parameters.  One step: class accuracy 0.99, Fréchet distance in
              pixel space below 1, after a few minutes on two CPU cores
unet          a small version of the CIFAR-10 system: an unconditional U-Net, 0.8 M parameters, with dropout,
              augmentation and the times of v1.  One step: Fréchet distance in pixel space near 2
imf           a small improved MeanFlow, 0.3 M parameters; the guidance scale is chosen when sampling.  One step: class
              accuracy rises from 0.97 to 0.99 at scale 1 to 0.999 at scale 1.5 and stays there; the Fréchet distance
              is smallest near scale 1.5, below 4
flow          flow matching, 0.7 M parameters, which needs many steps: from 8 steps on, Fréchet distance near 1
dmf           decoupled MeanFlow with the network of `flow`, started from it by --config.train.load_from=runs/flow.
              One step: class accuracy 0.998 and Fréchet distance near 1; four steps: 0.67
edm2_flow     EDM2's network as a flow model, 0.4 M parameters: the teacher of `remeanflow`.  16 steps of Heun: Fréchet
              distance near 0.6
remeanflow    Re-MeanFlow with the same network, from the teacher's couplings and time embeddings (README).  One step:
              class accuracy 0.99 and Fréchet distance near 2.3; four steps: 1.2
"""

from meanflow.config import options


def get_config(variant: str = "") -> options.Config:
    """Return the config of the demo or of a variant.  Raises ValueError for unknown variants."""
    if variant not in VARIANTS:
        names = ", ".join(name for name in VARIANTS if name)
        raise ValueError(f"no variant {variant!r} of digits; there are {names}, and the demo without one")
    network, method, change = VARIANTS[variant]
    config = options.get_config(network, method)
    config.name = f"digits:{variant}" if variant else "digits"
    config.train.steps = 1200
    config.train.batch_size = 64
    config.train.learning_rate = 1e-3
    config.train.schedule = "cosine"
    config.train.final_factor = 0.01
    config.train.ema_decays = (0.99,)
    config.train.log_every = 50
    config.train.sample_every = 400
    config.train.checkpoint_every = 400
    change(config)
    return config


def dit(config: options.Config) -> None:
    """Set the guidance of the demo."""
    config.method.omega, config.method.kappa = 1.3, 0.0  # enough for the class; more costs variety


def unet(config: options.Config) -> None:
    """Make it a small version of the CIFAR-10 system."""
    config.data.augment.prob = 0.12
    config.model.update(width=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.1, augment_dim=6)
    config.method.guidance = False
    config.method.label_drop_prob = 0.0
    config.method.flow_fraction = 0.25
    config.method.time_order = "truncated"
    config.method.time_mean, config.method.time_std = (-0.6, -4.0), (1.6, 1.6)
    config.method.clip_interval = False
    config.method.adaptive_power, config.method.adaptive_eps = 0.75, 1e-3
    config.train.steps = 500
    config.train.ema_decays, config.train.ema_every = (0.99, 0.995), 4
    config.train.sample_every = config.train.checkpoint_every = 250
    config.train.compile_backend = "aot_eager"  # kernels of a U-Net take minutes to compile and gain nothing on a CPU
    config.evaluation.classifier = False


def imf(config: options.Config) -> None:
    """Make it a small improved MeanFlow."""
    config.model.update(depth=3, head_depth=1, width=64, mlp_ratio=8 / 3)
    config.model.update(num_class_tokens=2, num_omega_tokens=4, num_interval_tokens=1, num_time_tokens=2)
    config.method.flow_fraction = 0.5
    config.method.omega_max = 4.0
    config.train.steps = 1200
    config.train.num_threads = 1  # many small kernels: 0.09 s per step, against 0.07 to 0.17 s on two cores
    config.train.learning_rate = 2e-3
    config.sample.omega = 1.5


def flow(config: options.Config) -> None:
    """Make it the flow model that `dmf` starts from."""
    config.model.update(depth=4, width=96)
    config.train.steps = 1000
    config.sample.update(steps=50, cfg_scale=1.5)


def dmf(config: options.Config) -> None:
    """Make it decoupled MeanFlow with the network of `flow`."""
    config.model.update(depth=4, width=96, dmf_depth=3)
    config.method.update(time_mean=(0.4, -1.2), time_std=(1.0, 1.0), omega=0.2)
    config.train.steps = 500


def edm2(config: options.Config) -> None:
    """Make it a small EDM2 network."""
    config.model.update(width=24, channel_mult=(1, 2), channel_mult_noise=1, channel_mult_emb=2, num_blocks=1)
    config.model.update(attn_resolutions=(4,), head_width=24, sigma_data=0.8)
    config.train.compile_backend = "aot_eager"  # see `unet`


def edm2_flow(config: options.Config) -> None:
    """Make it a flow model with EDM2's network, the teacher of `remeanflow`."""
    edm2(config)
    config.train.steps = 500
    config.train.learning_rate = 1e-2
    config.sample.update(steps=16, sampler="heun")


def remeanflow(config: options.Config) -> None:
    """Make it Re-MeanFlow from couplings of `edm2_flow`."""
    edm2(config)
    config.data.name = "runs/couplings"
    config.method.update(omega_sampler="uniform", omega_max=2.5, adaptive_power=0.5, stage1_steps=250)
    config.train.update(steps=500, learning_rate=5e-3, clip_norm=1.0, clip_stage="guided")
    config.evaluation.dataset = "digits"


#             network method       what it changes
VARIANTS = {
    "":           ("dit", "meanflow", dit),
    "unet":       ("unet", "meanflow", unet),
    "imf":        ("imf_dit", "improved", imf),
    "flow":       ("dit", "flow", flow),
    "dmf":        ("dmf_dit", "decoupled", dmf),
    "edm2_flow":  ("edm2", "flow", edm2_flow),
    "remeanflow": ("edm2", "rectified", remeanflow),
}  # fmt: skip
