"""Make couplings of a flow model, pairs of noise and image, for Re-MeanFlow: a dataset for both trainers.

    python torch_impl/reflow.py --teacher=runs/flow_torch --output=couplings --num_samples=100000
    torchrun --nproc_per_node=8 torch_impl/reflow.py --teacher=teacher.safetensors \\
        --config=configs/dmf_imagenet.py:sit_256 --labels=dataset --num_passes=2 --guidance=1.5 --output=couplings

Run again with the same arguments to continue after a kill.  Train on it with --config.data.name=couplings.  Several
processes share the work, each with its own shards.
"""

import torch

from meanflow.commands import reflow
from meanflow.config.flags import run
from meanflow.console_log import setup_logging
from meanflow.sampling.noise import in_dtype_of
from torch_impl import checkpoints, weights
from torch_impl.devices import choose_device, start_alone
from torch_impl.methods.reflow import couple
from torch_impl.step import build_net, put_batch


def make_coupler(models, sigmas, guidance):
    """Return the coupler (noise [b h w c], labels [b]) -> images [b h w c] in data units, all numpy.

    models: (config, canonical weights) of the teacher and, optionally, its guide.  sigmas: noise levels, see `couple`.
    Raises UserError for weights that do not fit.
    """
    device = choose_device()
    net, *guide = (_build(*model).to(device).eval() for model in models)

    @torch.no_grad()
    def coupler(noise, y):
        noise = in_dtype_of(models[0][0], noise)
        batch = put_batch({"image": noise, "label": y}, device)
        images = couple(net, batch["image"], batch["label"], sigmas, guidance, *guide)
        return images.permute(0, 2, 3, 1).cpu().numpy()

    return coupler


def _build(config, canonical):
    net = build_net(config)
    net.load_state_dict(weights.from_canonical(net, canonical))
    return net


def main():
    """Load, make couplings, write."""
    setup_logging()
    reflow.reflow(start_alone, checkpoints.read_weights, make_coupler)


if __name__ == "__main__":
    reflow.define_flags()
    run(main)
