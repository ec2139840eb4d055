"""The ids that OneFlow's tool (criteo1t_parquet.py, option mod_idx) writes, from the ids of the text.

With mod_idx N above 0: the id modulo N, plus N times the column's number. With 0 or less: Spark's xxhash64 of
the text and the column's number, 64 bits, so that ids of different columns differ.
"""

import numpy as np

P1, P2, P3, P4, P5 = (
    np.uint64(prime)
    for prime in (
        0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5,
    )
)  # fmt: skip
SEED = np.uint64(42)  # Spark's
# the four hexadecimal digits of each 16-bit number, as the bytes of a little-endian word
DIGITS = np.array([int.from_bytes(b"%04x" % number, "little") for number in range(1 << 16)], np.uint64)


def make_oneflow_ids(ids: np.ndarray, column: int, mod_idx: int) -> np.ndarray:
    """int64 [n]: OneFlow's ids of a column (from 0). `ids`: uint32 [n], modulo `mod_idx` already."""
    if mod_idx > 0:
        return ids.astype(np.int64) + mod_idx * column
    return hash_ids(ids, column - 1)


def hash_ids(ids: np.ndarray, number: int) -> np.ndarray:
    """int64 [n]: xxhash64(id as eight hexadecimal digits, number), as Spark computes it. ids: uint32 [n];
    0 is an empty field, which Spark leaves out.
    """
    with np.errstate(over="ignore"):
        text = DIGITS[ids >> np.uint32(16)] | (DIGITS[ids & np.uint32(0xFFFF)] << np.uint64(32))
        first = SEED + P5 + np.uint64(8)
        first = first ^ (_rotate_left(text * P2, 31) * P1)
        first = _mix_bits(_rotate_left(first, 27) * P1 + P4)
        seeds = np.where(ids == 0, SEED, first)
        second = (seeds + P5 + np.uint64(4)) ^ (np.uint64(number & 0xFFFFFFFF) * P1)
        return _mix_bits(_rotate_left(second, 23) * P2 + P3).view(np.int64)


def _rotate_left(words: np.ndarray, bits: int) -> np.ndarray:
    return (words << np.uint64(bits)) | (words >> np.uint64(64 - bits))


def _mix_bits(words: np.ndarray) -> np.ndarray:
    """The last step of xxHash64."""
    words = (words ^ (words >> np.uint64(33))) * P2
    words = (words ^ (words >> np.uint64(29))) * P3
    return words ^ (words >> np.uint64(32))
