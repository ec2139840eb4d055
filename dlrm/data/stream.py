"""Rows from .npy files by large sequential reads into reused buffers: bounded memory, each byte read once.

FileIO.seek and readinto are used because DFTracer sees them; it sees neither np.load's reads (a FILE* over
a duplicated descriptor) nor os.preadv nor page faults of a memory map.
"""

from dataclasses import dataclass
from io import FileIO

import numpy as np

from common.descriptors import opening
from common.errors import UserError, printable
from common.inputs import open_regular_file
from dlrm.data.npy import NpyLayout, scan_npy
from dlrm.data.rows import Rows, SourceKind, SourceOptions, name_batch_argument
from dlrm.runtime.trace import span


@dataclass(frozen=True)
class StreamPiece:
    """The rows of a set that are in one file."""

    path: str
    dtype: np.dtype
    offset: int  # bytes before the first of these rows
    first: int  # number of that row in the file
    rows: int


class StreamedArray:
    """One group of columns (dense, sparse, labels, a feature) over all files of a set, with its buffer."""

    def __init__(
        self,
        name: str,
        columns: int,
        dtype: type,
        pieces: list[StreamPiece],
        bytes_read: dict[str, int],
        batch_key: str = "batch",
    ) -> None:
        """`pieces`: its rows, file by file. `bytes_read`: by path; what is read is added.

        name       "dense", "sparse", "labels" or a feature's number
        dtype      of the rows that are returned; a file may have int64 where it is int32
        batch_key  the name of the batch's number in the spans: it tells the sets apart
        """
        self.batch_key = batch_key
        self.name, self.columns, self.pieces, self.bytes_read = name, columns, pieces, bytes_read
        self.starts = np.cumsum([0] + [piece.rows for piece in pieces])
        self.row_bytes = columns * max(piece.dtype.itemsize for piece in pieces)
        self.buffer = np.empty((0, columns), dtype)
        self.low = self.high = 0  # the buffer has rows low to high - 1
        self._handle: FileIO | None = None
        self._position = 0

    def read_rows(self, start: int, stop: int, ahead: int, batch: int) -> np.ndarray:
        """A view of rows start to stop - 1. Reads those that the buffer lacks, and the rows up to `ahead`."""
        if not (self.low <= start and stop <= self.high):
            kept = self.high - start if self.low <= start < self.high else 0
            high = max(stop, ahead)
            if high - start > len(self.buffer):
                old, self.buffer = self.buffer, np.empty((high - start, self.columns), self.buffer.dtype)
            else:
                old = self.buffer
            self.buffer[:kept] = old[start - self.low : start - self.low + kept]
            self.low = self.high = start  # the buffer is empty if the read fails
            self.read_into(start + kept, self.buffer[kept : high - start], batch)
            self.high = high
        return self.buffer[start - self.low : stop - self.low]

    def read_into(self, start: int, out: np.ndarray, batch: int) -> None:
        """Fill `out` [rows, columns] with the rows from `start` on."""
        number = int(np.searchsorted(self.starts, start, side="right")) - 1
        done = 0
        while done < len(out):
            piece, inside = self.pieces[number], start + done - int(self.starts[number])
            rows = min(len(out) - done, piece.rows - inside)
            self._read(piece, inside, out[done : done + rows], batch)
            done += rows
            number += 1

    def _read(self, piece: StreamPiece, inside: int, out: np.ndarray, batch: int) -> None:
        """Fill `out` [rows, columns] with a piece's rows from number `inside` on. `batch`: for the trace."""
        if not out.size:
            return
        raw = out if piece.dtype == out.dtype else np.empty(out.shape, piece.dtype)
        offset = piece.offset + inside * self.columns * piece.dtype.itemsize
        batch_argument = {self.batch_key: batch}
        with span("data", "read", file=piece.path, offset=offset, bytes=raw.nbytes, **batch_argument):
            self._read_bytes(piece.path, offset, memoryview(raw.data).cast("B"))
        if raw is not out:  # int64 ids, as torchrec's scripts write the last day
            out[:] = narrow_ids(raw, piece, np.arange(inside, inside + len(raw)))

    def _read_bytes(self, path: str, offset: int, view: memoryview) -> None:
        """Fill `view` from byte `offset` of a file, which stays open for the next call."""
        try:
            if self._handle is None or self._handle.name != path:
                self.close()
                self._handle, self._position = FileIO(path, opener=open_regular_file), 0
            if self._position != offset:
                self._handle.seek(offset)
            done = 0
            while done < len(view):
                got = self._handle.readinto(view[done:])
                if not got:
                    raise cut_file_error(path, offset + done)
                done += got
                self.bytes_read[path] = self.bytes_read.get(path, 0) + got
        except OSError as error:
            raise UserError(f"{printable(path)}: {error.strerror} at byte {offset}") from error
        self._position = offset + done

    def locate_row(self, row: int) -> str:
        """File and row in it, for messages."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        piece = self.pieces[number]
        return f"{printable(piece.path)}, row {piece.first + row - int(self.starts[number])}"

    def close(self) -> None:
        if self._handle is not None:
            with opening:
                self._handle.close()
            self._handle = None


class StreamSource:
    """Reads rows in order, in chunks of at most `chunk_mb`."""

    random_access = False
    in_memory = False
    contiguous = False

    def __init__(self, layout: NpyLayout, stage: str, chunk_mb: float = 16) -> None:
        """stage: train, val or test, which decides the days."""
        self.bytes_read = layout.bytes_read
        self.batch = 0
        days = layout.split_days(stage)
        self.rows = sum(len(rows) for _, rows in days)
        self.parts: dict[str, StreamedArray] = {}
        for name, files in layout.parts.items():
            pieces = [
                StreamPiece(f.path, f.dtype, f.offset + rows.start * f.row_bytes, rows.start, len(rows))
                for f, rows in ((files[day], rows) for day, rows in days)
            ]
            dtype = np.float32 if name == "dense" else np.int32
            self.parts[name] = StreamedArray(
                name, files[0].columns, dtype, pieces, self.bytes_read, name_batch_argument(stage)
            )
        self.row_bytes = sum(part.row_bytes for part in self.parts.values())
        self.chunk_rows = max(1, int(chunk_mb * (1 << 20)) // self.row_bytes)

    def read(self, start: int, stop: int, ahead: int = 0) -> Rows:
        ahead = min(ahead, start + self.chunk_rows, self.rows)
        return gather_rows(
            {name: part.read_rows(start, stop, ahead, self.batch) for name, part in self.parts.items()}
        )

    def take(self, rows: np.ndarray) -> Rows:
        raise NotImplementedError("a stream is read in order")

    def load(self, runs: np.ndarray, scattered: bool = False) -> None:
        """Nothing: rows are read when `read` is called."""

    def locate_row(self, row: int, part: str) -> str:
        return self.parts.get(part, self.parts["dense"]).locate_row(row)

    def close(self) -> None:
        for part in self.parts.values():
            part.close()


def narrow_ids(ids: np.ndarray, piece: StreamPiece, inside: np.ndarray) -> np.ndarray:
    """int64 ids as int32; UserError for one that does not fit. `inside`: their rows in the piece."""
    limits = np.iinfo(np.int32)
    wrong = (ids < limits.min) | (ids > limits.max)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise UserError(
            f"{printable(piece.path)}: row {piece.first + inside[row]}, column {column}: "
            f"{ids[row, column]} does not fit int32: make the dataset again"
        )
    return ids.astype(np.int32)


def cut_file_error(path: str, end: int) -> UserError:
    return UserError(f"{printable(path)}: ends at byte {end}: the file was cut while it was read")


def gather_rows(parts: dict[str, np.ndarray]) -> Rows:
    """Arrays by part -> Rows. Parts: dense, labels, and sparse or the numbers of the features."""
    sparse = parts["sparse"] if "sparse" in parts else [parts[n] for n in parts if n.isdigit()]
    return Rows(parts["dense"], sparse, parts["labels"].reshape(-1))


def open_stream(layout: NpyLayout, options: SourceOptions) -> StreamSource:
    return StreamSource(layout, options.stage, options.read_chunk_mb)


STREAM = SourceKind(scan_npy, open_stream)
