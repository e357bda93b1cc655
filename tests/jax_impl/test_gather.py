"""Bytes of several processes reach the first, whatever their lengths."""

import threading

import jax
import numpy as np
import processes
import pytest

from jax_impl import devices

PARTS = ([b"", b"a"], [bytes(range(256)) * 3, b"\0\0", b"abcd"], [b"12345678", b"1234"])


def test_a_process_alone_has_its_own(monkeypatch):
    monkeypatch.setattr(devices.multihost_utils, "process_allgather", lambda a: pytest.fail("it gathers"))
    assert devices.gather(b"abc") == [b"abc"]


@pytest.mark.parametrize("piece", [4, 7, devices.PIECE])
@pytest.mark.parametrize("parts", PARTS)
def test_parts_come_whole_and_in_order(monkeypatch, parts, piece):
    """With the arrays that JAX would gather gathered among threads; each has the same shape and type in all."""
    own, sizes = threading.local(), []

    def allgather(array):
        sizes.append(array.nbytes)
        assert jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype, "JAX has no 64 bits here"
        every = own.group.gather(array.tobytes())
        assert len(set(map(len, every))) == 1
        return np.stack([np.frombuffer(part, array.dtype).reshape(array.shape) for part in every])

    def process(group):
        own.group = group
        return devices.gather(parts[group.process])

    monkeypatch.setattr(devices, "PIECE", piece)
    monkeypatch.setattr(jax, "process_count", lambda: len(parts))
    monkeypatch.setattr(jax, "process_index", lambda: own.group.process)
    monkeypatch.setattr(devices.multihost_utils, "process_allgather", allgather)
    assert processes.run(len(parts), process, everywhere=True) == [parts] + [[]] * (len(parts) - 1)
    assert max(sizes) <= max(piece, 8)
