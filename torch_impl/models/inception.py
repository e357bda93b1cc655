"""The Inception network that defines the Fréchet distance and the Inception score; see `meanflow.metrics.inception`.

It computes in full float32 whatever the process's precision.  It is never trained: fresh kernels are zeros, for
`weights.from_canonical` to fill.
"""

import torch
import torch.nn.functional as F
from torch import nn

from meanflow.metrics.inception import EPS, NUM_CLASSES, STAGES, Unit, is_split
from meanflow.metrics.preprocessing import Convention, resize_matrix


def average_pool(x):
    """Return means of 3 x 3 pixels of x [b c h w], of fewer at the border: padding does not count."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_pool(x):
    """Return maxima of 3 x 3 pixels of x [b c h w]."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


def halving_pool(x):
    """Return maxima of 3 x 3 pixels at every other position of x [b c h w], without padding."""
    return F.max_pool2d(x, 3, stride=2)


POOLS = {"average": average_pool, "maximum": max_pool, "halving": halving_pool}


class BatchNorm(nn.Module):
    """Normalise the channels of x [b c h w] by fixed means and variances, then scale and shift."""

    def __init__(self, features, *, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(features, dtype=dtype))
        self.running_mean = nn.Parameter(torch.zeros(features, dtype=dtype))
        self.running_var = nn.Parameter(torch.ones(features, dtype=dtype))

    def forward(self, x):
        scale = self.weight * torch.rsqrt(self.running_var + EPS)
        mean, scale, bias = (a[:, None, None] for a in (self.running_mean, scale, self.bias))
        return (x - mean) * scale + bias


class Conv(nn.Module):
    """Convolution [b in h w] -> [b out h' w'] without bias, as a `Unit` says."""

    def __init__(self, in_features, unit, *, dtype):
        super().__init__()
        self.stride = unit.stride
        self.padding = tuple(side // 2 if unit.padded else 0 for side in unit.kernel)
        self.weight = nn.Parameter(torch.zeros((unit.features, in_features, *unit.kernel), dtype=dtype))

    def forward(self, x):
        return F.conv2d(x, self.weight, stride=self.stride, padding=self.padding)


class BasicConv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, in_features, unit, *, dtype):
        super().__init__()
        self.conv = Conv(in_features, unit, dtype=dtype)
        self.bn = BatchNorm(unit.features, dtype=dtype)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """A block of branches: x [b in h w] -> [b out_features h' w']."""

    def __init__(self, in_features, branches, *, dtype):
        super().__init__()
        self.branches, self.out_features = branches, 0
        for branch in branches:
            features = in_features
            for step in branch:
                units = step if is_split(step) else (step,) if isinstance(step, Unit) else ()
                for unit in units:
                    setattr(self, unit.name, BasicConv(features, unit, dtype=dtype))
                features = sum(unit.features for unit in units) or features
            self.out_features += features

    def forward(self, x):
        return torch.cat([self.branch(x, branch) for branch in self.branches], dim=1)

    def branch(self, x, branch):
        """Return the output of one branch for x."""
        for step in branch:
            if is_split(step):
                x = torch.cat([getattr(self, unit.name)(x) for unit in step], dim=1)
            else:
                x = POOLS[step](x) if isinstance(step, str) else getattr(self, step.name)(x)
        return x


class Logits(nn.Module):
    """Logits [b classes] of features [b n], with the bias and without it."""

    def __init__(self, in_features, num_classes, *, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((num_classes, in_features), dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(num_classes, dtype=dtype))

    def forward(self, x):
        unbiased = F.linear(x, self.weight)
        return unbiased + self.bias, unbiased


class Inception(nn.Module):
    """Features and logits of images x [b 3 299 299] as `resized` returns them.

    `dtype`, float32 or float64, is used throughout.
    Returns {name: array}: "64", "192", "768" and "2048", that many features [b n], each the mean over all pixels, and
    "logits" and "logits_unbiased" [b 1008].  The Fréchet distance uses 2048, the Inception score logits_unbiased, which
    omit the bias of the last layer.
    """

    def __init__(self, *, dtype=torch.float32):
        super().__init__()
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

    def forward(self, x):
        out = {}
        for name, stage in STAGES.items():
            for step in stage:
                x = POOLS[step](x) if isinstance(step, str) else getattr(self, step[0])(x)
            out[name] = x.mean((2, 3))
        logits, unbiased = self.fc(out["2048"])
        return out | {"logits": logits, "logits_unbiased": unbiased}


def resized(images, convention: Convention, dtype=torch.float32):
    """Return images [b c h w] in [0, 255], grey or RGB, in the form Inception takes: [b 3 299 299] in about [-1, 1]."""
    x = images.to(dtype)
    matrices = [resize_matrix(size, convention.resize) for size in images.shape[2:]]
    down, across = (torch.from_numpy(matrix).to(x) for matrix in matrices)
    x = torch.einsum("ph,bchw,qw->bcpq", down, x, across)
    x = x / convention.half_range - 1
    return x.expand(-1, 3, -1, -1)
