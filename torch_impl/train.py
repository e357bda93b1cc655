"""Train in PyTorch, on one device a process; also the training loop: batches in, steps, and what happens between.

    torchrun torch_impl/train.py --config=configs/digits.py --workdir=runs/digits_torch
    torchrun --nproc_per_node=8 torch_impl/train.py --config=configs/meanflow_imagenet.py:b4 --workdir=runs/b4

Run again with the same arguments to resume.
"""

import collections
import contextlib
import functools
import math
import os
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from absl import logging

from meanflow import signals
from meanflow.commands import snapshots
from meanflow.commands.data_metrics import evaluate, evaluate_emas
from meanflow.commands.frozen_networks import try_decoder
from meanflow.commands.image_metrics import Judge
from meanflow.commands.logs import MetricLog, Progress
from meanflow.commands.processes import ending_together
from meanflow.commands.sample import check_latents, generate
from meanflow.config import checks, latents
from meanflow.config.flags import config as config_flag
from meanflow.config.flags import run, workdir
from meanflow.config.stages import stage_at
from meanflow.config.workdir import check_workdir, open_workdir, read_workdir
from meanflow.console_log import setup_logging, show_only_warnings
from meanflow.data import digests as contents
from meanflow.data.examples import with_latents
from meanflow.data.loader import make_loader
from meanflow.data.prefetch import Ahead
from meanflow.errors import UserError
from meanflow.process_group import ProcessGroup
from meanflow.sampling import grids
from torch_impl import weights
from torch_impl.checkpoints import Checkpoints, read_weights
from torch_impl.devices import first_does, gather, make_board, start_torch, wait_for_all
from torch_impl.models.attention import check_kernels
from torch_impl.sample import TOOLS, make_sampler
from torch_impl.step import (
    build_net,
    create_state,
    make_mesh,
    make_train_step,
    put_batch,
    reduce_metrics,
    replace_params,
)

GRID_SAMPLES = 64  # images in the grids shown during training


def train(config, workdir, device):
    """Train from config, or resume what is in the work directory, to `config.train.steps`.  Returns the last state.

    SIGTERM or SIGUSR1, inside `signals.caught`, saves a checkpoint and returns.  Raises UserError for anything the user
    can fix, including a loss that is not finite; the latest checkpoint is then from before it.
    """
    checks.check_trainable(config)
    check_kernels(config.model, device)
    first = dist.get_rank() == 0
    if not first:
        show_only_warnings()
    config = with_latents(config)
    # Before anything takes memory on a device, of which a run in the same directory may leave none.
    check_workdir(workdir, config, "torch", alone=dist.get_world_size() == 1)
    checks.check_divisible(config, dist.get_world_size(), "processes")
    mesh = make_mesh(config, device)
    loader = make_loader(config, config.train.batch_size, dist.get_rank(), dist.get_world_size())
    loader = Ahead(loader, functools.partial(put_batch, device=device), config.data.prefetch)
    checkpoints = Checkpoints(workdir, config)
    state, progress = start_state(config, mesh, device, checkpoints)
    reports = [*make_reports(config, make_sampler(config, device)), make_snapshots(config, workdir)]
    # Once everything the config names is there, so that a mistake in it leaves nothing behind.
    digests = read_contents(config)
    lock = first_does(lambda: open_workdir(workdir, config, "torch", digests))
    num_parameters = sum(p.numel() for p in state.net.parameters())
    logging.info("%s: %.2f million parameters", config.model.name, num_parameters / 1e6)
    checkpoints.open()
    log, window = MetricLog(workdir, active=first), Window()
    if progress:
        window.steps = progress["window"]
        if progress["loader"]:
            loader.set_state(progress["loader"])
        logging.info("resuming from step %d", state.step)
    pending = bool(progress) and progress.get("pending", False)
    log.rewind(state.step, "learning_rate" if pending else "")
    parts = Parts(config, loader, checkpoints, log, window, reports, pending, lock)
    with closing(parts):
        return loop(parts, make_train_step(config), state)


class Parts(NamedTuple):
    """What a run works with, beside its state."""

    config: Any
    loader: Ahead
    checkpoints: Checkpoints
    log: MetricLog
    window: "Window"
    reports: list  # of (every, report), see `make_reports`
    pending: bool  # whether those of the step to go on from are still to be made
    lock: Any  # of the work directory, in the first process


@contextlib.contextmanager
def closing(parts):
    """Close the parts afterwards; not if a run of several processes failed, since saving waits for all of them."""
    try:
        yield
    except BaseException:
        if dist.get_world_size() > 1:
            raise
        close(parts)
        raise
    close(parts)


def close(parts):
    """End the last save, then the log and the loader, whose processes take longest to end."""
    parts.checkpoints.close()
    parts.log.close()
    parts.loader.close()
    if parts.lock is not None:
        parts.lock.close()


def start_state(config, mesh, device, checkpoints=None):
    """Return the state to train from and what else its checkpoint says (see `Checkpoints.save`).

    That of the newest checkpoint; if there is none, the state of step 0, from `train.load_from` if that is set, and
    None.  A run that has a checkpoint never reads that model, which may be gone.  Raises UserError if it is needed and
    differs from this one in images, classes, heads or path.
    """
    state = create_state(config, mesh, device, teacher=load_teacher(config, device))
    restored = checkpoints.restore(state) if checkpoints else None
    if restored:
        return restored
    if config.train.load_from:
        net, (own, canonical) = build_net(config), read_model(config.train.load_from, config)
        checks.check_alike(config, own, "train.load_from")
        canonical = weights.adopt(net, dict(net.named_parameters()), canonical)
        replace_params(state, weights.from_canonical(net, canonical))
    return state, None


def read_model(path, config):
    """Return the config and the canonical weights of a work directory, or None and the weights of a .safetensors.

    Raises UserError naming both if they are of latents of another convention than those of `config`.
    """
    if not os.path.isdir(path):
        check_latents(config, path, weights.metadata(path))
        return None, weights.load(path)
    own = read_workdir(path)
    theirs = latents.of(own)
    if theirs:
        latents.check_same(latents.of(config), theirs, "the config (config.latents)", path)
    return read_weights(path, own.sample.ema)


def read_contents(config):
    """Return {option: digest} of what the config's paths hold, in which a resumed run may not differ."""
    distills = "guidance_type" in config.method and config.method.guidance_type == "distill"
    return contents.of_config(config, read_model(config.method.teacher, config)[1] if distills else None)


def load_teacher(config, device):
    """Return the frozen flow model of guidance distillation, None without it.

    Raises UserError if `method.teacher` is no flow model, or one of other images or classes.
    """
    if "guidance_type" not in config.method or config.method.guidance_type != "distill":
        return None
    own, canonical = read_model(config.method.teacher, config)
    net = build_net(checks.check_teacher(config, own))
    net.load_state_dict(weights.from_canonical(net, weights.adopt(net, dict(net.named_parameters()), canonical)))
    return net.to(device).requires_grad_(False)


def loop(parts, train_step, state):
    """Run the steps; log, save and report when due.  Returns the last state.

    A step is on disk before its reports begin, so a report that fails or is killed costs no checkpoint.  The
    checkpoint says that they are pending until they are done, and a run that goes on from there makes them first.  A
    run that is asked to stop leaves them, for there may be no time.
    """
    c, window = parts.config.train, parts.window
    progress = Progress(c.steps, parts.log)
    step, termination = state.step, Termination()
    first = step
    if c.checkpoint_at_start and step == 0:
        save(parts, state)
        parts.checkpoints.wait()
    if parts.pending:
        make_due(parts, step, state)
        parts.checkpoints.note(step, pending=False)
    while step < c.steps:
        state, metrics = train_step(state, next(parts.loader), stage_at(parts.config, step))
        step += 1
        window.add(step, metrics)
        progress(step)
        if step == first + 1:
            log_peak_memory(metrics)
        stop = termination.requested()
        if step % c.log_every == 0:
            parts.log.write(step, window.close())
        due = any(every and step % every == 0 for every, _ in parts.reports)
        saved = stop or step % c.checkpoint_every == 0 or step == c.steps
        if saved:
            save(parts, state, pending=due)
        if stop:
            logging.info("asked to stop: saved step %d", step)
            break
        if saved and due:
            parts.checkpoints.wait()
        make_due(parts, step, state)
        if saved and due:
            parts.checkpoints.note(step, pending=False)
    termination.close()
    return state


def save(parts, state, pending=False):
    """Begin to save the state.  Raises UserError if a loss since the last log line is not finite.

    pending: whether reports of its step are still to be made.
    """
    parts.window.check()
    progress = {"loader": parts.loader.get_state(), "window": list(parts.window.steps), "pending": pending}
    parts.checkpoints.save(state, progress)


def make_due(parts, step, state):
    """Make the reports that are due at a step."""
    for every, report in parts.reports:
        if every and step % every == 0:
            report(step, state, parts.log)


def log_peak_memory(metrics):
    """Log the most memory that a device has needed so far, if it counts that; the CPU does not."""
    device = metrics["loss"].device
    if device.type == "cuda":
        logging.info(
            "peak device memory after the first step: %.2f GiB", torch.cuda.max_memory_allocated(device) / 2**30
        )


class Window:
    """The metrics of the steps since the last log line, left on the device until they are needed."""

    def __init__(self):
        self.steps = []

    def add(self, step, metrics):
        """Keep the scalars of a step."""
        self.steps.append((step, metrics))

    def check(self):
        """Read the scalars back, averaged over the processes.

        Raises UserError naming the first step whose loss is not finite.
        """
        numbers, metrics = zip(*self.steps, strict=True) if self.steps else ((), [])
        self.steps = list(zip(numbers, reduce_metrics(list(metrics)), strict=True))
        for step, metrics in self.steps:
            if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
                raise UserError(
                    f"the loss of step {step} is {metrics['loss']}, its gradient norm {metrics['grad_norm']}; the last "
                    "checkpoint is from before it.  Try a lower train.learning_rate, a larger train.adam_eps or "
                    "train.clip_norm"
                )

    def close(self):
        """Return the mean of each scalar over the window, and start the next one."""
        self.check()
        steps, self.steps = self.steps, []
        return {name: sum(m[name] for _, m in steps) / len(steps) for name in steps[0][1]}


class Termination:
    """Decides after each step whether to stop because of a signal, alike in all processes.

    They agree without waiting for each other: each posts whether it was asked, and reads the answer a step later.
    """

    def __init__(self):
        """Call in all processes."""
        several = dist.get_world_size() > 1
        self.group = dist.new_group(backend="gloo") if several else None  # the default one is busy with gradients
        self.posted = None

    def requested(self):
        """Return whether to stop after this step.  Call once a step."""
        if self.group is None:
            return signals.asked()
        before, flag = self.posted, torch.tensor(float(signals.asked()))
        self.posted = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return before is not None and self.read(before)

    def read(self, posted):
        """Return whether any process had been asked."""
        flag, work = posted
        work.wait()
        return bool(flag)

    def close(self):
        """End; the other processes do, too."""
        if self.posted:
            self.read(self.posted)


def make_snapshots(config, workdir):
    """Return (every, report) that writes the EMAs as canonical weights, see `snapshots`."""

    def report(step, state, _):
        emas = (weights.to_canonical(state.net, ema) for ema in state.emas)
        if dist.get_rank() == 0:
            snapshots.write(workdir, config, step, emas, weights.save)
        else:
            collections.deque(emas, 0)  # takes part in gathering what is sharded

    return config.train.snapshot_every, report


def make_reports(config, sampler):
    """Return [(every, report)], each called as report(step, state, log): sample grids and evaluations.

    Raises UserError for what evaluations need and cannot be read.
    """
    group = ProcessGroup(dist.get_rank(), dist.get_world_size(), gather)
    decode = try_decoder(config, TOOLS) if config.train.sample_every else None
    judge = Judge(config, TOOLS, group) if config.train.evaluate_every and config.evaluation.metrics else None

    def sampled_weights(state):
        params = dict(state.net.named_parameters()) if config.sample.ema < 0 else state.emas[config.sample.ema]
        return weights.to_canonical(state.net, params)

    def grid(step, state, log):
        images, _ = generate(config, sampler, sampled_weights(state), GRID_SAMPLES)
        log.image(step, "samples", grids.grid(images if decode is None else decode(images)))

    def evaluation(step, state, log):
        emas = [weights.to_canonical(state.net, ema) for ema in state.emas if config.evaluation.every_ema]
        result = evaluate_emas(config, sampler, emas, judge) if config.evaluation.every_ema else {}
        if not config.evaluation.every_ema or config.sample.ema < 0:
            result |= (judge or evaluate)(config, sampler, sampled_weights(state))[0]
        log.write(step, result)
        wait_for_all()  # here, as long as the first process judges: in a step, groups of a mesh wait ten minutes only

    return [(config.train.sample_every, grid), (config.train.evaluate_every, evaluation)]


def main():
    """Check the config and train."""
    setup_logging()
    c = checks.check(config_flag())
    device = start_torch(c)
    with ending_together(make_board(), wait_for_all), signals.caught():
        train(c, workdir(), device)
    dist.destroy_process_group()


if __name__ == "__main__":
    run(main)
