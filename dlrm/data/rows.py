"""What every source gives: `Rows`, plain arrays. And the narrow door that every source is."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

STAGES = ("train", "val", "test")


def batch_name(stage: str) -> str:
    """What a read calls its batch in the trace: only reads for training lead to training steps."""
    return "batch" if stage == "train" else "eval_batch"


class Rows(NamedTuple):
    dense: np.ndarray  # float32 [n, 13]
    sparse: np.ndarray | list[np.ndarray]  # int32 [n, 26], or multi-hot: 26 times int32 [n, k]
    labels: np.ndarray  # int32 [n]

    def each(self, function: Callable[[np.ndarray], np.ndarray]) -> "Rows":
        """The function applied to every array."""
        if isinstance(self.sparse, list):
            sparse: np.ndarray | list[np.ndarray] = [function(ids) for ids in self.sparse]
        else:
            sparse = function(self.sparse)
        return Rows(function(self.dense), sparse, function(self.labels))

    def take(self, rows: np.ndarray) -> "Rows":
        return self.each(lambda array: array.take(rows, axis=0))  # 4 times faster than array[rows]

    def slice(self, start: int, stop: int) -> "Rows":
        """A view of consecutive rows."""
        return self.each(lambda array: array[start:stop])


class RowSource(Protocol):
    """One set of rows (train, val or test), numbered from 0, whatever it is kept in."""

    rows: int
    random_access: bool  # `take` is cheap: shuffling needs no window
    holds: bool  # works from memory: `hold` loads rows
    contiguous: bool  # reads well only in long runs: give each rank a contiguous share
    row_bytes: int
    bytes_read: dict[str, int]  # absolute path -> bytes that really came from that file so far
    batch: int  # number of the batch being read, for the trace

    def read(self, start: int, stop: int, ahead: int = 0) -> Rows:
        """Rows [start, stop), valid until the next read. Rows up to `ahead` will be wanted next."""
        ...

    def take(self, rows: np.ndarray) -> Rows:
        """These rows, in this order (random access only)."""
        ...

    def hold(self, runs: np.ndarray, gaps: bool = False) -> None:
        """Load these runs of rows [k, 2] into memory (a source that `holds` only).

        `gaps`: they are scattered, so read what lies between them as well."""
        ...

    def where(self, row: int, part: str) -> str:
        """File and row in it, for messages."""
        ...

    def close(self) -> None: ...
