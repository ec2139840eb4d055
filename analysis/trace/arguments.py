"""Arguments of events as one number per event, and the bytes that each call moved."""

import numpy as np

from analysis.trace.scan import EVENT, FLOAT, INT, MAX_BYTES, EventBlock
from analysis.trace.strings import ID, StringTable, compiled

READ_CALLS = ("read", "pread", "pread64", "readv", "preadv", "preadv64", "preadv2")
WRITE_CALLS = ("write", "pwrite", "pwrite64", "writev", "pwritev", "pwritev64", "pwritev2")
NO_CALL, READ, WRITE = 0, 1, 2  # directions


def count_moved_bytes(block: EventBlock, strings: StringTable) -> tuple[np.ndarray, np.ndarray]:
    """Per event: NO_CALL, READ or WRITE (uint8), and the bytes that the call moved (int64), which is what a
    POSIX call returned.
    """
    direction = np.zeros(len(strings) + 1, np.uint8)
    for names, value in ((READ_CALLS, READ), (WRITE_CALLS, WRITE)):
        direction[[ID[name] for name in names]] = value
    kinds = np.where((block.cat == ID["POSIX"]) & (block.ph == EVENT), direction[block.name], NO_CALL)
    amounts = np.clip(read_argument(block, ID["ret"]), 0, MAX_BYTES)
    return kinds.astype(np.uint8), np.where(kinds == NO_CALL, 0, amounts)


def read_argument(block: EventBlock, key: int, missing: int = 0) -> np.ndarray:
    """One whole-number argument of every event (int64); `missing` where it has none."""
    found = np.full(len(block), missing, np.int64)
    _fill_argument(block.arg_begin, block.arg_key, block.arg_kind, block.arg_val, key, found)
    return found


@compiled
def _fill_argument(arg_begin, arg_key, arg_kind, arg_val, key, found):
    for i in range(len(found)):
        for j in range(arg_begin[i], arg_begin[i + 1]):
            if arg_key[j] == key and arg_kind[j] == INT:
                found[i] = arg_val[j]


def read_real_argument(block: EventBlock, key: int) -> np.ndarray:
    """One argument of every event as a real number (float64); nan where it has none."""
    found = np.full(len(block), np.nan)
    _fill_real_argument(block.arg_begin, block.arg_key, block.arg_kind, block.arg_val, key, found)
    return found


@compiled
def _fill_real_argument(arg_begin, arg_key, arg_kind, arg_val, key, found):
    real = arg_val.view(np.float64)
    for i in range(len(found)):
        for j in range(arg_begin[i], arg_begin[i + 1]):
            if arg_key[j] == key and arg_kind[j] == INT:
                found[i] = arg_val[j]
            elif arg_key[j] == key and arg_kind[j] == FLOAT:
                found[i] = real[j]
