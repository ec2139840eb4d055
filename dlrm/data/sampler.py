"""Which rows each rank gets in each step: pure arithmetic, the same on every rank.

Two orders. By step, the reference's: a step takes the next batch of every rank from the front, so W ranks
with batch B learn from what one rank with batch W * B does. By rank: every rank has one contiguous share.
Either way all ranks have the same number of steps, no batch is empty, and each row comes exactly once: the
rows of the last step are spread evenly, and fewer rows than ranks at the end make the last batch of some
ranks one row longer.
"""

from dataclasses import dataclass
from functools import cached_property

from dlrm.data.criteo import find_rank_rows
from dlrm.runtime.errors import UserError

Segment = tuple[int, int]


@dataclass(frozen=True)
class RowSampler:
    """Row numbers 0 to rows - 1 over `world_size` ranks, in batches of `batch_size` per rank."""

    rows: int
    batch_size: int
    world_size: int
    by_rank: bool = False
    drop_last: bool = False

    def __post_init__(self) -> None:
        if 0 < self.rows < self.world_size and not self.drop_last:
            raise UserError(
                f"{self.rows} rows are too few for {self.world_size} ranks: use fewer ranks or more rows"
            )

    @cached_property
    def full_steps(self) -> int:
        """Steps in which every rank has a full batch."""
        steps, rest = divmod(self.rows, self.batch_size * self.world_size)
        return steps - (0 < rest < self.world_size and not self.drop_last)

    @cached_property
    def steps(self) -> int:
        """Batches of each rank."""
        if self.drop_last:
            return self.full_steps
        if not self.by_rank:
            return self.full_steps + (self.full_steps * self.batch_size * self.world_size < self.rows)
        shares = [
            len(self._find_share(rank)) for rank in (0, self.world_size - 1)
        ]  # the longest, the shortest
        return min(-(-shares[0] // self.batch_size), shares[1])

    def _find_share(self, rank: int) -> range:
        return find_rank_rows(self.rows, rank, self.world_size)

    def find_first_row(self, step: int, rank: int) -> int:
        """First row of a rank's batch; for step == steps, the end of its last one."""
        if self.by_rank:
            share = self._find_share(rank)
            if self.drop_last:
                return share.start + step * self.batch_size
            if step >= self.steps:
                return share.stop
            # each later step must have a row
            return share.start + min(step * self.batch_size, len(share) - (self.steps - step))
        base = min(step, self.full_steps) * self.batch_size * self.world_size
        if step < self.full_steps:
            return base + rank * self.batch_size
        return base + find_rank_rows(self.rows - base, rank, self.world_size).start

    def find_batch_rows(self, step: int, rank: int) -> Segment:
        """(first row, row after the last) of a rank's batch."""
        start = self.find_first_row(step, rank)
        if self.by_rank:
            return start, self.find_first_row(step + 1, rank)
        if step < self.full_steps:
            return start, start + self.batch_size
        base = self.full_steps * self.batch_size * self.world_size
        return start, base + find_rank_rows(self.rows - base, rank, self.world_size).stop

    def find_contiguous_end(self, step: int, rank: int) -> int:
        """The row after the last that follows this batch on the same rank without a gap."""
        if self.by_rank:
            return self.find_first_row(self.steps, rank)
        if self.world_size == 1:
            return self.find_batch_rows(self.steps - 1, rank)[1]
        return self.find_batch_rows(step, rank)[1]

    def find_remaining(self, step: int) -> list[Segment]:
        """The rows that no rank has been given before this step."""
        if step >= self.steps:
            return []
        if self.by_rank:
            return [
                (self.find_first_row(step, rank), self._find_share(rank).stop)
                for rank in range(self.world_size)
            ]
        return [(self.find_first_row(step, 0), self.rows)]


def split_rows(segments: list[Segment], start: int, stop: int) -> list[Segment]:
    """Positions start to stop - 1 of the concatenated segments, as segments."""
    found = []
    for low, high in segments:
        begin, end = low + max(start, 0), min(high, low + stop)
        if begin < end:
            found.append((begin, end))
        start, stop = start - (high - low), stop - (high - low)
        if stop <= 0:
            break
    return found


def merge_ranges(segments: list[Segment]) -> list[Segment]:
    """Join segments of which one ends where the next begins; drops empty ones."""
    found: list[Segment] = []
    for start, stop in segments:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        elif start < stop:
            found.append((start, stop))
    return found
