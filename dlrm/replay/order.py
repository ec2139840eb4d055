"""What waits for what among the threads of a rank, found in its trace.

In: calls and spans of each thread with their times. Out: nodes to be played one after the other. Waiting is
not think time: a thread that waited for another one in the trace waits for it again, however long that takes.

The order that is kept, and no other is:
- a thread begins after what the rank's main thread had finished by then, and after the threads that had
  ended by then: one checkpoint is written after the other;
- a `checkpoint/wait` ends after the threads that had ended by then;
- a wait for a batch ends when the thread that read or assembled the batch is done with it;
- a reading thread is never more batches ahead than it was at most;
- the end of each `train/step` and of each evaluation is a barrier of all ranks; what they waited for each
  other before, inside of it, is not think time.
Each of these points back in the trace's time, so threads cannot wait for each other in a circle.
"""

import bisect
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from analysis.trace.classify import EVALUATION, PREPROCESS, find_kind, find_part

# Kinds of nodes. CALL: a call. BEGIN, END: of a span. COPY: from a mapped file, which a span tells. PUT: a
# batch is ready. TAKE: wait for one. LIMIT: wait until so many batches are taken. START: let a thread begin.
# JOIN: wait until a thread has ended. BARRIER: wait for all ranks.
CALL, BEGIN, END, COPY, PUT, TAKE, LIMIT, START, JOIN, BARRIER = range(10)
Thread = tuple[int, int]  # pid, tid
Timed = tuple[int, int, int, Any]  # begin, end (us), kind, payload; or begin, -duration, ...


class Node(NamedTuple):
    """payload: of CALL a call, of BEGIN, END and COPY a span, of PUT and LIMIT a number of batches, of TAKE a
    thread and how many batches it must have put, of START and JOIN a thread, of BARRIER the barrier's key.
    """

    think: int  # us
    kind: int
    payload: Any


class _Batch(NamedTuple):
    """What a thread did for one batch."""

    thread: Thread
    number: int  # how many the thread made before
    batch: int  # the batch's number, by the spans
    begin: int  # us
    end: int
    first: Any  # the span that began first
    last: Any  # the span that ended last


@dataclass
class _Deliveries:
    """Who waited for whom over batches."""

    takes: dict[tuple[Thread, int, int], _Batch]  # (thread, begin, end) of a wait -> the batch that ended it
    puts: dict[int, _Batch]  # id of the last span of a batch that some wait took -> the batch
    # id of the first span of a batch -> how many must be taken before, and when they were
    limits: dict[int, tuple[int, int]]


def order_threads(
    items: dict[Thread, list[Timed]], main: Thread, spans: dict[Thread, list[tuple[int, int, Any]]]
) -> dict[Thread, list[Node]]:
    """The nodes of each thread, of the main thread first.

    items: (begin, -duration, CALL or BEGIN, payload), sorted. spans: (begin, duration, span) of those.
    """
    begins = {thread: own[0][0] for thread, own in items.items()}
    ends = {thread: max(ts - negative for ts, negative, _, _ in own) for thread, own in items.items()}
    others = sorted((thread for thread in items if thread != main), key=lambda thread: begins[thread])
    deliveries = _match_batches(spans)
    started: dict[Thread, int] = {main: min(begins.values())}  # when (us) a thread may begin
    made = {}
    for thread in [main, *others]:
        nodes = list(_nest(items[thread], deliveries, thread))
        if thread == main:
            nodes = _insert_starts(nodes, [(begins[other], other) for other in others])
            started |= {payload: at for _, at, kind, payload in nodes if kind == START}
            nodes = list(_insert_joins(nodes, {other: ends[other] for other in others}))
        else:
            nodes = _list_joins(thread, started[thread], begins, ends, main) + nodes
        at, made[thread] = started[thread], []
        for begin, end, kind, payload in nodes:
            made[thread].append(Node(max(0, begin - at), kind, payload))
            at = max(at, end)
    return made


def take_out_waits(nodes: list[Node], waits: Mapping[tuple[Any, ...], int]) -> list[Node]:
    """The nodes without what a rank waited for others before a barrier: it waits again, at the barrier.

    waits: what names a barrier -> us that the rank waited inside the span that ends there.
    """
    made = list(nodes)
    for place, node in enumerate(nodes):
        left, at = waits.get(node.payload, 0) if node.kind == BARRIER else 0, place
        while left > 0 and at >= 0:
            if made[at].kind == BEGIN and _find_barrier(made[at].payload) == node.payload:
                break  # its think time was before the span
            taken = min(left, made[at].think)
            made[at] = made[at]._replace(think=made[at].think - taken)
            left -= taken
            at -= 1
    return made


def _insert_starts(nodes: list[Timed], starts: list[tuple[int, Thread]]) -> list[Timed]:
    """The main thread's nodes with a START for each (time, thread): after all that had ended before, and
    before what the main thread was busy with then.
    """
    latest, ends = nodes[0][0], []  # when all nodes up to this one had ended
    for _, end, _, _ in nodes:
        latest = max(latest, end)
        ends.append(latest)
    found, done = [], 0
    for time, thread in starts:
        place = bisect.bisect_left(ends, time)  # what ended at the same time may have waited for the thread
        found += nodes[done:place]
        time = min(time, nodes[place][0]) if place < len(nodes) else time
        found.append((time, time, START, thread))
        done = place
    return found + nodes[done:]


def _list_joins(
    thread: Thread, started: int, begins: dict[Thread, int], ends: dict[Thread, int], main: Thread
) -> list[Timed]:
    """A JOIN for each thread that had ended before this one began, but for what a later one of them joins."""
    ended = [each for each in ends if each not in (main, thread) and ends[each] <= begins[thread]]
    latest = max((begins[each] for each in ended), default=0)
    return [(started, max(started, ends[each]), JOIN, each) for each in ended if ends[each] > latest]


def _insert_joins(nodes: list[Timed], ends: dict[Thread, int]) -> Iterator[Timed]:
    """The main thread's nodes with a JOIN for each thread that had ended by the end of a checkpoint/wait."""
    left, latest = sorted(ends, key=lambda thread: ends[thread]), nodes[0][0]
    for node in nodes:
        _, end, kind, payload = node
        if kind == END and (payload.cat, payload.name) == ("checkpoint", "wait"):
            while left and ends[left[0]] <= end:
                yield latest, end, JOIN, left.pop(0)
                latest = end
        yield node
        latest = max(latest, end)


def _nest(items: list[Timed], deliveries: _Deliveries, thread: Thread) -> Iterator[Timed]:
    """The nodes of a thread in the order of time; a span becomes a BEGIN and an END around what is inside."""
    stack: list[tuple[int, Any]] = []  # end, span
    latest = items[0][0]

    def close(until: int | None) -> Iterator[Timed]:
        while stack and (until is None or stack[-1][0] <= until):
            end, span = stack.pop()
            yield end, end, END, span
            if id(span) in deliveries.puts:
                yield end, end, PUT, deliveries.puts[id(span)].number + 1
            if (key := _find_barrier(span)) is not None:
                yield end, end, BARRIER, key

    for ts, negative, kind, payload in items:
        yield from close(ts)
        end = ts - negative
        if kind == CALL:
            yield ts, end, CALL, payload
            latest = max(latest, end)
            continue
        if id(payload) in deliveries.limits:
            number, taken = deliveries.limits[id(payload)]
            begin = min(ts, latest)
            yield begin, max(begin, taken), LIMIT, number
        batch = deliveries.takes.get((thread, ts, end))
        if stack:
            end = min(end, stack[-1][0])
        yield ts, ts, BEGIN, payload
        latest = max(latest, ts)
        if batch is not None:
            yield ts, end, TAKE, (batch.thread, batch.number + 1)
            latest = max(latest, end)
        if payload.mapped:
            yield ts, end, COPY, payload
            latest = max(latest, end)
        stack.append((end, payload))
    yield from close(None)


def _find_barrier(span: Any) -> tuple[Any, ...] | None:
    """What names, on all ranks, the barrier at the end of a span; None where there is none."""
    if (span.cat, span.name) == ("train", "step"):
        return "step", span.args.get("epoch"), span.args.get("step"), span.args.get("batch")
    if span.name == "evaluate" and find_part(span.cat, span.name) == EVALUATION:
        return "evaluate", span.args.get("epoch"), span.args.get("step"), span.args.get("split")
    return None


def _match_batches(spans: dict[Thread, list[tuple[int, int, Any]]]) -> _Deliveries:
    """A wait was ended by the thread whose oldest batch not yet taken is the one waited for."""
    made = {thread: _list_batches(thread, own) for thread, own in spans.items()}
    waits = [
        (ts + dur, ts, thread, span.args.get("batch"))
        for thread, own in spans.items()
        for ts, dur, span in own
        if span.cat != "ssd" and find_kind(span.cat, span.name) == "wait"
    ]
    oldest = {thread: 0 for thread, batches in made.items() if batches}
    found = _Deliveries({}, {}, {})
    taken: dict[Thread, list[int]] = defaultdict(list)  # when, us, a thread's batches were taken
    for end, begin, thread, number in sorted(waits, key=lambda wait: wait[:2]):
        next_ones = [made[other][place] for other, place in oldest.items() if other != thread]
        ready = [each for each in next_ones if each.batch == number and each.end <= end]
        if not ready:
            continue
        batch = max(ready, key=lambda each: each.end)
        found.takes[thread, begin, end] = batch
        found.puts[id(batch.last)] = batch
        taken[batch.thread].append(end)
        oldest[batch.thread] += 1
        if oldest[batch.thread] == len(made[batch.thread]):
            del oldest[batch.thread]
    for thread, times in taken.items():
        found.limits |= _find_limits(made[thread], times)
    return found


def _list_batches(thread: Thread, spans: list[tuple[int, int, Any]]) -> list[_Batch]:
    """What a thread did for each batch: its reads, and the assembling that follows them."""
    made: list[_Batch] = []
    for ts, dur, span in sorted(spans, key=lambda item: item[0]):
        number = span.args.get("batch")
        if span.cat != "data" or span.name not in ("read", *PREPROCESS) or number is None:
            continue
        if not made or made[-1].batch != number:
            made.append(_Batch(thread, len(made), number, ts, ts + dur, span, span))
        elif ts + dur >= made[-1].end:
            made[-1] = made[-1]._replace(end=ts + dur, last=span)
    return made


def _find_limits(made: list[_Batch], taken: list[int]) -> dict[int, tuple[int, int]]:
    """The id of a batch's first span -> how many batches must be taken before, and when they were.

    made: a thread's batches. taken: when (us) each of the first of them was taken.
    """
    ahead = max(batch.number - bisect.bisect_right(taken, batch.begin) for batch in made)
    return {
        id(batch.first): (batch.number - ahead, taken[batch.number - ahead - 1])
        for batch in made
        if 0 < batch.number - ahead <= len(taken)
    }
