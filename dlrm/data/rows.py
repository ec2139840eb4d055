"""`Rows`, the arrays that every source returns, `RowSource`, the interface of every source, and `SourceKind`,
how one is opened.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from dlrm.data.criteo import CRITEO

STAGES = ("train", "val", "test")
RANDOM_ROWS = 1 << 20


def name_batch_argument(stage: str) -> str:
    """The argument of a read's span that has its batch: only reads for training belong to training steps."""
    return "batch" if stage == "train" else "eval_batch"


class Rows(NamedTuple):
    """n samples."""

    dense: np.ndarray  # float32 [n, numerical columns]
    sparse: np.ndarray | list[np.ndarray]  # int32 [n, features], or multi-hot: int32 [n, k] of each
    labels: np.ndarray  # int32 [n]

    def map_arrays(self, function: Callable[[np.ndarray], np.ndarray]) -> "Rows":
        """The same with `function` applied to every array."""
        if isinstance(self.sparse, list):
            sparse: np.ndarray | list[np.ndarray] = [function(ids) for ids in self.sparse]
        else:
            sparse = function(self.sparse)
        return Rows(function(self.dense), sparse, function(self.labels))

    def take(self, rows: np.ndarray) -> "Rows":
        """A copy of these rows (int64 [k]), in this order."""
        return self.map_arrays(lambda array: array.take(rows, axis=0))  # 4 times faster than array[rows]

    def slice(self, start: int, stop: int) -> "Rows":
        """A view of consecutive rows."""
        return self.map_arrays(lambda array: array[start:stop])


class RowSource(Protocol):
    """One set of rows (train, val or test), numbered from 0, whatever its format."""

    rows: int
    random_access: bool  # `take` is cheap: shuffling needs no window
    in_memory: bool  # reads from memory: `load` has to be called before
    contiguous: bool  # is fast only in long runs: each rank should get a contiguous share
    row_bytes: int
    bytes_read: dict[str, int]  # absolute path -> bytes read from that file so far
    batch: int  # number of the batch being read, for the trace

    def read(self, start: int, stop: int, ahead: int = 0) -> Rows:
        """Rows start to stop - 1, valid until the next read. The next reads will want rows up to `ahead`."""
        ...

    def take(self, rows: np.ndarray) -> Rows:
        """These rows (int64 [k]), in this order. Only where `random_access`."""
        ...

    def load(self, runs: np.ndarray, scattered: bool = False) -> None:
        """Load runs of rows (int64 [k, 2]: first, past the last) into memory; nothing where not `in_memory`.

        scattered: the runs are short, so reading the rows between them, too, takes less time.
        """
        ...

    def locate_row(self, row: int, part: str) -> str:
        """File and row in it, for messages. part: "dense", "sparse", "labels" or a feature's number."""
        ...

    def close(self) -> None: ...


# what a source found in its folder: at least `folder`, `columns` (Columns), `table_sizes`, `bytes_read`
AnyLayout = Any


@dataclass(frozen=True)
class SourceOptions:
    """What a source may need to know besides its files."""

    stage: str
    read_chunk_mb: float = 16
    rows: int = RANDOM_ROWS
    table_sizes: Sequence[int] | None = None
    seed: int = 0
    numerical: int = CRITEO.numerical  # columns of random data


class SourceKind(NamedTuple):
    """One way to keep rows."""

    scan: Callable[[str | os.PathLike[str]], AnyLayout]  # check a folder's files, once
    open: Callable[[AnyLayout, SourceOptions], RowSource]  # the rows of one stage
