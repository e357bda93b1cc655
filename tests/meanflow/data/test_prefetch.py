"""Batches put ahead come in the loader's order, resume exactly, and fail where the loader fails."""

import threading
import time

import numpy as np
import pytest

from configs import digits
from meanflow.data.loader import make_loader
from meanflow.data.prefetch import Prefetcher
from meanflow.errors import UserError

DEPTHS = (0, 1, 2, 5)
SECONDS = 0.05  # of what is slow


class Numbers:
    """A loader of 0, 1, 2, ..., which notes what is done to it."""

    def __init__(self, wait=0.0, broken=None):
        self.step, self.wait, self.broken, self.closed = 0, wait, broken, 0
        self.threads = set()

    def __next__(self):
        self.threads.add(threading.current_thread())
        time.sleep(self.wait)
        self.step += 1
        if self.step - 1 == self.broken:
            raise UserError(f"record {self.broken} does not fit")
        return self.step - 1

    def get_state(self):
        return str(self.step)

    def set_state(self, state):
        self.step = int(state)

    def close(self):
        self.closed += 1


def put(batch):
    return {"number": batch}


def take(batches, count):
    return [next(batches)["number"] for _ in range(count)]


def settled(loader):
    """Return how many batches have been read once no more are."""
    before = None
    while before != loader.step:
        before = loader.step
        time.sleep(2 * SECONDS)
    return before


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_order_is_that_of_the_loader_and_so_many_are_read_ahead(depth):
    loader = Numbers()
    batches = Prefetcher(loader, put, depth)
    assert loader.step == 0  # nothing before it is asked for
    assert take(batches, 20) == list(range(20))
    assert settled(loader) == 20 + depth
    batches.close()
    assert (threading.current_thread() in loader.threads) == (depth == 0)


@pytest.mark.parametrize("depth", DEPTHS)
def test_the_state_is_that_after_the_last_batch_returned(depth):
    batches = Prefetcher(Numbers(), put, depth)
    states = [batches.get_state()]
    for _ in range(6):
        take(batches, 1)
        states.append(batches.get_state())
    batches.close()
    assert states == ["0", "1", "2", "3", "4", "5", "6"] and batches.get_state() == "6"
    resumed = Prefetcher(Numbers(), put, depth)
    resumed.set_state(states[3])
    assert resumed.get_state() == "3"
    assert take(resumed, 3) == [3, 4, 5]
    resumed.set_state(states[1])  # while it runs
    assert take(resumed, 3) == [1, 2, 3]
    resumed.close()


def test_batches_and_states_of_the_loader_itself(datasets_dir):
    config = digits.get_config()
    config.data.update(dir=datasets_dir, flip=True)
    plain = make_loader(config, 64)
    expected = [(next(plain), plain.get_state()) for _ in range(6)]
    batches = Prefetcher(make_loader(config, 64), dict)
    for batch, state in expected[:3]:
        assert_same(next(batches), batch)
        assert batches.get_state() == state
    batches.close()
    resumed = Prefetcher(make_loader(config, 64), dict)
    resumed.set_state(batches.get_state())
    for continued in (batches, resumed):
        for batch, _ in expected[3:]:
            assert_same(next(continued), batch)
        continued.close()
    config.data.num_workers = 1  # which its thread starts
    batches = Prefetcher(make_loader(config, 64), dict)
    assert_same(next(batches), expected[0][0])
    batches.close()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, a in expected.items():
        np.testing.assert_array_equal(found[name], a)


@pytest.mark.parametrize("depth", DEPTHS)
def test_an_error_is_raised_for_its_batch(depth):
    batches = Prefetcher(Numbers(broken=3), put, depth)
    assert take(batches, 3) == [0, 1, 2]
    with pytest.raises(UserError, match="record 3 does not fit"):
        next(batches)
    assert batches.get_state() == "3"
    batches.close()


def test_an_error_of_putting_is_raised_too():
    def refuse(batch):
        raise MemoryError(f"no room for {batch}")

    batches = Prefetcher(Numbers(), refuse)
    with pytest.raises(MemoryError, match="no room for 0"):
        next(batches)
    batches.close()


@pytest.mark.parametrize("depth", DEPTHS)
def test_closes_at_once_and_twice_and_leaves_no_thread(depth):
    loader, before = Numbers(wait=SECONDS), set(threading.enumerate())
    batches = Prefetcher(loader, put, depth)
    batches.close()  # before it has begun
    take(batches, 1)
    settled(loader)  # as far ahead as it may be
    start = time.monotonic()
    batches.close()
    batches.close()
    assert time.monotonic() - start < SECONDS
    assert set(threading.enumerate()) == before and loader.closed == 3
    take(batches, 1)
    start = time.monotonic()
    batches.close()  # while it reads: the batch at hand is read to its end, the others are not
    assert time.monotonic() - start < 3 * SECONDS
    assert set(threading.enumerate()) == before and batches.get_state() == "2"


@pytest.mark.parametrize("depth", [0, 2])
def test_reading_goes_on_during_the_step(depth):
    count, batches = 8, Prefetcher(Numbers(wait=SECONDS), put, depth)
    take(batches, 1)
    start = time.monotonic()
    for _ in range(count):
        time.sleep(SECONDS)  # the step
        take(batches, 1)
    seconds = time.monotonic() - start
    batches.close()
    if depth:
        assert seconds < 1.6 * count * SECONDS
    else:
        assert seconds > 1.9 * count * SECONDS
