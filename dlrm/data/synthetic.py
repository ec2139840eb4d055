"""Random rows: dense values normal, ids uniform over the tables, labels 0 or 1 with equal chance.

A row depends on its number and the seed alone, so that ranks, batch sizes and resuming change nothing.
Drawing every row would take longer than reading one: a pool of rows is drawn once and repeated, and each pass
through it flips other bits of the ids, so that all rows of a large table are looked up.
"""

import os
from collections.abc import Sequence

import numpy as np

from dlrm.data.criteo import CRITEO
from dlrm.data.npy import NpyLayout
from dlrm.data.rows import STAGES, Rows, SourceKind, SourceOptions
from dlrm.runtime.errors import UserError

POOL = 1 << 14  # rows


class RandomSource:
    """Random rows, the same for the same seed: a pool of POOL rows, with other ids in each pass."""

    random_access = True
    in_memory = False
    contiguous = False

    def __init__(
        self,
        stage: str,
        rows: int,
        table_sizes: Sequence[int],
        seed: int = 0,
        numerical: int = CRITEO.numerical,
    ) -> None:
        """`table_sizes`: rows of each table, one table per categorical column. `numerical`: columns of
        counts.
        """
        if not table_sizes or min(table_sizes) < 1:
            raise UserError("--num_embeddings_per_feature: sizes of at least 1 are needed")
        self.rows, self.batch = rows, 0
        self.sizes = np.array(table_sizes, np.uint64)
        self.key = [seed % 2**64, STAGES.index(stage)]
        draw = np.random.default_rng(self.key)
        self.dense = draw.standard_normal((POOL, numerical), np.float32)
        self.bits = draw.integers(0, 1 << 32, (POOL, len(table_sizes)), np.uint32)
        self.labels = draw.integers(0, 2, POOL, np.int32)
        self._pass, self._flips = -1, np.zeros(0, np.uint32)
        self.row_bytes = 4 * (numerical + len(table_sizes) + 1)
        self.bytes_read: dict[str, int] = {}

    def read(self, start: int, stop: int, ahead: int = 0) -> Rows:
        pass_number, at = divmod(start, POOL)
        if at + stop - start > POOL:
            return self.take(np.arange(start, stop))
        place = slice(at, at + stop - start)
        return self._make_rows(place, self.bits[place] ^ self._draw_flips(pass_number))

    def take(self, rows: np.ndarray) -> Rows:
        passes, at = np.divmod(rows, POOL)
        bits = self.bits[at]
        for pass_number in np.unique(passes):
            bits[passes == pass_number] ^= self._draw_flips(int(pass_number))
        return self._make_rows(at, bits)

    def _draw_flips(self, pass_number: int) -> np.ndarray:
        """uint32 [tables]: the bits that this pass through the pool flips in each column."""
        if pass_number != self._pass:
            draw = np.random.default_rng([*self.key, 1, pass_number])
            self._pass, self._flips = pass_number, draw.integers(0, 1 << 32, len(self.sizes), np.uint32)
        return self._flips

    def _make_rows(self, at: slice | np.ndarray, bits: np.ndarray) -> Rows:
        ids = ((bits * self.sizes) >> np.uint64(32)).astype(np.int32)
        return Rows(self.dense[at], ids, self.labels[at])

    def load(self, runs: np.ndarray, scattered: bool = False) -> None:
        """Nothing to load."""

    def locate_row(self, row: int, part: str) -> str:
        return f"random row {row}"

    def close(self) -> None:
        """Nothing to close."""


def open_random(_layout: NpyLayout, options: SourceOptions) -> RandomSource:
    if options.table_sizes is None:
        raise UserError(
            "random data needs table sizes: give --num_embeddings or --num_embeddings_per_feature"
        )
    return RandomSource(options.stage, options.rows, options.table_sizes, options.seed, options.numerical)


RANDOM = SourceKind(lambda folder: NpyLayout(os.fspath(folder), {}), open_random)
