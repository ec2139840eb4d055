"""Histories as sources of rows for `BatchLoader`.

A training row is one masked sequence: the windows of all users, `dupe_factor` times over. A row for
evaluation is a user: history, and the right item among candidates.
"""

from typing import NamedTuple

import numpy as np

from dlrm.models.bert4rec.sequences import (
    MASKED,
    STEP,
    Histories,
    cut_windows,
    make_evaluation_sequence,
    mask_items,
)


class SequenceRows(NamedTuple):
    tokens: np.ndarray  # int32 [n, max_len]
    # int32 [n, max_len] in training: the masked items, else 0; in evaluation [n]: the right items
    labels: np.ndarray
    candidates: np.ndarray | None = None  # int32 [n, 1 + negatives], the right one first

    def take(self, rows: np.ndarray) -> "SequenceRows":
        return SequenceRows(*(None if each is None else each[rows] for each in self))  # type: ignore[arg-type]


class _InMemorySource:
    """What both sources have in common. `bytes_read` is that of the cache: nothing is read later."""

    random_access, in_memory, contiguous = True, False, False

    def __init__(self, rows: int, max_len: int, bytes_read: dict[str, int] | None) -> None:
        self.rows, self.batch, self.row_bytes = rows, 0, 8 * max_len
        self.bytes_read = {} if bytes_read is None else bytes_read

    def take(self, rows: np.ndarray) -> SequenceRows:
        raise NotImplementedError

    def read(self, start: int, stop: int, ahead: int = 0) -> SequenceRows:
        return self.take(np.arange(start, stop))

    def load(self, runs: np.ndarray, scattered: bool = False) -> None:
        """Everything is in memory."""

    def locate_row(self, row: int, part: str) -> str:
        return f"sequence {row}"

    def close(self) -> None:
        """Nothing to close."""


class TrainingSequences(_InMemorySource):
    """The masked sequences of all users.

    mask_prob     share of the items that are hidden
    mask_share    share of the hidden ones that the mask replaces; the others become random items
    dupe_factor   copies of each sequence, each masked differently
    window_share  from one sequence of a long history to the next, as a share of `max_len`
    """

    def __init__(
        self, data: Histories, max_len: int, mask_prob: float, dupe_factor: int, seed: int,
        bytes_read: dict[str, int] | None = None, window_share: float = STEP, mask_share: float = MASKED,
    ) -> None:  # fmt: skip
        """bytes_read: by file, what was read to make `data`."""
        self.data, self.max_len, self.mask_prob, self.seed = data, max_len, mask_prob, seed
        self.mask_share = mask_share
        self.windows = cut_windows(data, max_len, window_share)
        self.epoch = 0
        super().__init__(dupe_factor * len(self.windows), max_len, bytes_read)

    def set_epoch(self, epoch: int) -> None:
        """Other items are masked in each epoch."""
        self.epoch = epoch

    def take(self, rows: np.ndarray) -> SequenceRows:
        spans = self.windows[rows % len(self.windows)]
        return SequenceRows(
            *mask_items(
                self.data, spans, rows, self.max_len, self.mask_prob, self.seed, self.epoch, self.mask_share
            )
        )  # fmt: skip


class EvaluationSequences(_InMemorySource):
    """A row per user: the history, then the mask, and the right item among `negatives`, int32 [users, n].
    `split`: "val" or "test".
    """

    def __init__(self, data: Histories, negatives: np.ndarray, max_len: int, split: str) -> None:
        self.tokens, self.right = make_evaluation_sequence(data, max_len, split)
        self.negatives = negatives
        super().__init__(data.users, max_len, None)

    def take(self, rows: np.ndarray) -> SequenceRows:
        right = self.right[rows]
        return SequenceRows(
            self.tokens[rows], right, np.concatenate([right[:, None], self.negatives[rows]], axis=1)
        )
