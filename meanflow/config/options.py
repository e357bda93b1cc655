"""Every option of both trainers, with its default and one comment.

A system's file calls `get_config()` here and changes what it needs, so a run is read in two files at most.
Each option means the same in JAX and in PyTorch; `meanflow/config/ranges.py` has the range of every number.
Times are in [0, 1], 1 is noise; images in data units.
"""

from typing import Any, TypeAlias

import ml_collections

Config: TypeAlias = Any  # an ml_collections.ConfigDict, whose options a type checker cannot see

# Depth, width and heads of the DiT family: arXiv:2212.09748 table 1; M is MeanFlow's own, arXiv:2505.13447 table 4.
DIT_SIZES = {
    "S": {"depth": 12, "width": 384, "num_heads": 6},
    "B": {"depth": 12, "width": 768, "num_heads": 12},
    "M": {"depth": 16, "width": 1024, "num_heads": 16},
    "L": {"depth": 24, "width": 1024, "num_heads": 16},
    "XL": {"depth": 28, "width": 1152, "num_heads": 16},
}


def get_config() -> Config:
    """Return a fresh config: the published MeanFlow settings where they exist, a small network elsewhere."""
    config = ml_collections.ConfigDict()
    config.name = "base"  # shown in logs and in the work directory
    config.seed = 0  # initial weights, order of the data, every draw of training
    config.data = data()
    config.latents = latents()
    config.model = model()
    config.method = method()
    config.train = train()
    config.sample = sample()
    config.evaluation = evaluation()
    config.sample.path = config.method.get_ref("path")  # one value, set by either name: noise anew follows the path
    return config


def data() -> Config:
    """What to learn: an image dataset by its TFDS name."""
    c = ml_collections.ConfigDict()
    c.name = "digits"  # `digits` (embedded) or any TFDS image dataset with a label, e.g. mnist, cifar10,
    # or the directory of a prepared one, such as couplings
    c.split = "train"  # TFDS split to train on
    c.dir = ""  # where datasets are stored; empty: TFDS_DATA_DIR, else ~/tensorflow_datasets
    c.flip = False  # mirror each image left-right with probability 0.5
    c.num_workers = 0  # loader processes; 0 loads in the trainer's own process
    c.prefetch = 2  # batches that are read and put on the device ahead of their step, by a thread; 0: none
    c.encoder = ""  # flow with model.repa_dims: a frozen DINOv2, a local path or a name on the hub; empty: the dataset
    # has its `features` stored beside the images
    c.augment = augment()
    return c


def augment() -> Config:
    """EDM's augmentation of pixels, arXiv:2206.00364 appendix F.2; the network is told of it (model.augment_dim).

    The multipliers are those of the CIFAR-10 runs; 0 leaves a transform out, and its labels with it.
    """
    c = ml_collections.ConfigDict()
    c.prob = 0.0  # probability of each transform, times its multiplier; 0: no augmentation
    c.xflip = 1e8  # mirror left-right, half of the time; as good as always drawn
    c.yflip = 0.0  # mirror up-down, half of the time
    c.rotate_int = 0.0  # turn by a multiple of 90 degrees
    c.translate_int = 0.0  # shift by whole pixels
    c.scale = 1.0  # scale both axes
    c.rotate_frac = 0.0  # turn by any angle
    c.aniso = 1.0  # stretch one axis, squeeze the other
    c.translate_frac = 1.0  # shift by fractions of a pixel
    c.brightness = 0.0  # shift all colours
    c.contrast = 0.0  # scale all colours
    c.lumaflip = 0.0  # mirror brightness, half of the time
    c.hue = 0.0  # turn colours around the grey axis
    c.saturation = 0.0  # scale colours away from the grey axis
    return c


def latents() -> Config:
    """What the data are, if they are latents of images; `latents.py` has the conventions of the systems."""
    c = ml_collections.ConfigDict()
    c.vae = ""  # the autoencoder that decodes samples: a directory as diffusers saves it, or a name on the Hugging Face
    # hub; empty: samples stay as they are
    c.shift = ()  # data units are (raw - shift) * scale: one number, or one a channel; (): as the dataset says
    c.scale = ()
    c.pixels = "symmetric"  # what the autoencoder reads and writes: symmetric [-1, 1] | unit [0, 1]
    return c


def model() -> Config:
    """The network."""
    c = ml_collections.ConfigDict()
    c.name = "dit"  # a file in models/: dit | unet | imf_dit | dmf_dit | edm2; options of one are ignored by the others
    c.input_size = 8  # height and width of the data
    c.channels = 1  # channels of the data
    c.num_classes = 10  # classes; the label `num_classes` means "no class"
    c.width = 128  # channels of a token, of the first level (unet, edm2)
    c.patch_size = 2  # transformers: side of a patch, tokens = (input_size / patch_size)^2
    c.depth = 4  # transformers: blocks; of imf_dit those on the way to u, its head's included
    c.num_heads = 4  # transformers: attention heads
    c.mlp_ratio = 4.0  # transformers: hidden width of a block's MLP over `width`
    c.attention = "plain"  # transformers: where no tangent passes: plain | fused (cuDNN's, PyTorch's)
    c.attention_jvp = "plain"  # transformers: under the JVP, through which no gradient passes: plain | flash (in
    # PyTorch, on CUDA, by the package jvp_flash_attention); fused is refused, since none of those has a tangent
    c.qk_norm = False  # dit, dmf_dit: queries and keys are divided by their root mean square
    c.interval_embedder = True  # dit, edm2: embeds t - r, or r, for MeanFlow; False: a flow model, which ignores r
    c.repa_dims = ()  # dit: width of the features that each encoder of REPA has of a token; (): no REPA
    c.repa_depth = 8  # dit: blocks before the projectors of REPA
    c.projector_dim = 2048  # dit: hidden width of a projector
    c.dmf_depth = 3  # dmf_dit: first blocks, which are told t; the rest are told r
    c.head_depth = 2  # imf_dit: blocks of the head of u, and as many of the head of v; the rest they share
    c.v_heads = True  # imf_dit: has the blocks of the head of v; False, as in released weights: can only sample
    c.num_class_tokens = 8  # imf_dit: tokens that carry the class
    c.num_omega_tokens = 4  # imf_dit: tokens that carry the guidance scale
    c.num_interval_tokens = 2  # imf_dit: tokens that carry the start of the guidance interval, and as many for its end
    c.num_time_tokens = 4  # imf_dit: tokens that carry t - r
    c.channel_mult = (2, 2, 2)  # unet, edm2: channels of each level over `width`; each level halves the resolution
    c.channel_mult_emb = 4  # unet, edm2: width of the condition over `width`
    c.channel_mult_noise = 2  # unet, edm2: width of the features of one time over `width`
    c.num_blocks = 4  # unet, edm2: residual blocks of a level of the encoder; the decoder has one more
    c.attn_resolutions = (16,)  # unet, edm2: resolutions whose blocks have attention
    c.dropout = 0.0  # unet: probability, in training, in [0, 1)
    c.augment_dim = 0  # unet: labels of data.augment that the network is told, 6 for the CIFAR-10 runs; 0: none
    c.embedding_type = "positional"  # unet: features of a time: positional (DDPM++) | fourier (random, NCSN++)
    c.encoder_type = "standard"  # unet: standard (DDPM++) | skip | residual (NCSN++)
    c.decoder_type = "standard"  # unet: standard (DDPM++) | skip
    c.resample_filter = (1, 3, 3, 1)  # unet: taps of the filter of down- and upsampling; (1, 1) in DDPM++
    c.time_embedding = "joint"  # unet: joint (t and t - r, one MLP, py-meanflow) | separate (t, r, an MLP each)
    c.head_width = 64  # edm2: channels of an attention head, or all of a block that has fewer
    c.logvar_channels = 0  # edm2: features of the log-variance of EDM2's own training, for its weights; 0: none
    c.sigma_data = 0.5  # edm2: standard deviation of the data
    c.qkv_layout = "split"  # unet: channels of q, k, v: split (thirds, py-meanflow) | interleaved (EDM, reproduction)
    c.compute_dtype = "float32"  # of matmuls: float32 | bfloat16 | float64 (float64 needs parameters in float64)
    return c


def method() -> Config:
    """The objective, and what public code added to it.

    MeanFlow, arXiv:2505.13447; improved MeanFlow, arXiv:2512.02012; flow matching with logit-normal times,
    arXiv:2403.03206, with REPA, arXiv:2410.06940; decoupled MeanFlow, arXiv:2510.24474; Re-MeanFlow (2025), which
    learns from couplings.
    """
    c = ml_collections.ConfigDict()
    c.name = "meanflow"  # file in methods/: meanflow | improved | flow | decoupled | rectified; each
    # ignores others' options
    c.path = "linear"  # z(t): linear (1-t)x + te | cosine cos(pi t/2)x + sin(pi t/2)e
    c.time_sampler = "logit_normal"  # of all times: logit_normal | uniform | arctan (2/pi atan(exp(normal)), which is
    # to the cosine path what logit_normal is to the linear) | arctan_official (without exp; may be negative)
    # rectified: re2_truncate (t U-shaped, t - r logit-normal, r = 0 where t > 0.8 and r < 0.4) | uniform
    c.time_mean = (-0.4, -0.4)  # means of the normals under the logistic, of the first and the second time
    c.time_std = (1.0, 1.0)  # their standard deviations
    c.flow_time_mean = 0.0  # flow, decoupled: the same of the time of the flow term
    c.flow_time_std = 1.0
    c.time_order = "sorted"  # t, r: sorted (larger, smaller) | truncated (first, second but at most the first)
    c.interval_mean = -0.8  # rectified, re2_truncate: mean of the normal under the logistic, of t - r
    c.interval_std = 1.0  # its standard deviation
    # meanflow, improved, rectified:
    c.flow_rows = "split"  # r = t on: split (a static share, cheapest) | front (the first rows) | coin (each by chance)
    c.flow_fraction = 0.75  # share of rows with r = t, in [0, 1]; of the rows that a device computes at once (split) or
    # of the batch (front) it must be a whole number
    c.label_drop = "coin"  # rows that lose their label: coin (each by chance) | front (as many, from the first row on)
    c.label_drop_prob = 0.1  # probability of losing it
    c.guidance = True  # meanflow, improved, rectified: a guided velocity; improved: of every scale, else of 1 alone
    c.guidance_type = "mg"  # decoupled: default (none) | mg (by the model itself) | distill (from a frozen teacher)
    c.teacher = ""  # decoupled, distill: a flow model, its work directory or, of this model's sizes, its .safetensors
    c.omega = 1.0  # w.  meanflow: v_g = w v + k u(y) + (1-w-k) u(no class), an effective scale of w / (1-k)
    # decoupled: v + w (v(y) - v(no class)) for mg, v(no class) + w (v(y) - v(no class)) for distill
    c.kappa = 0.5  # meanflow, rectified: k, in [0, 1)
    c.omega_sampler = "constant"  # rectified: constant (omega and kappa) | uniform (effective scale in [1, omega_max])
    c.guidance_start = 0.0  # meanflow, decoupled: guide where guidance_start <= t <= guidance_end
    c.guidance_end = 1.0
    c.omega_max = 8.0  # improved, rectified: largest guidance scale drawn, the least is 1
    c.omega_power = 1.0  # improved: the density of drawn scales falls as omega^-omega_power
    c.clip_interval = True  # meanflow: clip t - r to [0, 1] in the target, as the official JAX code does
    c.stage1_steps = 0  # rectified: steps of the first of two stages; 0: one stage, guided as `guidance` says
    c.stage_order = "plain_first"  # rectified: plain_first (then guided, official code) | guided_first (paper's text)
    c.distance_clip = 0.0  # rectified: learn only pairs whose mean squared distance is below; 0: all
    # meanflow, improved, rectified, of an error (rectified: of its mean over a row):
    c.weighting = "adaptive"  # adaptive | adaptive_squared (reproduction) | uniform
    c.adaptive_power = 1.0  # p in 1 / (error + eps)^p
    c.adaptive_eps = 0.01  # eps; decoupled: in log(error / variance + eps)
    c.log_variance_pairs = "row"  # decoupled: of a log-variance: row | all (official, by accident; on one device)
    c.repa_coeff = 0.5  # flow: weight of the term of REPA
    return c


def train() -> Config:
    """The run."""
    c = ml_collections.ConfigDict()
    c.steps = 1000  # optimizer steps
    c.batch_size = 256  # images a step, over all processes and devices
    c.accumulate = 1  # micro-batches a step: less memory, same result
    c.remat = False  # keep only what blocks hand on, and compute the rest again for the gradient: less memory, slower
    c.fsdp = 1  # devices that share one copy of parameters, EMA and optimizer state
    c.optimizer = "adam"  # adam | adamw
    c.learning_rate = 1e-4  # peak
    c.beta1 = 0.9  # Adam's decay of the gradient
    c.beta2 = 0.95  # Adam's decay of the squared gradient
    c.adam_eps = 1e-8  # Adam's epsilon
    c.weight_decay = 0.0  # decoupled decay; adamw only
    c.clip_norm = 0.0  # largest global gradient norm; 0: no clipping
    c.clip_stage = "all"  # rectified: clip in: all | guided (only where the velocity is guided)
    c.schedule = "constant"  # after the warm-up: constant | cosine
    c.schedule_steps = 0  # cosine: length of the schedule, after which the rate stays at its floor; 0: train.steps
    c.warmup_steps = 0  # linear warm-up
    c.warmup_from = 0.0  # learning rate at step 0 of the warm-up
    c.final_factor = 0.1  # cosine: last learning rate over the peak
    c.cosine_end = "steps"  # cosine reaches its floor at: steps | early (warmup_steps before, as official iMF)
    c.ema_decays = (0.9999,)  # one EMA of the parameters each, by its decay a step
    c.ema_every = 1  # steps between updates of the EMAs, each by decay^ema_every
    c.compile = True  # PyTorch: torch.compile the step (JAX always compiles)
    c.compile_backend = "inductor"  # inductor (fused kernels) | aot_eager (traced: ready sooner; not for a DiT)
    c.num_threads = 0  # PyTorch on CPU: threads of an operation; tiny networks gain from 1; 0: as many as cores
    c.matmul_precision = "highest"  # float32 matmuls: highest (full float32) | default (TF32 where the device has it)
    c.log_every = 100  # steps between log lines
    c.sample_every = 1000  # steps between sample grids in TensorBoard; 0: never
    c.evaluate_every = 0  # steps between evaluations; 0: only by the evaluate command
    c.checkpoint_every = 1000  # steps between checkpoints; the last step is always saved
    c.keep_checkpoints = 2  # newest checkpoints kept
    c.keep_every = 0  # checkpoints at multiples of so many steps are kept for ever besides; 0: none
    c.checkpoint_at_start = False  # save before the first step too, so that a lack of memory or disk shows at once
    c.snapshot_every = 0  # steps between snapshots, WORKDIR/snapshots/STEP/ema_DECAY.safetensors; 0: never
    c.load_from = ""  # canonical .safetensors or a work directory to start from; empty: fresh weights
    return c


def sample() -> Config:
    """How to generate."""
    c = ml_collections.ConfigDict()
    c.steps = 1  # steps at uniform times, a network evaluation each; heun has two in all but the last
    c.times = ()  # times from 1 down to 0 instead, e.g. (1.0, 0.5, 0.0)
    c.shift = 1.0  # s: uniform times t become s t / (1 + (s - 1) t); above 1 spends more steps on noise
    c.sampler = "euler"  # flow models: euler | heun | sde; all others: euler | restart (to 0, and noise anew) | ctm
    # | velocity (Euler by u(z, t, t))
    c.gamma = 0.5  # ctm: 0 is euler, 1 is restart, in between a part of the noise is drawn anew
    c.diffusion = "sigma"  # sde: 2 sigma(t) | elbo, 2 sigma (sigma' - sigma alpha'/alpha), infinite at t = 1
    c.diffusion_scale = 1.0  # sde: factor of the coefficient; 0 is euler
    c.official = False  # official mistakes: flow models take no step where unguided; ctm adds too little noise,
    # on the cosine path as if it were linear
    c.cfg_scale = 1.0  # all but improved: guidance at sampling, for models trained without it; 1: none
    c.omega = 1.0  # improved: guidance scale, at least 1, which the network is told
    c.interval = (0.0, 1.0)  # times between which cfg_scale guides; improved: which the network is told
    c.batch_size = 500  # images generated at once
    c.ema = 0  # which of train.ema_decays to use; -1: the raw parameters
    c.seed = 0  # of noise and labels
    return c


def evaluation() -> Config:
    """How to judge the samples."""
    c = ml_collections.ConfigDict()
    c.num_samples = 2000  # generated images
    c.dataset = ""  # real images to compare with; empty: data.name
    c.split = "train"  # the split of them
    c.classifier = True  # score class accuracy under an SVM trained on the real images (small images only)
    c.metrics = ()  # of decoded images: fid | is | kid | pr (precision, recall) | fd_dinov2; (): those of the data
    # themselves, the Fréchet distance of their raw values and class accuracy, which small data allow
    c.reference = ""  # of fid, kid, pr, fd_dinov2: statistics of real images, .npz or EDM2's .pkl; evaluate makes them
    c.inception = ""  # of fid, is, kid, pr: Inception's weights, .safetensors that parity/convert.py makes
    c.convention = "torch_fidelity"  # how images reach Inception: torch_fidelity | jax_meanflow | pytorch_fid
    c.dino = "facebook/dinov2-large"  # of fd_dinov2: a directory as transformers saves it, or a name on the hub
    c.every_ema = False  # during training, judge every one of train.ema_decays, not only that of sample.ema
    return c
