"""The framework-free half of both trainers: what a run starts from, its loop, and what it logs, saves and reports."""

import collections
import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

from absl import logging

from meanflow import signals
from meanflow.commands import sample, snapshots
from meanflow.commands.checkpoints import CheckpointDirectory
from meanflow.commands.data_metrics import evaluate, evaluate_emas
from meanflow.commands.frozen_networks import FrozenNetworks, try_decoder
from meanflow.commands.image_metrics import ImageMetrics
from meanflow.commands.logs import MetricLog, Progress
from meanflow.config import latents, options
from meanflow.config.stages import stage_at
from meanflow.config.workdir import read_workdir
from meanflow.data import digests
from meanflow.data.prefetch import Prefetcher
from meanflow.errors import UserError
from meanflow.process_group import ProcessGroup
from meanflow.sampling import grids
from meanflow.weights import files, fitting, reading

GRID_SAMPLES = 64  # images in the grids shown during training

Metrics = dict[str, Any]  # scalars of one step, by name
Report = tuple[int, Callable[[int, Any, MetricLog], None]]  # (every how many steps, report(step, state, log))
ReadWeights = Callable[
    [str, int], tuple[options.Config, dict]
]  # (work directory, ema), see the frameworks' checkpoints


class Window:
    """The metrics of the steps since the last log line, kept on the device until they are needed."""

    def __init__(self, fetch: Callable[[list[Metrics]], list[dict[str, float]]]):
        """fetch: returns the metrics of each step as floats, averaged over the processes."""
        self.fetch = fetch
        self.steps: list = []  # (step, metrics)

    def add(self, step: int, metrics: Metrics) -> None:
        """Keep the scalars of a step."""
        self.steps.append((step, metrics))

    def check(self) -> None:
        """Fetch the scalars.  Raises UserError naming the first step whose loss or gradient norm is not finite."""
        if not self.steps:
            return
        numbers, metrics = zip(*self.steps, strict=True)
        self.steps = list(zip(numbers, self.fetch(list(metrics)), strict=True))
        for step, scalars in self.steps:
            if not math.isfinite(scalars["loss"]) or not math.isfinite(scalars["grad_norm"]):
                raise UserError(
                    f"the loss of step {step} is {scalars['loss']}, its gradient norm {scalars['grad_norm']}; the "
                    "latest checkpoint predates it.  Try a lower train.learning_rate, a larger train.adam_eps or "
                    "train.clip_norm"
                )

    def close(self) -> dict[str, float]:
        """Return the mean of each scalar over the window, and start the next window."""
        self.check()
        steps, self.steps = self.steps, []
        return {name: sum(m[name] for _, m in steps) / len(steps) for name in steps[0][1]}


class Termination:
    """Decides after each step whether to stop because of a signal; all processes decide alike.

    They agree without waiting for each other: each posts whether it received a signal and reads the answer one step
    later.
    """

    def __init__(self, post: Callable[[bool], Callable[[], bool]] | None):
        """post(asked) -> read() -> whether any process was asked to stop; None for a single process."""
        self.post = post
        self.posted: Callable[[], bool] | None = None

    def requested(self) -> bool:
        """Return whether to stop after this step.  Call once per step."""
        if self.post is None:
            return signals.asked()
        before, self.posted = self.posted, self.post(signals.asked())
        return before is not None and before()

    def close(self) -> None:
        """Wait for the last answer; all processes do."""
        if self.posted is not None:
            self.posted()


class Run:
    """Everything a run works with except its state."""

    def __init__(
        self, config, loader: Prefetcher, checkpoints, log: MetricLog, window: Window, reports: list[Report], lock
    ):
        """checkpoints: the framework's `Checkpoints`.  lock: on the work directory, in the first process, else None."""
        self.config, self.loader, self.checkpoints = config, loader, checkpoints
        self.log, self.window, self.reports, self.lock = log, window, reports, lock
        self.per_step: dict[str, float] = {}  # see `Progress`
        self.pending = False  # whether the reports of the step the run starts from are still to be made
        self.origin = ""  # of a run that another framework began: by which, and until which step

    def resume(self, step: int, progress: dict | None) -> None:
        """Continue from the `progress` that the checkpoint of `step` holds, None for a new run."""
        if progress:
            self.window.steps = progress["window"]
            if progress["loader"]:
                self.loader.set_state(progress["loader"])
            self.pending, self.origin = progress.get("pending", False), progress.get("origin", "")
            logging.info("resuming from step %d%s", step, self.origin and f"; trained by {self.origin}")
        self.log.rewind(step, "learning_rate" if self.pending else "")

    def save(self, state: Any, pending: bool = False) -> None:
        """Begin to save the state.  Raises UserError if a loss since the last log line is not finite.

        pending: whether reports of this step are still to be made.
        """
        self.window.check()
        progress = {"loader": self.loader.get_state(), "window": list(self.window.steps), "pending": pending}
        progress |= {"origin": self.origin} if self.origin else {}
        self.checkpoints.save(state, progress)

    def due(self, step: int) -> list:
        """Return the reports to make at a step."""
        return [report for every, report in self.reports if every and step % every == 0]

    def report(self, step: int, state: Any) -> None:
        """Make the reports due at a step.  If one fails, first completes the save under way: it costs no checkpoint."""
        try:
            for report in self.due(step):
                report(step, state, self.log)
        except BaseException:
            self.checkpoints.wait()
            raise

    def close(self) -> None:
        """Finish the last save, then close the log and the loader, whose processes take longest to end."""
        self.checkpoints.close()
        self.log.close()
        self.loader.close()
        if self.lock is not None:
            self.lock.close()


@contextlib.contextmanager
def closing(run: Run, alone: bool) -> Iterator[None]:
    """Close the run on exit, but not after an error in one of several processes: saving would wait for the others."""
    try:
        yield
    except BaseException:
        if alone:
            run.close()
        raise
    run.close()


def loop(
    run: Run,
    train_step: Callable,
    state: Any,
    step: int,
    termination: Termination,
    peak_memory: Callable[[Metrics], int | None],
) -> Any:
    """Take the steps after `step`; log, save and report when due.  Returns the last state.

    peak_memory: waits for the step of these metrics and returns the peak bytes used on a device, None if unknown.
    Reports are made while the state is written.  The checkpoint says that they are pending until they are done, and a
    run resumed from it makes them first.  A run that is asked to stop leaves them for then: there may be no time.
    """
    c, first = run.config.train, step
    progress = Progress(c.steps, run.log, run.per_step)
    if c.checkpoint_at_start and step == 0:
        run.save(state)
        run.checkpoints.wait()
    if run.pending:
        run.report(step, state)
        run.checkpoints.note(step, pending=False)
    while step < c.steps:
        state, metrics = train_step(state, next(run.loader), stage_at(run.config, step))
        step += 1
        run.window.add(step, metrics)
        progress(step)
        peak = peak_memory(metrics) if step == first + 1 else None
        if peak:
            logging.info("peak device memory after the first step: %.2f GiB", peak / 2**30)
        stop = termination.requested()
        if step % c.log_every == 0:
            run.log.write(step, run.window.close())
        due = bool(run.due(step))
        saved = stop or step % c.checkpoint_every == 0 or step == c.steps
        if saved:
            run.save(state, pending=due)
        if stop:
            logging.info("asked to stop: saved step %d", step)
            break
        run.report(step, state)
        if saved and due:
            run.checkpoints.note(step, pending=False)
        run.checkpoints.write_notes()
    termination.close()
    return state


def read_model(path: str, config: options.Config, read_weights: ReadWeights) -> tuple[options.Config | None, dict]:
    """Return the config, None if there is none, and the canonical weights of a run or of whatever `reading.read` reads.

    Raises UserError naming both if they were trained on latents of another convention than those of `config`.
    """
    if not snapshots.is_run(path):
        found = reading.read(path)
        fitting.check_latents(config, path, {} if found.latents is None else {"latents": found.latents})
        return found.config, found.weights
    own = read_workdir(path)
    theirs = latents.of(own)
    if theirs:
        latents.check_same(latents.of(config), theirs, "the config (config.latents)", path)
    return read_weights(path, own.sample.ema)


def start_of(config: options.Config, checkpoints: CheckpointDirectory | None) -> tuple[str, str]:
    """Return the model that a run without a checkpoint starts from, and the file of its classes; "" for none.

    That is the weights in the run's own directory, see `snapshots`, or else `train.load_from`.
    """
    alone = checkpoints.path.parents[1] / snapshots.ALONE if checkpoints else None
    if alone is not None and alone.is_file():
        return str(alone), ""
    return config.train.load_from, config.train.load_classes if "load_classes" in config.train else ""


def has_teacher(config: options.Config) -> bool:
    """Return whether the method distils the guidance of a frozen flow model, `method.teacher`."""
    return "guidance_type" in config.method and config.method.guidance_type == "distill"


def read_contents(config: options.Config, read_weights: ReadWeights) -> dict[str, str]:
    """Return {option: digest} of what the config's paths hold; a resumed run must find the same."""
    teacher = read_model(config.method.teacher, config, read_weights)[1] if has_teacher(config) else None
    return digests.of_config(config, teacher)


def make_snapshots(config: options.Config, workdir: str, canonical_emas: Callable, active: bool) -> Report:
    """Return the report that writes the EMAs as canonical weights, see `snapshots`.

    canonical_emas: state -> iterator of the canonical weights of each EMA, which gathers sharded ones: all processes
    go through it.  active: whether this one writes.
    """

    def report(step, state, _):
        if active:
            snapshots.write(workdir, config, step, canonical_emas(state), files.save)
        else:
            collections.deque(canonical_emas(state), 0)

    return config.train.snapshot_every, report


def make_reports(
    config: options.Config,
    sampler: sample.Sampler,
    networks: FrozenNetworks,
    group: ProcessGroup,
    weights_of: Callable[[Any, int], Any],
    finish: Callable[[], None] = lambda: None,
) -> list[Report]:
    """Return the reports that sample: image grids and evaluations.

    weights_of: (state, ema) -> weights as the sampler takes them, of an EMA or (-1) the raw parameters.
    finish: called after each evaluation, in all processes.
    Raises UserError for what evaluations need and cannot be read.
    """
    decode = try_decoder(config, networks) if config.train.sample_every else None
    by_images = config.train.evaluate_every and config.evaluation.metrics
    measure = ImageMetrics(config, networks, group) if by_images else None

    def grid(step, state, log):
        images, _ = sample.generate(config, sampler, weights_of(state, config.sample.ema), GRID_SAMPLES)
        log.image(step, "samples", grids.grid(images if decode is None else decode(images)))

    def evaluation(step, state, log):
        result = {}
        if config.evaluation.every_ema:
            emas = [weights_of(state, i) for i in range(len(config.train.ema_decays))]
            result = evaluate_emas(config, sampler, emas, measure)
        if not config.evaluation.every_ema or config.sample.ema < 0:
            result |= (measure or evaluate)(config, sampler, weights_of(state, config.sample.ema))[0]
        log.write(step, result)
        finish()

    return [(config.train.sample_every, grid), (config.train.evaluate_every, evaluation)]
