"""Converts weights between the frameworks and from the official code's formats, bitwise.

    python parity/convert.py SOURCE DEST [--to jax|torch] [--ema N] [--config FILE] [--prefix P]

Reads, by content or suffix:
  a work directory of jax_impl or torch_impl (its newest checkpoint; --ema chooses which weights)
  *.safetensors   canonical weights: the names and layouts of the official PyTorch state dicts
  *.pt, *.pth     an official PyTorch state dict, bare or under 'ema', 'model' or 'state_dict'; never executed.  Of the
                  networks of a py-meanflow checkpoint, --ema chooses: 0 net_ema, 1 net_ema1, 2 net_ema2, -1 net
  *.pkl           an official pickle of NVlabs/edm2: the network under 'ema' or 'net'; the code in it is never executed
  *.msgpack       an official Flax tree (Gsunshine/meanflow, Lyy-iiis/imeanflow), bare or in a train state with
                  'ema_params' or 'params'
  a directory     with an Orbax checkpoint of the same
Writes, by the suffix of DEST:
  *.safetensors   canonical weights; both trainers start from them by --config.train.load_from
  *.pt            a PyTorch state dict
  a directory     with --to jax or --to torch: a work directory that the trainer resumes and samples from
Every name is converted or refused.
"""

import argparse
import copy
import pathlib
import runpy
import sys

import numpy as np
import torch

from configs import base, resolve
from configs.errors import UserError, exit_on_user_error
from jax_impl import checkpoints as jax_checkpoints
from parity import sources
from parity.infer import inferred_config
from parity.names import canonical_to_flax_tree, flax_tree_to_canonical
from torch_impl import checkpoints as torch_checkpoints
from torch_impl import step as torch_step
from torch_impl import weights as canonical_files

__all__ = ["canonical_to_flax_tree", "convert", "flax_tree_to_canonical", "main"]


def main(argv: list[str] | None = None) -> None:
    """Run the command line.  Raises UserError for mistakes on it and for what cannot be converted."""
    args = parse(argv)
    config = load_config(args.config) if args.config else None
    kind, num = convert(args.source, args.dest, args.to, args.ema, config, args.prefix)
    print(f"{args.source} ({kind}) -> {args.dest}: {num} arrays")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", type=pathlib.Path, help="what to read")
    parser.add_argument("dest", metavar="DEST", type=pathlib.Path, help="what to write; replaced if it is a file")
    parser.add_argument("--to", choices=("jax", "torch"), help="make DEST a work directory of this framework")
    parser.add_argument(
        "--ema", metavar="N", type=int, default=0,
        help="of a work directory or a py-meanflow checkpoint: which EMA, -1 for the raw parameters (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--config", metavar="FILE",
        help="config of the network: FILE.py[:variant] or a config.json; needed for a work directory as DEST, and for "
        "Flax trees of MeanFlow, which do not say the size of their images",
    )  # fmt: skip
    parser.add_argument(
        "--prefix", metavar="P", default="",
        help="keep only the names that begin with P, without it, e.g. model. or params/ of a whole checkpoint",
    )  # fmt: skip
    return parser.parse_args(argv)


def convert(source, dest, to=None, ema=0, config=None, prefix="") -> tuple[str, int]:
    """Convert the file or directory `source` to `dest`, see the module's docstring.

    config: of the network, None to take a work directory's own or to infer the sizes.  Returns the kind of the source
    and the number of arrays.  Raises UserError.
    """
    source, dest = pathlib.Path(source), pathlib.Path(dest)
    if to is None and dest.suffix not in (".safetensors", ".pt"):
        raise UserError(f"{dest} is neither .safetensors nor .pt; for a work directory, add --to jax or --to torch")
    if to is not None and dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise UserError(f"{dest} exists already; name a new directory")
    weights, own_config, kind = sources.read(source, ema, prefix)
    weights = without_unused(weights)
    config = fitted(config or own_config, weights)
    weights = checked(weights, config)
    if to is not None:
        if config is None:
            raise UserError(f"a work directory needs a config, which {source} does not hold: give --config")
        checkpoints = jax_checkpoints if to == "jax" else torch_checkpoints
        checkpoints.write_weights(dest, config, weights)
    else:
        write_file(dest, weights, {"format": "canonical", "source": f"{source.name} ({kind})"})
    return kind, len(weights)


def without_unused(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return `weights` without EDM2's embedder of one time, where a network of two times holds it and never reads it.

    Official Re-MeanFlow builds its network with it, and deletes it for training.
    """
    unused = {"unet.emb_noise.weight"} if "unet.emb_noise_t.weight" in weights else set()
    for name in unused & weights.keys():
        print(f"left out {name}, which a network of two times does not read", file=sys.stderr)
    return {name: a for name, a in weights.items() if name not in unused}


def fitted(config, weights: dict[str, np.ndarray]):
    """Return `config`, but with improved MeanFlow's head of v if the weights have it; released ones have none."""
    if config is None or config.model.name != "imf_dit" or config.model.head_depth == 0:
        return config
    config = copy.deepcopy(config)
    config.model.v_heads = any(name.startswith("v_heads.") for name in weights)
    return config


def checked(weights: dict[str, np.ndarray], config) -> dict[str, np.ndarray]:
    """Return `weights` with the fixed tables of their network.

    Raises UserError unless names, shapes and tables are those of the network of `config`, or of one that is inferred.
    """
    if config is None:
        config = inferred_config(weights)
    with torch.device("meta"):  # names and shapes only: a large network costs nothing
        net = torch_step.build_net(config)
    whole = net.tables() | weights
    canonical_files.from_canonical(net, whole)
    return whole


def write_file(dest: pathlib.Path, weights: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write canonical weights as safetensors or as a PyTorch state dict.  Raises UserError if it cannot."""
    if dest.suffix == ".safetensors":
        canonical_files.save(dest, weights, metadata)
        return
    try:
        torch.save({name: torch.from_numpy(np.array(a)) for name, a in weights.items()}, dest)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot write {dest}: {sources.first_line(error)}") from error


def load_config(name: str) -> base.Config:
    """Return the config of FILE.py[:variant] or of a JSON file.  Raises UserError if there is none."""
    file, _, variant = name.partition(":")
    path = pathlib.Path(file)
    if not path.is_file():
        raise UserError(f"there is no config file {path}; configs/digits.py is one that is")
    if path.suffix == ".json":
        return resolve.check(resolve.from_json(path.read_text()))
    if path.suffix != ".py":
        raise UserError(f"--config {path} is neither a .py nor a .json file")
    get_config = runpy.run_path(str(path))["get_config"]
    return resolve.check(get_config(variant) if variant else get_config())


if __name__ == "__main__":
    with exit_on_user_error():
        main()
