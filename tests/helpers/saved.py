"""Work directories with a checkpoint of step 0, as a trainer writes it, of given weights."""

import torch
from flax import nnx

from jax_impl import checkpoints as jax_checkpoints
from jax_impl import step as jax_step
from jax_impl import weights as jax_weights
from jax_impl.devices import local_mesh, with_float64
from meanflow.config.workdir import open_workdir
from torch_impl import checkpoints as torch_checkpoints
from torch_impl import step as torch_step
from torch_impl import weights as torch_weights

MODULES = {"jax": jax_checkpoints, "torch": torch_checkpoints}


def write_run(framework, workdir, config, canonical):
    """Create a work directory whose checkpoint holds canonical weights {name: array}, also as EMAs."""
    lock = open_workdir(workdir, config, framework)
    saver = MODULES[framework].Checkpoints(workdir, config)
    saver.open()
    saver.save(STATES[framework](config, canonical), {"loader": "", "window": []})
    saver.close()
    lock.close()


@with_float64
def _of_jax(config, canonical):
    mesh = local_mesh()
    graphdef, state = jax_step.create_state(config, mesh)
    params = jax_weights.from_canonical(nnx.merge(graphdef, state.params), canonical)
    return jax_step.create_state(config, mesh, params)[1]


def _of_torch(config, canonical):
    cpu = torch.device("cpu")
    params = torch_weights.from_canonical(torch_step.build_net(config), canonical)
    return torch_step.create_state(config, None, cpu, params)


STATES = {"jax": _of_jax, "torch": _of_torch}
