"""Fit the two time embeddings of a Re-MeanFlow network to the single one of its EDM2 teacher, to start training from.

    python torch_impl/time_embedding.py --teacher=runs/teacher --output=start.safetensors
    python torch_impl/time_embedding.py --teacher=edm2-img512-s-2147483-0.070.pkl --output=start.safetensors

Then --config.train.load_from=start.safetensors trains from them.
Source: Xinxi-Zhang/Re-MeanFlow, init_time_emb.py, which fits by Adam; least squares reach a smaller error.
"""

import torch

from meanflow.commands import time_embedding
from meanflow.config.flags import run
from meanflow.console_log import setup_logging
from torch_impl import checkpoints, weights
from torch_impl.devices import set_precision
from torch_impl.models.edm2 import log_sigma
from torch_impl.step import build_net


def build(config, canonical):
    """Return the network with canonical weights {name: array}.  Raises UserError if they do not fit."""
    net = build_net(config)
    net.load_state_dict(weights.from_canonical(net, canonical))
    return net


@torch.no_grad()
def error(config, canonical, teacher_config, teacher, t, r):
    """Return the mean squared error (float) of a network's embedding of t and r [b] to the teacher's of t alone.

    canonical, teacher: weights {name: array}.  Raises UserError if they do not fit their config.
    """
    net, target = build(config, canonical), build(teacher_config, teacher).unet
    t, r = torch.from_numpy(t), torch.from_numpy(r)
    return float((net.unet.embed_times(t, r) - target.embed_times(log_sigma(t), None)).square().mean())


def main():
    """Load, fit, write."""
    setup_logging()
    time_embedding.time_embedding(set_precision, checkpoints.read_weights, weights.save, error)


if __name__ == "__main__":
    time_embedding.define_flags()
    run(main)
