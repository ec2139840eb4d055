"""Stretches of time [start, end) as numpy arrays: union, intersection, difference, total. Pure functions.

A set of stretches is a pair of arrays (starts, ends). What `union` returns is sorted and without overlap;
the other functions take any sets and return such.
"""

import numpy as np

Stretches = tuple[np.ndarray, np.ndarray]


def union(starts: np.ndarray, ends: np.ndarray) -> Stretches:
    starts, ends = np.asarray(starts), np.asarray(ends)
    keep = ends > starts
    starts, ends = starts[keep], ends[keep]
    if not len(starts):
        return starts, ends
    order = np.argsort(starts, kind="stable")
    starts, reach = starts[order], np.maximum.accumulate(ends[order])
    opens = np.concatenate([[True], starts[1:] > reach[:-1]])
    return starts[opens], reach[np.concatenate([opens[1:], [True]])]


def total(starts: np.ndarray, ends: np.ndarray) -> int | float:
    a, b = union(starts, ends)
    return (b - a).sum().item()


def intersection(one: Stretches, two: Stretches) -> Stretches:
    return _find_overlap(union(*one), union(*two), 2)


def difference(one: Stretches, two: Stretches) -> Stretches:
    """What of `one` is not in `two`."""
    a, b = union(*one), union(*two)
    if not len(a[0]):
        return a
    low, high = a[0][0], a[1][-1]
    outside = (np.concatenate([[low], b[1]]), np.concatenate([b[0], [high]]))
    return _find_overlap(a, union(*outside), 2)


def _find_overlap(one: Stretches, two: Stretches, depth: int) -> Stretches:
    """Where `depth` of two sets without overlap of their own are open at once."""
    times = np.concatenate([one[0], two[0], one[1], two[1]])
    opened = len(one[0]) + len(two[0])
    steps = np.concatenate([np.ones(opened, np.int64), -np.ones(len(times) - opened, np.int64)])
    order = np.lexsort((steps, times))  # at equal times the end comes first
    times, level = times[order], np.cumsum(steps[order])
    inside = np.flatnonzero(level[:-1] == depth)
    return union(times[inside], times[inside + 1])
