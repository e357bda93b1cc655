"""Sampling in PyTorch by the trainer's own sampler, of random weights.  Twin of jax_samples.py."""

from torch_impl import step, weights
from torch_impl.devices import choose_device
from torch_impl.sample import make_sampler


def make_run(config, noise, labels):
    """Return a function that generates images [b h w c], numpy, from noise [b h w c] and labels [b]."""
    net = step.build_net(config)
    canonical = weights.to_canonical(net, dict(net.named_parameters()))
    sampler = make_sampler(config, choose_device())
    return lambda: sampler(canonical, noise, labels, config.sample)
