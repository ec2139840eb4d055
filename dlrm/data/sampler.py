"""How a sequence of rows is dealt to ranks, step by step: pure arithmetic, the same on every rank.

`by step` (the reference's order): step s takes the next batch of every rank from the front, so W ranks
with batch B see what one rank with batch W*B sees. `by rank`: every rank has one contiguous share.
Either way all ranks have the same number of steps, none of them empty, and no row is left out or given
twice: the last step is spread evenly, and what cannot make a step of its own (fewer rows than ranks)
makes the last batch of some ranks one row longer.
"""

from dataclasses import dataclass
from functools import cached_property

from dlrm.data.criteo import rows_of_rank
from dlrm.runtime.errors import UserError

Segment = tuple[int, int]


@dataclass(frozen=True)
class RowSampler:
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
    def full(self) -> int:
        """Steps in which every rank has a whole batch."""
        steps, rest = divmod(self.rows, self.batch_size * self.world_size)
        return steps - (0 < rest < self.world_size and not self.drop_last)

    @cached_property
    def steps(self) -> int:
        if self.drop_last:
            return self.full
        if not self.by_rank:
            return self.full + (self.full * self.batch_size * self.world_size < self.rows)
        shares = [len(self._share(rank)) for rank in (0, self.world_size - 1)]  # the longest, the shortest
        return min(-(-shares[0] // self.batch_size), shares[1])

    def _share(self, rank: int) -> range:
        return rows_of_rank(self.rows, rank, self.world_size)

    def begin(self, step: int, rank: int) -> int:
        """First row of a rank's batch; for step == steps, the end of its last one."""
        if self.by_rank:
            share = self._share(rank)
            if self.drop_last:
                return share.start + step * self.batch_size
            if step >= self.steps:
                return share.stop
            # each later step must keep a row
            return share.start + min(step * self.batch_size, len(share) - (self.steps - step))
        base = min(step, self.full) * self.batch_size * self.world_size
        if step < self.full:
            return base + rank * self.batch_size
        return base + rows_of_rank(self.rows - base, rank, self.world_size).start

    def batch(self, step: int, rank: int) -> Segment:
        start = self.begin(step, rank)
        if self.by_rank:
            return start, self.begin(step + 1, rank)
        if step < self.full:
            return start, start + self.batch_size
        base = self.full * self.batch_size * self.world_size
        return start, base + rows_of_rank(self.rows - base, rank, self.world_size).stop

    def ahead(self, step: int, rank: int) -> int:
        """How far a rank's next rows follow on without a gap."""
        if self.by_rank:
            return self.begin(self.steps, rank)
        if self.world_size == 1:
            return self.batch(self.steps - 1, rank)[1]
        return self.batch(step, rank)[1]

    def left(self, step: int) -> list[Segment]:
        """What no rank has been given before this step."""
        if step >= self.steps:
            return []
        if self.by_rank:
            return [(self.begin(step, rank), self._share(rank).stop) for rank in range(self.world_size)]
        return [(self.begin(step, 0), self.rows)]


def split_rows(segments: list[Segment], start: int, stop: int) -> list[Segment]:
    """Numbers [start, stop) of the joined segments, as segments."""
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
    """Join segments that follow on each other."""
    found: list[Segment] = []
    for start, stop in segments:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        elif start < stop:
            found.append((start, stop))
    return found
