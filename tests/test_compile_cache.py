"""Compiled programs outlive a session of tests, but not those cut short, nor the oldest of too many."""

import os
import zlib

import compile_cache
from jax._src import compilation_cache  # JAX has no public way to write one


def test_programs_cut_short_and_the_oldest_are_deleted(tmp_path):
    content = zlib.compress(os.urandom(1000))
    sizes = {"new": len(content), "cut": 500, "old": len(content), "oldest": len(content)}
    for age, (name, size) in enumerate(sizes.items()):
        (tmp_path / name).write_bytes(content[:size])
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    compile_cache.prune(tmp_path, 2 * len(content) + 500)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "old"}


def test_what_jax_writes_is_whole():
    """Else every session would compile all again."""
    assert compile_cache.is_whole(compilation_cache.compress_executable(b"program"))
