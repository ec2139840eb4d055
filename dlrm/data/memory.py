"""Sources in memory: this rank's rows loaded once (`MemorySource`), or mapped files (`MappedSource`).

`MappedSource` is fast when everything is in the page cache, but DFTracer cannot see its page faults. Its
`bytes_read` counts headers only, as calls do; what it copies from the maps is in its spans data/read, which
have the argument `mapped`.
"""

import mmap
import os
from io import FileIO

import numpy as np

from common.descriptors import opening
from common.errors import os_errors_as_user_errors
from common.inputs import open_regular_file
from dlrm.data.npy import NpyLayout, scan_npy
from dlrm.data.rows import Rows, SourceKind, name_batch_argument
from dlrm.data.stream import (
    StreamPiece,
    StreamSource,
    cut_file_error,
    gather_rows,
    narrow_ids,
    open_stream,
)
from dlrm.runtime.trace import is_tracing, span


class MemorySource:
    """The rows of one rank in memory, loaded through `StreamSource`."""

    random_access = True
    in_memory = True
    contiguous = False

    def __init__(self, stream: StreamSource) -> None:
        self.stream = stream
        self.rows, self.row_bytes, self.bytes_read = stream.rows, stream.row_bytes, stream.bytes_read
        self.batch = 0
        self.runs = np.empty((0, 2), np.int64)  # [k, 2] loaded rows: first, past the last; ascending
        self.starts = np.zeros(1, np.int64)  # position of each run in the arrays
        self.arrays: Rows | None = None

    def load(self, runs: np.ndarray, scattered: bool = False) -> None:
        """Read runs of rows, int64 [k, 2], unless they are in memory already; `RowSource.load` says more."""
        runs = runs[np.argsort(runs[:, 0])]
        if self.arrays is not None and self._holds_runs(runs):
            return
        self.arrays = None  # free the old rows before the new ones are read
        self.runs, self.starts = runs, np.concatenate([[0], np.cumsum(runs[:, 1] - runs[:, 0])])
        parts = {
            name: np.empty((int(self.starts[-1]), part.columns), part.buffer.dtype)
            for name, part in self.stream.parts.items()
        }
        if scattered and len(runs):
            self._read_scattered(parts)
        else:
            for (start, stop), at in zip(runs.tolist(), self.starts.tolist(), strict=False):
                for name, part in self.stream.parts.items():
                    part.read_into(start, parts[name][at : at + stop - start], self.batch)
        self.arrays = gather_rows(parts)

    def _read_scattered(self, parts: dict[str, np.ndarray]) -> None:
        """Read everything from the first row to the last, keep the rows of `runs`."""
        wanted = np.arange(self.starts[-1]) + np.repeat(
            self.runs[:, 0] - self.starts[:-1], np.diff(self.starts)
        )
        low, high = int(wanted[0]), int(wanted[-1]) + 1
        for start in range(low, high, self.stream.chunk_rows):
            stop = min(start + self.stream.chunk_rows, high)
            first, last = np.searchsorted(wanted, [start, stop])
            for name, part in self.stream.parts.items():
                part.low = part.high = 0
                read = part.read_rows(start, stop, stop, self.batch)
                parts[name][first:last] = read[wanted[first:last] - start]

    def _holds_runs(self, runs: np.ndarray) -> bool:
        numbers = np.searchsorted(self.runs[:, 0], runs[:, 0], side="right") - 1
        return bool((numbers >= 0).all() and (runs[:, 1] <= self.runs[numbers, 1]).all())

    def read(self, start: int, stop: int, ahead: int = 0) -> Rows:
        self.load(np.array([[start, stop]]))
        assert self.arrays is not None
        number = int(np.searchsorted(self.runs[:, 0], start, side="right")) - 1
        at = int(self.starts[number] + start - self.runs[number, 0])
        return self.arrays.slice(at, at + stop - start)

    def take(self, rows: np.ndarray) -> Rows:
        assert self.arrays is not None, "load before take"
        numbers = np.searchsorted(self.runs[:, 0], rows, side="right") - 1
        return self.arrays.take(self.starts[numbers] + rows - self.runs[numbers, 0])

    def locate_row(self, row: int, part: str) -> str:
        return self.stream.locate_row(row, part)

    def close(self) -> None:
        self.arrays = None
        self.stream.close()


class MappedPiece:
    """The rows of one file, mapped, and copied when they are asked for.

    Touching a page beyond the end of a file that was cut meanwhile ends the process by SIGBUS, and the rest
    of its last page is zeros. So the file's size is checked before and after each copy. A cut during the copy
    itself, or on another node whose change this node's file system has not seen yet, is not noticed in time.
    """

    def __init__(self, piece: StreamPiece, columns: int, dtype: np.dtype) -> None:
        """`columns`: of the array. `dtype`: of the copies; the file may have int64 where it is int32."""
        self.piece, self.dtype = piece, dtype
        self.end = piece.offset + piece.rows * columns * piece.dtype.itemsize
        with (
            os_errors_as_user_errors(piece.path),
            opening,
            FileIO(piece.path, opener=open_regular_file) as file,
        ):
            self._check_size(os.fstat(file.fileno()).st_size)
            self.memory = mmap.mmap(file.fileno(), self.end, access=mmap.ACCESS_READ)
        self.rows = np.ndarray((piece.rows, columns), piece.dtype, self.memory, piece.offset)

    def copy(self, which: slice | np.ndarray, **batch: int) -> np.ndarray:
        """These rows of the piece. `batch`: which batch they are for, as an argument of the span."""
        self._check_size(self.memory.size())
        with span("data", "read", file=self.piece.path, mapped=1, **batch) as reading:
            found = self.rows[which].copy() if isinstance(which, slice) else self.rows.take(which, axis=0)
            if is_tracing() and len(found):
                first = int(which.start if isinstance(which, slice) else which.min())
                reading.update(bytes=found.nbytes, offset=self.piece.offset + first * self.rows.strides[0])
        self._check_size(self.memory.size())
        if found.dtype == self.dtype:
            return found
        numbers = np.arange(which.start, which.stop) if isinstance(which, slice) else which
        return narrow_ids(found, self.piece, numbers)

    def _check_size(self, size: int) -> None:
        if size < self.end:
            raise cut_file_error(self.piece.path, size)


class MappedSource:
    """The files as memory maps: the kernel reads a page when it is first used."""

    random_access = True
    in_memory = False
    contiguous = False

    def __init__(self, layout: NpyLayout, stage: str) -> None:
        self.stream = StreamSource(layout, stage)
        self.rows, self.row_bytes = self.stream.rows, self.stream.row_bytes
        self.bytes_read = layout.bytes_read
        self.batch, self.batch_key = 0, name_batch_argument(stage)
        self.maps = {
            name: [MappedPiece(piece, part.columns, part.buffer.dtype) for piece in part.pieces]
            for name, part in self.stream.parts.items()
        }
        self.starts = self.stream.parts["dense"].starts

    def read(self, start: int, stop: int, ahead: int = 0) -> Rows:
        number = int(np.searchsorted(self.starts, start, side="right")) - 1
        if stop > self.starts[number + 1]:  # across two days
            return self.take(np.arange(start, stop))
        low = int(self.starts[number])
        inside = slice(start - low, stop - low)
        batch = {self.batch_key: self.batch}
        return gather_rows({name: maps[number].copy(inside, **batch) for name, maps in self.maps.items()})

    def take(self, rows: np.ndarray) -> Rows:
        numbers = np.searchsorted(self.starts, rows, side="right") - 1
        parts = {}
        for name, maps in self.maps.items():
            part = self.stream.parts[name]
            out = parts[name] = np.empty((len(rows), part.columns), part.buffer.dtype)
            for number in np.unique(numbers):
                in_file = numbers == number
                inside = rows[in_file] - self.starts[number]
                out[in_file] = maps[number].copy(inside, **{self.batch_key: self.batch})
        return gather_rows(parts)

    def load(self, runs: np.ndarray, scattered: bool = False) -> None:
        """Nothing to load."""

    def locate_row(self, row: int, part: str) -> str:
        return self.stream.locate_row(row, part)

    def close(self) -> None:
        self.maps = {}


MEMORY = SourceKind(scan_npy, lambda layout, options: MemorySource(open_stream(layout, options)))
MAPPED = SourceKind(scan_npy, lambda layout, options: MappedSource(layout, options.stage))
