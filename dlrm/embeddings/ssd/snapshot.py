"""A snapshot of a table in a file, for a checkpoint that is written while training continues.

Copy on write: nothing is copied when the snapshot is made. The first time that a row is overwritten
afterwards, its old value goes to a file without a name, and readers of the snapshot get it from there.
"""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dlrm.embeddings.ssd.row_file import RowFile, as_raw_bytes
from dlrm.runtime.errors import UserError

MAX_LISTS = 256  # sorted lists of saved rows; beyond that they are merged into one


class TableSnapshot:
    """The rows of a row file as they were when this was made."""

    def __init__(self, row_file: RowFile) -> None:
        self.row_file = row_file
        # written at that time; rows of the others had their first values
        self.blocks = row_file.blocks.copy()
        self.unchanged = True  # no row has been overwritten since
        self.error: OSError | None = None
        # a bit for each row whose old value is saved
        self._saved_bits = np.zeros(-(-row_file.rows // 8), np.uint8)
        self._saved: list[
            tuple[np.ndarray, np.ndarray]
        ] = []  # (rows in ascending order, their positions in the file of old values)
        self._old_values, self._count = -1, 0  # file descriptor, rows in it
        try:
            self._old_values = row_file.open_old_values()
        except OSError as error:
            self.error = error

    def save_old_rows(self, ids: np.ndarray) -> None:
        """Save the old values of these rows (ascending), which are about to be overwritten.

        The caller holds the row file's lock. An error is raised later, to the checkpoint that reads.
        """
        self.unchanged = False
        ids = ids[self.blocks[self.row_file.find_block(ids)]]
        bits = np.left_shift(1, ids & 7).astype(np.uint8)
        new = (self._saved_bits[ids >> 3] & bits) == 0
        ids, bits = ids[new], bits[new]
        if not len(ids) or self.error:
            return
        np.bitwise_or.at(self._saved_bits, ids >> 3, bits)
        try:
            for begin in range(0, len(ids), self.row_file.rows_per_call):
                data, at = (
                    as_raw_bytes(self.row_file.read_stored(ids[begin : begin + self.row_file.rows_per_call])),
                    self._count + begin,
                )
                written = os.pwrite(self._old_values, data, at * self.row_file.row_bytes)
                if written < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except (OSError, UserError) as error:  # the checkpoint fails, training continues
            self.error = error if isinstance(error, OSError) else OSError(errno.EIO, str(error))
            return
        self._saved.append((ids, np.arange(self._count, self._count + len(ids))))
        self._count += len(ids)
        if len(self._saved) > MAX_LISTS:
            rows, places = (np.concatenate(each) for each in zip(*self._saved, strict=True))
            order = np.argsort(rows)
            self._saved = [(rows[order], places[order])]

    def read_block(self, block: int) -> Iterator[np.ndarray]:
        """The rows of a block as float32 [rows, width], a portion at a time. On any thread."""
        if not self.blocks[block]:
            yield from self.row_file.draw_first_values(block)
            return
        for low, high in self.row_file.split_block(block):
            with self.row_file.lock:
                rows = self.row_file.read_range(low, high)
                for ids, places in self._saved:
                    begin, end = np.searchsorted(ids, (low, high))
                    if end > begin:
                        rows[ids[begin:end] - low] = self._read_saved(places[begin:end])
                if self.error:
                    raise self.error
            yield rows

    def _read_saved(self, places: np.ndarray) -> np.ndarray:
        file, size = self._old_values, self.row_file.row_bytes
        data = b"".join([os.pread(file, size, place * size) for place in places.tolist()])
        return np.frombuffer(data, np.float32).reshape(len(places), -1)


@dataclass(frozen=True)
class SnapshotSlice:
    """Some columns of a snapshot: what a checkpoint takes for a tensor, read while it is written."""

    snapshot: TableSnapshot
    columns: slice
    shape: torch.Size
    place: tuple[int, ...]  # offset of its first element in the whole table
    dtype: torch.dtype = torch.float32

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    def element_size(self) -> int:
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.numel() * self.element_size()

    def read_parts(self) -> Iterator[memoryview]:
        """All bytes in row order, a portion at a time."""
        try:
            for block in range(len(self.snapshot.blocks)):
                for rows in self.snapshot.read_block(block):
                    yield as_raw_bytes(rows[:, self.columns])
        except UserError as error:
            raise OSError(errno.EIO, str(error)) from None
