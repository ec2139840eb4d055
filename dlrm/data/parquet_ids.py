"""Parquet ids that are not rows of a table yet, as OneFlow's tool writes them: one range of numbers that all
columns share (hash mod N + N x column), or 64-bit hashes.

In: the ids of each column. Out: their rows in the column's own table, 0, 1, 2, ... by rising id, so that no
two ids share a row.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from common.memory import refuse_too_large
from dlrm.data.parquet_footer import read_limits

LARGEST_ROW = (1 << 31) - 1


def have_shared_ids(ranges: Sequence[tuple[int, int] | None]) -> bool:
    """Whether the columns' ids, from (smallest, largest) of each, are not rows of tables: some do not fit
    int32, or each column's ids are above those of the column before. None: not known, then the answer is no.
    """
    known = [each for each in ranges if each is not None]
    if not known or len(known) < len(ranges):
        return False
    if any(low < 0 or high > LARGEST_ROW for low, high in known):
        return True
    return len(known) > 1 and all(low > high for (_, high), (low, _) in zip(known, known[1:], strict=False))


def find_id_ranges(files: Sequence[Any], names: Sequence[str]) -> list[tuple[int, int] | None]:
    """(smallest, largest) id of each column, by what the footers of `files` (ParquetFile) say; None if one of
    them does not say it, or is damaged.
    """
    ranges: dict[str, tuple[int, int] | None] = {}
    for file in files:
        schema = file.metadata.schema.to_arrow_schema()
        signed = {each.name: not pa.types.is_unsigned_integer(each.type) for each in schema}
        try:
            for group in read_limits(file.footer):
                for name in names:
                    found = group[name.encode()]
                    if found is None or ranges.get(name, found) is None:
                        ranges[name] = None
                        continue
                    low, high = (int.from_bytes(each, "little", signed=signed[name]) for each in found)
                    before = ranges.get(name) or (low, high)
                    ranges[name] = min(before[0], low), max(before[1], high)
        except (ValueError, IndexError, TypeError, KeyError, AttributeError):
            return [None] * len(names)
    return [ranges.get(name) for name in names]


class IdNumbering:
    """The distinct ids of each column in rising order; an id's position is its row in the column's table."""

    def __init__(self, ids: list[np.ndarray]) -> None:
        self.ids = ids  # per column: int64, rising

    @property
    def table_sizes(self) -> list[int]:
        return [max(len(ids), 1) for ids in self.ids]

    def find_rows(self, column: int, ids: np.ndarray) -> np.ndarray:
        """int32 [n], the rows of `ids`, int64 [n]; ValueError for an id that was not there before."""
        known = self.ids[column]
        rows = np.searchsorted(known, ids)
        np.minimum(rows, len(known) - 1, out=rows)
        if not np.array_equal(known[rows], ids):
            at = int(np.argmax(known[rows] != ids))
            raise ValueError(f"has changed while it was read: id {ids[at]} is new in column C{column + 1}")
        return rows.astype(np.int32)


class IdCollector:
    """Collects the distinct ids of some columns. Lists are merged when they have doubled, so that each id is
    sorted a few times, however many parts there are.
    """

    def __init__(self, columns: int, folder: str) -> None:
        self.folder = folder
        self._whole = [np.empty(0, np.int64) for _ in range(columns)]
        self._waiting: list[list[np.ndarray]] = [[] for _ in range(columns)]

    def add(self, column: int, ids: np.ndarray) -> None:
        """Add distinct ids, int64 [n], in any order."""
        waiting = self._waiting[column]
        waiting.append(ids)
        if sum(map(len, waiting)) > max(1 << 16, len(self._whole[column])):
            self._merge_column(column)

    def _merge_column(self, column: int) -> None:
        self._whole[column] = np.unique(np.concatenate([self._whole[column], *self._waiting[column]]))
        self._waiting[column].clear()
        refuse_too_large(
            3 * sum(ids.nbytes for ids in self._whole), f"{self.folder}: its different ids",
            "make the dataset without --mod_idx: then its ids are rows of tables already",
        )  # fmt: skip

    def number_ids(self) -> IdNumbering:
        for column, waiting in enumerate(self._waiting):
            if waiting:
                self._merge_column(column)
        return IdNumbering(self._whole)
