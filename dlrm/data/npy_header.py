"""The header of an .npy file: the only place that reads one.

In: bytes by a function of the caller. Out: shape, dtype and where the rows begin. Nothing is evaluated, every
length is bounded, and nothing is allocated by what the header says.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

MAGIC = b"\x93NUMPY"
LONGEST = 1 << 16  # bytes of a header; numpy writes 128
LARGEST = 1 << 48  # rows or columns
KINDS = {"b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"}
TEXT = re.compile(
    r"\s{0,8}\{ ?'descr': ?'([<>|=]?)([a-zA-Z][0-9]{1,3})', ?'fortran_order': ?(False|True),"
    r" ?'shape': ?\(((?:[0-9]{1,18}, ?){0,4}(?:[0-9]{1,18})?)\),? ?\}\s*",
    re.ASCII,
)


class NpyHeader(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype
    length: int  # of the header in bytes, from the first byte of the file

    @property
    def size(self) -> int:
        """Bytes of the whole file. Python's numbers do not overflow."""
        return self.length + math.prod(self.shape) * self.dtype.itemsize


def read_npy_header(read: Callable[[int], bytes]) -> NpyHeader:
    """`read(count)` gives the next bytes, fewer only at the end. ValueError says what is wrong."""

    def read_exactly(count: int) -> bytes:
        data = read(count)
        if len(data) != count:
            raise ValueError("ends inside its header")
        return data

    head = read_exactly(10)
    if head[:6] != MAGIC:
        raise ValueError("is not an .npy file")
    if head[6] not in (1, 2, 3):
        raise ValueError(f"has a damaged header (version {head[6]})")
    size, length = int.from_bytes(head[8:10], "little"), 10
    if head[6] > 1:  # versions 2 and 3 have a length of 4 bytes
        size, length = size | int.from_bytes(read_exactly(2), "little") << 16, 12
    if size > LONGEST:
        raise ValueError(f"has a damaged header (of {size} bytes)")
    found = TEXT.fullmatch(read_exactly(size).decode("latin-1"))
    if found is None:
        raise ValueError("has a damaged header (not that of a plain array of numbers)")
    order, kind, fortran, shape = found.groups()
    if kind not in KINDS:
        raise ValueError(f"has a damaged header (values of an unknown kind, {kind})")
    if fortran == "True":
        raise ValueError("is in Fortran order, expected C order")
    numbers = tuple(int(word) for word in shape.replace(" ", "").split(",") if word)
    if any(number > LARGEST for number in numbers):
        raise ValueError(f"has a damaged header (a shape of {max(numbers)})")
    return NpyHeader(numbers, np.dtype(order.replace("=", "") + kind), length + size)
