"""Reads tf.train.Example, the protobuf message of a TFDS record, without TensorFlow.

Source: tensorflow/core/example/example.proto and feature.proto; protobuf.dev/programming-guides/encoding.

    Example   1: Features
    Features  1: entries of a map, each 1: name, 2: Feature
    Feature   1: BytesList or 3: Int64List, which hold 1: values
"""

from collections.abc import Iterator
from typing import Any

VARINT, LENGTH_DELIMITED = 0, 2  # wire types
BYTES_LIST, INT64_LIST = 1, 3  # fields of a Feature


def parse(record: bytes) -> dict[str, list[memoryview] | list[int]]:
    """Return the values of each feature; those of bytes are views of `record`.

    Raises ValueError for anything but an Example of bytes and integers.
    """
    found = {}
    for features in _messages(memoryview(record), 1):
        for entry in _messages(features, 1):
            parts = dict(_fields(entry))
            found[bytes(parts[1]).decode()] = _values(parts.get(2, memoryview(b"")))
    return found


def _values(feature: memoryview) -> list:
    values = []
    for kind, content in _fields(feature):
        for number, value in _fields(content):
            if kind == BYTES_LIST and number == 1:
                values.append(value)
            elif kind == INT64_LIST and number == 1:
                values += [value] if isinstance(value, int) else _packed(value)
            else:
                raise ValueError(f"field {number} of a list of kind {kind}")
    return [value - 2**64 if isinstance(value, int) and value >= 2**63 else value for value in values]


def _packed(content: memoryview) -> Iterator[int]:
    position = 0
    while position < len(content):
        value, position = _varint(content, position)
        yield value


def _messages(message: memoryview, number: int) -> list[memoryview]:
    """Return the messages that are field `number` of a message, which may have no other fields."""
    fields = list(_fields(message))
    if any(key != number or isinstance(value, int) for key, value in fields):
        raise ValueError(f"fields {sorted({key for key, _ in fields})}, expected messages in field {number}")
    return [value for _, value in fields]


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each field, an integer or a view."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        size, position = _varint(message, position)  # or the value itself
        if key & 7 == VARINT:
            yield key >> 3, size
            continue
        if key & 7 != LENGTH_DELIMITED or position + size > len(message):
            raise ValueError(f"wire type {key & 7}, {size} bytes of {len(message) - position}")
        yield key >> 3, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """Return the integer at a position, 7 bits per byte and the lowest first, and the position after it."""
    value = shift = 0
    while position < len(message):
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
    raise ValueError("it ends within an integer")
