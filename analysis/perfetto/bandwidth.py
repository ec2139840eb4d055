"""Bytes per second over time, for Perfetto's counter tracks."""

import numpy as np

from analysis.trace.arguments import READ, WRITE
from analysis.trace.windows import spread_bytes

WINDOW_US = 100_000
MAX_WINDOWS = 1 << 20  # of a counter; the windows get longer instead of more
# On average over a block. Spreading a call as long as the run costs as much as the run has windows.
_WINDOWS_PER_CALL = 64
_DIRECTIONS = {"read": READ, "write": WRITE}


class BandwidthCounter:
    """Bytes per window of time; a call's bytes are spread evenly over the time that it took.

    Windows get twice as long whenever there would be more than MAX_WINDOWS of them.
    """

    def __init__(self, begin: int) -> None:
        self.begin, self.window = begin, WINDOW_US
        self.bytes = {"read": np.zeros(1024), "write": np.zeros(1024)}

    def add(self, ts: np.ndarray, dur: np.ndarray, kinds: np.ndarray, amounts: np.ndarray) -> None:
        """Count the calls of a block, in arrays of one length: ts and dur in us, kinds (READ, WRITE or
        NO_CALL), amounts in bytes.
        """
        for name in self.bytes:
            moving = (kinds == _DIRECTIONS[name]) & (amounts > 0)
            if moving.any():
                starts = np.maximum(ts[moving] - self.begin, 0)
                ends = np.maximum(ts[moving] + dur[moving] - self.begin, starts)
                most = int(ends.max())
                open_us = (ends - starts).sum(dtype=np.float64)
                most_windows = MAX_WINDOWS + _WINDOWS_PER_CALL * len(starts)
                while most // self.window + 2 > MAX_WINDOWS or open_us / self.window > most_windows:
                    self._widen()
                windows = most // self.window + 2
                if windows > len(self.bytes[name]):
                    self.bytes[name] = np.concatenate([self.bytes[name], np.zeros(2 * windows)])
                spread_bytes(starts, ends, amounts[moving], self.window, self.bytes[name])

    def _widen(self) -> None:
        """Add up pairs of windows."""
        self.window *= 2
        for name, sums in self.bytes.items():
            self.bytes[name] = sums[: len(sums) // 2 * 2].reshape(-1, 2).sum(1)

    def make_series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Times (us, int64) and bytes per second (float64), only where the rate changes."""
        rate = np.append(self.bytes[name], 0.0) * (1e6 / self.window)
        changed = np.flatnonzero(np.diff(rate, prepend=0.0))
        return self.begin + changed * self.window, rate[changed]
