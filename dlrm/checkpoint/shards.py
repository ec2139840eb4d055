"""One rank's tensors in one file: the safetensors layout (a JSON header, then raw bytes), and a checksum
for each block of the file. Written and read with plain calls that a trace shows; nothing is unpickled.
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

SMALL = 1 << 20
BLOCK = 4 << 20  # bytes under one checksum, also those of one read or write
MOST_DIMENSIONS = 16
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
bytes_read: dict[str, int] = defaultdict(int)  # by file, under the name that it had then
bytes_written: dict[str, int] = defaultdict(int)


@dataclass(frozen=True)
class TensorPiece:
    """A rectangle of a named tensor, in this process's memory, or of a table in a file."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]  # of this rectangle in it
    tensor: torch.Tensor
    kept: bool = False  # nobody changes it: it needs no copy


@dataclass(frozen=True)
class StoredPiece:
    """A rectangle of a named tensor, in a file: its bytes are `size` elements of `dtype` from `at`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    size: tuple[int, ...]
    at: int
    file: str

    @classmethod
    def parse(cls, values: dict[str, Any]) -> "StoredPiece":
        lists = {key: tuple(values[key]) for key in ("shape", "offset", "size")}
        stored = cls(values["name"], values["dtype"], at=values["at"], file=values["file"], **lists)
        texts = all(isinstance(each, str) for each in (stored.name, stored.dtype, stored.file))
        numbers = [stored.at, *(n for each in lists.values() for n in each)]
        if not texts or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise ValueError("not a tensor")
        dimensions = {len(each) for each in lists.values()}
        if stored.dtype not in DTYPES or len(dimensions) != 1 or max(dimensions) > MOST_DIMENSIONS:
            raise ValueError(f"{stored.name[:100]}: not a tensor")
        inside = all(
            o >= 0 and n >= 0 and o + n <= whole
            for o, n, whole in zip(stored.offset, stored.size, stored.shape, strict=True)
        )
        if not inside or stored.at < 0 or "/" in stored.file or stored.file.startswith("."):
            raise ValueError(f"{stored.name[:100]}: impossible place")
        return stored


def _bytes_of(tensor: Any) -> Iterator[memoryview]:
    if not isinstance(tensor, torch.Tensor):  # ssd.snapshot.SnapshotSlice
        yield from tensor.parts()
        return
    flat: Any = tensor.detach().contiguous().reshape(-1)
    yield memoryview(flat.view(torch.uint8).numpy())


def write_pieces(folder: Path, file: str, pieces: Sequence[TensorPiece]) -> dict[str, Any]:
    """Write and fsync; returns what the checkpoint's description says about this file."""
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
        output.add(memoryview(len(text).to_bytes(8, "little") + text))
        for piece in pieces:
            with span("checkpoint", "write", file=file, bytes=piece.tensor.nbytes, tensor=piece.name):
                for part in _bytes_of(piece.tensor):
                    output.add(part)
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
    """A small file, written and on the disk."""
    output = _ChecksummedFile(path)
    try:
        output.add(memoryview(data))
        output.finish()
    finally:
        output.close()


class _ChecksummedFile:
    """A file being written, with a running checksum for each block."""

    def __init__(self, path: Path) -> None:
        self.name = os.path.abspath(path)
        with opening:
            self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        self.bytes, self.sums, self._sum = 0, [], 0
        self._small = bytearray()  # a hundred biases and counters are one call

    def add(self, data: memoryview) -> None:
        if len(data) < SMALL:
            self._small += data
        if len(data) >= SMALL or len(self._small) >= SMALL:
            self._flush()
        if len(data) >= SMALL:
            self._put(data)

    def _flush(self) -> None:
        small, self._small = self._small, bytearray()
        self._put(memoryview(small))

    def _put(self, data: memoryview) -> None:
        begun = 0
        while begun < len(data):
            part = data[begun : begun + BLOCK - self.bytes % BLOCK]
            written = os.write(self.descriptor, part)  # may be short
            bytes_written[self.name] += written
            self._sum = zlib.crc32(part[:written], self._sum)
            self.bytes += written
            begun += written
            if self.bytes % BLOCK == 0:
                self.sums.append(self._sum)
                self._sum = 0

    def finish(self) -> None:
        self._flush()
        if self.bytes % BLOCK:
            self.sums.append(self._sum)
        os.fsync(self.descriptor)

    def close(self) -> None:
        with opening:
            os.close(self.descriptor)


class CorruptCheckpoint(UserError):
    """A checkpoint does not hold what it says."""


class Blocks:
    """The checked block read last of each of a few files: tensors that share a block read it once."""

    FILES = 8

    def __init__(self) -> None:
        self._held: OrderedDict[Path, tuple[int, memoryview]] = OrderedDict()

    def get(self, path: Path, number: int) -> memoryview | None:
        held = self._held.get(path)
        if held is None or held[0] != number:
            return None
        self._held.move_to_end(path)
        return held[1]

    def room(self, path: Path, size: int) -> memoryview:
        """A buffer for the next block of this file: the one of the block before, where it is long enough."""
        _, buffer = self._held.pop(path, (0, memoryview(b"")))
        return buffer if len(buffer) >= size else memoryview(bytearray(size))

    def keep(self, path: Path, number: int, buffer: memoryview) -> None:
        self._held[path] = (number, buffer)
        if len(self._held) > self.FILES:
            self._held.popitem(last=False)


def read_blocks(
    path: Path, facts: dict[str, Any], start: int, stop: int, held: Blocks | None = None
) -> Iterator[tuple[int, memoryview]]:
    """(position, bytes) of the checked blocks that cover [start, stop) of a file, cut to it. What is given is
    good until the next one is asked for.
    """
    block, size = int(facts["block"]), int(facts["bytes"])
    if stop > size:
        raise CorruptCheckpoint(f"{path}: a tensor ends at {stop}, the file at {size}")
    held = held or Blocks()
    with contextlib.ExitStack() as stack:
        file: FileIO | None = None
        for number in range(start // block, -(-stop // block)):
            begin, end = number * block, min((number + 1) * block, size)
            data = held.get(path, number)
            if data is None:
                file = file or stack.enter_context(open_untraced_race(path, "rb"))
                data = held.room(path, min(block, size))
                _read_exactly(file, begin, data[: end - begin], path)
                if zlib.crc32(data[: end - begin]) != facts["crc32"][number]:
                    raise CorruptCheckpoint(f"{path}: wrong checksum at byte {begin}")
                held.keep(path, number, data)
            low, high = max(start, begin), min(stop, end)
            yield low, data[low - begin : high - begin]


@contextmanager
def open_untraced_race(path: Path, mode: str) -> Iterator[FileIO]:
    """Opened and closed while no other thread does either: the tracer would lose a file."""
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
    folder: Path, files: dict[str, Any], stored: StoredPiece, piece: TensorPiece, held: Blocks | None = None
) -> int:
    """Copy what a stored rectangle and a wanted one have in common; returns the elements copied."""
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
    # only the first dimension narrows what is read; the others are cut afterwards
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
    rest, done = bytearray(), 0  # a row may lie across two blocks
    for _, part in read_blocks(folder / stored.file, files[stored.file], start, stop, held):
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
