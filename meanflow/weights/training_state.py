"""The whole state of a training run in canonical form, which either framework writes and goes on from."""

from typing import Any, NamedTuple

import numpy as np

Weights = dict[str, np.ndarray]


class TrainingState(NamedTuple):
    """All that the next step depends on; moments have the names and layouts of the weights they belong to."""

    step: int  # optimizer steps done
    params: Weights  # canonical, as the following, with the network's fixed tables
    first_moments: Weights  # of Adam: means of gradients
    second_moments: Weights  # means of their squares
    emas: tuple[Weights, ...]  # one for each of train.ema_decays
    progress: dict[str, Any]  # what else a checkpoint has, see `Run` in meanflow.commands.train
