"""One rank's tensors in one file: the safetensors layout (a JSON header, then raw bytes).

`dlrm/checkpoint/blocks.py` writes and reads the bytes. Nothing is unpickled: reading a checkpoint never runs
code from it.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dlrm.checkpoint.blocks import (
    ITEM_BYTES,
    BlockReader,
    ChecksummedFile,
    CorruptCheckpoint,
    StoredPiece,
    read_blocks,
)
from dlrm.runtime.trace import span

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


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

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


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
    output = ChecksummedFile(folder / file)
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
    return {"tensors": tensors, "file": {file: output.describe()}}


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
        row_bytes = math.prod(stored.size[1:]) * ITEM_BYTES[stored.dtype]
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
