"""The order of a shuffled epoch: which row is at which position, from (seed, epoch) alone.

Sources with random access get one permutation of all rows; that of epoch 0 is torchrec's for the same seed.
Streams are shuffled in windows: blocks of consecutive rows are put in random order, and 16 of them make a
window that is read (in file order) into memory and shuffled there. The order does not depend on ranks or
batch sizes, so a run can resume at others. A window that two ranks share is read by both.
"""

import numpy as np

from dlrm.data.rows import Rows, RowSource
from dlrm.data.sampler import Segment

BLOCKS = 16  # per window


class ShuffledOrder:
    """A permutation of rows 0 to rows - 1. window: rows of a window, 0 for a source with random access."""

    def __init__(self, rows: int, seed: int, epoch: int, window: int = 0) -> None:
        self.rows, self.seed, self.epoch = rows, seed, epoch
        self.window = min(window, rows)
        self._permutation: np.ndarray | None = None
        if not self.window:
            state = np.random.RandomState(seed if epoch == 0 else [seed, epoch])
            self._permutation = np.argsort(state.permutation(rows))  # type: ignore[arg-type]
            return
        # a set that fits into one window is one window: it must not get more than BLOCKS blocks
        block = max(1, self.window // BLOCKS) if self.window < rows else -(-rows // BLOCKS)
        self.firsts = np.arange(0, rows, block)
        np.random.default_rng([seed, epoch]).shuffle(self.firsts)
        self.lasts = np.minimum(self.firsts + block, rows)
        ends = np.cumsum(self.lasts - self.firsts)
        self.starts = np.concatenate([[0], ends[BLOCKS - 1 :: BLOCKS], ends[-1:]])  # of each window
        self.starts = np.unique(self.starts)

    def take_rows_at(self, start: int, stop: int) -> np.ndarray:
        """The rows at positions start to stop - 1. Only without windows."""
        assert self._permutation is not None
        return self._permutation[start:stop]

    def find_window(self, position: int) -> int:
        """Number of the window that has this position."""
        return int(np.searchsorted(self.starts, position, side="right")) - 1

    def list_blocks(self, window: int) -> list[Segment]:
        """The rows of a window, in file order."""
        own = slice(window * BLOCKS, (window + 1) * BLOCKS)
        return sorted(zip(self.firsts[own].tolist(), self.lasts[own].tolist(), strict=True))

    def permute_window(self, window: int) -> np.ndarray:
        """int64 [rows of the window]: position in the window -> number of the row in the window's blocks."""
        rows = int(self.starts[window + 1] - self.starts[window])
        return np.random.default_rng([self.seed, self.epoch, window]).permutation(rows)


class BatchOrder:
    """The rows of an epoch in blocks of `block` consecutive rows; the blocks are in random order, except that
    a last one with fewer rows stays the last: so each step has one block.
    """

    def __init__(self, rows: int, seed: int, epoch: int, block: int) -> None:
        self.epoch = epoch
        whole = rows // block
        order = np.random.default_rng([seed, epoch]).permutation(whole)
        self.block, self.firsts = block, np.append(order, whole) * block

    def locate_rows(self, start: int, stop: int) -> list[Segment]:
        """The rows at positions start to stop - 1 of the order, as segments of the set."""
        found = []
        while start < stop:
            number, inside = divmod(start, self.block)
            end = min(stop, start - inside + self.block)
            first = int(self.firsts[number]) + inside
            found.append((first, first + end - start))
            start = end
        return found


class ShuffleWindow:
    """Reads rows of a shuffled order from a stream, with one window in memory."""

    def __init__(self, source: RowSource, order: ShuffledOrder) -> None:
        self.source, self.order = source, order
        self.number = -1
        self.window: Rows | None = None
        self.numbers = self.rows = np.empty(0, np.int64)

    def read_positions(self, segments: list[Segment]) -> tuple[Rows, np.ndarray]:
        """The rows at these positions of the order, and their numbers in the set, int64 [n]."""
        pieces, rows = [], []
        for start, stop in segments:
            while start < stop:
                number = self.order.find_window(start)
                if number != self.number:
                    self._load(number)
                assert self.window is not None
                low, high = self.order.starts[number : number + 2]
                end = min(stop, int(high))
                picked = self.numbers[start - low : end - low]
                pieces.append(self.window.take(picked))
                rows.append(self.rows[picked])
                start = end
        return (pieces[0] if len(pieces) == 1 else join_rows(pieces)), np.concatenate(rows)

    def _load(self, number: int) -> None:
        self.window = None  # free the old window before the new one is read
        blocks = self.order.list_blocks(number)
        self.window = collect_rows(self.source, blocks)
        self.rows = np.concatenate([np.arange(start, stop) for start, stop in blocks])
        self.numbers, self.number = self.order.permute_window(number), number


def collect_rows(source: RowSource, segments: list[Segment]) -> Rows:
    """A copy of these rows, one segment after the other."""
    total = sum(stop - start for start, stop in segments)
    done, collected = 0, None
    for start, stop in segments:
        rows = source.read(start, stop, stop)
        if collected is None:
            collected = allocate_rows(rows, total)
        copy_rows(rows, collected, done)
        done += stop - start
    assert collected is not None, "no segments"
    return collected


def allocate_rows(like: Rows, rows: int) -> Rows:
    """Uninitialised arrays for `rows` rows, with the columns and dtypes of `like`."""

    def make_empty(array: np.ndarray) -> np.ndarray:
        return np.empty((rows, *array.shape[1:]), array.dtype)

    sparse = (
        [make_empty(ids) for ids in like.sparse] if isinstance(like.sparse, list) else make_empty(like.sparse)
    )
    return Rows(make_empty(like.dense), sparse, make_empty(like.labels))


def copy_rows(rows: Rows, into: Rows, at: int) -> None:
    """Copy `rows` to the rows of `into` from number `at` on."""
    place = slice(at, at + len(rows.dense))
    into.dense[place], into.labels[place] = rows.dense, rows.labels
    if isinstance(into.sparse, list):
        for target, ids in zip(into.sparse, rows.sparse, strict=True):
            target[place] = ids
    else:
        into.sparse[place] = rows.sparse


def join_rows(pieces: list[Rows]) -> Rows:
    joined = allocate_rows(pieces[0], sum(len(piece.dense) for piece in pieces))
    done = 0
    for piece in pieces:
        copy_rows(piece, joined, done)
        done += len(piece.dense)
    return joined
