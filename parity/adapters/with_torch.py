"""The PyTorch implementation behind `Adapter`; nothing is compiled."""

import contextlib
import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from meanflow.torch_precision import full_float32
from parity import trainers
from parity.adapters.adapter import Adapter, Network
from torch_impl import step, time_embedding, weights
from torch_impl.methods import METHODS, common, flow, improved, reflow
from torch_impl.models import edm2, imf_dit, layers, unet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Net(Network):
    """A network, whose module holds its parameters."""

    def log_variance(self, t, r):
        """Return the logarithm of the variance that the network predicts [b]."""
        return self.module.log_variance(t, r)

    def __call__(self, z, t, r, y, heads=None, tape=None, features=False, **given):
        """Return u, or the outputs that `heads` selects if there are several, or u and features."""
        options = {"heads": heads or self.head} if isinstance(self.module, imf_dit.IMFDiT) else {}
        return self.module(z, t, r, y, **given, **options, **({"features": True} if features else {}), tape=tape)


class Torch(Adapter):
    """The PyTorch implementation."""

    impl = SimpleNamespace(
        METHODS=METHODS, common=common, flow=flow, improved=improved, reflow=reflow, step=step, edm2=edm2,
        time_embedding=time_embedding, layers=layers, unet=unet,
    )  # fmt: skip
    no_grad = torch.no_grad
    device = "cpu"

    def array(self, a):
        """Return a numpy array as a tensor."""
        return torch.from_numpy(a).to(self.device)

    def sees_gpu(self):
        """Return whether PyTorch sees a GPU."""
        return torch.cuda.is_available()

    @contextlib.contextmanager
    def full_precision(self, platform="cpu"):
        """Switch on full float32 matmuls, and use one core: tiny matrices gain nothing from more."""
        num_threads = torch.get_num_threads()
        try:
            self.device = {"cpu": "cpu", "gpu": "cuda"}[platform]
            torch.set_num_threads(1)
            with full_float32():
                yield
        finally:
            self.device = "cpu"
            torch.set_num_threads(num_threads)

    def forget(self):
        """Do nothing: nothing is compiled."""

    def build(self, config, canonical, as_trained=False):
        """Return the network of `config` with canonical weights {name: array}.  Raises UserError if they do not fit.

        as_trained: ignored, as nothing is compiled.
        """
        module = step.build_net(config)
        module.load_state_dict(weights.from_canonical(module, canonical))
        module.to(self.device)
        dtype = torch.float64 if config.model.compute_dtype == "float64" else torch.float32
        return Net(module=module, dtype=dtype, method=config.method.name)

    def fresh_weights(self, config, seeds):
        """Return canonical weights {name: array} freshly drawn from each of `seeds`."""
        drawn = []
        for seed in seeds:
            config = copy.deepcopy(config)
            config.seed = seed
            module = step.build_net(config)
            drawn.append(weights.to_canonical(module, dict(module.named_parameters())))
        return drawn

    def bound(self, net):
        """Return the network, which holds its weights."""
        return net.module

    def differentiate(self, net, function):
        """Return the value and aux of function(net), and the gradients of trained parameters by canonical name."""
        value, aux = function(net)
        return self.to_numpy(value), self.to_numpy(aux), self._gradients(net, value)

    def regression_gradients(self, net, regressions):
        """Return the gradients of a sum of `oracle.Regression`s; JAX's adapter has no such function."""
        return self._gradients(net, sum(self._regression(net, r) for r in regressions))

    def _regression(self, net, r):
        inputs, given, total = self.arrays(net, r.inputs), self._given(net, r.given), 0.0
        for head, (target, scale) in ((head, self.arrays(net, pair)) for head, pair in r.targets.items()):
            total += (scale * (net(*inputs, head, **given) - target).square().sum((1, 2, 3))).mean()
        if r.slope is not None:
            total += (self.arrays(net, [r.slope])[0] * net.log_variance(*inputs[1:3])).mean()
        if r.cotangents:
            outputs = net(*inputs, features=True)[1]
            total += sum((a * b).sum() for a, b in zip(outputs, self.arrays(net, r.cotangents), strict=True))
        return total

    def _gradients(self, net, value):
        params = {name: p for name, p in net.module.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(value, list(params.values()), allow_unused=True, materialize_grads=True)
        canonical = weights.to_canonical(net.module, dict(zip(params, grads, strict=True)))
        return {name: canonical[name] for name in params}

    def canonical(self, net):
        """Return the network's weights by canonical name."""
        return weights.to_canonical(net.module, dict(net.module.named_parameters()))

    def projected(self, net, config):
        """Return the network with its weights projected, as a training step projects them."""
        module = copy.deepcopy(net.module)
        step.project(step.TrainState(0, module, step.make_optimizer(module, config.train), (), module), config)
        return net.replace(module=module)

    def rotary_table(self, net):
        """Return the cosines and sines [tokens, dim/2] of rotary positions."""
        return self.to_numpy((net.module.cos, net.module.sin))

    def trainer(self, config, given):
        """See `Adapter.trainer`."""
        config = copy.deepcopy(config)
        config.train.compile = False
        return trainers.TorchTrainer(config, given, device=torch.device(self.device))

    def optimize(self, start_at, grads, c, params=None):
        """See `Adapter.optimize`."""
        net = nn.Module()
        net.w = nn.Parameter(torch.tensor(start_at, device=self.device))
        emas = tuple({"w": net.w.detach().clone()} for _ in c.ema_decays)
        state = step.TrainState(0, net, step.make_optimizer(net, c), emas, net)
        history, norms = [], []
        for k, grad in enumerate(grads):
            if params is not None:
                net.w.data.copy_(torch.tensor(params[k]))
            net.w.grad = torch.tensor(grad, device=self.device)
            state, norm = step.apply_gradients(state, c)
            history.append([self.to_numpy(a).copy() for a in (net.w, *(ema["w"] for ema in state.emas))])
            norms.append(float(norm))
        params, *emas = np.stack(history, axis=1)
        return params, emas, np.array(norms)

    def arrays(self, net, arrays):
        """Return tensors: floats in the network's dtype, labels as integers, images [... c h w]."""
        tensors = (self._tensor(net, a) for a in arrays)
        return [a.movedim(-1, -3).contiguous() if a.ndim >= 4 else a for a in tensors]

    def _tensor(self, net, a):
        # In C order: fused AdamW silently misreads a gradient whose strides differ from its parameter's.
        a = torch.from_numpy(np.array(a, order="C")).to(self.device)
        return a.to(net.dtype) if a.is_floating_point() else a.long()

    def to_numpy(self, tree) -> Any:
        """Return numpy arrays in place of tensors; images as [b h w c]."""
        if isinstance(tree, dict):
            return {name: self.to_numpy(a) for name, a in tree.items()}
        if isinstance(tree, tuple | list):
            return tuple(map(self.to_numpy, tree))
        tree = tree.detach()
        return (tree.permute(0, 2, 3, 1) if tree.ndim == 4 else tree).cpu().numpy()
