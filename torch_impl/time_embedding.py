"""Fit the two time embeddings of a Re-MeanFlow network to the one of its EDM2 teacher: the weights to start from.

    python torch_impl/time_embedding.py --teacher=runs/teacher --output=start.safetensors

Then --config.train.load_from=start.safetensors trains from them.
Source: Xinxi-Zhang/Re-MeanFlow, init_time_emb.py, which fits by Adam (--fit=adam); least squares come nearer.
"""

import numpy as np
import torch

from meanflow.commands import time_embedding
from meanflow.config.flags import run
from meanflow.console_log import setup_logging
from torch_impl import weights
from torch_impl.devices import set_precision
from torch_impl.models.edm2 import log_sigma
from torch_impl.reflow import load
from torch_impl.step import build_net

BETAS = (0.9, 0.99)  # of Adam, as in the official code


def build(config, canonical):
    """Return the network with canonical weights {name: array}.  Raises UserError if they do not fit."""
    net = build_net(config)
    net.load_state_dict(weights.from_canonical(net, canonical))
    return net


def squared_error(net, teacher, t, r):
    """Return the mean squared error (scalar) of the embedding of times t and r [b], the teacher's being of t alone."""
    target = teacher.unet.embed_times(log_sigma(t), None).detach()
    return (net.unet.embed_times(t, r) - target).square().mean()


def error(config, canonical, teacher_config, teacher, t, r):
    """Return the same as a number, of networks by config and canonical weights {name: array}."""
    nets = build(config, canonical), build(teacher_config, teacher)
    with torch.no_grad():
        return float(squared_error(*nets, torch.from_numpy(t), torch.from_numpy(r)))


def fit(config, canonical, teacher_config, teacher, times, learning_rate):
    """Return canonical weights whose two time embeddings are fitted by Adam, a step each of times, and the losses.

    times: [steps 2 b], t and r.  All other weights stay as they are.
    """
    net, teacher = build(config, canonical), build(teacher_config, teacher)
    trained = [net.unet.emb_noise_t.weight, net.unet.emb_noise_r.weight]
    optimizer = torch.optim.Adam(trained, lr=learning_rate, betas=BETAS)
    losses = []
    for t, r in torch.from_numpy(times):
        optimizer.zero_grad()
        value = squared_error(net, teacher, t, r)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return weights.to_canonical(net, dict(net.named_parameters())), np.array(losses)


def main():
    """Load, fit, write."""
    setup_logging()
    time_embedding.time_embedding(set_precision, load, weights.save, fit, error)


if __name__ == "__main__":
    time_embedding.define_flags()
    run(main)
