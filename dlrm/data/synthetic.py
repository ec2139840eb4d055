"""Rows out of thin air: dense normal, ids uniform in the table sizes, labels by a coin.

A row depends on its number and the seed alone, so that ranks, batch sizes and resuming change nothing.
Drawing afresh would cost more than a training step's loader: a pool of rows is drawn once, and each turn
through it flips other bits of the ids, so that all of a large table is touched.
"""

from collections.abc import Sequence

import numpy as np

from dlrm.data.criteo import NUM_DENSE, NUM_SPARSE
from dlrm.data.rows import STAGES, Rows
from dlrm.runtime.errors import UserError

POOL = 1 << 14


class RandomSource:
    random_access = True
    holds = False
    contiguous = False

    def __init__(
        self,
        stage: str,
        rows: int,
        table_sizes: Sequence[int],
        seed: int = 0,
    ) -> None:
        if len(table_sizes) != NUM_SPARSE or min(table_sizes) < 1:
            raise UserError(f"--num_embeddings_per_feature: {NUM_SPARSE} sizes of at least 1 are needed")
        self.rows, self.batch = rows, 0
        self.sizes = np.array(table_sizes, np.uint64)
        self.key = [seed % 2**64, STAGES.index(stage)]
        draw = np.random.default_rng(self.key)
        self.dense = draw.standard_normal((POOL, NUM_DENSE), np.float32)
        self.bits = draw.integers(0, 1 << 32, (POOL, NUM_SPARSE), np.uint32)
        self.labels = draw.integers(0, 2, POOL, np.int32)
        self._turn, self._flips = -1, np.zeros(0, np.uint32)
        self.row_bytes = 4 * (NUM_DENSE + NUM_SPARSE + 1)
        self.bytes_read: dict[str, int] = {}

    def read(self, start: int, stop: int, ahead: int = 0) -> Rows:
        turn, at = divmod(start, POOL)
        if at + stop - start > POOL:
            return self.take(np.arange(start, stop))
        place = slice(at, at + stop - start)
        return self._rows(place, self.bits[place] ^ self._turned(turn))

    def take(self, rows: np.ndarray) -> Rows:
        turns, at = np.divmod(rows, POOL)
        bits = self.bits[at]
        for turn in np.unique(turns):
            bits[turns == turn] ^= self._turned(int(turn))
        return self._rows(at, bits)

    def _turned(self, turn: int) -> np.ndarray:
        """What this turn through the pool flips, per column."""
        if turn != self._turn:
            draw = np.random.default_rng([*self.key, 1, turn])
            self._turn, self._flips = turn, draw.integers(0, 1 << 32, len(self.sizes), np.uint32)
        return self._flips

    def _rows(self, at: slice | np.ndarray, bits: np.ndarray) -> Rows:
        ids = ((bits * self.sizes) >> np.uint64(32)).astype(np.int32)
        return Rows(self.dense[at], ids, self.labels[at])

    def hold(self, runs: np.ndarray, gaps: bool = False) -> None:
        """Nothing to load."""

    def where(self, row: int, part: str) -> str:
        return f"random row {row}"

    def close(self) -> None:
        """Nothing to close."""
