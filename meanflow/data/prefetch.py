"""Puts batches on the device before their step, so that steps wait neither for reading nor for transfers."""

import collections
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import numpy as np

from meanflow.data.loader import Loader


class Prefetcher(Iterator):
    """The batches of a loader, in its order, as `put` returns them: a thread reads and puts up to `depth` in advance.

    An error in the thread, such as the loader's UserError, is raised for the batch at which it happened.  `depth` + 1
    batches are on the device at once.
    """

    def __init__(
        self,
        loader: Loader,
        put: Callable[[dict[str, np.ndarray]], Any],
        depth: int = 2,
        draw: Callable[[int], dict[str, np.ndarray]] | None = None,
    ):
        """depth: 0 reads each batch when it is asked for, without a thread.  draw: (step) -> what joins the data."""
        self._loader, self._put, self._depth, self._draw = loader, put, depth, draw
        self._state = loader.get_state()
        self._thread = None
        self._pending = collections.deque()

    def __next__(self) -> Any:
        if self._depth == 0:
            batch, self._state = self._read()
            return batch
        if self._thread is None:
            self._thread = futures.ThreadPoolExecutor(1, "prefetch")
        while len(self._pending) <= self._depth:
            self._pending.append(self._thread.submit(self._read))
        batch, self._state = self._pending.popleft().result()
        return batch

    def get_state(self) -> str:
        """Return the loader's state after the last batch returned, whatever has been prefetched since."""
        return self._state

    def set_state(self, state: str) -> None:
        """Continue exactly after the batch at which `state` was taken.  Raises what the loader's `set_state` raises."""
        self.close()
        self._loader.set_state(state)
        self._state = self._loader.get_state()

    def close(self) -> None:
        """Stop the thread after the batch it is reading, and close the loader.

        The next batch starts both again, after the last one returned.
        """
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
            self._pending.clear()
            self._loader.set_state(self._state)  # forget what was prefetched
        self._loader.close()

    def _read(self) -> tuple[Any, str]:
        drawn = self._draw(self._loader.step) if self._draw else None
        batch = next(self._loader)
        return self._put(batch if drawn is None else batch | drawn), self._loader.get_state()
