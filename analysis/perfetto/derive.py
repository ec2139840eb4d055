"""What follows from the events: the bytes each call moved, bandwidth over time, which read fed which step."""

import numpy as np
from numba import types
from numba.typed import Dict

from analysis.trace.scan import EVENT, FLOAT, INT, MAX_BYTES, EventBlock
from analysis.trace.strings import ID, StringTable, compiled

READS = ("read", "pread", "pread64", "readv", "preadv", "preadv64", "preadv2")
WRITES = ("write", "pwrite", "pwrite64", "writev", "pwritev", "pwritev64", "pwritev2")
WINDOW_US = 100_000
MAX_WINDOWS = 1 << 20  # of the bandwidth; they get longer instead of more
_WINDOWS_PER_CALL = 64  # on average over a block: a call as long as the run has the work of all its windows
MAX_FLOWS = 10_000  # that end in one step
NO_CALL, READ, WRITE = 0, 1, 2
_CALLS = {"read": READ, "write": WRITE}


def bytes_moved(block: EventBlock, strings: StringTable) -> tuple[np.ndarray, np.ndarray]:
    """Per event: NO_CALL, READ or WRITE, and the bytes that the call moved (its return value)."""
    direction = np.zeros(len(strings) + 1, np.uint8)
    for names, value in ((READS, READ), (WRITES, WRITE)):
        direction[[ID[name] for name in names]] = value
    kinds = np.where((block.cat == ID["POSIX"]) & (block.ph == EVENT), direction[block.name], NO_CALL)
    amounts = np.clip(read_argument(block, ID["ret"]), 0, MAX_BYTES)
    return kinds.astype(np.uint8), np.where(kinds == NO_CALL, 0, amounts)


def read_argument(block: EventBlock, key: int, missing: int = 0) -> np.ndarray:
    """One whole-number argument of every event."""
    found = np.full(len(block), missing, np.int64)
    _argument(block.arg_begin, block.arg_key, block.arg_kind, block.arg_val, key, found)
    return found


@compiled
def _argument(arg_begin, arg_key, arg_kind, arg_val, key, found):
    for i in range(len(found)):
        for j in range(arg_begin[i], arg_begin[i + 1]):
            if arg_key[j] == key and arg_kind[j] == INT:
                found[i] = arg_val[j]


def read_real_argument(block: EventBlock, key: int) -> np.ndarray:
    """One argument of every event as a real number; nan where there is none."""
    found = np.full(len(block), np.nan)
    _real_argument(block.arg_begin, block.arg_key, block.arg_kind, block.arg_val, key, found)
    return found


@compiled
def _real_argument(arg_begin, arg_key, arg_kind, arg_val, key, found):
    real = arg_val.view(np.float64)
    for i in range(len(found)):
        for j in range(arg_begin[i], arg_begin[i + 1]):
            if arg_key[j] == key and arg_kind[j] == INT:
                found[i] = arg_val[j]
            elif arg_key[j] == key and arg_kind[j] == FLOAT:
                found[i] = real[j]


class BandwidthCounter:
    """Bytes per window of time; a call's bytes are spread evenly over the time that it took.

    Windows get twice as long whenever there would be more than MAX_WINDOWS of them.
    """

    def __init__(self, begin: int) -> None:
        self.begin, self.window = begin, WINDOW_US
        self.bytes = {"read": np.zeros(1024), "write": np.zeros(1024)}

    def add(self, ts: np.ndarray, dur: np.ndarray, kinds: np.ndarray, amounts: np.ndarray) -> None:
        for name in self.bytes:
            mine = (kinds == _CALLS[name]) & (amounts > 0)
            if mine.any():
                starts = np.maximum(ts[mine] - self.begin, 0)
                ends = np.maximum(ts[mine] + dur[mine] - self.begin, starts)
                most = int(ends.max())
                while most // self.window + 2 > MAX_WINDOWS or (ends - starts).sum(
                    dtype=np.float64
                ) / self.window > MAX_WINDOWS + _WINDOWS_PER_CALL * len(starts):
                    self._widen()
                windows = most // self.window + 2
                if windows > len(self.bytes[name]):
                    self.bytes[name] = np.concatenate([self.bytes[name], np.zeros(2 * windows)])
                _spread(starts, ends, amounts[mine], self.window, self.bytes[name])

    def _widen(self) -> None:
        """Pairs of windows become one."""
        self.window *= 2
        for name, sums in self.bytes.items():
            self.bytes[name] = sums[: len(sums) // 2 * 2].reshape(-1, 2).sum(1)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Times (us) and bytes per second, only where it changes."""
        rate = np.append(self.bytes[name], 0.0) * (1e6 / self.window)
        changed = np.flatnonzero(np.diff(rate, prepend=0.0))
        return self.begin + changed * self.window, rate[changed]


@compiled
def _spread(starts, ends, amounts, window, sums):
    """0 <= starts <= ends, and sums has a window for the latest end: `Bandwidth.add` sees to both."""
    for i in range(len(starts)):
        a, b = starts[i], ends[i]
        first, last = a // window, b // window
        if first == last:
            sums[first] += amounts[i]
            continue
        for w in range(first, last + 1):
            inside = min(b, (w + 1) * window) - max(a, w * window)
            sums[w] += amounts[i] * (inside / (b - a))


class ReadToStepFlows:
    """From each data/read of a batch to the train/step of the same batch, within one process.

    A batch number may come again in the next epoch: what the step has taken is gone.
    """

    def __init__(self, seed: int) -> None:
        self.waiting = Dict.empty(types.int64, types.int64)  # batch -> round << 20 | reads not yet taken
        self.seed = seed

    def of(self, block: EventBlock) -> tuple[np.ndarray, np.ndarray]:
        """base and count for wire.events."""
        base, count = np.zeros(len(block), np.int64), np.zeros(len(block), np.int64)
        reads = (block.cat == ID["data"]) & (block.name == ID["read"])
        steps = (block.cat == ID["train"]) & (block.name == ID["step"])
        who = np.flatnonzero(reads | steps)
        if len(who):
            batch = read_argument(block, ID["batch"], -1)
            _flows(who, reads, batch, self.waiting, self.seed, base, count)
        return base, count


@compiled
def _flows(who, reads, batch, waiting, seed, base, count):
    for i in who:
        b = batch[i]
        if b < 0:
            continue
        state = waiting.get(b, 0)
        taken, pending = state >> 20, state & 0xFFFFF
        base[i] = (np.int64(seed) << 48) ^ (b << 20) ^ (taken << 44)
        if reads[i]:
            if pending < MAX_FLOWS:
                count[i] = -1 - pending
                waiting[b] = state + 1
        else:
            count[i] = min(pending, MAX_FLOWS)
            waiting[b] = (taken + 1) << 20
