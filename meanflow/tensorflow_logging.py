"""Silences the start-up messages of TensorFlow, which TFDS and clu import."""

import os


def silence_tensorflow() -> None:
    """Set TensorFlow's log level to errors, unless the user has set it; call before it is first imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # its notice ignores the log level; nothing is computed with it
