"""What follows from the events: the bytes each call moved, bandwidth over time, which read fed which step."""

import numpy as np
from numba import njit, types
from numba.typed import Dict

from analysis.scan import EVENT, FLOAT, INT, Block
from analysis.strings import ID, Strings

READS = ("read", "pread", "pread64", "readv", "preadv", "preadv64", "preadv2")
WRITES = ("write", "pwrite", "pwrite64", "writev", "pwritev", "pwritev64", "pwritev2")
WINDOW_US = 100_000
NO_CALL, READ, WRITE = 0, 1, 2
_CALLS = {"read": READ, "write": WRITE}


def moved(block: Block, strings: Strings) -> tuple[np.ndarray, np.ndarray]:
    """Per event: NO_CALL, READ or WRITE, and the bytes that the call moved (its return value)."""
    direction = np.zeros(len(strings) + 1, np.uint8)
    for names, value in ((READS, READ), (WRITES, WRITE)):
        for name in names:
            number = strings.add(name)
            direction = np.append(direction, np.zeros(max(0, number + 1 - len(direction)), np.uint8))
            direction[number] = value
    kinds = np.where((block.cat == ID["POSIX"]) & (block.ph == EVENT), direction[block.name], NO_CALL)
    amounts = np.maximum(argument(block, ID["ret"]), 0)
    return kinds.astype(np.uint8), np.where(kinds == NO_CALL, 0, amounts)


def argument(block: Block, key: int, missing: int = 0) -> np.ndarray:
    """One whole-number argument of every event."""
    found = np.full(len(block), missing, np.int64)
    _argument(block.arg_begin, block.arg_key, block.arg_kind, block.arg_val, key, found)
    return found


@njit(cache=True, nogil=True)
def _argument(arg_begin, arg_key, arg_kind, arg_val, key, found):
    for i in range(len(found)):
        for j in range(arg_begin[i], arg_begin[i + 1]):
            if arg_key[j] == key and arg_kind[j] == INT:
                found[i] = arg_val[j]


def values_of(block: Block, key: int) -> np.ndarray:
    """One argument of every event as a real number; nan where there is none."""
    found = np.full(len(block), np.nan)
    _real_argument(block.arg_begin, block.arg_key, block.arg_kind, block.arg_val, key, found)
    return found


@njit(cache=True, nogil=True)
def _real_argument(arg_begin, arg_key, arg_kind, arg_val, key, found):
    real = arg_val.view(np.float64)
    for i in range(len(found)):
        for j in range(arg_begin[i], arg_begin[i + 1]):
            if arg_key[j] == key and arg_kind[j] == INT:
                found[i] = arg_val[j]
            elif arg_key[j] == key and arg_kind[j] == FLOAT:
                found[i] = real[j]


class Bandwidth:
    """Bytes per window of time; a call's bytes are spread evenly over the time that it took."""

    def __init__(self, begin: int) -> None:
        self.begin = begin
        self.bytes = {"read": np.zeros(1024), "write": np.zeros(1024)}

    def add(self, ts: np.ndarray, dur: np.ndarray, kinds: np.ndarray, amounts: np.ndarray) -> None:
        for name, sums in self.bytes.items():
            mine = (kinds == _CALLS[name]) & (amounts > 0)
            if mine.any():
                windows = int((ts[mine] + dur[mine]).max() - self.begin) // WINDOW_US + 2
                if windows > len(sums):
                    sums = self.bytes[name] = np.concatenate([sums, np.zeros(2 * windows)])
                _spread(np.maximum(ts[mine] - self.begin, 0), dur[mine], amounts[mine], WINDOW_US, sums)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Times (us) and bytes per second, only where it changes."""
        rate = np.append(self.bytes[name], 0.0) * (1e6 / WINDOW_US)
        changed = np.flatnonzero(np.diff(rate, prepend=0.0))
        return self.begin + changed * WINDOW_US, rate[changed]


@njit(cache=True, nogil=True)
def _spread(ts, dur, amounts, window, sums):
    for i in range(len(ts)):
        first, last = ts[i] // window, (ts[i] + dur[i]) // window
        if first == last or dur[i] == 0:
            sums[first] += amounts[i]
            continue
        for w in range(first, last + 1):
            inside = min(ts[i] + dur[i], (w + 1) * window) - max(ts[i], w * window)
            sums[w] += amounts[i] * (inside / dur[i])


class Flows:
    """From each data/read of a batch to the train/step of the same batch, within one process.

    A batch number may come again in the next epoch: what the step has taken is gone.
    """

    def __init__(self, seed: int) -> None:
        self.waiting = Dict.empty(types.int64, types.int64)  # batch -> round << 20 | reads not yet taken
        self.seed = seed

    def of(self, block: Block) -> tuple[np.ndarray, np.ndarray]:
        """base and count for wire.events."""
        base, count = np.zeros(len(block), np.int64), np.zeros(len(block), np.int64)
        reads = (block.cat == ID["data"]) & (block.name == ID["read"])
        steps = (block.cat == ID["train"]) & (block.name == ID["step"])
        who = np.flatnonzero(reads | steps)
        if len(who):
            batch = argument(block, ID["batch"], -1)
            _flows(who, reads, batch, self.waiting, self.seed, base, count)
        return base, count


@njit(cache=True, nogil=True)
def _flows(who, reads, batch, waiting, seed, base, count):
    for i in who:
        b = batch[i]
        if b < 0:
            continue
        state = waiting.get(b, 0)
        taken, pending = state >> 20, state & 0xFFFFF
        base[i] = (np.int64(seed) << 48) ^ (b << 20) ^ (taken << 44)
        if reads[i]:
            count[i] = -1 - pending
            waiting[b] = state + 1
        else:
            count[i] = pending
            waiting[b] = (taken + 1) << 20
