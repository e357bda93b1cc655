"""The Inception network that defines the Fréchet distance and the Inception score; see `meanflow.metrics.inception`.

It computes in full float32 whatever the process's precision.  It is never trained: fresh kernels are zeros, for
`weights.from_canonical` to fill.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from meanflow.metrics.inception import EPS, NUM_CLASSES, STAGES, Unit, is_split
from meanflow.metrics.preprocessing import Convention, resize_matrix


def average_pool(x):
    """Return means of 3 x 3 pixels of x [b h w c], of fewer at the border: padding does not count."""

    def sums(x):
        return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")

    return sums(x) / sums(jnp.ones((1, *x.shape[1:3], 1), x.dtype))


def max_pool(x):
    """Return maxima of 3 x 3 pixels of x [b h w c]."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")


def halving_pool(x):
    """Return maxima of 3 x 3 pixels at every other position of x [b h w c], without padding."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")


POOLS = {"average": average_pool, "maximum": max_pool, "halving": halving_pool}


class BatchNorm(nnx.Module):
    """Normalise the channels of x [b h w c] by fixed means and variances, then scale and shift."""

    def __init__(self, features, *, dtype):
        self.weight = nnx.Param(jnp.ones(features, dtype))
        self.bias = nnx.Param(jnp.zeros(features, dtype))
        self.running_mean = nnx.Param(jnp.zeros(features, dtype))
        self.running_var = nnx.Param(jnp.ones(features, dtype))

    def __call__(self, x):
        scale = self.weight[...] * jax.lax.rsqrt(self.running_var[...] + EPS)
        return (x - self.running_mean[...]) * scale + self.bias[...]


class Conv(nnx.Module):
    """Convolution [b h w in] -> [b h' w' out] without bias, as a `Unit` says."""

    def __init__(self, in_features, unit, *, dtype):
        self.stride = unit.stride
        self.padding = tuple((side // 2, side // 2) if unit.padded else (0, 0) for side in unit.kernel)
        self.kernel = nnx.Param(jnp.zeros((*unit.kernel, in_features, unit.features), dtype))

    def __call__(self, x):
        dimensions = ("NHWC", "HWIO", "NHWC")
        strides = (self.stride, self.stride)
        return jax.lax.conv_general_dilated(
            x, self.kernel[...], strides, self.padding, None, None, dimensions, precision="highest"
        )


class BasicConv(nnx.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, in_features, unit, *, dtype):
        self.conv = Conv(in_features, unit, dtype=dtype)
        self.bn = BatchNorm(unit.features, dtype=dtype)

    def __call__(self, x):
        return nnx.relu(self.bn(self.conv(x)))


class Mixed(nnx.Module):
    """A block of branches: x [b h w in] -> [b h' w' out_features]."""

    def __init__(self, in_features, branches, *, dtype):
        self.branches, self.out_features = branches, 0
        for branch in branches:
            features = in_features
            for step in branch:
                units = step if is_split(step) else (step,) if isinstance(step, Unit) else ()
                for unit in units:
                    setattr(self, unit.name, BasicConv(features, unit, dtype=dtype))
                features = sum(unit.features for unit in units) or features
            self.out_features += features

    def __call__(self, x):
        return jnp.concatenate([self.branch(x, branch) for branch in self.branches], axis=-1)

    def branch(self, x, branch):
        """Return the output of one branch for x."""
        for step in branch:
            if is_split(step):
                x = jnp.concatenate([getattr(self, unit.name)(x) for unit in step], axis=-1)
            else:
                x = POOLS[step](x) if isinstance(step, str) else getattr(self, step.name)(x)
        return x


class Logits(nnx.Module):
    """Logits [b classes] of features [b n], with the bias and without it."""

    def __init__(self, in_features, num_classes, *, dtype):
        self.kernel = nnx.Param(jnp.zeros((in_features, num_classes), dtype))
        self.bias = nnx.Param(jnp.zeros(num_classes, dtype))

    def __call__(self, x):
        unbiased = jnp.dot(x, self.kernel[...], precision="highest")
        return unbiased + self.bias[...], unbiased


class Inception(nnx.Module):
    """Features and logits of images x [b 299 299 3] as `resized` returns them.

    `dtype`, float32 or float64, is used throughout.
    Returns {name: array}: "64", "192", "768" and "2048", that many features [b n], each the mean over all pixels, and
    "logits" and "logits_unbiased" [b 1008].  The Fréchet distance uses 2048, the Inception score logits_unbiased, which
    omit the bias of the last layer.
    """

    def __init__(self, *, dtype=jnp.float32):
        features = 3
        for stage in STAGES.values():
            for step in stage:
                if isinstance(step, Unit):
                    setattr(self, step.name, BasicConv(features, step, dtype=dtype))
                    features = step.features
                elif not isinstance(step, str):
                    name, branches = step
                    setattr(self, name, Mixed(features, branches, dtype=dtype))
                    features = getattr(self, name).out_features
        self.fc = Logits(features, NUM_CLASSES, dtype=dtype)

    def tables(self):
        """Return the fixed tables of the canonical state dict: there are none."""
        return {}

    def __call__(self, x):
        out = {}
        for name, stage in STAGES.items():
            for step in stage:
                x = POOLS[step](x) if isinstance(step, str) else getattr(self, step[0])(x)
            out[name] = x.mean((1, 2))
        logits, unbiased = self.fc(out["2048"])
        return out | {"logits": logits, "logits_unbiased": unbiased}


def resized(images, convention: Convention, dtype=jnp.float32):
    """Return images [b h w c] in [0, 255], grey or RGB, in the form Inception takes: [b 299 299 3] in about [-1, 1]."""
    x = images.astype(dtype)
    down, across = (jnp.asarray(resize_matrix(size, convention.resize), dtype) for size in np.shape(images)[1:3])
    x = jnp.einsum("ph,bhwc,qw->bpqc", down, x, across, precision="highest")
    x = x / convention.half_range - 1
    return jnp.broadcast_to(x, (*x.shape[:3], 3))
