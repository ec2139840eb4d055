"""The files of a checkpoint as blocks of bytes, each with a CRC-32; and where a stored tensor lies in them.

Written with write(2) and read with readinto, so that a trace shows every byte: a memory map would hide them.
What the bytes mean is `dlrm/checkpoint/shards.py`'s. Needs no torch.
"""

import os
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from common.descriptors import close_descriptor, open_descriptor, opening
from common.errors import UserError
from dlrm.runtime.trace import span

SMALL_BYTES = 1 << 20  # what is added in parts below this is collected and written in one call
BLOCK = 4 << 20  # bytes under one checksum, and of one read or write
MAX_DIMENSIONS = 16
# of an element, by the names of the safetensors format
ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
bytes_read: dict[str, int] = defaultdict(int)  # by file, under its name at that time
bytes_written: dict[str, int] = defaultdict(int)


@dataclass(frozen=True)
class StoredPiece:
    """A rectangle of a named tensor in a file, row-major."""

    name: str
    dtype: str  # a key of ITEM_BYTES
    shape: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]  # of this rectangle in it
    size: tuple[int, ...]  # of this rectangle
    at: int  # its first byte in the file
    file: str

    @classmethod
    def parse(cls, values: dict[str, Any]) -> "StoredPiece":
        """From a description; ValueError, KeyError or TypeError unless it is a possible rectangle."""
        lists = {key: tuple(values[key]) for key in ("shape", "offset", "size")}
        stored = cls(values["name"], values["dtype"], at=values["at"], file=values["file"], **lists)
        texts = all(isinstance(each, str) for each in (stored.name, stored.dtype, stored.file))
        numbers = [stored.at, *(n for each in lists.values() for n in each)]
        if not texts or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise ValueError("not a tensor")
        dimensions = {len(each) for each in lists.values()}
        if stored.dtype not in ITEM_BYTES or len(dimensions) != 1 or max(dimensions) > MAX_DIMENSIONS:
            raise ValueError(f"{stored.name[:100]}: not a tensor")
        inside = all(
            o >= 0 and n >= 0 and o + n <= whole
            for o, n, whole in zip(stored.offset, stored.size, stored.shape, strict=True)
        )
        if not inside or stored.at < 0 or "/" in stored.file or stored.file.startswith("."):
            raise ValueError(f"{stored.name[:100]}: impossible position")
        return stored


def write_synced(path: Path, data: bytes) -> None:
    """Write a small file and fsync it."""
    output = ChecksummedFile(path)
    try:
        output.add_bytes(memoryview(data))
        output.finish_file()
    finally:
        output.close()


class ChecksummedFile:
    """A new file being written, with the checksums of its blocks so far."""

    def __init__(self, path: Path) -> None:
        self.name = os.path.abspath(path)
        self.descriptor = open_descriptor(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self.bytes, self.sums, self._sum = 0, [], 0
        self._small = bytearray()  # not written yet: a hundred biases and counters become one call

    def add_bytes(self, data: memoryview) -> None:
        if len(data) < SMALL_BYTES:
            self._small += data
        if len(data) >= SMALL_BYTES or len(self._small) >= SMALL_BYTES:
            self._flush_small()
        if len(data) >= SMALL_BYTES:
            self._write_blocks(data)

    def write_now(self, data: memoryview) -> None:
        """One write of exactly these bytes, whatever their size; up to the end of a block."""
        self._flush_small()
        self._write_blocks(data)

    def _flush_small(self) -> None:
        small, self._small = self._small, bytearray()
        self._write_blocks(memoryview(small))

    def _write_blocks(self, data: memoryview) -> None:
        position = 0
        while position < len(data):
            part = data[position : position + BLOCK - self.bytes % BLOCK]  # to the end of the block
            written = os.write(self.descriptor, part)  # may write less than asked
            bytes_written[self.name] += written
            self._sum = zlib.crc32(part[:written], self._sum)
            self.bytes += written
            position += written
            if self.bytes % BLOCK == 0:
                self.sums.append(self._sum)
                self._sum = 0

    def finish_file(self) -> None:
        self._flush_small()
        if self.bytes % BLOCK:
            self.sums.append(self._sum)
        # `analysis check` holds the calls against this size where a stopped run left no results.json
        with span("checkpoint", "sync", file=self.name, size=self.bytes):
            os.fsync(self.descriptor)

    def describe(self) -> dict[str, Any]:
        """What the checkpoint's description has of the file."""
        return {"bytes": self.bytes, "block": BLOCK, "crc32": self.sums}

    def close(self) -> None:
        close_descriptor(self.descriptor)


class CorruptCheckpoint(UserError):
    """A checkpoint whose description or files are damaged or missing. Resuming skips it."""


class BlockReader:
    """Files of a checkpoint being read: each is opened once, and its last verified block is kept, so that
    tensors which share a block read it once.
    """

    MAX_FILES = 8  # open at a time

    def __init__(self) -> None:
        self._files: OrderedDict[Path, _OpenFile] = OrderedDict()  # the one used last comes last

    def read_block(self, path: Path, facts: dict[str, Any], number: int) -> memoryview:
        """The bytes of block `number`; valid until another block of this file is read.

        facts  the file's entry in the description: bytes, block, crc32
        """
        block, size = int(facts["block"]), int(facts["bytes"])
        begin, end = number * block, min((number + 1) * block, size)
        file = self._open(path, min(block, size))
        if file.number != number:
            file.number = None  # the buffer is damaged if the read fails
            data = file.buffer[: end - begin]
            with span("checkpoint", "read", file=str(path), offset=begin, bytes=len(data)):
                _read_exactly(file.raw, begin, data, path)
            if zlib.crc32(data) != facts["crc32"][number]:
                raise CorruptCheckpoint(f"{path}: wrong checksum at byte {begin}")
            file.number = number
        return file.buffer[: end - begin]

    def _open(self, path: Path, block: int) -> "_OpenFile":
        if path not in self._files:
            if len(self._files) == self.MAX_FILES:
                self._files.popitem(last=False)[1].close()
            with opening:
                raw = FileIO(path)
            self._files[path] = _OpenFile(raw, memoryview(bytearray(block)))
        self._files.move_to_end(path)
        return self._files[path]

    def close(self) -> None:
        """Close all files; they are opened again when they are read again."""
        while self._files:
            self._files.popitem()[1].close()


@dataclass
class _OpenFile:
    raw: FileIO
    buffer: memoryview
    number: int | None = None  # of the block in the buffer

    def close(self) -> None:
        with opening:
            self.raw.close()


def read_blocks(
    path: Path, facts: dict[str, Any], start: int, stop: int, reader: BlockReader
) -> Iterator[tuple[int, memoryview]]:
    """Yield (position, bytes) of bytes [start, stop) of a file, block by block, each verified by its
    checksum. The bytes of one block are overwritten when the next one is read.
    """
    block, size = int(facts["block"]), int(facts["bytes"])
    if stop > size:
        raise CorruptCheckpoint(f"{path}: a tensor ends at {stop}, the file ends at {size}")
    for number in range(start // block, -(-stop // block)):
        data, begin = reader.read_block(path, facts, number), number * block
        low, high = max(start, begin), min(stop, begin + len(data))
        yield low, data[low - begin : high - begin]


def _read_exactly(file: Any, position: int, buffer: memoryview, path: Path) -> None:
    """Fill `buffer` from byte `position` of an open file; its bytes count in `bytes_read`. CorruptCheckpoint,
    which names `path`, where the file ends before.
    """
    file.seek(position)
    filled = 0
    while filled < len(buffer):
        count = file.readinto(buffer[filled:])
        if not count:
            raise CorruptCheckpoint(f"{path}: was cut short, at byte {position + filled}")
        filled += count
        bytes_read[os.path.abspath(path)] += count
