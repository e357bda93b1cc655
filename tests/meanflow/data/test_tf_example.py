"""The parser of tf.train.Example reads what protobuf writes, and refuses what is no such message."""

import numpy as np
import pytest
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from meanflow.data import tf_example

INTEGERS = [0, 1, 127, 128, 300, 2**31, 2**63 - 1, -1, -(2**63)]


def example(**features):
    """Return the bytes of an Example with these lists of integers or bytes."""
    made = {}
    for name, values in features.items():
        if values and isinstance(values[0], bytes):
            made[name] = tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=values))
        else:
            made[name] = tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=values))
    return tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=made)).SerializeToString()


def test_what_protobuf_writes():
    content = np.random.default_rng(0).bytes(70000)
    found = tf_example.parse(example(integers=INTEGERS, none=[], texts=[b"", "é".encode(), content], one=[5]))
    assert found == {"integers": INTEGERS, "none": [], "texts": [b"", "é".encode(), content], "one": [5]}
    assert tf_example.parse(example()) == tf_example.parse(b"") == {}


def test_integers_that_are_not_packed():
    """As older writers leave them; a list may also come in several parts."""
    values = b"".join(b"\x08" + bytes([value]) for value in (3, 4)) + b"\x0a\x02\x05\x06"
    feature = b"\x1a" + bytes([len(values)]) + values
    entry = b"\x0a\x01x\x12" + bytes([len(feature)]) + feature
    features = b"\x0a" + bytes([len(entry)]) + entry
    record = b"\x0a" + bytes([len(features)]) + features
    assert tf_example.parse(record) == {"x": [3, 4, 5, 6]}
    assert list(tf_example_pb2.Example.FromString(record).features.feature["x"].int64_list.value) == [3, 4, 5, 6]


def test_every_record_that_is_cut_off_is_refused():
    record = example(label=[300], text=[b"abc"])
    for end in range(1, len(record)):
        with pytest.raises(ValueError):
            tf_example.parse(record[:end])


def test_other_messages_are_refused():
    floats = tf_feature_pb2.Feature(float_list=tf_feature_pb2.FloatList(value=[0.5]))
    features = tf_feature_pb2.Features(feature={"x": floats})
    with pytest.raises(ValueError, match="list of kind 2"):
        tf_example.parse(tf_example_pb2.Example(features=features).SerializeToString())
    with pytest.raises(ValueError, match="expected messages in field 1"):
        tf_example.parse(b"\x10\x05")
    with pytest.raises(ValueError, match="wire type 5"):
        tf_example.parse(b"\x0d\x00\x00\x00\x00")
