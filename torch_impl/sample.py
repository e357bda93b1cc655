"""Generate images from a trained model: a PNG grid and an .npz.

python torch_impl/sample.py --workdir=runs/digits --num_samples=100 --steps=1
python torch_impl/sample.py --weights=weights.safetensors --config=configs/digits.py --output=samples
"""

import os
import pathlib

import numpy as np
import torch
from absl import flags
from tqdm import tqdm

from configs import resolve
from configs.errors import UserError
from configs.flags import config as config_flag
from configs.flags import run, workdir
from data import noise as noise_and_labels
from evaluation import files, grids
from evaluation.logs import setup_logging
from torch_impl import checkpoints, weights
from torch_impl.devices import choose_device
from torch_impl.methods import METHODS
from torch_impl.step import build_net, put_batch

flags.DEFINE_string("weights", "", "Canonical .safetensors to sample from, with --config, instead of --workdir.")
flags.DEFINE_string("output", "", "Directory for samples.png and samples.npz; WORKDIR/samples by default.")
flags.DEFINE_integer("num_samples", 100, "Images to generate.", lower_bound=1)
flags.DEFINE_list("labels", [], "Classes to generate, repeated in turn, e.g. 0,1,2; drawn at random by default.")
flags.DEFINE_integer("steps", None, "Network evaluations; config.sample.steps by default.", lower_bound=1)
flags.DEFINE_list("times", None, "Times from 1 down to 0 instead of uniform steps, e.g. 1,0.5,0.")
flags.DEFINE_float("cfg_scale", None, "Guidance at sampling, for models trained without it; 1: none.")
flags.DEFINE_integer("ema", None, "Which EMA to sample from; -1: the raw parameters.")
flags.DEFINE_integer("batch_size", None, "Images generated at once.", lower_bound=1)
flags.DEFINE_integer("seed", None, "Seed of noise and labels.", lower_bound=0)


def make_sampler(config, device):
    """Return the sampler (weights, noise [b h w c], labels [b]) -> images [b h w c] in data units, all numpy.

    weights: canonical {name: array}.
    """
    method, net = METHODS[config.method.name], build_net(config).to(device).eval()
    method.sampling_times(config.sample)

    @torch.no_grad()
    def sampler(canonical, noise, y):
        net.load_state_dict(weights.from_canonical(net, canonical))
        batch = put_batch({"image": noise, "label": y}, device)
        images = method.sample(net, batch["image"], batch["label"], config.sample)
        return images.permute(0, 2, 3, 1).cpu().numpy()

    return sampler


def generate(config, sampler, canonical, num_samples, labels=()):
    """Return `num_samples` images float32 [n h w c] in data units and their labels int32 [n], as numpy.

    Sample i depends on (config.sample.seed, i) alone.  labels: classes repeated in turn; empty: drawn at random.
    Raises UserError for a label outside the classes.
    """
    c, shape = config.sample, (config.model.input_size, config.model.input_size, config.model.channels)
    check_labels(labels, config.model.num_classes)
    images, all_labels = [], []
    for start in tqdm(range(0, num_samples, c.batch_size), "sampling", unit="batch", disable=None):
        indices = np.arange(start, min(start + c.batch_size, num_samples))
        noise, y = noise_and_labels.draw(indices, shape, config.model.num_classes, c.seed)
        y = np.asarray(labels, np.int32)[indices % len(labels)] if len(labels) else y
        missing = min(c.batch_size, num_samples) - len(indices)  # fill up the last batch: one compilation serves all
        noise, padded = (np.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)) for a in (noise, y))
        images.append(sampler(canonical, noise, padded)[: len(indices)])
        all_labels.append(y)
    return np.concatenate(images), np.concatenate(all_labels)


def check_labels(labels, num_classes):
    """Raise UserError for a label outside [0, num_classes]; num_classes itself asks for no class."""
    for label in labels:
        if not 0 <= label <= num_classes:
            raise UserError(f"label {label} is outside the classes 0 to {num_classes - 1} ({num_classes}: no class)")


def load(workdir_path, weights_path, config):
    """Return the config and the canonical weights of a work directory or of a safetensors file.

    Sampling flags given on the command line replace those of the config.
    """
    if weights_path:
        return override(resolve.check(config)), weights.load(weights_path)
    config = override(resolve.read_workdir(workdir_path))
    return config, checkpoints.read_weights(workdir_path, config.sample.ema)[1]


def override(config):
    """Return the config with the sampling flags that were given; raises UserError for times that are no numbers."""
    given = {name: flags.FLAGS[name].value for name in ("steps", "times", "cfg_scale", "ema", "batch_size", "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    if "times" in given:
        try:
            given["times"] = tuple(float(time) for time in given["times"])
        except ValueError as error:
            raise UserError(f"--times: {error}") from error
    elif "steps" in given:
        given["times"] = ()
    config.sample.update(given)
    return resolve.check(config)


def write(output, images, labels):
    """Write samples.npz (images [n h w c], labels [n]) and samples.png into a directory.  Returns the PNG's path."""
    output = pathlib.Path(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        np.savez(output / "samples.npz", images=images, labels=labels)
    except OSError as error:
        raise files.cannot_write(output, error) from error
    grids.save_png(output / "samples.png", images)
    return output / "samples.png"


def main():
    """Load, generate, write."""
    setup_logging()
    f = flags.FLAGS
    config, canonical = load(None if f.weights else workdir(), f.weights, config_flag())
    try:
        labels = [int(label) for label in f.labels]
    except ValueError as error:
        raise UserError(f"--labels: {error}") from error
    sampler = make_sampler(config, choose_device())
    if labels and config.model.name == "unet":
        raise UserError("--labels: this network knows no classes (config.model.name is unet)")
    images, labels = generate(config, sampler, canonical, f.num_samples, labels)
    if not (f.output or f.workdir):
        raise UserError("--output is missing: name the directory for the samples")
    print(write(f.output or os.path.join(workdir(), "samples"), images, labels))


if __name__ == "__main__":
    run(main)
