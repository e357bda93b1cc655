"""Cards to rehearse for, in public numbers.

Peaks of tensor cores are dense, with sums in float32.  Sources: NVIDIA's datasheets and architecture whitepapers of
each card; what a program can allocate, clocks and cache: the device descriptions of openxla/xla,
xla/backends/gpu/target_config/specs (L40S and RTX 4090: the total that PyTorch reports).
"""

from typing import NamedTuple

from meanflow.errors import UserError


class Card(NamedTuple):
    """One kind of GPU."""

    title: str  # as the driver reports it
    memory: int  # bytes that CUDA reports in total
    bandwidth: float  # of the memory, bytes/s
    bfloat16: float  # FLOP/s
    tf32: float  # FLOP/s, float32 inputs rounded to 10 bits of mantissa
    float32: float  # FLOP/s, without tensor cores
    link: float  # bytes/s that one card sends to the others of its host: NVLink, or PCIe
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    shared_memory: int  # bytes of a core
    l2_cache: int  # bytes
    clock: float  # GHz, boost


CARDS = {
    "h100": Card("NVIDIA H100 80GB HBM3", 84_942_979_072, 3.352e12, 989.4e12, 494.7e12, 66.9e12, 450e9, (9, 0), 132,
                 233_472, 52_428_800, 1.98),
    "h200": Card("NVIDIA H200", 151_397_597_184, 4.8e12, 989.4e12, 494.7e12, 66.9e12, 450e9, (9, 0), 132,
                 233_472, 52_428_800, 1.98),
    "a100": Card("NVIDIA A100-SXM4-80GB", 85_100_068_864, 2.039e12, 312e12, 156e12, 19.5e12, 300e9, (8, 0), 108,
                 167_936, 41_943_040, 1.41),
    "a100-40": Card("NVIDIA A100-SXM4-40GB", 42_298_834_944, 1.555e12, 312e12, 156e12, 19.5e12, 300e9, (8, 0), 108,
                    167_936, 41_943_040, 1.41),
    "l40s": Card("NVIDIA L40S", 47_663_000_000, 864e9, 362.05e12, 183e12, 91.6e12, 32e9, (8, 9), 142,
                 102_400, 100_663_296, 2.52),
    "rtx4090": Card("NVIDIA GeForce RTX 4090", 25_390_000_000, 1.008e12, 165.2e12, 82.6e12, 82.6e12, 32e9, (8, 9), 128,
                    102_400, 75_497_472, 2.52),
    "b200": Card("NVIDIA B200", 191_514_411_008, 7.672e12, 2250e12, 1125e12, 75e12, 900e9, (10, 0), 148,
                 233_472, 132_644_864, 1.965),
}  # fmt: skip
RESERVED = 0.08  # of the memory: CUDA's context, NCCL and cuDNN workspaces, and what the allocator cannot use


def find(name: str) -> Card:
    """Return the card of this name.  Raises UserError naming all if there is none."""
    if name not in CARDS:
        raise UserError(f"--card={name}: there are numbers for {', '.join(CARDS)}")
    return CARDS[name]


def usable(card: Card) -> int:
    """Return the bytes that a step can use."""
    return int(card.memory * (1 - RESERVED))


def peak(card: Card, config) -> float:
    """Return the FLOP/s of the card's products in the dtype and precision of a config; float64 is not meant for it."""
    if config.model.compute_dtype in ("bfloat16", "float16"):
        return card.bfloat16
    return {"high": card.tf32, "default": card.tf32}.get(config.train.matmul_precision, card.float32)
