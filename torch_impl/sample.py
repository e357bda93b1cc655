"""Generate images from a trained model: a PNG grid and an .npz.

python torch_impl/sample.py --workdir=runs/digits --num_samples=100 --steps=1
python torch_impl/sample.py --weights=hf://he-vision-group/iMF/MiT_XL_2.pth --omega=8 --output=samples
"""

import torch

from meanflow.commands import sample as sampling
from meanflow.commands.frozen_networks import FrozenNetworks
from meanflow.config.flags import run
from meanflow.config.workdir import read_workdir
from meanflow.console_log import setup_logging
from meanflow.sampling.noise import in_dtype_of
from torch_impl import checkpoints, weights
from torch_impl.autoencoder import make_decoder
from torch_impl.devices import choose_device, set_precision
from torch_impl.features import make_inception
from torch_impl.methods import METHODS
from torch_impl.step import build_net, put_batch

NETWORKS = FrozenNetworks(make_decoder, make_inception)


def make_sampler(config, device):
    """Return the sampler (canonical, noise [b h w c], labels [b], c, fresh) -> images [b h w c] in data units.

    All are numpy.  canonical: weights {name: array}.  c: a `config.sample`, see `sampling`.  fresh: [k b h w c], fresh
    noise for the steps that add some.
    Raises UserError for sampling times that do not decrease, or a diffusion that is infinite.
    """
    net = build_net(config).to(device).eval()
    sample = sampler_of(net, config, device)
    loaded = [None]  # the weights that the network holds: a sweep reuses the same ones many times

    def sampler(canonical, noise, y, c, fresh=None):
        if loaded[0] is not canonical:
            net.load_state_dict(weights.from_canonical(net, net.tables() | canonical))
            loaded[0] = canonical
        return sample(None, noise, y, c, fresh)

    return sampler


def sampler_of(net, config, device):
    """Return the sampler (None, noise, labels, c, fresh) -> images of a network that has its weights, on its device.

    See `make_sampler`.
    """
    method = METHODS[config.method.name]
    method.sampling_steps(config.sample)

    @torch.no_grad()
    def sampler(_, noise, y, c, fresh=None):
        noise = in_dtype_of(config, noise)
        batch, given = put_batch({"image": noise, "label": y}, device), method.sampling_conditions(c)
        if fresh is not None:
            given["fresh"] = torch.from_numpy(in_dtype_of(config, fresh)).to(device).permute(0, 1, 4, 2, 3)
        images = method.sample(net, batch["image"], batch["label"], given, config.sample)
        return images.permute(0, 2, 3, 1).cpu().numpy()

    return sampler


def load(workdir_path, weights_path, config):
    """Return config, sampler and its canonical weights of a work directory or of other weights.

    Samples in the precision in which the model was trained.  Sampling flags on the command line override the config.
    """
    if weights_path:
        config, canonical = sampling.read_weights(weights_path, config)
        set_precision(config)
    else:
        config = sampling.override(read_workdir(workdir_path))
        set_precision(config)
        _, canonical = checkpoints.read_weights(workdir_path, config.sample.ema, sampling.step())
        config, canonical = sampling.without_v_heads(config, canonical)
    return config, make_sampler(config, choose_device()), canonical


def main():
    """Load, generate, write."""
    setup_logging()
    sampling.sample(load, NETWORKS)


if __name__ == "__main__":
    sampling.define_sample_flags()
    run(main)
