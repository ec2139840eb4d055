"""md5 of many files, sixteen side by side: a vector instruction works on a word of each.

One file's md5 cannot be cut, and hashlib takes longer for it than all that made the file.
"""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from dlrm.prep.files import File
from dlrm.prep.native import I32, I64, compiled, intrinsic

LANES = 16
BLOCK = 64  # bytes that md5 takes at a time: sixteen words
CHUNK = 128 << 10  # bytes of a file read at a time
START = (0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476)
TURNS = ((7, 12, 17, 22), (5, 9, 14, 20), (4, 11, 16, 23), (6, 10, 15, 21))
ORDER = ((1, 0), (5, 1), (3, 5), (7, 0))  # which word each step of a round takes: factor, first
WORDS = ir.VectorType(I32, LANES)


def splat(value: int) -> ir.Constant:
    return ir.Constant(WORDS, [value] * LANES)


def transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Word w of row l becomes word l of row w: quarters of ever smaller squares change places."""
    for step in (1, 2, 4, 8):
        low = [lane if not lane & step else LANES + (lane ^ step) for lane in range(LANES)]
        high = [lane ^ step if not lane & step else LANES + lane for lane in range(LANES)]
        masks = [ir.Constant(WORDS, lanes) for lanes in (low, high)]
        for row in range(LANES):
            if not row & step:
                pair = rows[row], rows[row | step]
                rows[row], rows[row | step] = (builder.shuffle_vector(*pair, mask) for mask in masks)
    return rows


def mixed(builder: Any, turn: int, b: Any, c: Any, d: Any) -> Any:
    """The four functions of RFC 1321."""
    if turn == 0:
        return builder.xor(d, builder.and_(b, builder.xor(c, d)))
    if turn == 1:
        return builder.xor(c, builder.and_(d, builder.xor(b, c)))
    if turn == 2:
        return builder.xor(builder.xor(b, c), d)
    return builder.xor(c, builder.or_(b, builder.not_(d)))


@intrinsic
def hash_block(typing: Any, places: Any, offset: Any, state: Any) -> Any:
    """One block of each file, at places[lane] + offset, into the states, four words of all lanes each."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        places, offset, state = args
        words = []
        for lane in range(LANES):
            place = builder.load(builder.inttoptr(builder.add(places, I64(8 * lane)), I64.as_pointer()))
            where = builder.inttoptr(builder.add(place, offset), WORDS.as_pointer())
            words.append(builder.load(where, align=1))
        words = transposed(builder, words)
        kept = [
            builder.inttoptr(builder.add(state, I64(4 * LANES * k)), WORDS.as_pointer()) for k in range(4)
        ]
        a, b, c, d = before = [builder.load(where, align=4) for where in kept]
        for step in range(64):
            turn = step // 16
            factor, first = ORDER[turn]
            constant = int(abs(math.sin(step + 1)) * 2**32)
            total = builder.add(builder.add(a, splat(constant)), words[(factor * step + first) % 16])
            total = builder.add(total, mixed(builder, turn, b, c, d))
            bits = TURNS[turn][step % 4]
            total = builder.or_(builder.shl(total, splat(bits)), builder.lshr(total, splat(32 - bits)))
            a, b, c, d = d, builder.add(b, total), b, c
        for where, old, new in zip(kept, before, (a, b, c, d), strict=True):
            builder.store(builder.add(old, new), where, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


@compiled
def hash_blocks(places, count, state):
    for block in range(count):
        hash_block(places.ctypes.data, BLOCK * block, state.ctypes.data)


class Lane:
    """One file on its way through: its text with md5's padding behind it, a chunk at a time."""

    def __init__(self, path: Path, buffer: np.ndarray) -> None:
        self.path, self.file, self.buffer = path, File(path), buffer
        self.size, self.at = self.file.size, 0
        self.begin = self.end = 0  # what is still to be hashed of the buffer
        self.padded = False
        self.fill()

    def fill(self) -> bool:
        """The next chunk; False when all has been hashed."""
        if self.begin < self.end:
            return True
        if self.padded:
            self.file.close()
            return False
        got = self.file.read_into(self.buffer[:CHUNK].data, self.at)
        self.at += got
        self.begin, self.end = 0, got
        if got < CHUNK:
            rest = -(got + 9) % BLOCK
            tail = b"\x80" + bytes(rest) + (8 * self.at).to_bytes(8, "little")
            self.buffer[got : got + len(tail)] = np.frombuffer(tail, np.uint8)
            self.end += len(tail)
            self.padded = True
        return True


def digests(paths: list[Path]) -> dict[Path, str]:
    """md5 of each file, the largest first so that all lanes are busy to the end."""
    waiting = iter(sorted(paths, key=lambda path: -path.stat().st_size))
    buffers = np.zeros((LANES, CHUNK + 2 * BLOCK), np.uint8)
    state, places = np.zeros((4, LANES), np.uint32), np.zeros(LANES, np.int64)
    lanes: dict[int, Lane] = {}
    found: dict[Path, str] = {}

    def start(numbers: Iterator[int]) -> None:
        for number, path in zip(numbers, waiting, strict=False):
            lanes[number] = Lane(path, buffers[number])
            state[:, number] = START

    start(iter(range(LANES)))
    while lanes:
        count = min(lane.end - lane.begin for lane in lanes.values()) // BLOCK
        for number in range(LANES):  # a lane without a file hashes what lies there, for nobody
            places[number] = buffers[number].ctypes.data + (lanes[number].begin if number in lanes else 0)
        hash_blocks(places, count, state)
        for number, lane in list(lanes.items()):
            lane.begin += BLOCK * count
            if not lane.fill():
                found[lane.path] = state[:, number].tobytes().hex()
                del lanes[number]
                start(iter([number]))
    return found
