"""The tiny networks of the cases, and the loss, sampler and training settings that they are compared under."""

COMMON = {"input_size": 8, "channels": 3, "num_classes": 7, "compute_dtype": "float64"}
UNET = COMMON | {
    "name": "unet", "width": 8, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,), "dropout": 0.3,
    "augment_dim": 6,
}  # fmt: skip
IMF = COMMON | {
    "name": "imf_dit", "patch_size": 2, "depth": 3, "head_depth": 1, "width": 32, "num_heads": 4, "mlp_ratio": 8 / 3,
    "num_class_tokens": 3, "num_omega_tokens": 2, "num_interval_tokens": 1, "num_time_tokens": 2,
}  # fmt: skip
TRANSFORMER = COMMON | {"patch_size": 2, "depth": 2, "width": 32, "num_heads": 4, "mlp_ratio": 3.0}
DMF = TRANSFORMER | {"name": "dmf_dit", "depth": 3, "dmf_depth": 2}
EDM2 = COMMON | {
    "name": "edm2", "width": 8, "channel_mult": (1, 2), "channel_mult_emb": 2, "channel_mult_noise": 1, "num_blocks": 1,
    "attn_resolutions": (4,), "head_width": 8, "sigma_data": 0.7,
}  # fmt: skip
# The frozen teacher of a distillation, whose sizes differ from its student's.
TEACHER = TRANSFORMER | {"interval_embedder": False, "depth": 1, "width": 16, "num_heads": 2}
# Tiny networks, by the prefix of their cases' names; the transformer's cases have none.
NETWORKS = {
    "dit": TRANSFORMER,
    "unet": UNET,
    "unet_separate": UNET | {
        "time_embedding": "separate", "qkv_layout": "interleaved", "resample_filter": (1, 1), "channel_mult_noise": 1,
        "augment_dim": 0,
    },
    "unet_residual": UNET | {"embedding_type": "fourier", "encoder_type": "residual", "decoder_type": "skip"},
    "unet_skip": UNET | {"encoder_type": "skip", "decoder_type": "skip", "channel_mult": (1, 1, 2)},
    "imf": IMF,
    "dmf": DMF,
    "dmf_qk": DMF | {"qk_norm": True, "dmf_depth": 1},
    "dmf_sit": TRANSFORMER | {
        "interval_embedder": False, "depth": 3, "repa_dims": (12, 8), "repa_depth": 2, "projector_dim": 20
    },
    "edm2": EDM2,
    "edm2_flow": EDM2 | {
        "interval_embedder": False, "channel_mult": (2, 1, 1), "attn_resolutions": (8, 2), "head_width": 4,
        "logvar_channels": 6,
    },
}  # fmt: skip
GUIDED = {"omega": 0.6, "kappa": 0.5, "guidance_start": 0.3, "guidance_end": 0.7}
OMEGA = {"omega": 2.5, "kappa": 0.0, "guidance_start": 0.2, "guidance_end": 0.8}
SQUARED = {"weighting": "adaptive_squared", "adaptive_eps": 1e-3}
# Settings of config.method, each compared in every quantity; unnamed options keep their defaults.
SETTINGS = {
    "split/kappa0": OMEGA,
    "split/kappa": GUIDED | {"adaptive_power": 0.75},
    "split/noguid": {"guidance": False, "time_sampler": "uniform"},
    "split/cosine": GUIDED | {"path": "cosine", "weighting": "uniform", "label_drop_prob": 0.5},
    "split/squared": OMEGA | SQUARED | {"adaptive_power": 0.5, "time_mean": (0.3, -0.2), "time_std": (1.5, 1.2)},
    "split/front_drop": GUIDED | {"label_drop": "front", "label_drop_prob": 0.4, "clip_interval": False},
    "split/all_flow": GUIDED | {"flow_fraction": 1.0},
    "split/no_flow": GUIDED | {"flow_fraction": 0.0, "path": "cosine"},
    "front/kappa0": OMEGA | {"flow_rows": "front", "flow_fraction": 0.5, "path": "cosine"},
    "front/kappa": GUIDED | {"flow_rows": "front", "label_drop": "front", "label_drop_prob": 0.3},
    "front/noguid": {"flow_rows": "front", "guidance": False, "clip_interval": False, "weighting": "uniform"},
    "coin/kappa0": OMEGA | SQUARED | {"flow_rows": "coin", "flow_fraction": 0.3, "time_sampler": "uniform"},
    "coin/kappa": GUIDED | {"flow_rows": "coin", "flow_fraction": 0.25, "label_drop_prob": 0.3},
    "coin/noguid": SQUARED | {"flow_rows": "coin", "guidance": False, "adaptive_power": 0.75, "path": "cosine"},
}
V0 = {
    "guidance": False, "flow_fraction": 0.25, "time_mean": (-2.0, -2.0), "time_std": (2.0, 2.0),
    "adaptive_power": 0.75, "adaptive_eps": 1e-3, "clip_interval": False,
}  # fmt: skip
V1 = V0 | {"time_order": "truncated", "time_mean": (-0.6, -4.0), "time_std": (1.6, 1.6)}
DMF_TIMES = {"time_mean": (0.4, -1.2), "time_std": (1.0, 0.9)}
RE2 = {"name": "rectified", "time_sampler": "re2_truncate", "adaptive_power": 0.5}
DRAWN_SCALES = {"omega_sampler": "uniform", "omega_max": 3.5}
MODEL_GUIDANCE = {"omega": 0.6, "guidance_start": 0.1, "guidance_end": 0.7}
# The same for other networks, by network/name.  A U-Net ignores classes, but the objective must not rely on that.
NETWORK_SETTINGS = {
    "unet/v0": V0,
    "unet/v1": V1 | {"time_mean": (-0.6, -0.9)},
    "unet/v1_coin": V1 | {"flow_rows": "coin", "flow_fraction": 0.5, "weighting": "uniform"},
    "unet/kappa": GUIDED | {"flow_fraction": 0.25},
    "unet_separate/cosine": V0 | {"path": "cosine", "time_sampler": "uniform", "flow_fraction": 0.5},
    "imf/split": {"flow_fraction": 0.5},
    "imf/power": {"flow_fraction": 0.5, "omega_power": 2.0, "omega_max": 5.0, "adaptive_power": 0.75},
    "imf/uniform": {"flow_fraction": 0.25, "weighting": "uniform", "omega_power": 0.5, "label_drop_prob": 0.5},
    "imf/noguid": {"flow_fraction": 0.5, "guidance": False, "path": "cosine", "time_sampler": "uniform"},
    "imf/front": {"flow_fraction": 0.5, "flow_rows": "front", "label_drop": "front", "label_drop_prob": 0.4},
    "imf/coin": {"flow_fraction": 0.5, "flow_rows": "coin", "adaptive_eps": 1e-3, "adaptive_power": 0.5},
    "imf/all_flow": {"flow_fraction": 1.0},
    "imf/no_flow": {"flow_fraction": 0.0, "weighting": "uniform"},
    "dmf/mg": DMF_TIMES | MODEL_GUIDANCE | {"label_drop_prob": 0.3},
    "dmf/default": {"guidance_type": "default", "path": "cosine", "time_sampler": "arctan", "adaptive_eps": 0.1},
    "dmf/distill": DMF_TIMES | MODEL_GUIDANCE | {"guidance_type": "distill", "teacher": "TEACHER", "omega": 1.5},
    "dmf/uniform": MODEL_GUIDANCE | {"time_sampler": "uniform", "label_drop": "front", "time_order": "truncated"},
    "dmf/all_pairs": DMF_TIMES | MODEL_GUIDANCE | {"log_variance_pairs": "all", "flow_time_std": 0.7},
    "dmf/official_times": DMF_TIMES | {"time_sampler": "arctan_official", "path": "cosine", "flow_time_mean": 0.5},
    "dmf_qk/mg": DMF_TIMES | MODEL_GUIDANCE,
    "dmf_sit/repa": {"label_drop_prob": 0.3},
    "dmf_sit/cosine": {"path": "cosine", "time_sampler": "arctan", "flow_time_mean": -0.3, "repa_coeff": 2.0},
    "dmf_sit/uniform": {"time_sampler": "uniform", "label_drop": "front", "label_drop_prob": 0.4},
    "edm2/re2": RE2 | DRAWN_SCALES,
    "edm2/clip": RE2 | DRAWN_SCALES | {"distance_clip": 2.0, "label_drop_prob": 0.4},
    "edm2_flow/flow": {"label_drop_prob": 0.3, "flow_time_mean": -0.4},
    # Re-MeanFlow's own options, on a transformer, which compiles faster.
    "dit/remeanflow_clip": RE2 | DRAWN_SCALES | {"distance_clip": 2.1, "flow_fraction": 0.5},
    "dit/remeanflow_coin": RE2 | DRAWN_SCALES | {"flow_rows": "coin", "interval_mean": 0.3, "interval_std": 0.7},
    "dit/remeanflow_constant": RE2 | {"omega": 1.4, "kappa": 0.3, "flow_rows": "front", "adaptive_eps": 1e-3},
    "dit/remeanflow_noguid": RE2 | {"guidance": False, "label_drop": "front", "flow_fraction": 0.0},
    "dit/remeanflow_uniform": RE2 | DRAWN_SCALES | {"time_sampler": "uniform", "weighting": "adaptive_squared"},
    "dit/remeanflow_unweighted": RE2 | DRAWN_SCALES | {"weighting": "uniform", "omega_max": 2.0},
}
# Losses that are also computed in micro-batches.
DIVIDED = (
    "split/kappa", "front/kappa", "coin/kappa", "imf/front", "dmf/uniform", "dmf_sit/repa", "dit/remeanflow_clip",
)  # fmt: skip
SAMPLERS = {
    "steps1": {"steps": 1},
    "steps2": {"steps": 2},
    "steps5": {"steps": 5},
    "times": {"times": (1.0, 0.8, 0.35, 0.0)},
    "steps1_cfg": {"steps": 1, "cfg_scale": 1.5},
    "steps3_cfg": {"steps": 3, "cfg_scale": 2.5},
}
# The same for decoupled MeanFlow and flow models: guidance in an interval, samplers that add fresh noise.
INSIDE = {"cfg_scale": 1.5, "interval": (0.2, 0.8)}
NETWORK_SAMPLERS = {
    "unet/steps2": SAMPLERS["steps2"],
    "dmf/euler": {"steps": 4, "shift": 1.5} | INSIDE,
    "dmf/restart": {"steps": 3, "sampler": "restart", "path": "cosine"},
    "dmf/ctm": {"steps": 4, "sampler": "ctm", "gamma": 0.7, "shift": 2.0} | INSIDE,
    "dmf/ctm_cosine": {"times": (1.0, 0.7, 0.4, 0.0), "sampler": "ctm", "path": "cosine"},
    "dmf/ctm_official": {"steps": 3, "sampler": "ctm", "official": True, "path": "cosine"},
    "dmf_sit/euler": {"steps": 5, "shift": 1.5} | INSIDE,
    "dmf_sit/euler_official": {"steps": 5, "official": True} | INSIDE,
    "dmf_sit/heun": {"steps": 4} | INSIDE,
    "dmf_sit/sde": {"steps": 5, "sampler": "sde", "shift": 1.5} | INSIDE,
    "dmf_sit/sde_elbo": {"times": (0.95, 0.6, 0.2, 0.0), "sampler": "sde", "diffusion": "elbo", "path": "cosine"},
    "dmf/velocity": {"steps": 4, "sampler": "velocity", "shift": 1.5} | INSIDE,
    "edm2/steps1": {"steps": 1},
    "edm2/velocity": {"times": (80 / 81, 0.6, 0.2, 1e-8), "sampler": "velocity"},
    "edm2_flow/heun": {"steps": 4, "sampler": "heun"} | INSIDE,
}
GUIDED_SAMPLES = {"omega": 3.5, "interval": (0.25, 0.75)}
NETWORK_SAMPLERS |= {f"imf/{name}": SAMPLERS[name] | GUIDED_SAMPLES for name in ("steps1", "steps2", "times")}
# Couplings: guidance scale, and whether an autoguidance network provides the guidance.
COUPLINGS = {"plain": (1.0, False), "guided": (1.7, False), "autoguided": (1.7, True)}
TRAINING = {
    "adamw_cosine_clip": {
        "optimizer": "adamw", "weight_decay": 0.1, "learning_rate": 3e-3, "beta2": 0.999, "schedule": "cosine",
        "warmup_steps": 3, "warmup_from": 1e-4, "steps": 9, "clip_norm": 1.0, "ema_decays": (0.9, 0.99),
    },
    "adam_constant": {"learning_rate": 1e-3, "beta1": 0.8, "adam_eps": 1e-6, "ema_decays": (0.95, 0.5)},
}  # fmt: skip
# Ten steps of training: network, options of the method and of training.
TRAINED = {
    **{f"train/{name}": ("dit", GUIDED, options) for name, options in TRAINING.items()},
    "unet/train/ema_every": ("unet", V0, TRAINING["adam_constant"] | {"ema_every": 4}),
    "imf/train/adam": ("imf", NETWORK_SETTINGS["imf/power"], TRAINING["adam_constant"]),
    "dmf/train/clip": ("dmf", NETWORK_SETTINGS["dmf/mg"], TRAINING["adamw_cosine_clip"]),
    "edm2/train/clip": ("edm2", NETWORK_SETTINGS["edm2/re2"], TRAINING["adamw_cosine_clip"]),
}
