"""Slices in nesting order: random forests, in blocks of any size, with and without what cannot nest."""

import random

import numpy as np
import pytest

from analysis.perfetto.nest import SliceLane

Event = tuple[int, int, bool]  # ts, end, leaf


def forest(rng: random.Random, begin: int, end: int, depth: int) -> list[Event]:
    """Nested events in the order in which they end."""
    found: list[Event] = []
    at = begin
    while at < end:
        at += rng.randrange(0, 4)
        stop = min(end, at + rng.randrange(0, max(1, (end - begin) // 2)))
        if at > stop:
            break
        inside = forest(rng, at, stop, depth - 1) if depth and stop > at and rng.random() < 0.7 else []
        found += [*inside, (at, stop, False)]
        at = stop + (stop == at)
    return found


def as_tracks(events: list[Event], block: int) -> list[list[tuple[int, int]]]:
    """Each lane's slices in the order in which the trace processor meets them: by time, then as written."""
    lanes: list[SliceLane] = []
    written: list[list[tuple[float, int, int, int]]] = []
    for start in range(0, len(events), block):
        part = events[start : start + block]
        level = 0
        while part:
            if level == len(lanes):
                lanes.append(SliceLane())
                written.append([])
            ts = np.array([e[0] for e in part])
            dur = np.array([e[1] - e[0] for e in part])
            order, late, refused = lanes[level].nest_slices(ts, dur, np.array([e[2] for e in part]))
            assert sorted([*order, *late, *refused]) == list(range(len(part)))
            for i in late:
                written[level].append((part[i][0] - 0.001, len(written[level]), part[i][0], part[i][1]))
            for i in order:
                written[level].append((part[i][0], len(written[level]), part[i][0], part[i][1]))
            part = [part[i] for i in refused]
            level += 1
    return [[(ts, end) for _, _, ts, end in sorted(lane)] for lane in written]


def assert_nested(track: list[tuple[int, int]]) -> None:
    stack: list[int] = []
    for ts, end in track:
        while stack and stack[-1] <= ts:
            stack.pop()
        assert not stack or end <= stack[-1], (ts, end, stack)
        stack.append(end)


@pytest.mark.parametrize("block", [1, 3, 50, 100_000])
def test_forests_need_one_lane(block: int) -> None:
    rng = random.Random(block)
    moved = total = 0
    for _ in range(60):
        events = forest(rng, 0, 400, 5)
        tracks = as_tracks(events, block)
        for track in tracks:
            assert_nested(track)
        assert sorted(e for track in tracks for e in track) == sorted((a, b) for a, b, _ in events)
        total += len(events)
        moved += sum(len(track) for track in tracks[1:])
    # moved: parents that begin in the microsecond of a child of an earlier block, and where a neighbour ends
    assert moved == 0 if block > 1000 else moved < 0.1 * total


@pytest.mark.parametrize("block", [1, 7, 100_000])
def test_nothing_is_lost_when_nothing_nests(block: int) -> None:
    rng = random.Random(1)
    events = [
        (a, a + rng.randrange(0, 60), rng.random() < 0.5) for a in (rng.randrange(500) for _ in range(400))
    ]
    tracks = as_tracks(events, block)
    for track in tracks:
        assert_nested(track)
    assert sorted(e for track in tracks for e in track) == sorted((a, b) for a, b, _ in events)
    assert len(tracks) > 1


def test_parents_come_first_whatever_takes_no_time() -> None:
    lane = SliceLane()
    # a call in the microsecond in which its span begins, and the span; then two calls in one microsecond
    ts, dur = np.array([10, 10, 30, 30]), np.array([0, 5, 0, 2])
    order, late, refused = lane.nest_slices(ts, dur, np.array([True, False, True, True]))
    assert order.tolist() == [1, 0, 2, 3] and not len(late) and not len(refused)


def test_a_late_parent_of_many_blocks() -> None:
    lane = SliceLane()
    for begin in range(0, 100_000, 10):
        lane.nest_slices(np.array([begin]), np.array([10]), np.array([False]))
    order, late, refused = lane.nest_slices(np.array([5_0000]), np.array([50_000]), np.array([False]))
    assert (len(order), len(late), len(refused)) == (0, 0, 1)  # began where a neighbour ended: ambiguous
    order, late, refused = lane.nest_slices(np.array([0]), np.array([100_000]), np.array([False]))
    assert (len(order), late.tolist(), len(refused)) == (0, [0], 0)
    assert lane.size == 1
