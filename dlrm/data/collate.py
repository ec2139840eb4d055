"""Rows -> torchrec Batch: dense and labels as tensors, ids feature after feature, checked on the way.

What no row changes (keys, lengths, offsets) is made once per batch size. Folding ids is the dear part
(a division each), so only the features that have an id beyond their table are folded.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm.data.criteo import NUM_SPARSE, SPARSE_NAMES
from dlrm.data.rows import Rows
from dlrm.runtime.errors import UserError

Where = Callable[[int, str], str]  # (row of the batch, part) -> file and row
Frame = tuple[torch.Tensor, torch.Tensor, list[int], list[int]]  # lengths, offsets, per key: length, offset


class BatchCollator:
    """`table_sizes` None: ids are taken as they are. `fold` False: an id beyond its table is an error."""

    def __init__(
        self,
        table_sizes: Sequence[int] | None = None,
        fold: bool = True,
        pin_memory: bool = False,
        widen: "Callable[[np.ndarray], list[np.ndarray]] | None" = None,
    ) -> None:
        if table_sizes is not None and (len(table_sizes) != NUM_SPARSE or min(table_sizes) < 1):
            raise UserError(f"--num_embeddings_per_feature: {NUM_SPARSE} sizes of at least 1 are needed")
        self.sizes = None if table_sizes is None else np.array(table_sizes, np.int64)
        self.fold, self.widen = fold, widen
        self.pin_memory = pin_memory and torch.cuda.is_available()  # there is nothing to pin for
        self.index = {name: number for number, name in enumerate(SPARSE_NAMES)}
        self._frames: dict[tuple[int, tuple[int, ...]], Frame] = {}

    def __call__(self, rows: Rows, where: Where) -> Batch:
        n = len(rows.labels)
        check_dense(rows.dense, where)
        check_labels(rows.labels, where)
        if isinstance(rows.sparse, list):
            hots = tuple(ids.shape[1] for ids in rows.sparse)
            features = [ids.reshape(-1) for ids in rows.sparse]
            values = np.concatenate(features)
        else:
            values = np.empty((NUM_SPARSE, n), np.int32)
            np.copyto(values, rows.sparse.T)
            hots = (1,) * NUM_SPARSE
        self._into_tables(values.reshape(-1), n, hots, where)
        if self.widen is not None:
            features = self.widen(values)
            hots = tuple(ids.size // n for ids in features)
            values = np.concatenate([ids.reshape(-1) for ids in features])
        batch = self._batch(rows, torch.from_numpy(values.reshape(-1)), hots)
        return batch.pin_memory() if self.pin_memory else batch

    def _batch(self, rows: Rows, values: torch.Tensor, hots: tuple[int, ...]) -> Batch:
        n = len(rows.labels)
        lengths, offsets, length_per_key, offset_per_key = self._frame(n, hots)
        return Batch(
            dense_features=torch.from_numpy(rows.dense.copy()),
            sparse_features=KeyedJaggedTensor(
                keys=SPARSE_NAMES,
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

    def _frame(self, n: int, hots: tuple[int, ...]) -> Frame:
        key = (n, hots)
        if key not in self._frames:
            lengths = torch.repeat_interleave(torch.tensor(hots, dtype=torch.int32), n)
            offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
            torch.cumsum(lengths, 0, dtype=torch.int32, out=offsets[1:])
            per_key = [hot * n for hot in hots]
            self._frames[key] = (lengths, offsets, per_key, np.cumsum([0, *per_key]).tolist())
        return self._frames[key]

    def _into_tables(self, values: np.ndarray, n: int, hots: tuple[int, ...], where: Where) -> None:
        """Fold ids into their tables, in place, or name the first that lies outside."""
        ends = np.cumsum(hots) * n
        # seen as unsigned, a negative id is a large one
        highest = np.maximum.reduceat(values.view(np.uint32), ends - n * np.array(hots))
        limits = np.full(NUM_SPARSE, 1 << 31) if self.sizes is None else self.sizes
        for feature in np.flatnonzero(highest >= limits):
            ids = values[ends[feature] - n * hots[feature] : ends[feature]]
            if self.fold and self.sizes is not None:
                size = np.int32(self.sizes[feature])
                ids -= ids // size * size  # the remainder, never negative; numpy's own has no SIMD
                continue
            worst = int(np.argmax(ids.view(np.uint32) >= limits[feature]))
            part = "sparse" if len(set(hots)) == 1 and hots[0] == 1 else str(feature)
            raise UserError(
                f"{where(worst // hots[feature], part)}: id {ids[worst]} of {SPARSE_NAMES[feature]} lies "
                f"outside its table of {limits[feature]} rows: give larger --num_embeddings_per_feature"
            )


def check_dense(dense: np.ndarray, where: Where) -> None:
    # one pass without a temporary; only an overflow of large finite values needs the second look
    if not np.isfinite(np.vdot(dense, dense)):
        finite = np.isfinite(dense)
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            raise UserError(
                f"{where(int(row), 'dense')}: {dense[row, column]} in column {column}: repair the row or "
                "make the dataset again"
            )


def check_labels(labels: np.ndarray, where: Where) -> None:
    if labels.view(np.uint32).max() > 1:
        row = int(np.argmax(labels.view(np.uint32) > 1))
        raise UserError(f"{where(row, 'labels')}: label {labels[row]}, expected 0 or 1: repair the row")
