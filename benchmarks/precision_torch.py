"""The precision study in PyTorch: a loss and its gradients in one mode, numpy in and out.  See precision.py."""

import contextlib
import copy

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from meanflow.torch_precision import full_float32
from torch_impl import step, weights
from torch_impl.devices import choose_device
from torch_impl.methods import METHODS
from torch_impl.models.tape import under_jvp

aten = torch.ops.aten
# Products and the argument positions of their factors.
FACTORS = {
    aten.mm: (0, 1), aten.bmm: (0, 1), aten.addmm: (1, 2), aten.baddbmm: (1, 2), aten.convolution: (0, 1),
    aten.convolution_backward: (0, 1, 2),
}  # fmt: skip


class Mixed:
    """A network whose calls run in the data types of a mode.

    It is called like the networks: first for the primal of all rows with a recording tape, then for the tangent with
    the same tape.  If the data types of the two differ, nothing is recorded, and the tangent computes its own primal.
    """

    takes_tape = True

    def __init__(self, nets, params, mode):
        """nets: {dtype: module}, called with `params` {name: tensor} in place of their own.  mode: `precision.Mode`."""
        self.nets, self.params, self.mode, net = nets, params, mode, nets[mode.plain]
        self.num_classes, self.augment_dim = net.num_classes, getattr(net, "augment_dim", 0)

    def __call__(self, *inputs, tape=None, **given):
        (_, t, r, _), (plain, primal, tangent, _) = inputs, self.mode
        if len({plain, primal, tangent}) > 1:
            if under_jvp(tape):
                return self.call(tangent, inputs, given)
            tape = None
        u = self.call(plain, inputs, given | {"tape": tape})
        if plain == primal or r is t:
            return u
        of_row = (r < t)[:, None, None, None]
        return tree_map(lambda a, b: torch.where(of_row, a, b), self.call(primal, inputs, given), u)

    def call(self, dtype, inputs, given):
        """Call one of the networks."""
        return functional_call(self.nets[dtype], self.params, inputs, given)


class Products(TorchDispatchMode):
    """A mode in which products of bfloat16 factors are accumulated in float32 and rounded once, as on a GPU.

    Emulated with float32 products, because a CPU without bfloat16 instructions would be about a hundred times slower.
    rounded: also rounds the factors of float32 products to bfloat16, but not the results; the default on TPUs.
    """

    def __init__(self, rounded):
        super().__init__()
        self.rounded = rounded

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        factors = FACTORS.get(func._overloadpacket)
        if factors is None:
            return func(*args, **(kwargs or {}))
        dtype = args[factors[0]].dtype
        if dtype == torch.float32 and self.rounded:
            args = [a.bfloat16().float() if i in factors else a for i, a in enumerate(args)]
        if dtype == torch.bfloat16:
            args = tree_map(lambda a: a.float() if isinstance(a, torch.Tensor) else a, args)
            return tree_map(lambda a: a if a is None else a.bfloat16(), func(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def shapes(config):
    """Return the canonical shapes {name: shape} of the parameters, and the fixed tables {name: array}."""
    with torch.device("meta"):
        net = step.ARCHITECTURES[config.model.name](config.model)
    return {name: tuple(p.shape) for name, p in net.named_parameters()}, net.tables()


def make(config, mode, emulate=True):
    """Return run(canonical weights, rows, draws) -> (aux, gradients by canonical name).

    rows, draws: arrays by name, images [b h w c].  mode: `precision.Mode`.  emulate: on a CPU, run bfloat16
    products as `Products` does instead of with PyTorch's kernels.
    """
    method, device = METHODS[config.method.name], choose_device()
    nets = {name: build_net(config, name) for name in set(mode[:3])}
    net, dtype = nets[mode.plain], torch.float64 if mode.plain == "float64" else torch.float32
    emulated = mode.rounded or (emulate and device.type == "cpu")

    def arrays(named):
        tensors = {}
        for name, a in named.items():
            tensor = torch.from_numpy(np.array(a)).to(device)
            tensor = tensor.permute(0, 3, 1, 2).contiguous() if tensor.ndim == 4 else tensor
            tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor.long()
        return tensors

    def run(canonical, rows, draws):
        state = weights.from_canonical(net, canonical)
        params = {name: state[name].to(device).requires_grad_() for name, _ in net.named_parameters()}
        given = method.Draws(**arrays({name: draws[name] for name in method.Draws._fields}))
        with contextlib.ExitStack() as stack:
            stack.enter_context(full_float32())
            if emulated:
                stack.enter_context(Products(mode.rounded))
            loss, aux = method.loss(Mixed(nets, params, mode), arrays(rows), given, config.method)
            grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True, materialize_grads=True)
        named = weights.to_canonical(net, dict(zip(params, grads, strict=True)))
        return {name: to_numpy(a) for name, a in aux.items()}, {name: named[name] for name in params}

    return run


def build_net(config, dtype):
    """Return the network with another compute dtype and no parameter storage; callers pass the parameters."""
    config = copy.deepcopy(config)
    config.model.compute_dtype = dtype
    net = step.build_net(config)
    for module in net.modules():
        for name, p in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(p.to("meta")))
        for name, table in module.named_buffers(recurse=False):
            setattr(module, name, table.to(choose_device()))
    return net


def to_numpy(a):
    """Return a tensor as an array, images as [b h w c]."""
    return (a.permute(0, 2, 3, 1) if a.ndim == 4 else a).detach().cpu().numpy()
