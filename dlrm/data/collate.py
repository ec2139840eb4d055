"""Rows -> torchrec Batch: dense and labels as tensors, ids as a KeyedJaggedTensor; all values are checked.

What does not depend on the rows (keys, lengths, offsets) is made once per batch size.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dlrm.data.arrays import ArrayCollator
from dlrm.runtime.trace import span

# of a KeyedJaggedTensor: lengths int32 [features n], offsets int32 [features n + 1]; per key: length, offset
IndexTensors = tuple[torch.Tensor, torch.Tensor, list[int], list[int]]


class TracedBatch(Batch):
    """torchrec's batch; its copy to the device is a span."""

    to = span("device", "transfer")(Batch.to)

    def pin_memory(self) -> "TracedBatch":
        return TracedBatch(**vars(super().pin_memory()))


class BatchCollator(ArrayCollator):
    """As `ArrayCollator`, for torchrec. pin_memory: where there is a GPU to copy to."""

    def __init__(
        self,
        table_sizes: Sequence[int] | None = None,
        fold: bool = True,
        make_multi_hot: "Callable[[np.ndarray], list[np.ndarray]] | None" = None,
        *,
        pin_memory: bool = False,
    ) -> None:
        super().__init__(table_sizes, fold, make_multi_hot)
        self.pin_memory = pin_memory and torch.cuda.is_available()
        self._index_tensors: dict[tuple[int, tuple[int, ...]], IndexTensors] = {}

    def make_batch(
        self, dense: np.ndarray, values: np.ndarray, ids_per_row: tuple[int, ...], labels: np.ndarray
    ) -> Batch:
        """torchrec's batch of n rows. dense: float32 [n, numerical]. values: int32 [ids], feature by feature.
        ids_per_row: of each feature. labels: int32 [n].
        """
        n = len(labels)
        lengths, offsets, length_per_key, offset_per_key = self._make_index_tensors(n, ids_per_row)
        batch = TracedBatch(
            dense_features=torch.from_numpy(dense),
            sparse_features=KeyedJaggedTensor(
                keys=self.names,
                values=torch.from_numpy(values),
                lengths=lengths,
                offsets=offsets,
                stride=n,
                length_per_key=length_per_key,
                offset_per_key=offset_per_key,
                index_per_key=self.index,
            ),
            labels=torch.from_numpy(labels),
        )
        return batch.pin_memory() if self.pin_memory else batch

    def _make_index_tensors(self, n: int, ids_per_row: tuple[int, ...]) -> IndexTensors:
        key = (n, ids_per_row)
        if key not in self._index_tensors:
            lengths = torch.repeat_interleave(torch.tensor(ids_per_row, dtype=torch.int32), n)
            offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
            torch.cumsum(lengths, 0, dtype=torch.int32, out=offsets[1:])
            per_key = [count * n for count in ids_per_row]
            self._index_tensors[key] = (lengths, offsets, per_key, np.cumsum([0, *per_key]).tolist())
        return self._index_tensors[key]
