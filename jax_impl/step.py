"""One training step: gradients, optimizer and EMA, as one compiled function over a device mesh."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jax_impl import weights
from jax_impl.devices import AXES, compiled_for, device_mesh, shard
from jax_impl.measures import measure, of_kinds
from jax_impl.methods import METHODS
from jax_impl.models import ARCHITECTURES, PROJECTIONS
from jax_impl.models.tape import gather_outside_blocks
from meanflow.config.stages import stages
from meanflow.data import draws
from meanflow.weights import initial

BATCH = PartitionSpec(AXES)  # batch rows over all devices

# On CPUs, XLA removes the barriers around rematerialised computations and merges them with the originals.
KEEP_BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}


class TrainState(NamedTuple):
    """The optimisation state in a checkpoint; its draws follow from the step and the seed."""

    step: jax.Array  # optimizer steps done
    params: Any  # nnx.State of the network, float32
    opt_state: Any  # optax
    emas: tuple  # one nnx.State for each of train.ema_decays


def build_net(config):
    """Return the network's graph definition and fresh parameters (nnx.State): `initial.draw` from config.seed.

    Parameters are float32; float64 where that is the compute dtype, which needs `jax_enable_x64`.
    """
    graphdef, params = abstract_net(config)
    net = nnx.merge(graphdef, params)
    drawn = initial.draw(config.model.name, weights.shapes(net), config.seed)
    return graphdef, weights.from_canonical(net, drawn | net.tables())


def abstract_net(config):
    """Return the same with shapes and dtypes in place of parameters, for networks whose weights are loaded."""

    def build():
        net = ARCHITECTURES[config.model.name](config.model)
        for _, module in nnx.iter_modules(net):
            if hasattr(module, "remat"):
                module.remat = config.train.remat  # pyright: ignore
        graphdef, params = nnx.split(net)
        dtype = jnp.promote_types(config.model.compute_dtype, jnp.float32)
        return graphdef, jax.tree.map(lambda a: a.astype(dtype), params)

    return jax.eval_shape(build)


def make_mesh(config):
    """Return the mesh (data, fsdp) over the devices of all processes.

    Raises UserError if train.fsdp does not divide them into groups within a host or of whole hosts.
    """
    return device_mesh(jax.devices(), config.train.fsdp)


def state_shardings(state, mesh):
    """Return the sharding of each array of `state`, see `shard`."""
    return jax.tree.map(lambda a: shard(a, mesh), state)


def create_state(config, mesh, params=None):
    """Return the graph definition and the sharded state of step 0; `params` (nnx.State) replace fresh weights."""

    def create(params):
        emas = tuple(jax.tree.map(jnp.copy, params) for _ in config.train.ema_decays)
        return TrainState(jnp.zeros((), jnp.int32), params, make_optimizer(config.train).init(params), emas)

    graphdef, params = build_net(config) if params is None else (abstract_net(config)[0], params)
    shardings = state_shardings(jax.eval_shape(create, params), mesh)
    return graphdef, jax.jit(create, out_shardings=shardings)(params)


def abstract_state(config, mesh):
    """Return the same as shapes, dtypes and shardings, to restore a state into."""
    graphdef, params = abstract_net(config)
    state = jax.eval_shape(lambda params: create_state(config, mesh, params)[1], params)
    shardings = state_shardings(state, mesh)
    return graphdef, jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)


def learning_rate(step, c):
    """Return the learning rate after `step` steps: linear warm-up, then constant or cosine.  c: `config.train`.

    The cosine reaches final_factor times the peak at the last step (schedule_steps if set), or warmup_steps earlier
    with cosine_end = early, as in the official iMF code, which passes optax a length that already excludes the warm-up.
    """
    step = jnp.asarray(step, jnp.result_type(float))  # float64 where enabled: an int32 would give float32
    warmup = c.warmup_from + (c.learning_rate - c.warmup_from) * step / max(c.warmup_steps, 1)
    end = (c.schedule_steps or c.steps) - (c.warmup_steps if c.cosine_end == "early" else 0)
    progress = jnp.clip((step - c.warmup_steps) / max(end - c.warmup_steps, 1), 0, 1)
    cosine = c.final_factor + (1 - c.final_factor) * (1 + jnp.cos(math.pi * progress)) / 2
    rate = c.learning_rate * (cosine if c.schedule == "cosine" else 1.0)
    return jnp.where(step < c.warmup_steps, warmup, rate)


def make_optimizer(c):
    """Return Adam or AdamW from `config.train`; the step clips, since it needs the norm anyway.

    Frequencies and phases, which are not trained, do not decay either.
    """

    def decays(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: not is_fixed(jax.tree_util.keystr(path)), params)

    return optax.adamw(
        lambda step: learning_rate(step, c), b1=c.beta1, b2=c.beta2, eps=c.adam_eps,
        weight_decay=c.weight_decay if c.optimizer == "adamw" else 0.0, mask=decays,
    )  # fmt: skip


def is_fixed(name):
    """Return whether a parameter of this name holds random frequencies or phases, which are not trained."""
    return "freqs" in name or "phases" in name


def project(state, config):
    """Return the state with its parameters as a step needs them: normalised for EDM2, otherwise unchanged."""
    projection = PROJECTIONS.get(config.model.name)
    return state if projection is None else state._replace(params=projection(state.params))


def apply_gradients(state, grads, c):
    """Return the state after one optimizer and EMA step, and the gradient norm before clipping.

    EMA: ema + (1 - d) (params - ema) after the update, every `ema_every` steps with d = decay^ema_every; this form
    rounds well even for d close to 1.  Source: Gsunshine/meanflow, utils/ema_util.py;
    Gsunshine/py-meanflow, models/meanflow.py (every 16 steps).
    """
    norm = optax.tree.norm(grads)
    if c.clip_norm > 0:
        scale = jnp.minimum(1.0, c.clip_norm / norm)
        grads = jax.tree.map(lambda g: g * scale, grads)
    updates, opt_state = make_optimizer(c).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1

    def update(emas):
        return tuple(
            jax.tree.map(lambda e, p, w=1 - decay**c.ema_every: e + w * (p - e), ema, params)
            for decay, ema in zip(c.ema_decays, emas, strict=True)
        )

    due = step % c.ema_every == 0
    emas = update(state.emas) if c.ema_every == 1 else jax.lax.cond(due, update, lambda emas: emas, state.emas)
    return TrainState(step, params, opt_state, emas), norm


def make_train_step(config, graphdef, mesh, teacher=None):
    """Return the compiled step: (state, batch, stage=0) -> (state, metrics).

    batch: {'image' [b h w c] float32, 'label' [b] int32, the loader's other features, and the step's draws (see
    `draws.of_process`)}, rows sharded over all devices.  stage: index of the stage (see `stages`); each one compiles.
    The state is donated.
    teacher: (graph definition, parameters) of a frozen network for the method's loss, or None.
    Micro-batches are taken within each device's shard; the result does not depend on their number or that of devices.
    """
    method, c, settings = METHODS[config.method.name], config.train, stages(config)
    dtype = jnp.promote_types(config.model.compute_dtype, jnp.float32)
    rows_sharding, whole = NamedSharding(mesh, BATCH), NamedSharding(mesh, PartitionSpec())

    def loss_fn(params, frozen, batch, drawn, stage):
        net = gather_outside_blocks(nnx.merge(graphdef, params))
        given = {"teacher": nnx.merge(teacher[0], frozen)} if teacher else {}
        loss, aux = method.loss(net, batch, drawn, settings[stage].method, **given)
        return loss, measure(loss, aux)

    def in_dtype(a):  # float64 steps have no float32 in them
        return a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a

    def micro_batches(a):
        """[b ...] -> [accumulate b/accumulate ...]; each device keeps its rows."""
        a = a.reshape(mesh.size, c.accumulate, -1, *a.shape[1:]).swapaxes(0, 1)
        return a.reshape(c.accumulate, -1, *a.shape[3:])

    def gradients(stage, params, frozen, *rows):
        value_and_grad = jax.value_and_grad(functools.partial(loss_fn, stage=stage), has_aux=True)
        if c.accumulate == 1:
            (_, metrics), grads = value_and_grad(params, frozen, *rows)
            return grads, metrics

        def add(total, rows):
            (_, metrics), grads = value_and_grad(params, frozen, *rows)
            return jax.tree.map(jnp.add, total, (grads, metrics)), None

        first = jax.tree.map(lambda a: a[0], rows)
        shapes = jax.eval_shape(lambda *rows: value_and_grad(params, frozen, *rows), *first)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (shapes[1], shapes[0][1]))
        total, _ = jax.lax.scan(add, zeros, rows)
        return jax.tree.map(lambda a: a / c.accumulate, total)

    def train_step(state, batch, stage=0, frozen=None):
        state = project(state, config)
        data, drawn = draws.split(jax.tree.map(in_dtype, batch))
        rows = jax.lax.with_sharding_constraint((data, method.Draws(**drawn)), rows_sharding)
        if c.accumulate > 1:
            rows = jax.tree.map(micro_batches, rows)
        frozen = jax.lax.with_sharding_constraint(frozen, whole)
        with compiled_for(mesh):
            grads, metrics = gradients(stage, state.params, frozen, *rows)
        grads = jax.lax.with_sharding_constraint(grads, state_shardings(grads, mesh))
        metrics = jax.lax.with_sharding_constraint(metrics, whole)
        rate = learning_rate(state.step, c)
        state, norm = apply_gradients(state, grads, settings[stage].train)
        return state, of_kinds(metrics) | {"grad_norm": norm, "learning_rate": rate}

    options = KEEP_BARRIERS if c.remat and mesh.devices.flat[0].platform == "cpu" else None
    compiled = jax.jit(train_step, donate_argnums=0, static_argnums=2, compiler_options=options)
    return (lambda state, batch, stage=0: compiled(state, batch, stage, teacher[1])) if teacher else compiled


def put_batch(batch, mesh):
    """Put this process's rows of a numpy batch on its devices, as its part of the global batch."""
    sharding = NamedSharding(mesh, BATCH)
    return {name: jax.make_array_from_process_local_data(sharding, np.asarray(a)) for name, a in batch.items()}
