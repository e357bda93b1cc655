"""Writes canonical weights as other codes read them: names, and the entries of a checkpoint around the weights.

A layout holds what the official loading code reads and nothing else: one network, under every entry that is read.
`meanflow.weights.sources` reads all of them back.  A new layout needs an entry in `LAYOUTS`.
"""

import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from meanflow.config import latents, options
from meanflow.errors import UserError
from meanflow.files import replacing
from meanflow.weights import infer, sources
from meanflow.weights.names import canonical_to_flax_tree

Weights = dict[str, np.ndarray]

TORCH, FLAX = (".pt", ".pth", ".bin"), (".msgpack",)  # suffixes, by what writes the file
SUFFIXES = (".safetensors", *TORCH, *FLAX)
# Systems, as messages name them.
MEANFLOW, FLOW = "a DiT of MeanFlow", "a flow model (SiT)"
QK_NORM = "a DiT of MeanFlow with qk_norm"
DECOUPLED, IMPROVED = "a DiT of decoupled MeanFlow", "improved MeanFlow's transformer"
UNET, SEPARATE = "a U-Net with a joint time embedding", "a U-Net with separate time embeddings"
EDM2, EDM2_TWO_TIMES = "EDM2's U-Net", "EDM2's U-Net of two times (Re-MeanFlow)"
EDM2_NO_LOGVAR = "EDM2's U-Net without its log-variance head"
UNKNOWN = "a network that is not trained here"
QKV_LAYOUTS = {UNET: "split", SEPARATE: "interleaved"}  # the model.qkv_layout of the official U-Nets


class Layout(NamedTuple):
    """What one official code loads."""

    code: str  # the repository
    systems: tuple[str, ...]
    suffixes: tuple[str, ...]
    build: Callable[[Weights], dict[str, Any]]  # canonical weights -> the content of the file
    latents: str = ""  # the convention by which the code decodes, a key of `latents.CONVENTIONS`


def state_dict(weights: Weights) -> dict[str, Any]:
    """Return a bare state dict.

    Source: kyungmnlee/dmf, generate.py, which loads it with strict=False, so that under any entry it would be ignored.
    """
    import torch  # JAX does without

    return {name: torch.from_numpy(np.require(a, requirements=("C", "A", "W"))) for name, a in weights.items()}


def zhuyu(weights: Weights) -> dict[str, Any]:
    """Return a checkpoint's EMA.  Source: zhuyu-cs/MeanFlow, evaluate.py (main: DiT; branch cifar10: U-Net)."""
    return {"ema": state_dict(weights)}


def py_meanflow(weights: Weights) -> dict[str, Any]:
    """Return a checkpoint whose network and three EMAs are the same, stored once.

    Source: Gsunshine/py-meanflow, meanflow/training/load_and_save.py, models/meanflow.py and train_arg_parser.py.  It
    loads with strict=False and evaluates each EMA: one that is missing would be evaluated at random weights.
    """
    import torch

    tensors = state_dict(weights)
    nets = ("net", "net_ema", "net_ema1", "net_ema2")
    state = {f"{net}.{name}": tensor for net in nets for name, tensor in tensors.items()}
    return {"model": state | {"num_updates": torch.tensor(0)}}


def imf(weights: Weights) -> dict[str, Any]:
    """Return a bare state dict of its wrapper, without the v heads, which that code does not have.

    Source: Lyy-iiis/imeanflow, branch torch, evaluate.py (strict), imf.py and models/imfDiT.py (eval_mode).
    """
    left_out = [name for name in weights if name.startswith("v_heads.")]
    if left_out:
        print(f"left out v_heads.*, which that code does not have ({len(left_out)} arrays)", file=sys.stderr)
    return {f"net.{name}": tensor for name, tensor in state_dict(weights).items() if name not in left_out}


def edm2(weights: Weights) -> dict[str, Any]:
    """Return the part of a training state that holds the network: `CheckpointIO(net=net).load(FILE)` reads it.

    Source: NVlabs/edm2, torch_utils/distributed.py.  Its generate_images.py reads only pickles of code, which are not
    written here, and resuming needs the states of its optimizer and EMAs, which these weights do not have.
    """
    return {"net": state_dict(weights)}


def flax_tree(weights: Weights) -> dict[str, Any]:
    """Return the official Flax tree {'net': ...} of weights, without the position table that the network computes."""
    import flax.traverse_util  # PyTorch does without

    return flax.traverse_util.unflatten_dict(canonical_to_flax_tree(weights), sep="/")


def meanflow_jax(weights: Weights) -> dict[str, Any]:
    """Return a train state at step 0, whose learning rate is a number.

    Source: Gsunshine/meanflow, train.py (create_train_state) and utils/ckpt_util.py.
    """
    return train_state(weights, {})


def imf_jax(weights: Weights) -> dict[str, Any]:
    """Return a train state at step 0, whose learning rate is a schedule, which counts.

    Source: Lyy-iiis/imeanflow, utils/trainstate_util.py, utils/lr_utils.py and utils/ckpt_util.py.
    """
    return train_state(weights, {"count": np.zeros((), np.int32)})


def train_state(weights: Weights, learning_rate: dict[str, Any]) -> dict[str, Any]:
    """Return a Flax train state as `flax.training.checkpoints.restore_checkpoint` needs it: with a fresh AdamW.

    learning_rate: the state of its last part.  Restoring fails without an optimizer state, even to evaluate.
    """
    params = flax_tree(weights)
    moments = flax_tree({name: np.zeros_like(a) for name, a in weights.items()})
    adam = {"count": np.zeros((), np.int32), "mu": moments, "nu": moments}
    opt_state = {"0": adam, "1": {}, "2": learning_rate}
    return {"step": np.zeros((), np.int32), "params": params, "ema_params": params, "opt_state": opt_state}


LAYOUTS = {
    "zhuyu": Layout("zhuyu-cs/MeanFlow", (MEANFLOW, SEPARATE), TORCH, zhuyu, "imm"),
    "py-meanflow": Layout("Gsunshine/py-meanflow", (UNET,), TORCH, py_meanflow),
    "imf": Layout("Lyy-iiis/imeanflow, branch torch", (IMPROVED,), TORCH, imf, "imf"),
    "dmf": Layout("kyungmnlee/dmf", (DECOUPLED, FLOW), TORCH, state_dict, "sd"),
    "edm2": Layout("NVlabs/edm2", (EDM2,), TORCH, edm2, "edm2"),
    "meanflow-jax": Layout("Gsunshine/meanflow", (MEANFLOW,), FLAX, meanflow_jax, "sd"),
    "imf-jax": Layout("Lyy-iiis/imeanflow", (IMPROVED,), FLAX, imf_jax, "imf"),
}


def system_of(weights: Weights) -> str:
    """Return the system that canonical weights belong to, one of the names above."""
    if "unet.emb_fourier.freqs" in weights:
        one_time = EDM2 if "logvar_linear.weight" in weights else EDM2_NO_LOGVAR
        return EDM2_TWO_TIMES if "unet.emb_noise_t.weight" in weights else one_time
    if "map_layer0.weight" in weights:
        return SEPARATE if "map_layer0_s.weight" in weights else UNET
    if "omega_tokens" in weights:
        return IMPROVED
    if "blocks.0.mlp.fc1.weight" not in weights:
        return UNKNOWN
    _, method = infer.kind_of_dit(weights)
    meanflow = QK_NORM if "blocks.0.attn.q_norm.scale" in weights else MEANFLOW
    return {"decoupled": DECOUPLED, "flow": FLOW}.get(method, meanflow)


def check_suffix(dest: pathlib.Path, name: str) -> None:
    """Raise UserError unless a file of this layout, '' for none, may have the suffix of `dest`."""
    if dest.suffix not in SUFFIXES:
        raise UserError(
            f"{dest} ends in none of {', '.join(SUFFIXES)}; for a directory, add --to run, hub or diffusers"
        )
    if name and dest.suffix not in LAYOUTS[name].suffixes:
        fits = " or ".join(LAYOUTS[name].suffixes)
        raise UserError(f"{LAYOUTS[name].code} reads no {dest.suffix} file: with --for {name}, DEST ends in {fits}")


def check_fit(
    weights: Weights, name: str, config: options.Config | None, convention: latents.Convention | None
) -> None:
    """Check that the code of a layout can run canonical weights; a convention of latents that differs is only said.

    config, convention: of the network and its latents, if known.  Raises UserError naming what fits.
    """
    layout, system = LAYOUTS[name], system_of(weights)
    if system not in layout.systems:
        fitting = [other for other in LAYOUTS if system in LAYOUTS[other].systems]
        way_out = f"--for {' or '.join(fitting)} fits" if fitting else "no --for fits, leave it out"
        raise UserError(f"--for {name} is for {' or '.join(layout.systems)}, and this is {system}: {way_out}")
    needed = QKV_LAYOUTS.get(system)
    if needed and config is not None and config.model.qkv_layout != needed:
        raise UserError(
            f"--for {name}: {layout.code} reads q, k and v as model.qkv_layout={needed!r}, and this network has them "
            f"{config.model.qkv_layout!r}: no --for fits, leave it out"
        )
    theirs = latents.CONVENTIONS.get(layout.latents)
    if theirs and convention and not latents.same(convention, theirs):
        print(
            f"warning: {layout.code} decodes latents of the convention {latents.describe(theirs)}, and these weights "
            f"generate {latents.describe(convention)}: change it there",
            file=sys.stderr,
        )


def write(dest: pathlib.Path, weights: Weights, name: str = "") -> None:
    """Write canonical weights, by the suffix of `dest`, as a PyTorch file or a Flax msgpack file.

    name: of the layout; '' for a bare state dict or Flax tree.  Raises UserError if it cannot be written, or if the
    system has no Flax tree.
    """
    if dest.suffix in FLAX and not name and system_of(weights) not in (MEANFLOW, IMPROVED):
        raise UserError(f"{system_of(weights)} has no official Flax tree: name DEST *.safetensors or *{TORCH[0]}")
    flax_or_torch = flax_tree if dest.suffix in FLAX else state_dict
    content = (LAYOUTS[name].build if name else flax_or_torch)(weights)
    try:
        with replacing(dest) as unfinished:
            if dest.suffix in FLAX:
                import flax.serialization

                unfinished.write_bytes(flax.serialization.msgpack_serialize(content))
            else:
                import torch

                torch.save(content, unfinished)
    except (OSError, RuntimeError) as error:  # torch.save raises either
        raise UserError(f"cannot write {dest}: {sources.first_line(error)}") from error
