"""Prints the samples of one and of three fake devices, and which rows each of the three had.

sample_on_devices.py CONFIG.json ROWS      {"one": [n h w c], "three": [n h w c], "rows": [[first, end], ...]}
"""

import json
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_impl import sample
from jax_impl.devices import local_mesh
from jax_impl.methods import METHODS
from jax_impl.step import build_net
from meanflow.config import store
from meanflow.sampling import noise


def samples(config, num_rows, num_devices):
    """Return images [n h w c] of weights that are zero nowhere."""
    graphdef, params = build_net(config)
    rng = np.random.RandomState(0)
    params = jax.tree.map(lambda a: a + rng.normal(0, 0.1, a.shape).astype(np.float32), params)
    mesh = local_mesh(jax.local_devices()[:num_devices])
    sampler = sample.make_sampler(config, graphdef, mesh)
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    shape = (config.model.input_size, config.model.input_size, config.model.channels)
    num_fresh = noise.num_fresh(config.sample)
    drawn = noise.draw(range(num_rows), shape, config.model.num_classes, config.sample.seed, num_fresh)
    return sampler(params, *drawn[:2], config.sample, drawn[2])


def spy(method):
    """Have the method note how its rows lie; return the list of [first, end], of each device, that it notes."""
    rows, method_sample = [], method.sample

    def note(sharding, shape):
        rows[:] = sorted(index[0].indices(shape[0])[:2] for index in sharding.devices_indices_map(shape).values())

    def spying(net, z, *args):
        jax.debug.inspect_array_sharding(z, callback=lambda sharding: note(sharding, z.shape))
        return method_sample(net, z, *args)

    method.sample = spying
    return rows


def main():
    """Sample with one device, then with three."""
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.config.update("jax_num_cpu_devices", 3)
    with open(sys.argv[1]) as file:
        config = store.from_json(file.read())
    rows = spy(METHODS[config.method.name])
    one, three = (samples(config, int(sys.argv[2]), num).tolist() for num in (1, 3))
    print(json.dumps({"one": one, "three": three, "rows": rows}))


if __name__ == "__main__":
    main()
