"""DiT for decoupled MeanFlow: a flow transformer whose first blocks are conditioned on t and whose last ones on r.

It has the parameters of the flow model, including its single time embedder, so a trained flow model can be loaded:
at r = t the outputs are equal.  The only addition is a head of a few hundred parameters, used only in training.
Source: arXiv:2510.24474; kyungmnlee/dmf, models/dmft.py.
"""

import torch
import torch.nn.functional as F

from torch_impl.models.dit import DiT, sizes_of
from torch_impl.models.layers import Linear, timestep_features

LOG_VARIANCE_FEATURES = 128  # of each time


class DMFDiT(DiT):
    """Average velocity u = net(z, t, r, y), as `DiT`; the first dmf_depth blocks see t, all later layers r.

    Raises ValueError for sizes that do not divide.
    """

    def __init__(self, *, dmf_depth, **sizes):
        super().__init__(**sizes, interval_embedder=False)
        if dmf_depth > len(self.blocks):
            raise ValueError(f"dmf_depth {dmf_depth} is more than the {len(self.blocks)} blocks")
        self.dmf_depth = dmf_depth
        self.logvar_linear = Linear(2 * LOG_VARIANCE_FEATURES, 1, dtype=None)

    @classmethod
    def from_config(cls, c):
        """Build from `config.model`."""
        return cls(**sizes_of(c), dmf_depth=c.dmf_depth)

    def forward(self, z, t, r, y, tape=None):
        label = self.y_embedder(y)
        early, late = (F.silu(self.t_embedder(time, tape) + label) for time in (t, r))
        num_late = len(self.blocks) - self.dmf_depth + 1
        return self.transform(z, [early] * self.dmf_depth + [late] * num_late, tape)[0]

    def log_variance(self, t, r):
        """Return the predicted log-variance [b] of the error of u at times t, r [b]."""
        features = [timestep_features(time, LOG_VARIANCE_FEATURES) for time in (t, r)]
        return self.logvar_linear(torch.cat(features, dim=-1))[:, 0]
