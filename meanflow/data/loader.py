"""Loads batches for training, and whole splits for evaluation.

The order of the examples depends only on config.seed, not on the number of processes or loader workers, so both
trainers see the same global batches on any number of devices.
"""

import functools
import json
import math
import re
from collections.abc import Callable, Iterator

import grain
import numpy as np
from absl import flags, logging

from meanflow import child_processes, signals, torch_precision
from meanflow.config import options as base
from meanflow.config.features import Feature, Tokens
from meanflow.config.methods import METHODS
from meanflow.data import augment, features
from meanflow.data.examples import open_examples, posterior
from meanflow.errors import UserError

FLIP_PROB = 0.5
# Grain's defaults, 16 threads and 500 elements, suit single records; here the elements are whole batches.
READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
BATCHES_PER_WORKER = 2
ENDLESS = 2**53  # rows of all epochs; Grain computes the number of batches in floating point
LOST = re.compile(r"Worker process was terminated unexpectedly with exit code (-?\d+)")  # Grain's message


class Loader(Iterator):
    """Endless batches of one process; made by `make_loader`.

    Each batch is {'image': float32 [b h w c] in data units, 'label': int32 [b]}, and with config.data.augment
    'augment': float32 [b k], the labels of the augmentation.  In addition they have what the method needs, see
    `meanflow.config.features`: 'noise', float32 [b h w c], of which a flow model made the images, or 'features',
    float32 [b n d], of n = (input_size / patch_size)^2 tokens in row-major order, the encoders concatenated along d.
    """

    def __init__(
        self,
        batches: grain.MapDataset,
        identity: dict[str, int | str],
        num_workers: int,
        encode: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        """batches: those of this process, by step.  identity: what the order depends on, kept in the state; without
            the path of the data, which may move.

        encode: if given, computes `features` from `pixels`, or from `image` if there are none.
        """
        self._batches = batches
        self._identity = identity
        self._num_workers = num_workers
        self._encode = encode
        self.step = 0  # of the next batch
        self._iterator = None

    def __next__(self) -> dict[str, np.ndarray]:
        """Return the next batch.  Raises UserError for a record that does not fit, or if a worker process died."""
        try:
            batch = self._read()
        except RuntimeError as error:
            lost = LOST.search(str(error))
            if not lost:
                raise
            self._do_without(int(lost[1]))
            batch = self._read()
        self.step += 1
        # Worker processes return a subclass of Grain's; a plain view of it keeps the shared memory alive.
        batch = {key: np.asarray(value) for key, value in batch.items()}
        if self._encode:
            batch["features"] = self._encode(batch.pop("pixels", batch["image"]))
        return batch

    def get_state(self) -> str:
        """Return the position after the last batch returned, as JSON text; the same in every process."""
        return json.dumps({"step": self.step} | self._identity)

    def set_state(self, state: str) -> None:
        """Continue exactly after the batch at which `state` was taken, whatever the number of processes or workers.

        Raises UserError if `state` is of another split, length, seed or global batch size.
        """
        saved = json.loads(state)
        for key, value in self._identity.items():
            if saved.get(key, value) != value:  # older checkpoints may lack some keys
                raise UserError(
                    f"the checkpoint's loader had {key} {saved[key]!r}, this run has {value!r}: set it back, or start "
                    "a new work directory"
                )
        self.close()
        self.step = saved["step"]

    def close(self) -> None:
        """Stop the threads and worker processes; the next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _read(self) -> dict[str, np.ndarray]:
        if self._iterator is not None:
            return next(self._iterator)
        with child_processes.sheltered():
            self._iterator = self._start()
            return next(self._iterator)

    def _do_without(self, code: int) -> None:
        """Read in this process from now on, if the run is about to stop.  code: exit code of the worker that died."""
        if not signals.asked() and -code not in signals.STOP:
            reason = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise UserError(
                f"a process that loads data died ({reason}); if memory ran out, use fewer: --config.data.num_workers="
                f"{self._num_workers // 2}"
            )
        logging.warning("a process that loads data died of the signal to stop; reading in the main process")
        self.close()
        self._num_workers = 0

    def _start(self) -> grain.DatasetIterator:
        # A batch depends only on its step, so resuming means slicing and needs no state of Grain's.
        batches = self._batches[self.step :].to_iter_dataset(READ_OPTIONS)
        if self._num_workers > 0:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain reads its absl flags; outside absl.app they keep their defaults
            options = grain.MultiprocessingOptions(self._num_workers, per_worker_buffer_size=BATCHES_PER_WORKER)
            batches = batches.mp_prefetch(options, child_processes.end_with_parent)
        return iter(batches)


def make_loader(config: base.Config, batch_size: int, process: int = 0, num_processes: int = 1) -> Loader:
    """Return the training batches of process `process` of `num_processes`.

    batch_size: global; each process receives batch_size / num_processes rows.
    With b rows per process, the batch of process p at step k is rows [p b, (p+1) b) of global batch k: concatenated
    over the processes, batches equal those of a single process bit for bit, flips included.  Every epoch has its own
    order, and batches continue across the end of an epoch, so no example is dropped.
    Latents are sampled anew from their moments each time.  config.data.flip uses the stored moments of the mirrored
    image if there are any, and otherwise mirrors the arrays; a mirrored latent only approximates the latent of the
    mirrored image, and so does a mirrored grid of stored features.  config.data.augment follows, on pixels only.
    What is stored with an image is mirrored with it.  config.data.encoder reads the images as the network sees them or,
    if these are neither grey nor RGB, the `pixels` stored with them.  It runs in this process on the rows of this
    process, whose number changes its features by rounding.
    Raises UserError: batch_size not divisible, seed outside [0, 2^32), model.augment_dim other than the labels of
    data.augment, data.augment with a feature stored with the images, empty split, and whatever `open_source`,
    `features.load` and the method's `needs` raise; while iterating, for a record that does not fit config.model, or
    channels that data.augment cannot change.
    """
    if batch_size <= 0 or batch_size % num_processes:
        raise UserError(
            f"a batch of {batch_size} (config.train.batch_size) cannot be divided among {num_processes} processes: "
            "set a multiple"
        )
    if not 0 <= config.seed < 2**32:
        raise UserError(f"config.seed is {config.seed}; it must be in [0, 2^32)")
    feature, tokens = METHODS[config.method.name].needs(config)
    _check_augment(config, feature)
    encode = _load_encoder(config, tokens) if tokens else None
    examples = open_examples(config, config.data.split, feature)
    identity = {
        "split": config.data.split,
        "num_examples": len(examples),
        "seed": config.seed,
        "batch_size": batch_size,
    }
    rows = grain.MapDataset.source(examples).seed(config.seed).shuffle().repeat(ENDLESS // len(examples))
    if config.data.flip:
        rows = rows.random_map(_flip)
    if examples.convention:
        rows = rows.random_map(functools.partial(posterior, convention=examples.convention))
    if config.data.augment.prob > 0:
        rows = rows.random_map(functools.partial(_augment, c=config.data.augment))
    batches = rows.batch(batch_size // num_processes)[process::num_processes]
    return Loader(batches, identity, config.data.num_workers, encode)


def load_arrays(config: base.Config, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return a whole split: images float32 [n h w c] in data units, labels int32 [n], in stored order.

    Neither flipped nor augmented, without features.  Latents are sampled from their moments, seeded by
    (config.seed, index).
    Raises UserError as `make_loader` does.
    """
    examples = open_examples(config, split)
    images = np.empty((len(examples), *examples.shape), np.float32)
    labels = np.empty(len(examples), np.int32)
    for i in range(len(examples)):
        rng = np.random.Generator(np.random.Philox(key=[config.seed, i]))
        example = posterior(examples[i], rng, examples.convention)
        images[i], labels[i] = example["image"], example["label"]
    return images, labels


def _check_augment(config: base.Config, feature: Feature | None) -> None:
    """Raise UserError if config.data.augment contradicts the network, or would change images but not their feature."""
    c, num_labels = config.data.augment, augment.num_labels(config.data.augment)
    embedded = config.model.augment_dim if "augment_dim" in config.model else 0
    if c.prob > 0 and embedded not in (0, num_labels):
        raise UserError(
            f"config.model.augment_dim is {config.model.augment_dim}, but config.data.augment makes {num_labels} "
            f"labels: set --config.model.augment_dim={num_labels}, or 0 for a network that is not conditioned on them"
        )
    if c.prob > 0 and feature:
        raise UserError(
            f"config.data.augment changes the images, but not the `{feature.key}` stored with them, which the model "
            f"learns from: set --config.data.augment.prob=0{feature.unaugmented}"
        )


def _load_encoder(config: base.Config, tokens: Tokens) -> Callable[[np.ndarray], np.ndarray]:
    torch_precision.set_precision(config.train.matmul_precision)
    return features.load(config.data.encoder, tokens.grid, tokens.width)


def _flip(example: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    if rng.random() >= FLIP_PROB:
        return example
    mirrored = {key: example[key][:, ::-1] for key in ("image", "moments", "noise", "pixels") if key in example}
    if "moments_flip" in example:
        mirrored["moments"] = example["moments_flip"]
    if "features" in example:
        tokens = example["features"]
        grid = math.isqrt(len(tokens))
        mirrored["features"] = tokens.reshape(grid, grid, -1)[:, ::-1].reshape(tokens.shape)
    return example | mirrored


def _augment(example: dict[str, np.ndarray], rng: np.random.Generator, c: base.Config) -> dict[str, np.ndarray]:
    images, labels = augment.augment(example["image"][None], augment.draw(rng, 1), c)
    return example | {"image": images[0], "augment": labels[0]}
