"""One rank's tensors in one file: the safetensors layout (a JSON header, then raw bytes), and a CRC-32 for
each block of the file.

Written with write(2) and read with readinto, so that a trace shows every byte: a memory map would hide them.
Nothing is unpickled: reading a checkpoint never runs code from it.
"""

import json
import math
import os
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from dlrm.runtime.trace import opening, span

SMALL_BYTES = 1 << 20  # tensors below this are collected and written in one call
BLOCK = 4 << 20  # bytes under one checksum, and of one read or write
MAX_DIMENSIONS = 16
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
bytes_read: dict[str, int] = defaultdict(int)  # by file, under its name at that time
bytes_written: dict[str, int] = defaultdict(int)


@dataclass(frozen=True)
class TensorPiece:
    """A rectangle of a named tensor, in this process's memory, or of a table in a file.

    A sharded table is one tensor whose rectangles are on different ranks: a row-wise shard is a range of
    rows, a column-wise shard a range of columns.
    """

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]  # of this rectangle in it
    tensor: torch.Tensor
    kept: bool = False  # it does not change while it is written, so it needs no copy


@dataclass(frozen=True)
class StoredPiece:
    """A rectangle of a named tensor in a file, row-major."""

    name: str
    dtype: str  # a key of DTYPES
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
        if stored.dtype not in DTYPES or len(dimensions) != 1 or max(dimensions) > MAX_DIMENSIONS:
            raise ValueError(f"{stored.name[:100]}: not a tensor")
        inside = all(
            o >= 0 and n >= 0 and o + n <= whole
            for o, n, whole in zip(stored.offset, stored.size, stored.shape, strict=True)
        )
        if not inside or stored.at < 0 or "/" in stored.file or stored.file.startswith("."):
            raise ValueError(f"{stored.name[:100]}: impossible position")
        return stored


def _bytes_of(tensor: Any) -> Iterator[memoryview]:
    if not isinstance(tensor, torch.Tensor):  # ssd.snapshot.SnapshotSlice
        yield from tensor.read_parts()
        return
    flat: Any = tensor.detach().contiguous().reshape(-1)
    yield memoryview(flat.view(torch.uint8).numpy())


def write_pieces(folder: Path, file: str, pieces: Sequence[TensorPiece]) -> dict[str, Any]:
    """Write FOLDER/FILE with these pieces and fsync it. Returns what the checkpoint's description has of it:
    {"tensors": StoredPieces as dicts, "file": {name: bytes, block, crc32}}.
    """
    header: dict[str, Any] = {}
    position = 0
    for number, piece in enumerate(pieces):
        size = piece.tensor.numel() * piece.tensor.element_size()
        header[f"{number}:{piece.name}"] = {
            "dtype": NAMES[piece.tensor.dtype],
            "shape": list(piece.tensor.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    output = _ChecksummedFile(folder / file)
    try:
        output.add_bytes(memoryview(len(text).to_bytes(8, "little") + text))
        for piece in pieces:
            with span("checkpoint", "write", file=file, bytes=piece.tensor.nbytes, tensor=piece.name):
                for part in _bytes_of(piece.tensor):
                    output.add_bytes(part)
        output.finish_file()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder / file)) from None
    finally:
        output.close()
    tensors = [
        asdict(
            StoredPiece(
                piece.name,
                entry["dtype"],
                piece.shape,
                piece.offset,
                tuple(piece.tensor.shape),
                start + entry["data_offsets"][0],
                file,
            )
        )
        for piece, entry in zip(pieces, header.values(), strict=True)
    ]
    return {"tensors": tensors, "file": {file: {"bytes": output.bytes, "block": BLOCK, "crc32": output.sums}}}


def write_synced(path: Path, data: bytes) -> None:
    """Write a small file and fsync it."""
    output = _ChecksummedFile(path)
    try:
        output.add_bytes(memoryview(data))
        output.finish_file()
    finally:
        output.close()


class _ChecksummedFile:
    """A new file being written, with the checksums of its blocks so far."""

    def __init__(self, path: Path) -> None:
        self.name = os.path.abspath(path)
        with opening:
            self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self.bytes, self.sums, self._sum = 0, [], 0
        self._small = bytearray()  # not written yet: a hundred biases and counters become one call

    def add_bytes(self, data: memoryview) -> None:
        if len(data) < SMALL_BYTES:
            self._small += data
        if len(data) >= SMALL_BYTES or len(self._small) >= SMALL_BYTES:
            self._flush_small()
        if len(data) >= SMALL_BYTES:
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

    def close(self) -> None:
        with opening:
            os.close(self.descriptor)


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
        with opening:  # see `trace.opening`
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


def read_into(
    folder: Path,
    files: dict[str, Any],
    stored: StoredPiece,
    pieces: Sequence[TensorPiece],
    reader: BlockReader,
) -> list[int]:
    """Copy the intersection of a stored rectangle with each of `pieces` into its tensor; returns how many
    elements each has got. What several pieces need is read once.

    This is how a checkpoint is loaded under another sharding: each rank reads, of every stored rectangle, the
    part that its own shards need.
    """
    copies = [_Copy(stored, piece) for piece in pieces]
    wanted = [copy for copy in copies if copy.elements]
    if wanted:
        # Only whole rows are contiguous: the first dimension limits what is read, the others are cut later.
        row_bytes = math.prod(stored.size[1:]) * DTYPES[stored.dtype].itemsize
        first, last = min(copy.rows[0] for copy in wanted), max(copy.rows[1] for copy in wanted)
        start, stop = stored.at + first * row_bytes, stored.at + last * row_bytes
        rest = bytearray()  # the start of a row that continues in the next block
        for _, part in read_blocks(folder / stored.file, files[stored.file], start, stop, reader):
            data = rest + part if rest else part
            whole = len(data) // row_bytes
            if whole:
                values = torch.frombuffer(bytearray(data[: whole * row_bytes]), dtype=DTYPES[stored.dtype])
                for copy in wanted:
                    copy.add_rows(first, values.reshape(whole, *stored.size[1:]))
                first += whole
            rest = bytearray(data[whole * row_bytes :])
    return [copy.elements for copy in copies]


class _Copy:
    """Copies the intersection of a stored rectangle with a piece, some rows at a time."""

    def __init__(self, stored: StoredPiece, piece: TensorPiece) -> None:
        low = [max(a, b) for a, b in zip(stored.offset, piece.offset, strict=True)]
        ends = zip(stored.offset, stored.size, piece.offset, piece.tensor.shape, strict=True)
        high = [min(a + n, b + m) for a, n, b, m in ends]
        self.elements = math.prod(max(0, b - a) for a, b in zip(low, high, strict=True))
        if self.elements and DTYPES[stored.dtype] != piece.tensor.dtype:
            raise CorruptCheckpoint(
                f"{piece.name}: {stored.dtype} in the checkpoint, {piece.tensor.dtype} in the model"
            )
        self.target = piece.tensor.detach()
        # rows of the rectangle; a scalar is one row
        self.rows = (low[0] - stored.offset[0], high[0] - stored.offset[0]) if low else (0, 1)
        self.shift = stored.offset[0] - piece.offset[0] if low else 0  # from a row's number here to there
        spans = list(zip(low[1:], high[1:], strict=True))
        self.source_columns = tuple(
            slice(a - b, c - b) for (a, c), b in zip(spans, stored.offset[1:], strict=True)
        )
        self.target_columns = tuple(
            slice(a - b, c - b) for (a, c), b in zip(spans, piece.offset[1:], strict=True)
        )

    def add_rows(self, first: int, values: torch.Tensor) -> None:
        """`values`: the rectangle's rows from number `first` on."""
        low, high = max(first, self.rows[0]), min(first + len(values), self.rows[1])
        if low >= high:
            return
        if not self.target.dim():
            self.target.copy_(values[0])
            return
        found = values[(slice(low - first, high - first), *self.source_columns)]
        rows = slice(low + self.shift, high + self.shift)
        self.target[(rows, *self.target_columns)] = found.to(self.target.device)
