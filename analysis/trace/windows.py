"""Bytes of calls over time: each call's bytes, spread evenly over the windows of time that it was open in."""

import numpy as np

from analysis.trace.strings import compiled


def spread_bytes(
    starts: np.ndarray, ends: np.ndarray, amounts: np.ndarray, window: int, sums: np.ndarray
) -> None:
    """Add to sums[w] (float64 [windows]) the bytes moved from w * window to (w + 1) * window.

    starts, ends, amounts: int64 [n], start <= end; times count from the begin of the first window. What is
    before the first window or after the last one counts there.
    """
    _spread_bytes(starts, ends, amounts, window, sums)


@compiled
def _spread_bytes(starts, ends, amounts, window, sums):
    """Add each call's bytes to the windows of time that it lies in, by its share in each.

    starts, ends: us from the first window, int64 [calls]. amounts: bytes [calls]. window: us. sums: float64
    [windows], changed.
    """
    most = len(sums) - 1
    for i in range(len(starts)):
        a, b = starts[i], ends[i]
        first = min(max(a // window, 0), most)
        last = min(max(b // window, first), most)
        if first == last:
            sums[first] += amounts[i]
            continue
        for w in range(first, last + 1):
            low = a if w == first else w * window
            high = b if w == last else (w + 1) * window
            sums[w] += amounts[i] * ((high - low) / (b - a))
