"""The order of a shuffled epoch: which row stands at which position, from (seed, epoch) alone.

Sources with random access get one permutation of all rows; that of epoch 0 is torchrec's for the same seed.
Streams are shuffled in windows: blocks of consecutive rows come in random order, 16 of them make a window
that is read (in file order) into memory and shuffled there. The order does not depend on ranks or batch
sizes, so a run can resume at others. A window that two ranks share is read by both.
"""

import numpy as np

from dlrm.data.rows import Rows, RowSource
from dlrm.data.sampler import Segment

BLOCKS = 16  # per window


class ShuffledOrder:
    def __init__(self, rows: int, seed: int, epoch: int, window: int = 0) -> None:
        self.rows, self.seed, self.epoch = rows, seed, epoch
        self.window = min(window, rows)  # 0: a source with random access
        self._permutation: np.ndarray | None = None
        if not self.window:
            state = np.random.RandomState(seed if epoch == 0 else [seed, epoch])
            self._permutation = np.argsort(state.permutation(rows))  # type: ignore[arg-type]
            return
        # a set that fits one window is one window: as many blocks as it may have, not one more
        block = max(1, self.window // BLOCKS) if self.window < rows else -(-rows // BLOCKS)
        self.firsts = np.arange(0, rows, block)
        np.random.default_rng([seed, epoch]).shuffle(self.firsts)
        self.lasts = np.minimum(self.firsts + block, rows)
        ends = np.cumsum(self.lasts - self.firsts)
        self.starts = np.concatenate([[0], ends[BLOCKS - 1 :: BLOCKS], ends[-1:]])  # of each window
        self.starts = np.unique(self.starts)

    def at(self, start: int, stop: int) -> np.ndarray:
        """The rows at positions [start, stop) of one permutation of all."""
        assert self._permutation is not None
        return self._permutation[start:stop]

    def window_of(self, position: int) -> int:
        return int(np.searchsorted(self.starts, position, side="right")) - 1

    def blocks(self, window: int) -> list[Segment]:
        """The rows of a window, in file order."""
        mine = slice(window * BLOCKS, (window + 1) * BLOCKS)
        return sorted(zip(self.firsts[mine].tolist(), self.lasts[mine].tolist(), strict=True))

    def within(self, window: int) -> np.ndarray:
        """Position in the window -> number of the row among the window's blocks in file order."""
        rows = int(self.starts[window + 1] - self.starts[window])
        return np.random.default_rng([self.seed, self.epoch, window]).permutation(rows)


class ShuffleWindow:
    """Serves positions of an order from a stream, holding one window at a time."""

    def __init__(self, source: RowSource, order: ShuffledOrder) -> None:
        self.source, self.order = source, order
        self.number = -1
        self.held: Rows | None = None
        self.numbers = self.rows = np.empty(0, np.int64)

    def take(self, segments: list[Segment]) -> tuple[Rows, np.ndarray]:
        """The rows at these positions and their numbers in the set."""
        pieces, rows = [], []
        for start, stop in segments:
            while start < stop:
                number = self.order.window_of(start)
                if number != self.number:
                    self._load(number)
                assert self.held is not None
                low, high = self.order.starts[number : number + 2]
                end = min(stop, int(high))
                picked = self.numbers[start - low : end - low]
                pieces.append(self.held.take(picked))
                rows.append(self.rows[picked])
                start = end
        return (pieces[0] if len(pieces) == 1 else join_rows(pieces)), np.concatenate(rows)

    def _load(self, number: int) -> None:
        self.held = None  # the old window goes before the new one comes
        blocks = self.order.blocks(number)
        self.held = collect_rows(self.source, blocks)
        self.rows = np.concatenate([np.arange(start, stop) for start, stop in blocks])
        self.numbers, self.number = self.order.within(number), number


def collect_rows(source: RowSource, segments: list[Segment]) -> Rows:
    """A copy of these rows, one segment after the other."""
    total = sum(stop - start for start, stop in segments)
    done, held = 0, None
    for start, stop in segments:
        rows = source.read(start, stop, stop)
        if held is None:
            held = empty_rows(rows, total)
        copy_rows(rows, held, done)
        done += stop - start
    assert held is not None, "no segments"
    return held


def empty_rows(like: Rows, rows: int) -> Rows:
    def one(array: np.ndarray) -> np.ndarray:
        return np.empty((rows, *array.shape[1:]), array.dtype)

    sparse = [one(ids) for ids in like.sparse] if isinstance(like.sparse, list) else one(like.sparse)
    return Rows(one(like.dense), sparse, one(like.labels))


def copy_rows(rows: Rows, into: Rows, at: int) -> None:
    place = slice(at, at + len(rows.dense))
    into.dense[place], into.labels[place] = rows.dense, rows.labels
    if isinstance(into.sparse, list):
        for target, ids in zip(into.sparse, rows.sparse, strict=True):
            target[place] = ids
    else:
        into.sparse[place] = rows.sparse


def join_rows(pieces: list[Rows]) -> Rows:
    joined = empty_rows(pieces[0], sum(len(piece.dense) for piece in pieces))
    done = 0
    for piece in pieces:
        copy_rows(piece, joined, done)
        done += len(piece.dense)
    return joined
