"""The PyTorch implementation, called with numpy arrays: images [b h w c], weights and gradients by canonical names.

The twin of `with_jax`, function by function.
"""

import contextlib
import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from meanflow.sampling import edm, steps
from meanflow.torch_precision import full_float32
from torch_impl import step, time_embedding, weights
from torch_impl.methods import METHODS, common, flow, improved, reflow
from torch_impl.models import edm2, imf_dit, layers, unet


class Net(NamedTuple):
    """A network as a function of (z, t, r, y)."""

    module: Any  # nn.Module
    dtype: torch.dtype  # of inputs and draws
    method: str  # name of the method that trains it
    teacher: Any = None  # the frozen network that its loss is given
    head: str = "u"  # of a network with several, the one that is called

    @property
    def num_classes(self):
        """The null class."""
        return self.module.num_classes

    @property
    def dropout(self):
        """The rate of dropout."""
        return self.module.dropout

    @property
    def augment_dim(self):
        """How many augmentation labels the network is told."""
        return self.module.augment_dim

    @property
    def takes_tape(self):
        """Whether the network records for its own tangent."""
        return self.module.takes_tape

    def dropout_masks(self, draws):
        """Return the masks of draws [b]."""
        return self.module.dropout_masks(draws)

    def log_variance(self, t, r):
        """Return the logarithm of the variance that the network expects [b]."""
        return self.module.log_variance(t, r)

    def __call__(self, z, t, r, y, heads=None, tape=None, features=False, **given):
        """Return u, or what `heads` asks for of a network that has more than one, or u and features."""
        options = {"heads": heads or self.head} if isinstance(self.module, imf_dit.IMFDiT) else {}
        return self.module(z, t, r, y, **given, **options, **({"features": True} if features else {}), tape=tape)


@contextlib.contextmanager
def full_precision():
    """Switch on full float32 matmuls for a while, on one core: tiny matrices gain nothing from more."""
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with full_float32():
            yield
    finally:
        torch.set_num_threads(num_threads)


def forget():
    """Do nothing: nothing is compiled."""


def build(config, canonical, as_trained=False):
    """Return the network of `config` with canonical weights {name: array}.  Raises UserError if they do not fit.

    as_trained: means nothing here, where nothing is compiled.
    """
    module = step.build_net(config)
    module.load_state_dict(weights.from_canonical(module, canonical))
    dtype = torch.float64 if config.model.compute_dtype == "float64" else torch.float32
    return Net(module, dtype, config.method.name)


def fresh_weights(config, seeds):
    """Return canonical weights {name: array} freshly drawn from each of `seeds`."""
    drawn = []
    for seed in seeds:
        config = copy.deepcopy(config)
        config.seed = seed
        module = step.build_net(config)
        drawn.append(weights.to_canonical(module, dict(module.named_parameters())))
    return drawn


def tables(net):
    """Return the fixed tables {name: array}."""
    return net.module.tables()


@torch.no_grad()
def forward(net, z, t, r, y, given=None, head="u"):
    """Return u [b h w c], or the velocity of another head.

    given: what the network is given beside, dropout by its draws [b].
    """
    return _to_numpy(net(*_arrays(net, (z, t, r, y)), head, **_given(net, given)))


def jvp(net, z, t, r, y, tangent, given=None, head="u"):
    """Return u and du/dt along (tangent, 1, 0) on all rows, as the methods do.

    head: `v` for another head's velocity in place of u.
    """
    z, t, r, y, tangent = _arrays(net, (z, t, r, y, tangent))
    rows, given = common.Rows(groups=1, flow=0, jvp=len(y)), _given(net, given)
    net = net._replace(head=head)
    u, tape = common.average_velocity(net, z, t, r, y, given, rows)
    return _to_numpy(u), _to_numpy(common.total_derivative(net, z, tangent, t, r, y, given, rows, tape))


@torch.no_grad()
def features(net, z, t, y):
    """Return what the projectors make of the tokens of a flow model, [b n d] for each encoder."""
    z, t, y = _arrays(net, (z, t, y))
    return tuple(map(_to_numpy, net(z, t, t, y, features=True)[1]))


def alignment(projections, features):
    """Return the term of REPA (scalar) of projections [b n d_i] and features [b n sum d_i]."""
    return _to_numpy(flow.alignment([torch.from_numpy(p) for p in projections], torch.from_numpy(features)))


@torch.no_grad()
def log_variance(net, t, r):
    """Return the logarithm [b] of the variance that the network expects at times t and r [b]."""
    return _to_numpy(net.log_variance(*_arrays(net, (t, r))))


def loss(net, batch, draws, cfg, part=slice(None), function="loss"):
    """Return the loss, its aux, and its gradients by canonical name.

    batch: image, label and perhaps more; draws: those that are used; arrays by name.  cfg: `config.method`.
    part: the rows of a micro-batch.  function: the method's, `loss` or `loss_reference`.
    """
    method, given = METHODS[cfg.name], {"teacher": net.teacher} if net.teacher else {}
    batch = {name: a[part] for name, a in _by_name(net, batch).items()}
    draws = method.Draws(*(None if a is None else a[part] for a in _draws(net, method, draws, cfg)))
    value, aux = getattr(method, function)(net, batch, draws, cfg, **given)
    return _to_numpy(value), {name: _to_numpy(a) for name, a in aux.items()}, _gradients(net, value)


def regression_gradients(net, regressions):
    """Return the gradients of a sum of `oracle.Regression`s; without a twin, as the oracle is asked once."""
    return _gradients(net, sum(_regression(net, r) for r in regressions))


def _regression(net, r):
    inputs, given, total = _arrays(net, r.inputs), _given(net, r.given), 0.0
    for head, (target, scale) in ((head, _arrays(net, pair)) for head, pair in r.targets.items()):
        total += (scale * (net(*inputs, head, **given) - target).square().sum((1, 2, 3))).mean()
    if r.slope is not None:
        total += (_arrays(net, [r.slope])[0] * net.log_variance(*inputs[1:3])).mean()
    if r.cotangents:
        outputs = net(*inputs, features=True)[1]
        total += sum((a * b).sum() for a, b in zip(outputs, _arrays(net, r.cotangents), strict=True))
    return total


def sample_times(net, draws, cfg):
    """Return t and r [b] of the draws that are given by name."""
    method = METHODS[cfg.name]
    return tuple(map(_to_numpy, method.sample_times(_draws(net, method, draws, cfg), cfg)))


def order_times(net, times, cfg):
    """Return t and r [b] of draws [b 2], without flow rows."""
    return tuple(map(_to_numpy, common.order_times(_arrays(net, [times])[0], cfg)))


def flow_time(net, times, cfg):
    """Return the time of flow matching [b] of draws [b]."""
    return _to_numpy(common.to_time(_arrays(net, [times])[0], cfg.flow_time_mean, cfg.flow_time_std, cfg))


def sample_guidance(net, draws, cfg):
    """Return what improved MeanFlow tells its network of guidance, [b] each by name, from draws by name."""
    given = improved.sample_guidance(_draws(net, improved, draws, cfg), cfg)
    return {name: _to_numpy(a) for name, a in given.items()}


def path(net, x, e, t, cfg):
    """Return z and v [b h w c]."""
    x, e, t = _arrays(net, (x, e, t))
    return tuple(map(_to_numpy, common.path(x, e, t, cfg)))


@torch.no_grad()
def sample(net, noise, y, cfg, fresh=None):
    """Return the images that noise becomes.  cfg: `config.sample`.  fresh: [k b h w c], of samplers that draw anew."""
    (noise, y), method = _arrays(net, (noise, y)), METHODS[net.method]
    given = method.sampling_conditions(cfg) | ({} if fresh is None else {"fresh": _arrays(net, [fresh])[0]})
    return _to_numpy(method.sample(net, noise, y, given, cfg))


def sampling_times(cfg):
    """Return the times of sampling.  cfg: `config.sample`."""
    return steps.sampling_times(cfg)


def score(v, z, t, path):
    """Return the score at states z with velocities v [b h w c] and times t [b]."""
    factors = np.array([steps.score_factors(float(time), path) for time in t])
    of_v, of_z = factors.T[..., None, None, None]
    return of_v * v + of_z * z


def diffusion(t, cfg):
    """Return g^2 of the stochastic sampler at times t [n].  cfg: `config.sample`."""
    return np.array([steps.diffusion(float(time), cfg) for time in t])


@torch.no_grad()
def raw(net, x, t, r, y):
    """Return what EDM2's network makes of x [b h w c] without preconditioning, told t and r [b] as they are."""
    x, t, r, y = _arrays(net, (x, t, r, y))
    unet = net.module.unet
    return _to_numpy(unet(x, unet.embed(t, r, y)))


@torch.no_grad()
def denoise(net, x, sigma, y):
    """Return the denoised images [b h w c] of x at noise levels sigma [b], in EDM's terms."""
    return _to_numpy(reflow.denoise(net, *_arrays(net, (x, sigma, y))))


@torch.no_grad()
def couple(net, noise, y, grid, guidance=1.0, guide=None):
    """Return the samples [b h w c] that a flow model makes of noise.

    grid: options of the noise levels, by name.  guide: its autoguidance network.
    """
    noise, y = _arrays(net, (noise, y))
    return _to_numpy(reflow.couple(net, noise, y, sigmas(grid), guidance, guide))


def sigmas(grid):
    """Return the noise levels of couplings.  grid: their options, by name."""
    return edm.noise_levels(edm.Schedule(**grid))


def embedding_error(config, canonical, teacher_config, teacher, t, r):
    """Return the mean squared error of a network's embedding of t and r [b] to its teacher's; canonical weights."""
    return time_embedding.error(config, canonical, teacher_config, teacher, t, r)


@torch.no_grad()
def embed_times(net, t, r):
    """Return the embedding [b d] of times t and r [b], of a network of one time that of t, as a flow model's."""
    unet = net.module.unet
    t, r = _arrays(net, (t, r))
    return _to_numpy(unet.embed_times(t if unet.interval_embedder else edm2.log_sigma(t), r))


def projected(net, config):
    """Return the network with its weights as a step of training wants them."""
    module = copy.deepcopy(net.module)
    step.project(step.TrainState(0, module, step.make_optimizer(module, config.train), (), module), config)
    return net._replace(module=module)


def canonical(net):
    """Return its weights by canonical name."""
    return weights.to_canonical(net.module, dict(net.module.named_parameters()))


def rotary_table(net):
    """Return the cosines and sines [tokens, dim/2] of rotary positions."""
    return _to_numpy(net.module.cos), _to_numpy(net.module.sin)


def time_features(net, t):
    """Return the sinusoidal features [b dim] of times t [b], cosines first."""
    module, t = net.module, torch.tensor(t, dtype=net.dtype)
    if isinstance(module, unet.UNet):
        return np.roll(_to_numpy(module.embed_time(t)), module.features // 2, axis=-1)
    if isinstance(module, edm2.EDM2):
        return _to_numpy(module.unet.emb_fourier(t))
    return _to_numpy(layers.timestep_features(t, module.t_embedder.features))


def train(net, config, batches):
    """Take an optimizer and EMA step for each (batch, draws) of `batches`, through the trainer's own step functions.

    Returns {params, ema0, ema1, ...}, each by canonical name, and {grad_norm, learning_rate}, [steps] each.
    """
    module = copy.deepcopy(net.module)
    emas = tuple({name: p.detach().clone() for name, p in module.named_parameters()} for _ in config.train.ema_decays)
    state = step.TrainState(0, module, step.make_optimizer(module, config.train), emas, module)
    scalars = {"grad_norm": [], "learning_rate": []}
    for batch, draws in batches:
        state = step.project(state, config)
        _, _, grads = loss(net._replace(module=state.net), batch, draws, config.method)
        for name, p in state.net.named_parameters():
            p.grad = _array(net, grads[name]).reshape(p.shape) if p.requires_grad else None
        scalars["learning_rate"].append(float(step.learning_rate(state.step, config.train)))
        state, norm = step.apply_gradients(state, config.train)
        scalars["grad_norm"].append(float(norm))
    trees = {"params": dict(state.net.named_parameters())} | {f"ema{i}": ema for i, ema in enumerate(state.emas)}
    return {name: weights.to_canonical(net.module, tree) for name, tree in trees.items()}, scalars


def optimize(start_at, grads, c, params=None):
    """Take optimizer and EMA steps on one array.  c: `config.train`.

    start_at: [n].  grads: [steps n].  params: [steps n] that replace the parameters after each step, before its EMA,
    which is exact at a learning rate of 0.  Returns the parameters and EMAs after each step and the gradient norms.
    """
    net = nn.Module()
    net.w = nn.Parameter(torch.tensor(start_at))
    emas = tuple({"w": torch.tensor(start_at)} for _ in c.ema_decays)
    state = step.TrainState(0, net, step.make_optimizer(net, c), emas, net)
    history, norms = [], []
    for k, grad in enumerate(grads):
        if params is not None:
            net.w.data.copy_(torch.tensor(params[k]))
        net.w.grad = torch.tensor(grad)
        state, norm = step.apply_gradients(state, c)
        history.append([_to_numpy(a).copy() for a in (net.w, *(ema["w"] for ema in state.emas))])
        norms.append(float(norm))
    params, *emas = np.stack(history, axis=1)
    return params, emas, np.array(norms)


def learning_rates(steps, c):
    """Return the learning rate of each step, by its number from 0.  c: `config.train`."""
    return np.array([float(step.learning_rate(int(k), c)) for k in steps])


def _array(net, a):
    # In C order: fused AdamW misreads, without an error, a gradient whose strides are not those of its parameter.
    a = torch.from_numpy(np.array(a, order="C"))
    return a.to(net.dtype) if a.is_floating_point() else a.long()


def _arrays(net, arrays):
    """Floats in the dtype of the network, labels as integers, images [... c h w]."""
    arrays = (_array(net, a) for a in arrays)
    return [a.movedim(-1, -3).contiguous() if a.ndim >= 4 else a for a in arrays]


def _by_name(net, arrays):
    arrays = arrays or {}
    return dict(zip(arrays, _arrays(net, arrays.values()), strict=True))


def _given(net, arrays):
    """What a network is given: dropout masks in place of the draws that they follow from."""
    given = _by_name(net, arrays)
    return given | ({"dropout": net.dropout_masks(given["dropout"])} if "dropout" in given else {})


def _draws(net, method, draws, cfg):
    """The draws given by name, arranged as a step does; what is not given is not used."""
    return common.arrange(method.Draws(**dict.fromkeys(method.Draws._fields) | _by_name(net, draws)), cfg)


def _to_numpy(a):
    a = a.detach()
    return (a.permute(0, 2, 3, 1) if a.ndim == 4 else a).numpy()


def _gradients(net, value):
    params = {name: p for name, p in net.module.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(value, list(params.values()), allow_unused=True, materialize_grads=True)
    canonical = weights.to_canonical(net.module, dict(zip(params, grads, strict=True)))
    return {name: canonical[name] for name in params}
