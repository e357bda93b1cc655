"""A tiny run of any network and method on the digits, as a config file: --config=tests/helpers/tiny.py:dit,flow."""

from meanflow.config import options

COMMON = {
    "train.batch_size": 16, "train.steps": 5, "train.learning_rate": 1e-3, "train.final_factor": 0.01,
    "train.log_every": 1, "train.sample_every": 0, "train.checkpoint_every": 400, "train.compile": False,
    "train.ema_decays": (0.9, 0.99), "sample.batch_size": 10, "evaluation.num_samples": 20,
}  # fmt: skip
TRANSFORMER = {"model.depth": 1, "model.width": 16, "model.num_heads": 2}
NETWORKS = {
    "dit": TRANSFORMER,
    "imf_dit": TRANSFORMER | {
        "model.depth": 2, "model.head_depth": 1, "model.num_class_tokens": 1, "model.num_omega_tokens": 1,
        "model.num_interval_tokens": 1, "model.num_time_tokens": 1,
    },
    "dmf_dit": TRANSFORMER | {"model.dmf_depth": 1},
    "unet": {
        "model.width": 4, "model.channel_mult": (1,), "model.num_blocks": 1, "model.attn_resolutions": (8,),
        "model.augment_dim": 6, "method.guidance": False, "method.label_drop_prob": 0.0, "evaluation.classifier": False,
    },
    "edm2": {
        "model.width": 4, "model.channel_mult": (1, 1), "model.channel_mult_noise": 1, "model.channel_mult_emb": 2,
        "model.num_blocks": 1, "model.attn_resolutions": (),
    },
}  # fmt: skip
METHODS = {
    "rectified": {
        "method.omega_sampler": "uniform", "method.omega_max": 2.5, "method.stage1_steps": 2, "train.clip_norm": 0.5,
        "train.clip_stage": "guided", "evaluation.dataset": "digits",
    },
}  # fmt: skip


def get_config(variant: str = "dit,meanflow"):
    """Return the config of a network and a method, by their names."""
    return make(*variant.split(","))


def split(changes):
    """Return model.name and method.name of options by dotted name, (dit, meanflow) by default, and the others."""
    changes = dict(changes)
    return changes.pop("model.name", "dit"), changes.pop("method.name", "meanflow"), changes


def compose(changes):
    """Return the default config with options by dotted name, of which model.name and method.name choose what it has."""
    network, method, changes = split(changes)
    config = options.get_config(network, method)
    config.update_from_flattened_dict(changes)
    return config


def of_network(model):
    """Return the default config with options of config.model, its name among them, and a method that trains it."""
    network = model.get("name", "dit")
    method = {"imf_dit": "improved", "dmf_dit": "decoupled", "edm2": "rectified"}.get(network, "meanflow")
    if not model.get("interval_embedder", True) or "repa_dims" in model:
        method = "flow"
    config = options.get_config(network, method)
    config.model.update(model)
    return config


def make(network="dit", method="meanflow", changes=()):
    """Return the config of a network and a method.  changes: options by dotted name."""
    config = options.get_config(network, method)
    config.name = "tiny"
    config.update_from_flattened_dict(COMMON | NETWORKS[network] | METHODS.get(method, {}) | dict(changes))
    return config
