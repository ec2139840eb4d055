"""What a Parquet footer says of the smallest and largest values of its columns.

pyarrow ends the process where a footer contradicts itself (its accessors of column chunks do not catch the
C++ exceptions), so a file of somebody else is not asked through them. Here its footer is read as what it
is: a structure of Thrift's compact protocol, as parquet.thrift describes it. In: a file. Out: the footer's
bytes, and from these the limits.
"""

import os
import struct
from collections.abc import Iterator
from typing import Any

from dlrm.data.npy import CountingFile

MAGIC, END_BYTES = b"PAR1", 8
MOST_NESTING = 16
# Thrift's types on the wire
STOP, TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = 0, 1, 2, 3, 7, 8, 9, 10, 11, 12
INTEGERS = (4, 5, 6)  # 16, 32 and 64 bits, all as a zigzag varint
# Field numbers of parquet.thrift
ROW_GROUPS, COLUMNS, META_DATA, PATH, STATISTICS = 4, 1, 3, 3, 12
OLD_LARGEST, OLD_SMALLEST, LARGEST, SMALLEST = 1, 2, 5, 6


class CompactReader:
    """Reads a structure as {field number: value}. ValueError or IndexError for any other bytes."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def read_struct(self, depth: int = 0) -> dict[int, Any]:
        found, number = {}, 0
        while (head := self._take_byte()) & 15 != STOP:
            number = number + (head >> 4) if head >> 4 else self._read_integer()
            found[number] = self._read_value(head & 15, depth)
        return found

    def _read_value(self, kind: int, depth: int) -> Any:
        """The value that comes next. kind: Thrift's number of its type; depth: of nesting so far."""
        if depth > MOST_NESTING:
            raise ValueError("is nested too deeply")
        if kind in (TRUE, FALSE):
            return kind == TRUE
        if kind in INTEGERS:
            return self._read_integer()
        if kind == BYTE:
            return self._take_byte()
        if kind == DOUBLE:
            return struct.unpack("<d", self._take(8))[0]
        if kind == BINARY:
            return self._take(self._read_varint())
        if kind == STRUCT:
            return self.read_struct(depth + 1)
        if kind in (LIST, SET):
            head = self._take_byte()
            count = head >> 4 if head >> 4 < 15 else self._read_varint()
            return [self._read_element(head & 15, depth) for _ in self._each(count)]
        if kind == MAP:
            count = self._read_varint()
            kinds = self._take_byte() if count else 0
            return [
                (self._read_element(kinds >> 4, depth), self._read_element(kinds & 15, depth))
                for _ in self._each(count)
            ]
        raise ValueError("has a value of an unknown kind")

    def _read_element(self, kind: int, depth: int) -> Any:
        """A member of a list: there a truth value is a byte of its own."""
        return self._take_byte() == TRUE if kind in (TRUE, FALSE) else self._read_value(kind, depth + 1)

    def _each(self, count: int) -> range:
        """A member has at least one byte, so that a number cannot ask for more than the data hold."""
        if count > len(self._data) - self._at:
            raise ValueError("has a list that is longer than the footer")
        return range(count)

    def _read_integer(self) -> int:
        value = self._read_varint()
        return (value >> 1) ^ -(value & 1)

    def _read_varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._take_byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("has a number that does not end")

    def _take_byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _take(self, count: int) -> bytes:
        if count > len(self._data) - self._at:
            raise ValueError("has a text that is longer than the footer")
        self._at += count
        return self._data[self._at - count : self._at]


def read_footer(file: CountingFile) -> bytes:
    """The end of the file: the footer, its length in 4 bytes, PAR1. ValueError for a file without one."""
    size = os.fstat(file.fileno()).st_size
    file.seek(max(0, size - END_BYTES))
    end = file.read_up_to(END_BYTES)
    length = int.from_bytes(end[:4], "little")
    if len(end) < END_BYTES or end[4:] != MAGIC or not 0 < length <= size - END_BYTES - len(MAGIC):
        raise ValueError("is not a Parquet file, or is not complete")
    file.seek(size - END_BYTES - length)
    return file.read_up_to(length + END_BYTES)


def read_limits(footer: bytes) -> Iterator[dict[bytes, tuple[bytes, bytes] | None]]:
    """For each row group, by column: the bytes of the smallest and of the largest value, little endian; None
    where the footer does not say it. `footer`: from `read_footer`. ValueError, IndexError, TypeError,
    KeyError or AttributeError: it is damaged.
    """
    found = CompactReader(footer[:-END_BYTES]).read_struct()
    for group in found.get(ROW_GROUPS, ()):
        limits = {}
        for chunk in (each[META_DATA] for each in group[COLUMNS]):
            statistics = chunk.get(STATISTICS, {})
            small = statistics.get(SMALLEST, statistics.get(OLD_SMALLEST))
            large = statistics.get(LARGEST, statistics.get(OLD_LARGEST))
            limits[b".".join(chunk[PATH])] = (small, large) if small and large else None
        yield limits
