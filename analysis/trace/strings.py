"""Strings as numbers: each distinct text once, found through a hash table that numba code fills.

Also three machine instructions for scanning text: load a byte, load eight bytes, count trailing zero bits.

Compiled loops do not check bounds; these invariants stand in for the checks, whatever the bytes are:
- Text ends with a newline and PAD more bytes follow it. Every loop over text either has a limit `end`, the
  place of its line's newline, or stops at any byte that it does not expect, such as a newline. So a place p
  is never beyond `end`; eight bytes from there lie inside the padding.
- `find_quote` is called with p <= end and returns a place from p to end: sizes are never negative. A caller
  that steps over the quote checks first that there is one (p < end).
- `intern_text` writes only after it has compared with the lengths of the arrays; what does not fit has no
  number (-1).
With NUMBA_BOUNDSCHECK=1 in the environment every access is checked instead, and a wrong one is an IndexError:
the tests run both builds. The checked one is kept in a cache only where NUMBA_CACHE_DIR names one for it.
"""

import json
import os
import threading
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

# Strings with fixed numbers: KNOWN.index(text) is the number in every StringTable.
KNOWN = (
    "(none)", "hhash", "fhash", "offset", "count", "ret", "epoch", "step", "batch", "value", "split", "when",
    "file", "bytes", "name", "POSIX", "STDIO", "counter", "clock", "dftracer", "data", "read", "train",
    "barrier", "num_events", "CM", "FH", "HH", "SH", "thread_name", "start", "end", "fname", "size",
    "whence", "flags",
    "mapped", "checkpoint", "sync", "ret_len", "str_len", "mode",
    "a", "ab", "ae", "a+", "ab+", "a+b",
    "dft_cnt",
)  # fmt: skip
ID = {text: number for number, text in enumerate(KNOWN)}
MAX_STRINGS = 200_000  # beyond this, new values are not kept: memory is bounded
# beyond this no names, categories and keys either: their lines are counted as bad
MAX_NAMES = 2 * MAX_STRINGS
MAX_POOL = 64 << 20  # bytes of all strings together
_MAX_PROBES = 512  # places that are looked at for a string: more is text made to collide
QUOTE, BACKSLASH = b'"\\'
PAD = 16  # text is read eight bytes at a time: this many bytes must follow its end
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_ONES, _TOPS = np.uint64(0x0101010101010101), np.uint64(0x8080808080808080)
_QUOTES, _SLASHES = np.uint64(0x2222222222222222), np.uint64(0x5C5C5C5C5C5C5C5C)
_NEWLINES = np.uint64(0x0A0A0A0A0A0A0A0A)


def _pointer(typingctx, array):
    """An array's data as a bare pointer: helpers that take arrays would count references at every call."""

    def codegen(context, builder, signature, args):
        return context.make_array(signature.args[0])(context, builder, args[0]).data

    return types.CPointer(array.dtype)(array), codegen


def _load(bits: int):
    def typer(typingctx, data, index):  # an unaligned read
        def codegen(context, builder, signature, args):
            place = builder.gep(args[0], [args[1]])
            if bits == 64:
                return builder.load(builder.bitcast(place, ir.IntType(64).as_pointer()), align=1)
            return builder.zext(builder.load(place), ir.IntType(64))

        return (types.uint64 if bits == 64 else types.int64)(data, types.int64), codegen

    return typer


def _trailing_zeros(typingctx, value):
    def codegen(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.uint64), codegen


def _bits_of(typingctx, value):
    """A float64 as the int64 of the same bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(64))

    return types.int64(types.float64), codegen


CHECKED = os.environ.get("NUMBA_BOUNDSCHECK") == "1"  # numba itself reads the same variable
compiled: Any = njit(cache=not CHECKED or bool(os.environ.get("NUMBA_CACHE_DIR")), nogil=True)

# Any: numba supplies the first argument
byte: Any = intrinsic(_load(8))
word: Any = intrinsic(_load(64))
pointer: Any = intrinsic(_pointer)

if CHECKED:

    @compiled
    def _pointer_checked(array):
        return array

    @compiled
    def _byte_checked(data, p):
        if p < 0 or p >= len(data):
            raise IndexError("a byte outside of its array")
        return np.int64(data[p])

    @compiled
    def _word_checked(data, p):
        if p < 0 or p + 8 > len(data):
            raise IndexError("eight bytes outside of their array")
        found = np.uint64(0)
        for i in range(8):
            found |= np.uint64(data[p + i]) << np.uint64(8 * i)
        return found

    byte, word, pointer = _byte_checked, _word_checked, _pointer_checked
trailing_zeros: Any = intrinsic(_trailing_zeros)
bits_of: Any = intrinsic(_bits_of)


class StringTable:
    """Each distinct string once: numbers to text and, through a hash table, text to numbers."""

    def __init__(self) -> None:
        self.pool = np.zeros(1 << 20, np.uint8)
        self.starts = np.zeros(1 << 16, np.int64)
        self.hashes = np.zeros(1 << 16, np.uint64)
        self.table = np.full(1 << 18, -1, np.int32)
        self.count = np.zeros(1, np.int64)
        self._text: list[str] = []
        self._lock = threading.Lock()  # several threads may ask for texts while none adds any
        for text in KNOWN:
            self.add(text)

    def add(self, text: str) -> int:
        """Its number; -1 when the table is full."""
        raw = text.encode(errors="replace")
        self.make_room(len(raw))
        padded = np.frombuffer(bytearray(raw + bytes(PAD)), np.uint8)
        return int(_add_text(padded, len(raw), self.arrays))

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return self.pool, self.starts, self.hashes, self.table, self.count

    def make_room(self, length: int) -> None:
        """After this, all strings in a line of `length` bytes fit."""
        n = int(self.count[0])
        if self.starts[n] + length + PAD > len(self.pool):
            self.pool = grow_array(self.pool, int(self.starts[n]) + length + PAD)
        if n + length // 2 + 2 > len(self.starts):
            self.starts, self.hashes = (
                grow_array(self.starts, n + length),
                grow_array(self.hashes, n + length),
            )
        if 2 * (n + length // 2) > len(self.table):
            self.table = np.full(1 << (4 * (n + length)).bit_length(), -1, np.int32)
            _rehash(self.hashes, n, self.table)

    def text(self, number: int) -> str:
        """The text of a number that `add` or the scanner gave."""
        if len(self._text) <= number:
            with self._lock:
                while len(self._text) <= number:
                    a, b = self.starts[len(self._text)], self.starts[len(self._text) + 1]
                    self._text.append(unescape_text(self.pool[a:b].tobytes()))
        return self._text[number]

    def __len__(self) -> int:
        return int(self.count[0])


def unescape_text(raw: bytes) -> str:
    """The text of a JSON string's bytes, without the quotes."""
    text = raw.decode(errors="replace")
    if "\\" not in text:
        return text
    try:
        found = str(json.loads(f'"{text}"'))
    except ValueError:  # dftracer does not escape what a path itself contains
        return text
    return found.encode(errors="replace").decode()  # half of a surrogate pair is not text


def grow_array(array: np.ndarray, need: int) -> np.ndarray:
    bigger = np.zeros(2 * max(need, len(array)), array.dtype)
    bigger[: len(array)] = array
    return bigger


@compiled
def _rehash(hashes, n, table):
    """Fill an empty, larger hash table with the numbers of the first n strings."""
    mask = len(table) - 1
    for number in range(n):
        slot = np.int64(hashes[number]) & mask
        while table[slot] >= 0:
            slot = (slot + 1) & mask
        table[slot] = number


@compiled
def count_free_slots(pool, starts, table, count):
    """The length of a line whose strings are sure to fit."""
    n = count[0]
    return min(len(pool) - starts[n] - PAD, 2 * (len(starts) - n - 2), 2 * (len(table) // 2 - n))


@compiled
def find_end_of_line(text, p):
    """The place of the newline that ends the line at p."""
    while True:
        w = word(text, p) ^ _NEWLINES
        found = (w - _ONES) & ~w & _TOPS
        if found:
            return p + (trailing_zeros(found) >> 3)
        p += 8


@compiled
def _add_text(text, size, arrays):
    """The number of a text: uint8, `size` bytes and PAD more. arrays: of the `StringTable`."""
    return intern_text(pointer(text), 0, size, make_pointers(arrays), True)


@compiled
def make_pointers(arrays):
    """A StringTable's arrays and limits, as `intern_text` takes them."""
    pool, starts, hashes, table, count = arrays
    room = min(len(pool), MAX_POOL) - PAD
    most = min(MAX_NAMES, len(hashes), len(starts) - 1, len(table) // 2)
    return (
        pointer(pool), pointer(starts), pointer(hashes), pointer(table), pointer(count),
        len(table) - 1, room, most,
    )  # fmt: skip


@compiled
def find_quote(text, p, end):
    """Where the string that runs at p has its closing quote; `end` when it has none before that."""
    while p < end:
        w = word(text, p)
        quote, slash = w ^ _QUOTES, w ^ _SLASHES
        if (slash - _ONES) & ~slash & _TOPS:
            while p < end and byte(text, p) != QUOTE:
                p += 2 if byte(text, p) == BACKSLASH else 1
            break
        found = (quote - _ONES) & ~quote & _TOPS
        if found:
            p += trailing_zeros(found) >> 3
            break
        p += 8
    return min(p, end)


@compiled
def intern_text(text, a, size, strings, keep):
    """The number of text[a : a + size], a new one if need be; -1 when the table is full."""
    pool, starts, hashes, table, count, mask, room, most = strings
    h = np.uint64(size)
    for i in range(0, size - 7, 8):
        h = (h ^ word(text, a + i)) * _PRIME
        h ^= h >> np.uint64(32)
    rest = size & 7
    if rest:
        w = word(text, a + size - rest) & ((np.uint64(1) << np.uint64(8 * rest)) - np.uint64(1))
        h = (h ^ w) * _PRIME
        h ^= h >> np.uint64(32)
    slot = np.int64(h) & mask
    probes = 0
    while table[slot] >= 0:
        number = np.int64(table[slot])
        s = starts[number]
        if hashes[number] == h and starts[number + 1] - s == size:
            i = 0
            while i + 8 <= size and word(pool, s + i) == word(text, a + i):
                i += 8
            if i + 8 > size:
                while i < size and byte(pool, s + i) == byte(text, a + i):
                    i += 1
                if i == size:
                    return number
        slot = (slot + 1) & mask
        probes += 1
        if probes > _MAX_PROBES:
            return np.int64(-1)
    number = count[0]
    s = starts[number]
    if number >= (most if keep else min(most, MAX_STRINGS)) or s + size > room:
        return np.int64(-1)
    for i in range(size):
        pool[s + i] = text[a + i]
    starts[number + 1] = s + size
    hashes[number] = h
    table[slot] = number
    count[0] = number + 1
    return number
