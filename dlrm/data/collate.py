"""Rows -> torchrec Batch: dense and labels as tensors, ids feature after feature; all values are checked.

What does not depend on the rows (keys, lengths, offsets) is made once per batch size. Folding ids takes most
of the time (a division each), so only features that have an id beyond their table are folded.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm.data.criteo import name_features
from dlrm.data.rows import Rows
from dlrm.runtime.errors import UserError

RowLocator = Callable[[int, str], str]  # (row of the batch, part) -> file and row, for messages
# of a KeyedJaggedTensor: lengths int32 [features n], offsets int32 [features n + 1]; per key: length, offset
IndexTensors = tuple[torch.Tensor, torch.Tensor, list[int], list[int]]


class BatchCollator:
    """table_sizes: rows of each table, or None: ids are not changed. fold: ids beyond their table are
    replaced by their remainder, else they are an error. make_multi_hot: ids [features, n] -> an array [n, k]
    of each.
    """

    def __init__(
        self,
        table_sizes: Sequence[int] | None = None,
        fold: bool = True,
        pin_memory: bool = False,
        make_multi_hot: "Callable[[np.ndarray], list[np.ndarray]] | None" = None,
    ) -> None:
        if table_sizes is not None and min(table_sizes) < 1:
            raise UserError("--num_embeddings_per_feature: sizes of at least 1 are needed")
        self.sizes = None if table_sizes is None else np.array(table_sizes, np.int64)
        self.fold, self.make_multi_hot = fold, make_multi_hot
        # without a GPU there is nothing to copy to
        self.pin_memory = pin_memory and torch.cuda.is_available()
        self.names, self.index = [], {}  # of the features, known with the first batch
        self._index_tensors: dict[tuple[int, tuple[int, ...]], IndexTensors] = {}

    def __call__(self, rows: Rows, locate: RowLocator) -> Batch:
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
        batch = self._make_batch(rows, torch.from_numpy(values.reshape(-1)), ids_per_row)
        return batch.pin_memory() if self.pin_memory else batch

    def _name_features(self, count: int) -> None:
        if self.sizes is not None and len(self.sizes) != count:
            raise UserError(f"--num_embeddings_per_feature: {count} sizes are needed, not {len(self.sizes)}")
        if len(self.names) != count:
            self.names = name_features(count)
            self.index = {name: number for number, name in enumerate(self.names)}

    def _make_batch(self, rows: Rows, values: torch.Tensor, ids_per_row: tuple[int, ...]) -> Batch:
        """`values`: int32, flat, feature after feature. `ids_per_row`: of each feature."""
        n = len(rows.labels)
        lengths, offsets, length_per_key, offset_per_key = self._make_index_tensors(n, ids_per_row)
        return Batch(
            dense_features=torch.from_numpy(rows.dense.copy()),
            sparse_features=KeyedJaggedTensor(
                keys=self.names,
                values=values,
                lengths=lengths,
                offsets=offsets,
                stride=n,
                length_per_key=length_per_key,
                offset_per_key=offset_per_key,
                index_per_key=self.index,
            ),
            labels=torch.from_numpy(rows.labels.astype(np.int32)),
        )

    def _make_index_tensors(self, n: int, ids_per_row: tuple[int, ...]) -> IndexTensors:
        key = (n, ids_per_row)
        if key not in self._index_tensors:
            lengths = torch.repeat_interleave(torch.tensor(ids_per_row, dtype=torch.int32), n)
            offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
            torch.cumsum(lengths, 0, dtype=torch.int32, out=offsets[1:])
            per_key = [count * n for count in ids_per_row]
            self._index_tensors[key] = (lengths, offsets, per_key, np.cumsum([0, *per_key]).tolist())
        return self._index_tensors[key]

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
    if labels.view(np.uint32).max() > 1:
        row = int(np.argmax(labels.view(np.uint32) > 1))
        raise UserError(f"{locate(row, 'labels')}: label {labels[row]}, expected 0 or 1: repair the row")
