"""Shared by the adapters of both frameworks: the functions of a network, a method or a step, called with numpy arrays.

Images are [b h w c]; weights and gradients are keyed by canonical name.  No trainer uses this.
"""

import abc
import contextlib
import dataclasses
import functools
from typing import Any

import numpy as np

from meanflow.data.draws import METHODS, PREFIX, arrange
from meanflow.sampling import edm, steps
from meanflow.weights.training_state import TrainingState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Network:
    """A network as a function of (z, t, r, y), with its weights; subclasses define the call."""

    module: Any  # the framework's network; JAX's holds shapes only
    dtype: Any  # of inputs and draws
    method: str  # name of the method that trains it
    teacher: Any = None  # the frozen network passed to its loss
    head: str = "u"  # the one to call if there are several

    @property
    def num_classes(self):
        """The null class."""
        return self.module.num_classes

    @property
    def dropout(self):
        """Dropout probability."""
        return self.module.dropout

    @property
    def augment_dim(self):
        """Number of augmentation labels."""
        return self.module.augment_dim

    @property
    def takes_tape(self):
        """Whether the network takes a tape, on which its forward pass records for the JVP."""
        return self.module.takes_tape

    def dropout_masks(self, draws):
        """Return the masks for draws [b]."""
        return self.module.dropout_masks(draws)

    def replace(self, **changes):
        """Return a copy with other fields."""
        return dataclasses.replace(self, **changes)


def inference(function):
    """Run a method of an adapter without gradients."""

    @functools.wraps(function)
    def run(self, *args, **kwargs):
        with self.no_grad():
            return function(self, *args, **kwargs)

    return run


class Adapter(abc.ABC):
    """One framework's implementation.  `impl` names its modules: methods, step, models and so on."""

    impl: Any
    array: Any  # converts a numpy array to the framework's
    compiled: Any = staticmethod(lambda function: function)  # compiles a function, if the framework does
    no_grad: Any = contextlib.nullcontext

    def tables(self, net):
        """Return the fixed tables {name: array}."""
        return net.module.tables()

    @inference
    def forward(self, net, z, t, r, y, given=None, head="u"):
        """Return u [b h w c], or the velocity of another head.

        given: further inputs of the network by name; dropout as its draws [b].
        """
        return self.to_numpy(net(*self.arrays(net, (z, t, r, y)), head, **self._given(net, given)))

    def jvp(self, net, z, t, r, y, tangent, given=None, head="u"):
        """Return u and du/dt along (tangent, 1, 0) on all rows, as the methods compute them.

        head: `v` for that head's velocity instead of u.
        """
        z, t, r, y, tangent = self.arrays(net, (z, t, r, y, tangent))
        net, given, common = net.replace(head=head), self._given(net, given), self.impl.common
        rows = common.Rows(groups=1, flow=0, jvp=len(y))
        u, tape = common.average_velocity(net, z, t, r, y, given, rows)
        return self.to_numpy((u, common.total_derivative(net, z, tangent, t, r, y, given, rows, tape)))

    @inference
    def features(self, net, z, t, y):
        """Return the projected tokens of a flow model, [b n d] for each encoder."""
        z, t, y = self.arrays(net, (z, t, y))
        return self.to_numpy(tuple(net(z, t, t, y, features=True)[1]))

    def alignment(self, projections, features):
        """Return the term of REPA (scalar) of projections [b n d_i] and features [b n sum d_i]."""
        *projections, features = map(self.array, (*projections, features))
        return self.to_numpy(self.impl.flow.alignment(projections, features))

    @inference
    def log_variance(self, net, t, r):
        """Return the logarithm [b] of the variance that the network predicts at times t and r [b]."""
        return self.to_numpy(net.log_variance(*self.arrays(net, (t, r))))

    def loss(self, net, batch, draws, cfg, part=slice(None), function="loss"):
        """Return the loss, its aux, and its gradients by canonical name.

        batch: image, label and others; draws: those that are used; arrays by name.  cfg: `config.method`.
        part: the rows of a micro-batch.  function: the method's `loss` or `loss_reference`.
        """
        method = self.impl.METHODS[cfg.name]
        batch = {name: a[part] for name, a in self._by_name(net, batch).items()}
        draws = method.Draws(*(None if a is None else a[part] for a in self._draws(net, method, draws, cfg)))
        given = {"teacher": net.teacher} if net.teacher else {}
        return self.differentiate(net, lambda net: getattr(method, function)(net, batch, draws, cfg, **given))

    def sample_times(self, net, draws, cfg):
        """Return t and r [b] for draws by name."""
        method = self.impl.METHODS[cfg.name]
        return self.to_numpy(method.sample_times(self._draws(net, method, draws, cfg), cfg))

    def order_times(self, net, times, cfg):
        """Return t and r [b] for draws [b 2], without flow rows."""
        return self.to_numpy(self.impl.common.order_times(self.arrays(net, [times])[0], cfg))

    def flow_time(self, net, times, cfg):
        """Return the time of flow matching [b] for draws [b]."""
        times = self.arrays(net, [times])[0]
        return self.to_numpy(self.impl.common.to_time(times, cfg.flow_time_mean, cfg.flow_time_std, cfg))

    def sample_guidance(self, net, draws, cfg):
        """Return the guidance {name: [b]} that improved MeanFlow conditions its network on, for draws by name."""
        method = self.impl.improved
        return self.to_numpy(method.sample_guidance(self._draws(net, method, draws, cfg), cfg))

    def path(self, net, x, e, t, cfg):
        """Return z and v [b h w c]."""
        return self.to_numpy(self.impl.common.path(*self.arrays(net, (x, e, t)), cfg))

    @inference
    def sample(self, net, noise, y, cfg, fresh=None):
        """Return the images sampled from noise.  cfg: `config.sample`.  fresh: noise of later steps [k b h w c]."""
        (noise, y), method = self.arrays(net, (noise, y)), self.impl.METHODS[net.method]
        given = method.sampling_conditions(cfg) | ({} if fresh is None else {"fresh": self.arrays(net, [fresh])[0]})
        return self.to_numpy(method.sample(net, noise, y, given, cfg))

    def sampling_times(self, cfg):
        """Return the times of sampling.  cfg: `config.sample`."""
        return steps.sampling_times(cfg)

    def score(self, v, z, t, path):
        """Return the score at states z with velocities v [b h w c] and times t [b]."""
        factors = np.array([steps.score_factors(float(time), path) for time in t])
        of_v, of_z = factors.T[..., None, None, None]
        return of_v * v + of_z * z

    def diffusion(self, t, cfg):
        """Return g^2 of the stochastic sampler at times t [n].  cfg: `config.sample`."""
        return np.array([steps.diffusion(float(time), cfg) for time in t])

    @inference
    def raw(self, net, x, t, r, y):
        """Return the output of EDM2's network for x [b h w c] and times t and r [b], without preconditioning."""
        unet = self.bound(net).unet
        function = self.compiled(lambda x, t, r, y: unet(x, unet.embed(t, r, y)))
        return self.to_numpy(function(*self.arrays(net, (x, t, r, y))))

    @inference
    def denoise(self, net, x, sigma, y):
        """Return the denoised images [b h w c] of x at noise levels sigma [b], in EDM's terms."""
        return self.to_numpy(self.impl.reflow.denoise(net, *self.arrays(net, (x, sigma, y))))

    @inference
    def couple(self, net, noise, y, grid, guidance=1.0, guide=None):
        """Return the samples [b h w c] of a flow model.

        grid: options of the noise levels, by name.  guide: its autoguidance network.
        """
        noise, y = self.arrays(net, (noise, y))
        return self.to_numpy(self.impl.reflow.couple(net, noise, y, self.sigmas(grid), guidance, guide))

    def sigmas(self, grid):
        """Return the noise levels of couplings.  grid: their options, by name."""
        return edm.noise_levels(edm.Schedule(**grid))

    def embedding_error(self, config, canonical, teacher_config, teacher, t, r):
        """Return the mean squared error of the network's embedding of t and r [b] against the teacher's.

        canonical, teacher: canonical weights.
        """
        return self.impl.time_embedding.error(config, canonical, teacher_config, teacher, t, r)

    @inference
    def embed_times(self, net, t, r):
        """Return the embedding [b d] of times t and r [b]; a one-time network, as of a flow model, embeds t."""
        unet = self.bound(net).unet
        t, r = self.arrays(net, (t, r))
        return self.to_numpy(unet.embed_times(t if unet.interval_embedder else self.impl.edm2.log_sigma(t), r))

    @inference
    def time_features(self, net, t):
        """Return the sinusoidal features [b dim] of times t [b], cosines first."""
        module, [t] = self.bound(net), self.arrays(net, [t])
        if isinstance(module, self.impl.unet.UNet):
            return np.roll(self.to_numpy(module.embed_time(t)), module.features // 2, axis=-1)
        if isinstance(module, self.impl.edm2.EDM2):
            return self.to_numpy(module.unet.emb_fourier(t))
        return self.to_numpy(self.impl.layers.timestep_features(t, module.t_embedder.features))

    def learning_rates(self, steps, c):
        """Return the learning rate at each of `steps`, counted from 0.  c: `config.train`."""
        return np.array([float(self.impl.step.learning_rate(int(k), c)) for k in steps])

    def _by_name(self, net, arrays):
        arrays = arrays or {}
        return dict(zip(arrays, self.arrays(net, arrays.values()), strict=True))

    def _given(self, net, arrays):
        """Return a network's inputs, with dropout masks in place of their draws."""
        given = self._by_name(net, arrays)
        return given | ({"dropout": net.dropout_masks(given["dropout"])} if "dropout" in given else {})

    def _draws(self, net, method, draws, cfg):
        """Return the method's draws, arranged as a step arranges them; those not given are None."""
        draws = self._by_name(net, arrange(draws, cfg))
        return method.Draws(**dict.fromkeys(method.Draws._fields) | draws)

    @abc.abstractmethod
    def sees_gpu(self) -> bool:
        """Return whether the framework sees a GPU."""

    @abc.abstractmethod
    def full_precision(self, platform="cpu") -> Any:
        """Set the framework to float64 and full-precision float32 on a platform, `cpu` or `gpu`, within a context."""

    @abc.abstractmethod
    def forget(self) -> Any:
        """Drop every compiled program."""

    @abc.abstractmethod
    def build(self, config, canonical, as_trained=False) -> Any:
        """Return the network of `config` with canonical weights {name: array}.  Raises UserError if they do not fit.

        as_trained: compile it as the trainer does.
        """

    @abc.abstractmethod
    def fresh_weights(self, config, seeds) -> Any:
        """Return canonical weights {name: array} freshly drawn from each of `seeds`."""

    @abc.abstractmethod
    def bound(self, net) -> Any:
        """Return the framework's network with its weights."""

    @abc.abstractmethod
    def differentiate(self, net, function) -> Any:
        """Return the value and aux of function(net), and the gradients of trained parameters by canonical name."""

    @abc.abstractmethod
    def canonical(self, net) -> Any:
        """Return the network's weights by canonical name."""

    @abc.abstractmethod
    def projected(self, net, config) -> Any:
        """Return the network with its weights projected, as a training step projects them."""

    @abc.abstractmethod
    def rotary_table(self, net) -> Any:
        """Return the cosines and sines [tokens, dim/2] of rotary positions."""

    @abc.abstractmethod
    def trainer(self, config, given) -> Any:
        """Return the `parity.trainers.Trainer` of a config on the adapter's device, at a canonical training state."""

    def train(self, net, config, batches):
        """Take the trainer's own step, not compiled in PyTorch, for each (batch, draws) of `batches`.

        Returns {params, ema0, ema1, ...}, each by canonical name, and {name: [steps]} of what it logs.
        """
        start_at, tables = self.canonical(net), self.tables(net)
        zeros = {name: a if name in tables else np.zeros_like(a) for name, a in start_at.items()}
        emas = (start_at,) * len(config.train.ema_decays)
        trainer = self.trainer(config, TrainingState(0, start_at, zeros, zeros, emas, {}))
        logged = []
        for batch, draws in batches:
            drawn = arrange(draws, config.method)
            logged.append(trainer.step(batch | {PREFIX + name: drawn[name] for name in METHODS[config.method.name]}))
        state = trainer.export()
        trees = {"params": state.params} | {f"ema{i}": ema for i, ema in enumerate(state.emas)}
        return trees, {name: [scalars[name] for scalars in logged] for name in logged[0]}

    @abc.abstractmethod
    def optimize(self, start_at, grads, c, params=None) -> Any:
        """Take optimizer and EMA steps on one array.  c: `config.train`.

        start_at: [n].  grads: [steps n].  params: [steps n], replacing the parameters after each step, before its EMA
        update, which is exact at a learning rate of 0.
        Returns the parameters and EMAs after each step, and the gradient norms.
        """

    @abc.abstractmethod
    def arrays(self, net, arrays) -> Any:
        """Return the framework's arrays: floats in the network's dtype, labels as integers, images in its layout."""

    @abc.abstractmethod
    def to_numpy(self, tree) -> Any:
        """Return numpy arrays in place of the framework's; images as [b h w c]."""
