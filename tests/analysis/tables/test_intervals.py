"""Stretches of time against the same with one bit per microsecond."""

import numpy as np

from analysis.tables import intervals


def bits(stretches: intervals.Stretches) -> np.ndarray:
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
        assert (bits((starts, ends)) == bits(one)).all()
        assert (bits(intervals.unite_stretches(one, two)) == (bits(one) | bits(two))).all()
        assert (bits(intervals.subtract_stretches(one, two)) == (bits(one) & ~bits(two))).all()
