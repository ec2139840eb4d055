"""Rows out of thin air: dense normal, ids uniform in the table sizes, labels by a coin.

A row depends on its number and the seed alone, so that ranks, batch sizes and resuming change nothing.
Drawing afresh would cost more than a training step's loader: a pool of rows is drawn once, and each turn
through it flips other bits of the ids, so that all of a large table is touched.
"""

from collections.abc import Sequence

import numpy as np

from dlrm.criteo import NUM_DENSE, NUM_SPARSE
from dlrm.data.rows import STAGES, Rows
from dlrm.errors import UserError

POOL = 1 << 14


class Random:
    random_access = True
    holds = False

    def __init__(
        self,
        stage: str,
        rows: int,
        table_sizes: Sequence[int],
        seed: int = 0,
        multi_hot_sizes: Sequence[int] | None = None,
    ) -> None:
        if len(table_sizes) != NUM_SPARSE or min(table_sizes) < 1:
            raise UserError(f"--num_embeddings_per_feature: {NUM_SPARSE} sizes of at least 1 are needed")
        self.rows, self.batch = rows, 0
        self.hots = list(multi_hot_sizes) if multi_hot_sizes else None
        hots = self.hots or [1] * NUM_SPARSE
        self.sizes = np.repeat(np.array(table_sizes, np.uint64), hots)
        self.key = [seed % 2**64, STAGES.index(stage)]
        draw = np.random.default_rng(self.key)
        self.dense = draw.standard_normal((POOL, NUM_DENSE), np.float32)
        self.bits = draw.integers(0, 1 << 32, (POOL, sum(hots)), np.uint32)
        self.labels = draw.integers(0, 2, POOL, np.int32)
        self.row_bytes = 4 * (NUM_DENSE + sum(hots) + 1)
        self.bytes_read: dict[str, int] = {}

    def read(self, start: int, stop: int, ahead: int = 0) -> Rows:
        return self.take(np.arange(start, stop))

    def take(self, rows: np.ndarray) -> Rows:
        turns, at = np.divmod(rows, POOL)
        bits = self.bits[at]
        for turn in np.unique(turns):
            flips = np.random.default_rng([*self.key, 1, int(turn)]).integers(
                0, 1 << 32, len(self.sizes), np.uint32
            )
            bits[turns == turn] ^= flips
        ids = ((bits * self.sizes) >> np.uint64(32)).astype(np.int32)
        sparse = np.split(ids, np.cumsum(self.hots)[:-1], axis=1) if self.hots else ids
        return Rows(self.dense[at], sparse, self.labels[at])

    def hold(self, runs: np.ndarray, gaps: bool = False) -> None:
        """Nothing to load."""

    def where(self, row: int, part: str) -> str:
        return f"random row {row}"

    def close(self) -> None:
        """Nothing to close."""
