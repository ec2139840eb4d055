"""Rows -> arrays as a model takes them: ids feature after feature; all values are checked. Needs no torch.

Folding ids takes most of the time (a division each), so only features that have an id beyond their table are
folded. `dlrm/data/collate.py` makes torchrec's batches of these arrays.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dlrm.data.criteo import name_features
from dlrm.data.rows import Rows
from dlrm.runtime.errors import UserError

RowLocator = Callable[[int, str], str]  # (row of the batch, part) -> file and row, for messages


class ArrayCollator:
    """table_sizes: rows of each table, or None: ids are not changed. fold: ids beyond their table are
    replaced by their remainder, else they are an error. make_multi_hot: ids [features, n] -> an array [n, k]
    of each.
    """

    def __init__(
        self,
        table_sizes: Sequence[int] | None = None,
        fold: bool = True,
        make_multi_hot: "Callable[[np.ndarray], list[np.ndarray]] | None" = None,
    ) -> None:
        if table_sizes is not None and min(table_sizes) < 1:
            raise UserError("--num_embeddings_per_feature: sizes of at least 1 are needed")
        self.sizes = None if table_sizes is None else np.array(table_sizes, np.int64)
        self.fold, self.make_multi_hot = fold, make_multi_hot
        self.names, self.index = [], {}  # of the features, known with the first batch

    def __call__(self, rows: Rows, locate: RowLocator) -> Any:
        n = len(rows.labels)
        self._name_features(len(rows.sparse) if isinstance(rows.sparse, list) else rows.sparse.shape[1])
        check_dense(rows.dense, locate)
        check_labels(rows.labels, locate)
        if isinstance(rows.sparse, list):
            ids_per_row = tuple(ids.shape[1] for ids in rows.sparse)
            features = [ids.reshape(-1) for ids in rows.sparse]
            values = np.concatenate(features)
        else:
            values = np.empty((len(self.names), n), np.int32)
            np.copyto(values, rows.sparse.T)
            ids_per_row = (1,) * len(self.names)
        self._fit_tables(values.reshape(-1), n, ids_per_row, locate)
        if self.make_multi_hot is not None:
            features = self.make_multi_hot(values)
            ids_per_row = tuple(ids.size // n for ids in features)
            values = np.concatenate([ids.reshape(-1) for ids in features])
        return self.make_batch(
            rows.dense.copy(), values.reshape(-1), ids_per_row, rows.labels.astype(np.int32)
        )

    def make_batch(
        self, dense: np.ndarray, values: np.ndarray, ids_per_row: tuple[int, ...], labels: np.ndarray
    ) -> Any:
        """What a batch is; here a `Rows` whose ids are flat. This method's own arrays: the caller keeps none.

        dense  float32 [n, numerical columns]    values  int32, flat, feature after feature
        labels int32 [n]                         ids_per_row  of each feature
        """
        return Rows(dense, values, labels)

    def _name_features(self, count: int) -> None:
        if self.sizes is not None and len(self.sizes) != count:
            raise UserError(f"--num_embeddings_per_feature: {count} sizes are needed, not {len(self.sizes)}")
        if len(self.names) != count:
            self.names = name_features(count)
            self.index = {name: number for number, name in enumerate(self.names)}

    def _fit_tables(
        self, values: np.ndarray, n: int, ids_per_row: tuple[int, ...], locate: RowLocator
    ) -> None:
        """Fold ids into their tables, in place, or raise a UserError for the first that is beyond its table.

        values: int32, flat, feature after feature. ids_per_row: ids per row of each feature.
        """
        ends = np.cumsum(ids_per_row) * n
        # as unsigned integers negative ids are large ones
        highest = np.maximum.reduceat(values.view(np.uint32), ends - n * np.array(ids_per_row))
        limits = np.full(len(self.names), 1 << 31) if self.sizes is None else self.sizes
        for feature in np.flatnonzero(highest >= limits):
            ids = values[ends[feature] - n * ids_per_row[feature] : ends[feature]]
            if self.fold and self.sizes is not None:
                size = np.int32(self.sizes[feature])
                ids -= ids // size * size  # the remainder, never negative; numpy's own has no SIMD
                continue
            worst = int(np.argmax(ids.view(np.uint32) >= limits[feature]))
            part = "sparse" if len(set(ids_per_row)) == 1 and ids_per_row[0] == 1 else str(feature)
            raise UserError(
                f"{locate(worst // ids_per_row[feature], part)}: id {ids[worst]} of {self.names[feature]} "
                f"is outside its table of {limits[feature]} rows: give larger --num_embeddings_per_feature"
            )


def check_dense(dense: np.ndarray, locate: RowLocator) -> None:
    """UserError for NaN or infinity in float32 [rows, columns]. locate: names a row, for the message."""
    # one pass without a temporary; the second check is for large finite values, whose sum overflows
    if not np.isfinite(np.vdot(dense, dense)):
        finite = np.isfinite(dense)
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            raise UserError(
                f"{locate(int(row), 'dense')}: {dense[row, column]} in column {column}: repair the row or "
                "make the dataset again"
            )


def check_labels(labels: np.ndarray, locate: RowLocator) -> None:
    """UserError for a label other than 0 and 1 in int32 [rows]. locate: names a row, for the message."""
    if labels.view(np.uint32).max() > 1:
        row = int(np.argmax(labels.view(np.uint32) > 1))
        raise UserError(f"{locate(row, 'labels')}: label {labels[row]}, expected 0 or 1: repair the row")
