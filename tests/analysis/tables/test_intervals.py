"""Stretches of time against the same with one bit per microsecond."""

import numpy as np

from analysis.tables import intervals


def mark_covered(stretches: intervals.Stretches) -> np.ndarray:
    found = np.zeros(100, np.bool_)
    for start, end in zip(*stretches, strict=True):
        found[start:end] = True
    return found


def test_against_bits() -> None:
    rng = np.random.default_rng(0)

    def some() -> intervals.Stretches:
        starts = rng.integers(0, 60, rng.integers(0, 9))
        return starts, starts + rng.integers(0, 9, len(starts))

    for _ in range(300):
        one, two = some(), some()
        starts, ends = intervals.merge_stretches(*one)
        assert (starts[1:] > ends[:-1]).all()
        assert (mark_covered((starts, ends)) == mark_covered(one)).all()
        assert (
            mark_covered(intervals.unite_stretches(one, two)) == (mark_covered(one) | mark_covered(two))
        ).all()
        assert (
            mark_covered(intervals.subtract_stretches(one, two)) == (mark_covered(one) & ~mark_covered(two))
        ).all()
