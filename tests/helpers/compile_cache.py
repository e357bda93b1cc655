"""Looks after the directory where JAX keeps compiled programs from one session of tests to the next."""

import os
import zlib

SIZE = 2**29  # bytes


def prune(directory, size=SIZE):
    """Delete programs that a kill left half written, which JAX never replaces, and the oldest beyond `size` bytes."""
    left = size
    for path in sorted(directory.iterdir(), key=os.path.getmtime, reverse=True):
        content = path.read_bytes()
        left -= len(content)
        if left < 0 or not is_whole(content):
            path.unlink()


def is_whole(content):
    """Return whether a compressed program has its end."""
    try:
        zlib.decompress(content)
    except zlib.error:
        return False
    return True
