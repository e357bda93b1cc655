"""Fixtures of the Inception network of torch-fidelity, pytorch-fid and the official JAX code, with their resizing."""

import functools

import numpy as np

from meanflow.metrics.preprocessing import CONVENTIONS
from parity.adapters import frozen_networks
from parity.checks import Measure
from parity.golden.network import BOUND, nhwc

# For resized images: official code computes positions in float32, 4e-5 off near 299 pixels; ours uses float64.
RESIZE_BOUND = 1e-4
STRIDE = 23  # between the rows and columns of resized images that the fixture keeps
# Evaluation convention of each group of features and of resized images.
FEATURES = {"torch_fidelity": "torch_fidelity", "pytorch_fid": "pytorch_fid", "imf_jax": "jax_meanflow"}
RESIZED = {
    "resize_tf1": "torch_fidelity", "resize_half_pixel": "jax_meanflow", "resize_jaxrepo": "jax_meanflow",
    "resize_pytorchfid": "pytorch_fid",
}  # fmt: skip
# Outputs: official name -> ours.  The official JAX code's logits have no bias.
OUTPUTS = {name: name for name in ("64", "192", "768", "2048", "logits", "logits_unbiased")}
JAX_OUTPUTS = {"pooled": "2048", "logits": "logits_unbiased"}
FLOAT64 = "_f64"  # suffix of what the official network computed in float64


def groups(fixture) -> list[str]:
    """Return the cases that the fixture must have."""
    return [*FEATURES, *RESIZED]


@functools.lru_cache(maxsize=4)
def network(fixture, framework: str, dtype: str):
    """Return Inception with the weights that the fixture's seed draws.  Cached: it is slow to compile."""
    return frozen_networks.inception(framework, frozen_networks.inception_weights(fixture.config["weight_seed"]), dtype)


def features(group: str, fixture, measure: Measure) -> None:
    """Features and logits of `in/img`."""
    names = JAX_OUTPUTS if group == "imf_jax" else OUTPUTS
    images, results = nhwc(fixture.get("in/img")), fixture.under(f"out/{group}/")
    for framework in frozen_networks.INCEPTION:
        for dtype in ("float32", "float64"):
            wanted = {name: a for name, a in results.items() if name.endswith(FLOAT64) == (dtype == "float64")}
            if not wanted:
                continue
            got = network(fixture, framework, dtype)(images, CONVENTIONS[FEATURES[group]])
            for name, want in wanted.items():
                output = names.get(name.removesuffix(FLOAT64))
                if output is None:
                    measure.add(framework, f"{name} (no such output is known)", np.inf, 0.0)
                else:
                    measure.compare(framework, name, got[output], want, BOUND)


def resized(group: str, fixture, measure: Measure) -> None:
    """Every image of the fixture as Inception reads it."""
    for name, want in fixture.under(f"out/{group}/").items():
        images = nhwc(fixture.get(f"in/{name}"))
        for framework in frozen_networks.INCEPTION:
            got = frozen_networks.resized(framework, images, CONVENTIONS[RESIZED[group]], "float32")
            got = got[:, ::STRIDE, ::STRIDE].transpose(0, 3, 1, 2)
            measure.compare(framework, name, got, want, RESIZE_BOUND)


RUNNERS = {group: functools.partial(features, group) for group in FEATURES}
RUNNERS |= {group: functools.partial(resized, group) for group in RESIZED}
