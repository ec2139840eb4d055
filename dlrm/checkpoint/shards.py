"""One rank's tensors in one file: the safetensors layout (a JSON header, then raw bytes), and a CRC-32 for
each block of the file.

Written with write(2) and read with readinto, so that a trace shows every byte: a memory map would hide them.
Nothing is unpickled: reading a checkpoint never runs code from it.
"""

import contextlib
import json
import os
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
        yield from tensor.parts()
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
        output.finish()
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
        output.finish()
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

    def finish(self) -> None:
        self._flush_small()
        if self.bytes % BLOCK:
            self.sums.append(self._sum)
        os.fsync(self.descriptor)

    def close(self) -> None:
        with opening:
            os.close(self.descriptor)


class CorruptCheckpoint(UserError):
    """A checkpoint whose description or files are damaged or missing. Resuming skips it."""


class Blocks:
    """A cache: the last verified block of each of a few files. Tensors that share a block read it once."""

    MAX_FILES = 8

    def __init__(self) -> None:
        self._held: OrderedDict[Path, tuple[int, memoryview]] = OrderedDict()

    def get(self, path: Path, number: int) -> memoryview | None:
        """Block `number` of the file, if it is cached."""
        held = self._held.get(path)
        if held is None or held[0] != number:
            return None
        self._held.move_to_end(path)
        return held[1]

    def make_buffer(self, path: Path, size: int) -> memoryview:
        """A buffer for the next block of this file: that of the block before, where it is long enough."""
        _, buffer = self._held.pop(path, (0, memoryview(b"")))
        return buffer if len(buffer) >= size else memoryview(bytearray(size))

    def put(self, path: Path, number: int, buffer: memoryview) -> None:
        self._held[path] = (number, buffer)
        if len(self._held) > self.MAX_FILES:
            self._held.popitem(last=False)


def read_blocks(
    path: Path, facts: dict[str, Any], start: int, stop: int, cache: Blocks | None = None
) -> Iterator[tuple[int, memoryview]]:
    """Yield (position, bytes) of bytes [start, stop) of a file, block by block, each verified by its
    checksum.

    facts  the file's entry in the description: bytes, block, crc32
    The bytes of one block are overwritten when the next one is read.
    """
    block, size = int(facts["block"]), int(facts["bytes"])
    if stop > size:
        raise CorruptCheckpoint(f"{path}: a tensor ends at {stop}, the file ends at {size}")
    cache = cache or Blocks()
    with contextlib.ExitStack() as stack:
        file: FileIO | None = None
        for number in range(start // block, -(-stop // block)):
            begin, end = number * block, min((number + 1) * block, size)
            data = cache.get(path, number)
            if data is None:
                file = file or stack.enter_context(open_untraced_race(path, "rb"))
                data = cache.make_buffer(path, min(block, size))
                _read_exactly(file, begin, data[: end - begin], path)
                if zlib.crc32(data[: end - begin]) != facts["crc32"][number]:
                    raise CorruptCheckpoint(f"{path}: wrong checksum at byte {begin}")
                cache.put(path, number, data)
            low, high = max(start, begin), min(stop, end)
            yield low, data[low - begin : high - begin]


@contextmanager
def open_untraced_race(path: Path, mode: str) -> Iterator[FileIO]:
    """Open a file, and later close it, while no other thread does either: see `trace.opening`."""
    with opening:
        file = FileIO(path, mode)
    try:
        yield file
    finally:
        with opening:
            file.close()


def _read_exactly(file: Any, position: int, buffer: memoryview, path: Path) -> None:
    file.seek(position)
    filled = 0
    while filled < len(buffer):
        count = file.readinto(buffer[filled:])
        if not count:
            raise CorruptCheckpoint(f"{path}: ends at byte {position + filled}, too early")
        filled += count
        bytes_read[os.path.abspath(path)] += count


def read_into(
    folder: Path, files: dict[str, Any], stored: StoredPiece, piece: TensorPiece, cache: Blocks | None = None
) -> int:
    """Copy the intersection of a stored rectangle with `piece` into its tensor; returns the elements copied.

    This is how a checkpoint is loaded under another sharding: each rank reads, of every stored rectangle, the
    part that its own shards need.
    """
    low = [max(a, b) for a, b in zip(stored.offset, piece.offset, strict=True)]
    high = [
        min(a + n, b + m)
        for a, n, b, m in zip(stored.offset, stored.size, piece.offset, piece.tensor.shape, strict=True)
    ]
    if any(b <= a for a, b in zip(low, high, strict=True)):
        return 0
    dtype = DTYPES[stored.dtype]
    if dtype != piece.tensor.dtype:
        raise CorruptCheckpoint(
            f"{piece.name}: {stored.dtype} in the checkpoint, {piece.tensor.dtype} in the model"
        )
    # Only whole rows are contiguous: the first dimension limits what is read, the others are cut afterwards.
    rows = (low[0] - stored.offset[0], high[0] - stored.offset[0]) if low else (0, 1)
    width = 1
    for n in stored.size[1:]:
        width *= n
    row_bytes = width * torch.empty(0, dtype=dtype).element_size()
    start, stop = stored.at + rows[0] * row_bytes, stored.at + rows[1] * row_bytes
    target = piece.tensor.detach()
    inner = tuple(slice(a - b, c - b) for a, b, c in zip(low[1:], piece.offset[1:], high[1:], strict=True))
    outer = tuple(slice(a - b, c - b) for a, b, c in zip(low[1:], stored.offset[1:], high[1:], strict=True))
    first = low[0] - piece.offset[0] if low else 0
    rest, done = bytearray(), 0  # the start of a row that continues in the next block; rows copied
    for _, part in read_blocks(folder / stored.file, files[stored.file], start, stop, cache):
        data = rest + part if rest else part
        whole = len(data) // row_bytes
        if whole:
            values = torch.frombuffer(bytearray(data[: whole * row_bytes]), dtype=dtype)
            values = values.reshape(whole, *stored.size[1:])
            if low:
                at = slice(first + done, first + done + whole)
                target[(at, *inner)] = values[(slice(None), *outer)].to(target.device)
            else:
                target.copy_(values[0])
            done += whole
        rest = bytearray(data[whole * row_bytes :])
    count = 1
    for a, b in zip(low, high, strict=True):
        count *= b - a
    return count
