"""The layers of the Inception network that defines the Fréchet distance and the Inception score, as a table.

Source: arXiv:1512.00567; TensorFlow's frozen graph of 2015-12-05, in the names of its PyTorch ports (torch-fidelity,
pytorch-fid).  It is not torchvision's network: average pools do not count the padding, the last block has a maximum
pool, and there are 1008 classes.
"""

from typing import NamedTuple

EPS = 1e-3  # of all batch norms
NUM_CLASSES = 1008


class Unit(NamedTuple):
    """A convolution, batch norm and ReLU."""

    name: str
    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padded: bool = True  # with zeros; at stride 1 this keeps the image size


# A block is a tuple of branches, whose outputs are concatenated.  A branch is a sequence of units and names of pools; a
# tuple of units inside it runs them in parallel and concatenates their outputs.
def mixed_a(pool_features):
    """Return the block of 35 x 35 pixels."""
    return (
        (Unit("branch1x1", 64),),
        (Unit("branch5x5_1", 48), Unit("branch5x5_2", 64, (5, 5))),
        (Unit("branch3x3dbl_1", 64), Unit("branch3x3dbl_2", 96, (3, 3)), Unit("branch3x3dbl_3", 96, (3, 3))),
        ("average", Unit("branch_pool", pool_features)),
    )


def mixed_b():
    """Return the block from 35 x 35 to 17 x 17 pixels."""
    last = Unit("branch3x3dbl_3", 96, (3, 3), 2, padded=False)
    return (
        (Unit("branch3x3", 384, (3, 3), 2, padded=False),),
        (Unit("branch3x3dbl_1", 64), Unit("branch3x3dbl_2", 96, (3, 3)), last),
        ("halving",),
    )


def mixed_c(features):
    """Return the block of 17 x 17 pixels."""
    return (
        (Unit("branch1x1", 192),),
        (
            Unit("branch7x7_1", features),
            Unit("branch7x7_2", features, (1, 7)),
            Unit("branch7x7_3", 192, (7, 1)),
        ),
        (
            Unit("branch7x7dbl_1", features),
            Unit("branch7x7dbl_2", features, (7, 1)),
            Unit("branch7x7dbl_3", features, (1, 7)),
            Unit("branch7x7dbl_4", features, (7, 1)),
            Unit("branch7x7dbl_5", 192, (1, 7)),
        ),
        ("average", Unit("branch_pool", 192)),
    )


def mixed_d():
    """Return the block from 17 x 17 to 8 x 8 pixels."""
    return (
        (Unit("branch3x3_1", 192), Unit("branch3x3_2", 320, (3, 3), 2, padded=False)),
        (
            Unit("branch7x7x3_1", 192),
            Unit("branch7x7x3_2", 192, (1, 7)),
            Unit("branch7x7x3_3", 192, (7, 1)),
            Unit("branch7x7x3_4", 192, (3, 3), 2, padded=False),
        ),
        ("halving",),
    )


def mixed_e(pool):
    """Return the block of 8 x 8 pixels."""
    return (
        (Unit("branch1x1", 320),),
        (Unit("branch3x3_1", 384), (Unit("branch3x3_2a", 384, (1, 3)), Unit("branch3x3_2b", 384, (3, 1)))),
        (
            Unit("branch3x3dbl_1", 448),
            Unit("branch3x3dbl_2", 384, (3, 3)),
            (Unit("branch3x3dbl_3a", 384, (1, 3)), Unit("branch3x3dbl_3b", 384, (3, 1))),
        ),
        (pool, Unit("branch_pool", 192)),
    )


# The network: stages by the number of features they end with, each a sequence of units, pools and named blocks.
STAGES = {
    "64": (
        Unit("Conv2d_1a_3x3", 32, (3, 3), 2, padded=False),
        Unit("Conv2d_2a_3x3", 32, (3, 3), padded=False),
        Unit("Conv2d_2b_3x3", 64, (3, 3)),
        "halving",
    ),
    "192": (Unit("Conv2d_3b_1x1", 80), Unit("Conv2d_4a_3x3", 192, (3, 3), padded=False), "halving"),
    "768": (
        ("Mixed_5b", mixed_a(32)), ("Mixed_5c", mixed_a(64)), ("Mixed_5d", mixed_a(64)), ("Mixed_6a", mixed_b()),
        ("Mixed_6b", mixed_c(128)), ("Mixed_6c", mixed_c(160)), ("Mixed_6d", mixed_c(160)), ("Mixed_6e", mixed_c(192)),
    ),
    "2048": (("Mixed_7a", mixed_d()), ("Mixed_7b", mixed_e("average")), ("Mixed_7c", mixed_e("maximum"))),
}  # fmt: skip


def is_split(step):
    """Return whether a step of a branch is a tuple of parallel units rather than one unit or a pool."""
    return isinstance(step, tuple) and not isinstance(step, Unit)
