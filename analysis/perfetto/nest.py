"""Slices of one track must nest: put a thread's events into the order that a track needs.

DFTracer logs an event when it ends, so children come before their parents. One pass with a stack of what has
ended and has no parent yet builds the forest; walking it gives parents first. Nothing has to be sorted, and
a parent that ends hours after its children (an epoch) needs only the stack, not the events.
What straddles another event's border is refused: the caller puts it on a lane of its own.

The compiled loops index by numbers of events and by positions on the stack, never by values of a trace: the
stack is large enough for all events of a block before they begin, and each event is walked once.
"""

import numpy as np

from analysis.trace.strings import compiled

ROOTS_KEPT = 1 << 20  # older ones melt into one: a parent that begins among those gets a lane of its own
NORMAL, LATE, REFUSED = 0, 1, 2
_BEFORE, _BEFORE_LATE = -1, -2  # stack entries from earlier blocks; of those, the late parents


class SliceLane:
    """What has ended on one lane of a track and may still get a parent."""

    def __init__(self) -> None:
        self.starts = np.empty(64, np.int64)
        self.ends = np.empty(64, np.int64)
        self.nodes = np.empty(64, np.int64)
        self.size = 0

    def nest_slices(
        self, ts: np.ndarray, dur: np.ndarray, leaf: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Numbers of the events in the order of the track; of late parents; of those that do not fit.

        leaf: events that have no children (POSIX calls). A late parent began in the microsecond of a child
        that was handed out before, with an earlier block.
        """
        n = len(ts)
        ends = ts + dur
        if n > 1 and (ends[1:] < ends[:-1]).any():  # not as it ended: merged or foreign traces
            order = np.lexsort((np.arange(n), -ts, ends))
            found = self.nest_slices(ts[order], dur[order], leaf[order])
            return order[found[0]], order[found[1]], order[found[2]]
        self._make_room(n)
        status = np.empty(n, np.uint8)
        walk = np.empty(n, np.int64)
        self.size, count = _nest_slices(
            ts, ends, leaf, self.starts, self.ends, self.nodes, self.size, status, walk
        )
        return walk[:count], np.flatnonzero(status == LATE), np.flatnonzero(status == REFUSED)

    def _make_room(self, n: int) -> None:
        """Make room on the stack for n more, and mark what is on it as of earlier blocks."""
        if self.size > ROOTS_KEPT:
            half = self.size // 2
            self.starts[1 : self.size - half + 1] = self.starts[half : self.size].copy()
            self.ends[: self.size - half + 1] = np.concatenate(
                [[self.ends[half - 1]], self.ends[half : self.size]]
            )
            self.size -= half - 1
        if self.size + n > len(self.starts):
            room = 2 * (self.size + n)
            for name in ("starts", "ends", "nodes"):
                bigger = np.empty(room, np.int64)
                bigger[: self.size] = getattr(self, name)[: self.size]
                setattr(self, name, bigger)
        late = self.nodes[: self.size] == _BEFORE_LATE
        self.nodes[: self.size] = np.where(late, _BEFORE_LATE, _BEFORE)


@compiled
def _nest_slices(ts, ends, leaf, stack_start, stack_end, stack_node, size, status, walk):
    """Builds the forest of a block's events on the stack, and fills `status` (uint8 [n]) and `walk` (int64
    [n]: the events that fit, parents first). Returns the stack's new size and how many events are in `walk`.
    """
    n = len(ts)
    child, sibling = np.full(n, -1, np.int64), np.full(n, -1, np.int64)
    for i in range(n):
        s, e = ts[i], ends[i]
        k = size - 1
        while k >= 0 and stack_start[k] >= s and stack_end[k] <= e:
            # What took no time in the microsecond in which this began: inside, as logging it takes
            # longer than that; but nothing is inside a POSIX call.
            if stack_end[k] <= s and leaf[i]:
                break
            k -= 1
        if k >= 0 and stack_end[k] > s:
            status[i] = REFUSED
            continue
        status[i] = NORMAL
        if k + 1 < size and stack_node[k + 1] < 0 and stack_start[k + 1] == s:
            if stack_node[k + 1] <= _BEFORE_LATE or (k >= 0 and stack_end[k] == s):
                status[i] = REFUSED
                continue
            status[i] = LATE
        first = -1
        for j in range(size - 1, k, -1):
            node = stack_node[j]
            if node >= 0:
                sibling[node] = first
                first = node
            elif node < _BEFORE_LATE and child[_BEFORE_LATE - 1 - node] >= 0:
                last = child[_BEFORE_LATE - 1 - node]
                head = last
                while sibling[last] >= 0:
                    last = sibling[last]
                sibling[last] = first
                first = head
        child[i] = first
        size = k + 2
        stack_start[k + 1], stack_end[k + 1], stack_node[k + 1] = s, e, i
        if status[i] == LATE:
            stack_node[k + 1] = _BEFORE_LATE - 1 - i  # its children of this block are roots of their own
    return size, _walk_preorder(child, sibling, status, stack_node, size, walk)


@compiled
def _walk_preorder(child, sibling, status, stack_node, size, walk):
    """Writes the trees that are on the stack into `walk`, parents first; returns their number of events."""
    todo = np.empty(len(child) + 1, np.int64)
    count = 0
    for j in range(size):
        node = stack_node[j]
        if node in (_BEFORE, _BEFORE_LATE):
            continue
        if node < 0:
            node = child[_BEFORE_LATE - 1 - node]
            stack_node[j] = _BEFORE_LATE
            if node < 0:
                continue
        top = 0
        todo[0] = node
        while top >= 0:
            node = todo[top]
            top -= 1
            while node >= 0:
                walk[count] = node
                count += 1
                if sibling[node] >= 0:
                    top += 1
                    todo[top] = sibling[node]
                node = child[node]
    return count
