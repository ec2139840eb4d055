"""Stretches of time [start, end): union and difference. Pure functions.

A set of stretches is a pair of int64 arrays (starts [n], ends [n]). The functions take any sets, and return
sets that are sorted and without overlap.
"""

import numpy as np

Stretches = tuple[np.ndarray, np.ndarray]


def merge_stretches(starts: np.ndarray, ends: np.ndarray) -> Stretches:
    """The time that at least one stretch covers; empty stretches are left out."""
    starts, ends = np.asarray(starts), np.asarray(ends)
    keep = ends > starts
    starts, ends = starts[keep], ends[keep]
    if not len(starts):
        return starts, ends
    order = np.argsort(starts, kind="stable")
    starts, reach = starts[order], np.maximum.accumulate(ends[order])
    opens = np.concatenate([[True], starts[1:] > reach[:-1]])
    return starts[opens], reach[np.concatenate([opens[1:], [True]])]


def unite_stretches(one: Stretches, two: Stretches) -> Stretches:
    """The time that is in one of two sets, or in both."""
    return merge_stretches(np.concatenate([one[0], two[0]]), np.concatenate([one[1], two[1]]))


def subtract_stretches(one: Stretches, two: Stretches) -> Stretches:
    """The time that is in `one` and not in `two`."""
    a, b = merge_stretches(*one), merge_stretches(*two)
    if not len(a[0]):
        return a
    low, high = a[0][0], a[1][-1]
    outside = (np.concatenate([[low], b[1]]), np.concatenate([b[0], [high]]))
    return _intersect_stretches(a, merge_stretches(*outside))


def _intersect_stretches(one: Stretches, two: Stretches) -> Stretches:
    """The time that is in both of two sets without overlap of their own."""
    times = np.concatenate([one[0], two[0], one[1], two[1]])
    opened = len(one[0]) + len(two[0])
    steps = np.concatenate([np.ones(opened, np.int64), -np.ones(len(times) - opened, np.int64)])
    order = np.lexsort((steps, times))  # at equal times the end comes first
    times, level = times[order], np.cumsum(steps[order])
    inside = np.flatnonzero(level[:-1] == 2)
    return merge_stretches(times[inside], times[inside + 1])
