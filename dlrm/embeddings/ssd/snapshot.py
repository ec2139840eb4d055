"""A table in a file as it is at one moment, for a checkpoint that is written while training goes on.

Nothing is copied beforehand. The first time that a row is overwritten afterwards, its old value is put
aside, in a file without a name; who reads the rows later gets the old ones from there.
"""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dlrm.embeddings.ssd.row_file import RowFile, as_raw_bytes
from dlrm.runtime.errors import UserError

MANY = 256  # sorted lists to search


class TableSnapshot:
    """The rows of `store` as they are now, as long as this lives."""

    def __init__(self, store: RowFile) -> None:
        self.store = store
        self.blocks = store.blocks.copy()  # the others are as they begin, whatever becomes of them
        self.fresh = True  # nothing was overwritten
        self.error: OSError | None = None
        self._seen = np.zeros(-(-store.rows // 8), np.uint8)  # a bit for each row that is aside
        self._lists: list[tuple[np.ndarray, np.ndarray]] = []  # rows in ascending order, where they are aside
        self._aside, self._count = -1, 0
        try:
            self._aside = store.aside()
        except OSError as error:
            self.error = error

    def keep(self, ids: np.ndarray) -> None:
        """These rows, in ascending order, are about to be overwritten. The store's lock is held."""
        self.fresh = False
        ids = ids[self.blocks[self.store.block_of(ids)]]
        bits = np.left_shift(1, ids & 7).astype(np.uint8)
        new = (self._seen[ids >> 3] & bits) == 0
        ids, bits = ids[new], bits[new]
        if not len(ids) or self.error:
            return
        np.bitwise_or.at(self._seen, ids >> 3, bits)
        try:
            for begin in range(0, len(ids), self.store.few):
                data, at = (
                    as_raw_bytes(self.store.get(ids[begin : begin + self.store.few])),
                    self._count + begin,
                )
                written = os.pwrite(self._aside, data, at * self.store.row_bytes)
                if written < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except (OSError, UserError) as error:  # the checkpoint fails, training goes on
            self.error = error if isinstance(error, OSError) else OSError(errno.EIO, str(error))
            return
        self._lists.append((ids, np.arange(self._count, self._count + len(ids))))
        self._count += len(ids)
        if len(self._lists) > MANY:
            rows, places = (np.concatenate(each) for each in zip(*self._lists, strict=True))
            order = np.argsort(rows)
            self._lists = [(rows[order], places[order])]

    def pieces(self, block: int) -> Iterator[np.ndarray]:
        """The rows of a block, a portion at a time. On any thread."""
        if not self.blocks[block]:
            yield from self.store.drawn(block)
            return
        for low, high in self.store.parts(block):
            with self.store.lock:
                rows = self.store.stretch(low, high)
                for ids, places in self._lists:
                    begin, end = np.searchsorted(ids, (low, high))
                    if end > begin:
                        rows[ids[begin:end] - low] = self._old(places[begin:end])
                if self.error:
                    raise self.error
            yield rows

    def _old(self, places: np.ndarray) -> np.ndarray:
        file, size = self._aside, self.store.row_bytes
        data = b"".join([os.pread(file, size, place * size) for place in places.tolist()])
        return np.frombuffer(data, np.float32).reshape(len(places), -1)


@dataclass(frozen=True)
class SnapshotSlice:
    """Some columns of a moment's rows: what a checkpoint takes for a tensor, read when it is written."""

    moment: TableSnapshot
    columns: slice
    shape: torch.Size
    place: tuple[int, ...]  # of its first element in the whole table
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

    def parts(self) -> Iterator[memoryview]:
        """All bytes, in order."""
        try:
            for block in range(len(self.moment.blocks)):
                for rows in self.moment.pieces(block):
                    yield as_raw_bytes(rows[:, self.columns])
        except UserError as error:
            raise OSError(errno.EIO, str(error)) from None
