"""Arguments of events as one number per event, and the bytes that each call moved."""

import numpy as np

from analysis.trace.classify import CALLS, find_operation
from analysis.trace.scan import FLOAT, INT, MAX_BYTES, EventBlock
from analysis.trace.strings import ID, StringTable, compiled

NO_CALL, READ, WRITE = 0, 1, 2  # directions
_DIRECTIONS = {"read": READ, "write": WRITE}
_NOT_THERE = -(1 << 62)  # beyond what an argument can be
# How calls of the C library's streams say what they moved; all others return it. fgetc and the like return
# the character, getw and putw the word.
_ITEMS, _CHARACTER, _WORD, _LENGTH = 1, 2, 3, 4
_STREAM_CALLS: dict[str, int] = {
    "fread": _ITEMS, "fwrite": _ITEMS, "fgetc": _CHARACTER, "getc": _CHARACTER, "fputc": _CHARACTER,
    "putc": _CHARACTER, "getw": _WORD, "putw": _WORD, "fgets": _LENGTH, "fputs": _LENGTH,
}  # fmt: skip


def count_moved_bytes(block: EventBlock, strings: StringTable) -> tuple[np.ndarray, np.ndarray]:
    """Per event: NO_CALL, READ or WRITE (uint8), and the bytes that the call moved (int64).

    A POSIX call returns its bytes; of streams see `_count_stream_bytes`. Where a trace has no return value,
    the argument `bytes` counts.
    """
    is_call = block.is_event() & np.isin(block.cat, [ID[cat] for cat in CALLS])
    used = np.zeros(len(strings) + 1, np.bool_)
    used[block.name[is_call]] = True
    direction = np.zeros(len(used), np.uint8)
    for number in np.flatnonzero(used).tolist():
        direction[number] = _DIRECTIONS.get(find_operation(strings.text(number)), NO_CALL)
    kinds = np.where(is_call, direction[block.name], NO_CALL).astype(np.uint8)
    amounts = read_argument(block, ID["ret"], _NOT_THERE)
    amounts = np.where(amounts == _NOT_THERE, read_argument(block, ID["bytes"]), amounts)
    amounts = np.clip(amounts, 0, MAX_BYTES)
    streams = np.flatnonzero((block.cat == ID["STDIO"]) & (kinds != NO_CALL))
    if len(streams):
        amounts[streams] = _count_stream_bytes(block, strings, streams, amounts[streams])
    return kinds, np.where(kinds == NO_CALL, 0, amounts)


def _count_stream_bytes(
    block: EventBlock, strings: StringTable, events: np.ndarray, returned: np.ndarray
) -> np.ndarray:
    """The bytes that these reads and writes of streams moved. returned: int64, at least 0, one per event."""
    ways = np.zeros(len(strings) + 1, np.uint8)
    for number in np.unique(block.name[events]).tolist():
        ways[number] = _STREAM_CALLS.get(strings.text(number).removesuffix("_unlocked"), 0)
    way = ways[block.name[events]]
    item = np.clip(read_argument(block, ID["size"], 1)[events], 1, MAX_BYTES)
    items = np.minimum(returned, MAX_BYTES // item) * item
    length = np.maximum(*(read_argument(block, ID[key])[events] for key in ("ret_len", "str_len")))
    moved = np.select(
        [way == _ITEMS, way == _CHARACTER, way == _WORD, way == _LENGTH],
        [items, 1, 4, np.clip(length, 0, MAX_BYTES)],
        returned,
    )
    failed = read_argument(block, ID["ret"])[events] == -1
    return np.where(failed, 0, moved)


def read_argument(block: EventBlock, key: int, missing: int = 0) -> np.ndarray:
    """One whole-number argument of every event (int64); `missing` where it has none."""
    found = np.full(len(block), missing, np.int64)
    _fill_argument(block.arg_begin, block.arg_key, block.arg_kind, block.arg_val, key, found)
    return found


def read_argument_of(block: EventBlock, events: np.ndarray, key: int) -> np.ndarray:
    """One whole-number argument of these events alone (int64); -1 where one has none."""
    found = np.full(len(events), -1, np.int64)
    _fill_argument_of(events, block.arg_begin, block.arg_key, block.arg_kind, block.arg_val, key, found)
    return found


@compiled
def _fill_argument_of(events, arg_begin, arg_key, arg_kind, arg_val, key, found):
    """Set found, int64 [len(events)], to the argument `key` of these events. The columns arg_* are those of
    an `EventBlock`.
    """
    for k in range(len(events)):
        for j in range(arg_begin[events[k]], arg_begin[events[k] + 1]):
            if arg_key[j] == key and arg_kind[j] == INT:
                found[k] = arg_val[j]


@compiled
def _fill_argument(arg_begin, arg_key, arg_kind, arg_val, key, found):
    """The same for all events of a block: found is int64 [events]."""
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
    """The same with real numbers, whose bits stand in arg_val: found is float64 [events]."""
    real = arg_val.view(np.float64)
    for i in range(len(found)):
        for j in range(arg_begin[i], arg_begin[i + 1]):
            if arg_key[j] == key and arg_kind[j] == INT:
                found[i] = arg_val[j]
            elif arg_key[j] == key and arg_kind[j] == FLOAT:
                found[i] = real[j]
