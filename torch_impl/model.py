"""`torch_impl.load`: a trained model in a few lines of Python.  Twin of `jax_impl.model`."""

import contextlib
import pathlib
from typing import Any

import torch

from meanflow.commands import model
from meanflow.sampling.noise import in_dtype_of
from torch_impl import checkpoints, weights
from torch_impl.autoencoder import make_encoder
from torch_impl.devices import choose_device, set_precision
from torch_impl.methods import METHODS
from torch_impl.sample import NETWORKS, sampler_of
from torch_impl.step import build_net, put_batch


def load(source: str | pathlib.Path, **given: Any) -> model.Model:
    """Return the model of a work directory, canonical weights, or an official file.

    Arguments and errors as `meanflow.commands.model.load`.  device: a torch.device or its name; by default a GPU if
    there is one.
    """
    return model.load(source, FRAMEWORK, **given)


def make_network(config, canonical, device):
    """Return the network of canonical weights {name: array}, see `model.Network`."""
    device = choose_device() if device is None else torch.device(device)
    with torch.device("meta"):  # names and shapes only: all parameters are loaded
        net = build_net(config)
    net.load_state_dict(weights.from_canonical(net, net.tables() | canonical), assign=True)
    net = net.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def velocity(z, t, r, y, given):
        batch = put_batch({"image": in_dtype_of(config, z), "label": y}, device)
        t, r, *given_values = (torch.from_numpy(in_dtype_of(config, a)).to(device) for a in (t, r, *given.values()))
        u = net(batch["image"], t, r, batch["label"], **dict(zip(given, given_values, strict=True)))
        return u.permute(0, 2, 3, 1).cpu().numpy()

    return model.Network(net, lambda config: sampler_of(net, config, device), velocity, lambda: precision(config))


@contextlib.contextmanager
def precision(config):
    """Set the precision of a config, and afterwards that of before."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    set_precision(config)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def conditions(config):
    """Return what the network is told besides (z, t, r, y) when it samples, a number each by name."""
    return METHODS[config.method.name].sampling_conditions(config.sample)


FRAMEWORK = model.Framework(checkpoints.read_weights, make_network, NETWORKS, make_encoder, conditions)
