"""Keeps TensorFlow, which TFDS and clu import behind the scenes, from greeting on stderr."""

import os


def silence_tensorflow() -> None:
    """Set TensorFlow's log level to errors, unless the user has set it; call before it is first imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # a notice ignores the level; we compute nothing with it
