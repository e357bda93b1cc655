"""Every option of a run: `get_config` combines common options with those of one network and one method.

A recipe calls `get_config(network=..., method=...)` and changes what it needs.  `networks.py` and `methods.py` list the
options of each; options that do not belong to a run cannot be set.  Options mean the same in JAX and PyTorch.
Times are in [0, 1], where 1 is noise; images are in data units.
"""

from meanflow.config.methods import METHODS
from meanflow.config.networks import NETWORKS, data_sizes
from meanflow.config.sections import (
    FIXED,
    Options,
    Section,
    choice,
    falls,
    flatten,
    is_choice,
    is_number,
    make,
    number,
    pair,
)
from meanflow.config.sections import Config as Config
from meanflow.errors import UserError

CONVENTIONS = ("torch_fidelity", "jax_meanflow", "pytorch_fid")  # for Inception's input
METRICS = ("fid", "is", "kid", "pr", "fd_dinov2")


def get_config(network: str = "dit", method: str = "meanflow") -> Config:
    """Return a new config with the method's published settings where they exist, and a small network.

    Raises UserError for an unknown network or method, or a method that cannot train the network.
    """
    config: Config = make(sections(network, method), "config", f"network {network} and method {method}")
    config.sample.path = config.method.get_ref("path")  # shared value: noise added in sampling follows the path
    return config.lock()


def all_options() -> Options:
    """Return {dotted name: allowed values} for the options of all networks and methods."""
    runs = [sections(network, name) for name, method in METHODS.items() for network in method.networks]
    return {key: value for run in runs for key, value in flatten(run).items()}


def recompose(config: Config, network: str, method: str) -> Config:
    """Return a config for another network and method, taking the options that both have from `config`.

    Options set by the method, and choices not available there, keep their defaults.
    """
    other, allowed = get_config(network, method), sections(network, method)

    def copy(source: Config, target: Config, allowed: Options) -> None:
        for name, value in source.items():
            if name not in target or f"{target.origin[0]}.{name}" in (*FIXED, "config.model.interval_embedder"):
                continue
            if isinstance(value, Section):
                copy(value, target[name], allowed[name])
            elif is_choice(value, allowed[name]):
                target[name] = value

    copy(config, other, allowed)
    return other


def sections(network: str, method: str) -> Options:
    """Return the options of a run and the allowed values of each.  Raises UserError like `get_config`."""
    for kind, name, table in (("network", network, NETWORKS), ("method", method, METHODS)):
        if name not in table:
            raise UserError(f"there is no {kind} {name!r}; choose one of {', '.join(table)}")
    if network not in METHODS[method].networks:
        raise UserError(
            f"the method {method} cannot train the network {network}: it trains {' or '.join(METHODS[method].networks)}"
        )
    options = METHODS[method].options()
    return {
        "name": "base",  # shown in logs and in the work directory
        "seed": number(0, "[0, 4294967296)"),  # for initial weights, data order and every random draw in training
        "data": data(network, method),
        "latents": latents(),
        "model": {"name": network} | data_sizes() | NETWORKS[network].options(method),
        "method": {"name": method} | options,
        "train": train(network, method),
        "sample": sample() | METHODS[method].sampling() | {"path": options["path"]},
        "evaluation": evaluation(),
    }


def data(network: str, method: str) -> Options:
    """Options of the training data, an image dataset given by TFDS name or directory."""
    encoder = {
        # REPA: a frozen DINOv2, local path or hub name; empty: the dataset stores `features` with the images
        "encoder": "",
    }
    return {
        # `digits` (built in), any labelled TFDS image dataset, e.g. mnist, cifar10, or the directory of a prepared
        # dataset, such as couplings
        "name": "digits",
        "split": "train",  # TFDS split to train on
        "dir": "",  # where datasets are stored; empty: TFDS_DATA_DIR, else ~/tensorflow_datasets
        "flip": False,  # mirror each image left-right with probability 0.5
        "num_workers": number(0, "[0, inf)"),  # loader processes; 0: load in the trainer's process
        "prefetch": number(2, "[0, inf)"),  # batches that a thread reads and moves to the device ahead of time; 0: none
        "augment": augment(),
    } | (encoder if (network, method) == ("dit", "flow") else {})


def augment() -> Options:
    """EDM's pixel augmentation, arXiv:2206.00364 appendix F.2; `model.augment_dim` makes a network embed its labels.

    The multipliers are those of the CIFAR-10 runs; 0 drops a transform and its labels.
    """
    return {
        "prob": number(0.0, "[0, 1]"),  # probability of each transform, times its multiplier; 0: no augmentation
        "xflip": number(1e8, "[0, inf)"),  # mirror left-right, half of the time; 1e8: in effect always drawn
        "yflip": number(0.0, "[0, inf)"),  # mirror up-down, half of the time
        "rotate_int": number(0.0, "[0, inf)"),  # rotate by a multiple of 90 degrees
        "translate_int": number(0.0, "[0, inf)"),  # shift by whole pixels
        "scale": number(1.0, "[0, inf)"),  # scale both axes
        "rotate_frac": number(0.0, "[0, inf)"),  # rotate by any angle
        "aniso": number(1.0, "[0, inf)"),  # stretch one axis, squeeze the other
        "translate_frac": number(1.0, "[0, inf)"),  # shift by fractions of a pixel
        "brightness": number(0.0, "[0, inf)"),  # shift all colours
        "contrast": number(0.0, "[0, inf)"),  # scale all colours
        "lumaflip": number(0.0, "[0, inf)"),  # mirror brightness, half of the time
        "hue": number(0.0, "[0, inf)"),  # rotate colours around the grey axis
        "saturation": number(0.0, "[0, inf)"),  # scale colours away from the grey axis
    }


def latents() -> Options:
    """How latents relate to images, if the data are latents; `latents.py` lists the systems' conventions."""
    return {
        # The autoencoder that decodes samples: a directory saved by diffusers, or a name on the Hugging Face hub;
        # empty: samples are not decoded.
        "vae": "",
        "shift": (),  # data units are (raw - shift) * scale: one number, or one per channel; (): the dataset's
        "scale": (),
        "pixels": choice("symmetric", "unit"),  # what the autoencoder reads and writes: [-1, 1] | [0, 1]
    }


def train(network: str, method: str) -> Options:
    """Options of the training run."""
    classes = {
        # JSON file with the row of load_from's class embedding that each class starts with, e.g. [3, null, 0], where
        # null is a fresh row, or with names (`meanflow/weights/classes.py`); empty: the same rows if the numbers of
        # classes agree, else fresh ones
        "load_classes": "",
    }
    stages = {
        "clip_stage": choice("all", "guided"),  # clip gradients in: all stages | the guided stage only
    }
    own = (classes if network != "unet" else {}) | (stages if method == "rectified" else {})
    return {
        "steps": number(1000, "[1, inf)"),  # optimizer steps
        "batch_size": number(256, "[1, inf)"),  # images per step, over all processes and devices
        "accumulate": number(1, "[1, inf)"),  # micro-batches per step: less memory, same result
        "remat": False,  # recompute blocks in the backward pass: less memory, slower
        # Devices that share one copy of parameters, EMA and optimizer state.  JAX gathers parameters block by block,
        # PyTorch all of them for the whole step.
        "fsdp": number(1, "[1, inf)"),
        "optimizer": choice("adam", "adamw"),
        "learning_rate": number(1e-4, "[0, inf)"),  # peak
        "beta1": number(0.9, "[0, 1)"),  # Adam's decay of the gradient
        "beta2": number(0.95, "[0, 1)"),  # Adam's decay of the squared gradient
        "adam_eps": number(1e-8, "[0, inf)"),  # Adam's epsilon
        "weight_decay": number(0.0, "[0, inf)"),  # decoupled decay; adamw only
        "clip_norm": number(0.0, "[0, inf)"),  # largest global gradient norm; 0: no clipping
        "schedule": choice("constant", "cosine"),  # after the warm-up
        "schedule_steps": number(0, "[0, inf)"),  # cosine: its length, then the rate stays constant; 0: train.steps
        "warmup_steps": number(0, "[0, inf)"),  # linear warm-up
        "warmup_from": number(0.0, "[0, inf)"),  # learning rate at step 0 of the warm-up
        "final_factor": number(0.1, "[0, 1]"),  # cosine: final learning rate / peak
        "cosine_end": choice("steps", "early"),  # cosine ends: at the last step | warmup_steps before it (official iMF)
        "ema_decays": (0.9999,),  # per-step decays, one EMA of the parameters each
        "ema_every": number(1, "[1, inf)"),  # steps between updates of the EMAs, each by decay^ema_every
        "compile": True,  # PyTorch: torch.compile the step (JAX always compiles)
        "compile_backend": choice("inductor", "aot_eager"),  # fused kernels | only traced: quicker start, not for DiT
        "num_threads": number(0, "[0, inf)"),  # PyTorch on CPU: threads; 1 suits tiny networks; 0: one per core
        "matmul_precision": choice("highest", "default"),  # float32 matmuls: full float32 | TF32 where available
        "log_every": number(100, "[1, inf)"),  # steps between log lines
        "sample_every": number(1000, "[0, inf)"),  # steps between sample grids in TensorBoard; 0: never
        "evaluate_every": number(0, "[0, inf)"),  # steps between evaluations; 0: only with the evaluate command
        "checkpoint_every": number(1000, "[1, inf)"),  # steps between checkpoints; the last step is always saved
        "keep_checkpoints": number(2, "[1, inf)"),  # newest checkpoints kept
        "keep_every": number(0, "[0, inf)"),  # also keep every checkpoint at a multiple of this step; 0: none
        "checkpoint_at_start": False,  # save before the first step, to fail early if memory or disk runs out
        "snapshot_every": number(0, "[0, inf)"),  # steps between WORKDIR/snapshots/STEP/ema_DECAY.safetensors; 0: never
        "load_from": "",  # work directory or any weights to start from; empty: fresh weights
    } | own


def sample() -> Options:
    """Sampling options of all models; `methods.py` has the samplers."""
    return {
        "steps": number(1, "[1, inf)"),  # uniform steps of one network evaluation; heun: two except in the last
        "times": (),  # explicit times instead, from 1 down to 0, e.g. (1.0, 0.5, 0.0)
        "shift": number(1.0, "(0, inf)"),  # s: t becomes s t / (1 + (s - 1) t); s > 1 spends more steps near noise
        "batch_size": number(500, "[1, inf)"),  # images generated at once
        "ema": number(0, "[-1, inf)"),  # index in train.ema_decays; -1: the raw parameters
        "seed": number(0, "[0, 18446744073709551616)"),  # for noise and labels
    }


def evaluation() -> Options:
    """How to score the samples."""
    return {
        "num_samples": number(2000, "[2, inf)"),  # generated images
        "dataset": "",  # real images to compare against; empty: data.name
        "split": "train",  # their split
        "classifier": True,  # score class accuracy with an SVM trained on the real images (small images only)
        # Metrics on decoded images: fid | is | kid | pr (precision, recall) | fd_dinov2; (): for small data, the
        # Fréchet distance of raw values and class accuracy.
        "metrics": (),
        "reference": "",  # fid, kid, pr, fd_dinov2: statistics of real images, .npz (from evaluate) or EDM2's .pkl
        "inception": "",  # fid, is, kid, pr: Inception's weights, .safetensors from python -m parity.convert
        "convention": choice(*CONVENTIONS),  # preprocessing of images for Inception
        "dino": "facebook/dinov2-large",  # fd_dinov2: a directory saved by transformers, or a hub name
        "every_ema": False,  # during training, score all train.ema_decays, not only that of sample.ema
    }


def check_start(config: Config) -> None:
    """Raise UserError for train.load_classes without weights to start from."""
    c = config.train
    if "load_classes" in c and c.load_classes and not c.load_from:
        raise UserError(
            f"config.train.load_classes is {c.load_classes}, but config.train.load_from is empty: name the weights "
            "whose classes it lists"
        )


def check_ema(config: Config) -> None:
    """Raise UserError for invalid train.ema_decays, or a sample.ema out of range."""
    decays = config.train.ema_decays
    if not decays or not all(is_number(d) and 0 <= d < 1 for d in decays):
        raise UserError(f"config.train.ema_decays is {decays}; name at least one decay in [0, 1)")
    if config.sample.ema >= len(decays):
        raise UserError(f"config.sample.ema is {config.sample.ema}, but there are {len(decays)} EMAs")


def check_sampling(config: Config) -> None:
    """Raise UserError for times that do not decrease, or an invalid interval."""
    c = config.sample
    if c.times and not (all(map(is_number, c.times)) and falls(c.times) and c.times[0] <= 1 and c.times[-1] >= 0):
        raise UserError(
            f"config.sample.times is {c.times}: sampling times must fall from at most 1 to at least 0, in one step or "
            "more"
        )
    start, end = pair(c.interval, "sample.interval", "the start and the end of the interval")
    if not 0 <= start <= end <= 1:
        raise UserError(f"config.sample.interval is {c.interval}; it must rise and stay in [0, 1]")


def check_evaluation(config: Config) -> None:
    """Raise UserError for unknown metrics, or metrics that lack the samples, weights or statistics they need."""
    c = config.evaluation
    unknown = sorted(set(c.metrics) - set(METRICS))
    if unknown:
        raise UserError(f"config.evaluation.metrics has {unknown[0]!r}; choose from {', '.join(METRICS)}")
    least = {"is": 10, "pr": 4, "kid": 2}  # one per split; 3 neighbours and the sample itself; for a variance
    for metric in c.metrics:
        if c.num_samples < least.get(metric, 2):
            raise UserError(
                f"config.evaluation.num_samples is {c.num_samples}, but {metric} needs at least {least[metric]}"
            )
    if set(c.metrics) - {"fd_dinov2"} and not c.inception:
        raise UserError(
            f"config.evaluation.metrics is {', '.join(c.metrics)}, but config.evaluation.inception names no weights: "
            "python -m parity.convert pt_inception-2015-12-05-6726825d.pth inception.safetensors makes them from the "
            "file that torch-fidelity and pytorch-fid download"
        )
    if set(c.metrics) - {"is"} and not c.reference:
        raise UserError(
            f"config.evaluation.metrics is {', '.join(c.metrics)}, but config.evaluation.reference names no statistics "
            "of real images: evaluate --make_reference=IMAGES --reference=FILE.npz makes them"
        )
