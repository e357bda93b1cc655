"""Converts runs between the frameworks, and weights from and to the official codes' formats, bitwise.

    python parity/convert.py SOURCE DEST [--to jax|torch|run|hub|diffusers] [--weights_only] [--step N] [--ema N]
                             [--for CODE] [--config FILE] [--prefix P] [--latents NAME]

Reads, recognised by content and not by name:
  a work directory of jax_impl or torch_impl (its newest checkpoint)
  safetensors     canonical weights: the names and layouts of the official PyTorch state dicts
  PyTorch files   (.pt, .pth, .bin, .ckpt) official state dicts, bare or in a training checkpoint; never executed.  Also
                  the Inception network of torch-fidelity and pytorch-fid, which the metrics need
  .pkl            an official pickle of NVlabs/edm2; the code in it is never executed
  .msgpack        an official Flax tree (Gsunshine/meanflow, Lyy-iiis/imeanflow), bare or in a train state
  a directory     with an Orbax checkpoint of such a tree, a checkpoint of torch.distributed, weights split over several
                  files with an index, or as accelerate or diffusers saves them; of several steps, --step chooses one
  a .zip          of any of these
  hf://OWNER/NAME[@REVISION][/PATH]  any of these on the Hugging Face hub, through its cache
The time of the original SiT (willisma/SiT) runs the other way: its weights are turned round, exactly.  Nothing in the
weights tells them from REPA's, so what is assumed is said; --time decides.
From a training checkpoint it takes the EMA, or the raw parameters if there is none, and says which; --ema chooses: -1
the raw parameters ('model', 'net', 'params' ...), N an EMA ('ema', 'net_ema', 'ema_params' are 0, 'net_ema1' is 1).
Wrappers (module., _orig_mod. ...) are dropped from names, and those of FastGen, of diffusers' iMF and of REPA's
--legacy become canonical.  float16 and bfloat16 become float32, which is exact.
Writes, by the suffix of DEST:
  *.safetensors   canonical weights; both trainers start from them by --config.train.load_from
  *.pt            a PyTorch state dict; also *.pth and *.bin
  *.msgpack       the official Flax tree, if the system has one: MeanFlow's DiT, improved MeanFlow
  either, --for   the checkpoint that an official code loads (meanflow/weights/layouts.py), with its names and entries:
                  zhuyu, py-meanflow, imf (its PyTorch branch), dmf, edm2 (training state); meanflow-jax, imf-jax
  a directory     with --to jax or torch: a work directory in which that framework goes on with the run in SOURCE: all
                  that its next step depends on, and its log (if SOURCE is no run, or with --weights_only: as --to run)
                  with --to run: a work directory of these weights alone, which every command reads and either trainer
                  starts from; with --to hub: the same and a model card, to upload as they are;
                  with --to diffusers: a pipeline of diffusers (parity/diffusers_pipeline.py)
  hf://OWNER/NAME with --to hub: uploads that folder, with the token of `hf auth login`
Every name is converted, or it is an error.  The convention of a model's latents, taken from the work directory or from
--latents, is kept: in the metadata of a .safetensors or in the config of a work directory.
"""

import argparse
import copy
import json
import pathlib
import tempfile
from typing import NamedTuple

import numpy as np
import torch

from meanflow.config import checks, latents, paths, store
from meanflow.config import options as base
from meanflow.config.workdir import FRAMEWORKS
from meanflow.errors import UserError, exit_on_user_error, naming
from meanflow.weights import fitting, hub, layouts, times
from meanflow.weights.infer import inferred_config
from meanflow.weights.reading import Choice
from meanflow.weights.sources import Source
from parity import diffusers_folder, hub_folder, run_state
from parity.sources import read as read_source
from torch_impl import step as torch_step
from torch_impl import weights as canonical_files
from torch_impl.models.inception import Inception

IN_INCEPTION = "Conv2d_1a_3x3.conv.weight"  # a name that no other network has
COUNTERS = ".num_batches_tracked"  # the end of the names under which PyTorch's batch norms count
FOLDERS = {"hub": "hub folder", "diffusers": "folder of diffusers"}  # what --to makes, besides work directories
LATENTS = (  # what to do about two conventions
    "the data that the model was trained on decide: give the --latents of their convention, and a --config whose file "
    "sets latents.scale, latents.shift and latents.pixels to it"
)


class Options(NamedTuple):
    """The options of the command line, without source and destination."""

    to: str | None = None  # run: write a work directory; hub: a folder to upload; diffusers: its format
    ema: int | None = None  # which EMA, -1 for the raw parameters; None for the first EMA, or what there is
    config: base.Config | None = None  # of the network; None to use that of a work directory, or to infer it
    prefix: str = ""  # of the names to keep
    latents: str = ""  # a name in `latents.CONVENTIONS`; '' for what the source says
    step: int | None = None  # of a checkpoint or snapshot in a directory; None for the newest of a work directory
    time: str | None = None  # how the time of a flow model runs, one of `times.DIRECTIONS`; None to judge by the source
    layout: str = ""  # a name in `layouts.LAYOUTS`; '' for a bare state dict or Flax tree
    weights_only: bool = False  # of a run, to jax or torch: not its optimizer, EMAs and step


AS_IT_IS = Options()


def main(argv: list[str] | None = None) -> None:
    """Run the command line.  Raises UserError for a wrong flag or a source that cannot be converted."""
    args = parse(argv)
    config = load_config(args.config) if args.config else None
    options = Options(
        args.to, args.ema, config, args.prefix, args.latents, args.step, args.time, args.layout, args.weights_only
    )
    kind, num = convert(args.source, args.dest, options)
    print(f"{args.source} ({kind}) -> {args.dest}: {num} arrays")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", type=paths.source, help="what to read")
    parser.add_argument("dest", metavar="DEST", type=paths.dest, help="what to write; replaced if it is a file")
    parser.add_argument(
        "--to", choices=("run", "jax", "torch", "hub", "diffusers"),
        help="make DEST a work directory: jax, torch: of a run that goes on in this framework; run: of weights alone, "
        "for either; or a folder to upload to the Hugging Face hub, or a pipeline of diffusers",
    )  # fmt: skip
    parser.add_argument(
        "--weights_only", action="store_true", help="with --to jax or torch: of a run take the weights alone"
    )
    parser.add_argument(
        "--for", dest="layout", choices=tuple(layouts.LAYOUTS), default="",
        help="write what the loader of this official code reads (meanflow/weights/layouts.py names the files)",
    )  # fmt: skip
    parser.add_argument(
        "--ema", metavar="N", type=int,
        help="which EMA, -1 for the raw parameters (default: the first EMA, or the raw parameters if there is none)",
    )  # fmt: skip
    parser.add_argument(
        "--step",
        metavar="N",
        type=int,
        help="which checkpoint of a directory (default: the newest of a work directory)",
    )
    parser.add_argument(
        "--time", choices=times.DIRECTIONS,
        help="how the time of a flow model's weights runs: ours, with noise at t = 1, as in REPA; reversed, as in the "
        "original SiT (default: judged by what the file says, and said)",
    )  # fmt: skip
    parser.add_argument(
        "--config", metavar="FILE",
        help="config of the network: FILE.py[:variant] or a config.json; needed if DEST is a work directory, and for "
        "Flax trees of MeanFlow, which do not contain the image size",
    )  # fmt: skip
    parser.add_argument(
        "--prefix", metavar="P", default="",
        help="keep only names that begin with P, and remove it, e.g. model. or params/ of a checkpoint",
    )  # fmt: skip
    parser.add_argument(
        "--latents", choices=tuple(latents.CONVENTIONS), default="",
        help="convention of the latents of the model (meanflow/config/latents.py): sd (official MeanFlow, "
        "decoupled MeanFlow), imm (its PyTorch reproduction), imf (improved MeanFlow), edm2 (EDM2, Re-MeanFlow)",
    )  # fmt: skip
    return parser.parse_args(argv)


def convert(source, dest, options: Options = AS_IT_IS) -> tuple[str, int]:
    """Convert the file or directory `source` to `dest`, see the module's docstring.

    Returns the kind of the source and the number of arrays.  Raises UserError.
    """
    if hub.is_address(dest):
        return push(source, str(dest), options)
    dest, to = pathlib.Path(dest), options.to
    check_dest(dest, options)
    if to in FRAMEWORKS and not options.weights_only and run_state.framework_of(source):
        refuse_choices(options)
        return run_state.carry(pathlib.Path(source), dest, to, options.step)
    if to in FOLDERS and options.step is None:
        options = options._replace(step=hub_folder.newest_step(source))
    run = hub_folder.run_of(source, options.ema, options.step) if to in FOLDERS else hub_folder.Run()
    found = read_source(source, Choice(options.ema, options.prefix, options.step, options.time))
    name = source if hub.is_address(source) else pathlib.Path(source).name
    metadata = {"format": "canonical", "source": f"{name} ({found.kind})"}
    if IN_INCEPTION in found.weights:
        weights = checked_inception(found.weights, options)
        write_file(dest, weights, metadata)
        return f"{found.kind} of Inception", len(weights)
    config, weights = fitting.fit(options.config or found.config or run.config, found.weights)
    with naming(source):
        weights = checked(weights, config)
    convention = convention_of(source, found, config, options.latents)
    if to is None:
        if options.layout:
            layouts.check_fit(weights, options.layout, config, convention)
        of_run = {} if config is None else {"config": store.to_json(config)}
        write_file(dest, weights, metadata | of_run | as_metadata(convention), options.layout)
    elif config is None:
        what = FOLDERS.get(to, "work directory")
        raise UserError(f"a {what} needs a config, which {source} does not hold: give --config")
    elif to == "diffusers":
        diffusers_folder.write(dest, weights, metadata | as_metadata(convention), with_latents(config, convention))
    else:
        write_folder = hub_folder.write if to == "hub" else hub_folder.write_weights
        write_folder(dest, weights, metadata | as_metadata(convention), with_latents(config, convention), run)
    return found.kind, len(weights)


def push(source, address: str, options: Options) -> tuple[str, int]:
    """Convert to a folder and upload it to a repository on the hub; see `convert`."""
    if options.to != "hub":
        raise UserError(f"{address} is on the hub, where only --to hub writes")
    hub.check_repository(address)
    with tempfile.TemporaryDirectory() as name:
        done = convert(source, pathlib.Path(name) / "folder", options)
        print(hub.push(pathlib.Path(name) / "folder", address, f"Weights of {pathlib.Path(source).name}"))
    return done


def check_dest(dest: pathlib.Path, options: Options) -> None:
    """Raise UserError unless `dest` can be what the options make it."""
    if options.to is None:
        layouts.check_suffix(dest, options.layout)
        return
    if options.layout:
        raise UserError("--for writes a file and --to a directory: leave out one of them")
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise UserError(f"{dest} exists already; name a new directory")


def refuse_choices(options: Options) -> None:
    """Raise UserError for options that choose or change weights, where a whole state is carried over."""
    given = {
        "--ema": options.ema is not None, "--config": options.config, "--prefix": options.prefix,
        "--latents": options.latents, "--time": options.time,
    }  # fmt: skip
    for option, value in given.items():
        if value:
            raise UserError(
                f"--to {options.to} carries the run's whole training state, to which {option} does not apply: leave it "
                "out, or add --weights_only"
            )


def checked_inception(weights: dict[str, np.ndarray], options: Options) -> dict[str, np.ndarray]:
    """Return the weights of Inception without counters.

    Raises UserError if names or shapes do not match, and for options that do not apply to it.
    """
    given = {"--to": options.to, "--for": options.layout, "--config": options.config, "--latents": options.latents}
    for option, value in given.items():
        if value:
            raise UserError(f"these are the weights of Inception, which is not trained: leave out {option}")
    with torch.device("meta"):
        net = Inception()
    weights = {name: a for name, a in weights.items() if not name.endswith(COUNTERS)}
    canonical_files.check(net, weights)
    return weights


def convention_of(source: object, found: Source, config: base.Config | None, name: str) -> latents.Convention | None:
    """Return the convention of the latents that the model generates, None if there is none or nothing says.

    name: a key of `latents.CONVENTIONS`, or '' for what the config or the metadata of a .safetensors says.
    Raises UserError if two of them differ.
    """
    said = {
        "--latents": latents.CONVENTIONS.get(name),
        "the config": None if config is None else latents.of(config),
        str(source): None if found.latents is None else from_metadata(source, found.latents),
    }
    known = [(where, convention) for where, convention in said.items() if convention is not None]
    for where, convention in known[1:]:
        latents.check_same(known[0][1], convention, known[0][0], where, LATENTS)
    return known[0][1] if known else None


def from_metadata(source: object, text: str) -> latents.Convention:
    """Return the convention in a file's metadata.  Raises UserError if it is invalid."""
    try:
        return latents.from_dict(json.loads(text))
    except json.JSONDecodeError as error:
        raise UserError(f"{source}: its metadata 'latents' is not JSON: {text!r:.80}") from error


def as_metadata(convention: latents.Convention | None) -> dict[str, str]:
    """Return the metadata entry of a convention."""
    return {} if convention is None else {"latents": json.dumps(latents.to_dict(convention))}


def with_latents(config: base.Config, convention: latents.Convention | None) -> base.Config:
    """Return the config with the convention, if there is one."""
    if convention is None:
        return config
    config = copy.deepcopy(config)
    config.latents.update(convention._asdict())
    return checks.check(config)


def checked(weights: dict[str, np.ndarray], config) -> dict[str, np.ndarray]:
    """Return `weights` with the fixed tables that their network computes.

    Raises UserError if names, shapes or tables do not match the network of `config`, which is inferred if None.
    """
    if config is None:
        config = inferred_config(weights)
    with torch.device("meta"):  # names and shapes only, which cost nothing
        net = torch_step.build_net(config)
    tables = net.tables()
    canonical_files.check(net, tables | weights)
    return weights | tables


def write_file(dest: pathlib.Path, weights: dict[str, np.ndarray], metadata: dict[str, str], layout: str = "") -> None:
    """Write canonical weights as safetensors, with metadata, or in a layout of `layouts`.  Raises UserError."""
    if dest.suffix == ".safetensors":
        canonical_files.save(dest, weights, metadata)
    else:
        layouts.write(dest, weights, layout)


def load_config(name: str) -> base.Config:
    """Return the config of FILE.py[:variant] or of a JSON file.  Raises UserError if it does not exist."""
    return checks.check(store.load_file(name))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
