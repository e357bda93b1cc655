"""The JAX implementation, called with numpy arrays: images [b h w c], weights and gradients by canonical names.

The method runs unjitted around a jitted network, so that every setting of a method shares the compiled network.
"""

import contextlib
import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_impl import step, time_embedding, weights
from jax_impl.methods import METHODS, common, flow, improved, reflow
from jax_impl.models import edm2, layers, unet
from jax_impl.models.tape import Tape, under_jvp
from meanflow.config import options as base
from meanflow.config import store
from meanflow.sampling import edm, steps
from meanflow.tables import rotary_table as table_of

OPTIMIZE_LESS = "jax_disable_most_optimizations"


class Net(NamedTuple):
    """A network as a function of (z, t, r, y), under given parameters."""

    module: Any  # the network for its names and tables; its own parameters are only shapes
    apply: Any  # (params, z, t, r, y, given, known, heads, features) -> (u, v or both, or u and features; outputs)
    params: Any  # nnx.State
    dtype: str  # of inputs and draws
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
        return nnx.merge(nnx.graphdef(self.module), self.params).log_variance(t, r)

    def __call__(self, z, t, r, y, heads=None, tape: Any = None, features=False, **given):
        """Return u, or what `heads` asks for of a network that has more than one, or u and features."""
        known = tape.outputs if under_jvp(tape) else None
        u, outputs = self.apply(self.params, z, t, r, y, given, known, heads or self.head, features)
        if tape is not None:
            tape.outputs = {} if under_jvp(tape) else jax.tree.map(tape.select, outputs)
        return u


@contextlib.contextmanager
def full_precision():
    """Switch on float64 and full float32 matmuls for a while, and forget the networks compiled before."""
    changes = {"jax_enable_x64": True, "jax_default_matmul_precision": "highest"}
    before = {name: getattr(jax.config, name) for name in changes} | {OPTIMIZE_LESS: jax.config.read(OPTIMIZE_LESS)}
    _network.cache_clear()
    try:
        for name, value in changes.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def forget():
    """Drop every compiled program.  XLA maps memory for each, and Linux stops a process at 65530 maps."""
    _network.cache_clear()
    jax.clear_caches()


def build(config, canonical, as_trained=False):
    """Return the network of `config` with canonical weights {name: array}.  Raises UserError if they do not fit.

    as_trained: compile it as the trainer does.  Else without XLA's expensive passes, in half the time: the mathematics
    is the same.
    """
    module, apply = _network(_model(config))
    params = weights.from_canonical(module, canonical)
    dtype = "float64" if config.model.compute_dtype == "float64" else "float32"
    jax.config.update(OPTIMIZE_LESS, not as_trained)
    return Net(module, apply, params, dtype, config.method.name)


def fresh_weights(config, seeds):
    """Return canonical weights {name: array} freshly drawn from each of `seeds`."""
    module, _ = _network(_model(config))
    jax.config.update(OPTIMIZE_LESS, True)
    draw = jax.jit(lambda seed: step.build_net(SimpleNamespace(seed=seed, model=config.model, train=config.train))[1])
    return [weights.to_canonical(module, draw(seed)) for seed in seeds]


def tables(net):
    """Return the fixed tables {name: array}."""
    return net.module.tables()


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
    return _to_numpy((u, common.total_derivative(net, z, tangent, t, r, y, given, rows, tape)))


def features(net, z, t, y):
    """Return what the projectors make of the tokens of a flow model, [b n d] for each encoder."""
    z, t, y = _arrays(net, (z, t, y))
    return _to_numpy(net(z, t, t, y, features=True)[1])


def alignment(projections, features):
    """Return the term of REPA (scalar) of projections [b n d_i] and features [b n sum d_i]."""
    return _to_numpy(flow.alignment([jnp.asarray(p) for p in projections], jnp.asarray(features)))


def log_variance(net, t, r):
    """Return the logarithm [b] of the variance that the network expects at times t and r [b]."""
    return _to_numpy(net.log_variance(*_arrays(net, (t, r))))


def loss(net, batch, draws, cfg, part=slice(None), function="loss"):
    """Return the loss, its aux, and its gradients by canonical name.

    batch: image, label and perhaps more; draws: those that are used; arrays by name.  cfg: `config.method`.
    part: the rows of a micro-batch.  function: the method's, `loss` or `loss_reference`.
    """
    method = METHODS[cfg.name]
    batch, draws = jax.tree.map(lambda a: a[part], (_by_name(net, batch), _draws(net, method, draws, cfg)))
    given = {"teacher": net.teacher} if net.teacher else {}

    def loss_of(params):
        return getattr(method, function)(net._replace(params=params), batch, draws, cfg, **given)

    (value, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(net.params)
    return _to_numpy(value), _to_numpy(aux), _gradients(net, grads)


def sample_times(net, draws, cfg):
    """Return t and r [b] of the draws that are given by name."""
    method = METHODS[cfg.name]
    return _to_numpy(method.sample_times(_draws(net, method, draws, cfg), cfg))


def order_times(net, times, cfg):
    """Return t and r [b] of draws [b 2], without flow rows."""
    return _to_numpy(common.order_times(_arrays(net, [times])[0], cfg))


def flow_time(net, times, cfg):
    """Return the time of flow matching [b] of draws [b]."""
    return _to_numpy(common.to_time(_arrays(net, [times])[0], cfg.flow_time_mean, cfg.flow_time_std, cfg))


def sample_guidance(net, draws, cfg):
    """Return what improved MeanFlow tells its network of guidance, [b] each by name, from draws by name."""
    return _to_numpy(improved.sample_guidance(_draws(net, improved, draws, cfg), cfg))


def path(net, x, e, t, cfg):
    """Return z and v [b h w c]."""
    x, e, t = _arrays(net, (x, e, t))
    return _to_numpy(common.path(x, e, t, cfg))


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


def raw(net, x, t, r, y):
    """Return what EDM2's network makes of x [b h w c] without preconditioning, told t and r [b] as they are."""
    x, t, r, y = _arrays(net, (x, t, r, y))
    unet = nnx.merge(nnx.graphdef(net.module), net.params).unet
    return _to_numpy(jax.jit(lambda x, t, r, y: unet(x, unet.embed(t, r, y)))(x, t, r, y))


def denoise(net, x, sigma, y):
    """Return the denoised images [b h w c] of x at noise levels sigma [b], in EDM's terms."""
    return _to_numpy(reflow.denoise(net, *_arrays(net, (x, sigma, y))))


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


def embed_times(net, t, r):
    """Return the embedding [b d] of times t and r [b], of a network of one time that of t, as a flow model's."""
    unet = nnx.merge(nnx.graphdef(net.module), net.params).unet
    t, r = _arrays(net, (t, r))
    return _to_numpy(unet.embed_times(t if unet.interval_embedder else edm2.log_sigma(t), r))


def projected(net, config):
    """Return the network with its weights as a step of training wants them."""
    state = step.TrainState(jnp.zeros((), jnp.int32), net.params, None, ())
    return net._replace(params=step.project(state, config).params)


def canonical(net):
    """Return its weights by canonical name."""
    return weights.to_canonical(net.module, net.params)


def rotary_table(net):
    """Return the cosines and sines [tokens, dim/2] of rotary positions."""
    return table_of(*net.module.rope_shape)


def time_features(net, t):
    """Return the sinusoidal features [b dim] of times t [b], cosines first."""
    module, t = nnx.merge(nnx.graphdef(net.module), net.params), jnp.asarray(t, net.dtype)
    if isinstance(module, unet.UNet):
        return np.roll(_to_numpy(module.embed_time(t)), module.features // 2, axis=-1)
    if isinstance(module, edm2.EDM2):
        return _to_numpy(module.unet.emb_fourier(t))
    return _to_numpy(layers.timestep_features(t, module.t_embedder.features))


def train(net, config, batches):
    """Take an optimizer and EMA step for each (batch, draws) of `batches`, through the trainer's own step functions.

    Returns {params, ema0, ema1, ...}, each by canonical name, and {grad_norm, learning_rate}, [steps] each.
    """
    opt_state = step.make_optimizer(config.train).init(net.params)
    emas = (net.params,) * len(config.train.ema_decays)
    state = step.TrainState(jnp.zeros((), jnp.int32), net.params, opt_state, emas)
    apply_gradients = jax.jit(lambda state, grads: step.apply_gradients(state, grads, config.train))
    scalars = {"grad_norm": [], "learning_rate": []}
    for batch, draws in batches:
        state = step.project(state, config)
        _, _, grads = loss(net._replace(params=state.params), batch, draws, config.method)
        scalars["learning_rate"].append(float(step.learning_rate(state.step, config.train)))
        fixed = {name: np.zeros_like(a) for name, a in canonical(net).items() if step.is_fixed(name)}
        state, norm = apply_gradients(state, weights.from_canonical(net.module, grads | fixed | tables(net)))
        scalars["grad_norm"].append(float(norm))
    trees = {"params": state.params} | {f"ema{i}": ema for i, ema in enumerate(state.emas)}
    return {name: weights.to_canonical(net.module, tree) for name, tree in trees.items()}, scalars


def optimize(start_at, grads, c, params=None):
    """Take optimizer and EMA steps on one array.  c: `config.train`.

    start_at: [n].  grads: [steps n].  params: [steps n] that replace the parameters after each step, before its EMA,
    which is exact at a learning rate of 0.  Returns the parameters and EMAs after each step and the gradient norms.
    """
    w = {"w": jnp.asarray(start_at)}
    state = step.TrainState(jnp.zeros((), jnp.int32), w, step.make_optimizer(c).init(w), (w,) * len(c.ema_decays))
    apply_gradients = jax.jit(lambda state, grads: step.apply_gradients(state, grads, c))
    history, norms = [], []
    for k, grad in enumerate(grads):
        if params is not None:
            state = state._replace(params={"w": jnp.asarray(params[k])})
        state, norm = apply_gradients(state, {"w": jnp.asarray(grad)})
        history.append([np.asarray(tree["w"]) for tree in (state.params, *state.emas)])
        norms.append(float(norm))
    params, *emas = np.stack(history, axis=1)
    return params, emas, np.array(norms)


def learning_rates(steps, c):
    """Return the learning rate of each step, by its number from 0.  c: `config.train`."""
    return np.array([float(step.learning_rate(int(k), c)) for k in steps])


def _model(config):
    """The config of the network alone, as text."""
    alone = base.get_config(config.model.name, config.method.name)
    alone.model.update(config.model)
    return store.to_json(alone)


@functools.cache
def _network(model):
    config = store.from_json(model)
    graphdef, shapes = step.abstract_net(config)
    several = config.model.name == "imf_dit"

    @functools.partial(jax.jit, static_argnames=("heads", "features"))
    def apply(params, z, t, r, y, given, known, heads, features):
        """known: the outputs of a tape, under the JVP; else None."""
        options = ({"heads": heads} if several else {}) | ({"features": True} if features else {})
        tape = Tape(lambda output: output)
        if known is not None:
            tape.outputs = known
            tape.replay(())
        u = nnx.merge(graphdef, params)(z, t, r, y, **given, **options, tape=tape)
        return u, tape.finish() if known is not None else tape.outputs

    return nnx.merge(graphdef, shapes), apply


def _arrays(net, arrays):
    """Floats in the dtype of the network, labels as integers."""
    return [jnp.asarray(a, net.dtype if a.dtype.kind == "f" else "int32") for a in map(np.asarray, arrays)]


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


def _to_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def _gradients(net, grads):
    """Gradients by canonical name, of what is trained."""
    fixed = tables(net)
    canonical = weights.to_canonical(net.module, grads)
    return {name: a for name, a in canonical.items() if name not in fixed and not step.is_fixed(name)}
