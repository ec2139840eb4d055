"""A block of scanned events -> a polars table with named columns; what has no column goes into `args`."""

from collections.abc import Sequence

import numpy as np
import polars as pl
import pyarrow as pa

from analysis.trace.scan import FLOAT, STRING, EventBlock
from analysis.trace.strings import ID, StringTable, compiled

COLUMNS = (
    "rank", "pid", "tid", "cat", "name", "ts", "dur", "file", "offset", "count", "ret", "bytes",
    "epoch", "step", "batch", "value", "split", "when", "args",
)  # fmt: skip
_WHOLE = ("offset", "count", "ret", "bytes", "epoch", "step", "batch")
_TEXT = ("split", "when")
_SOURCES = (*_WHOLE, *_TEXT, "value", "file", "fname", "fhash")  # argument columns, in the kernel's order
_PLACE = {name: place for place, name in enumerate(_SOURCES)}
_NONE = -(1 << 63)


def resolve_paths(numbers: np.ndarray, paths: dict[int, int], strings: StringTable) -> np.ndarray:
    """File hashes -> paths, all as numbers of strings; a hash without a record stays itself."""
    table = np.arange(len(strings) + 1, dtype=np.int64)
    for given, path in paths.items():
        table[given] = path
    return table[numbers]


def make_event_frame(
    block: EventBlock, strings: StringTable, paths: dict[int, int], rank: int, columns: Sequence[str]
) -> pl.DataFrame:
    """A row per event of the block, in its order, with these columns of COLUMNS.

    paths: file hash -> path, both as numbers of strings. rank: the value of the column `rank`.
    """
    keep = block.is_event()
    found = np.full((len(_SOURCES), len(block)), _NONE, np.int64)
    place = np.full(len(strings) + 1, -1, np.int64)
    for name, row in _PLACE.items():
        place[ID[name]] = row
    rest = np.zeros(len(block.arg_key), np.bool_)
    _spread_arguments(
        block.arg_begin, block.arg_key, block.arg_kind, block.arg_val, place, _PLACE["value"], found, rest
    )
    made: dict[str, pa.Array | pl.Series] = {}
    for name in dict.fromkeys(columns):
        if name == "rank":
            made[name] = _make_numbers(np.full(int(keep.sum()), rank, np.int32))
        elif name in ("pid", "tid", "ts", "dur"):
            made[name] = _make_numbers(getattr(block, name)[keep])
        elif name in ("cat", "name"):
            made[name] = _make_texts(getattr(block, name)[keep].astype(np.int64), strings)
        elif name in _WHOLE:
            values = found[_PLACE[name]][keep]
            made[name] = _make_numbers(values, missing=values == _NONE)
        elif name == "value":
            values = found[_PLACE[name]][keep]
            made[name] = _make_numbers(values.view(np.float64), missing=values == _NONE)
        elif name in _TEXT:
            made[name] = _make_texts(found[_PLACE[name]][keep], strings)
        elif name == "file":
            made[name] = _make_texts(_find_files(found, paths, strings)[keep], strings)
        elif name == "args":
            made[name] = _make_json(block, rest, keep)
        else:
            raise KeyError(f"no column {name!r} in a trace; there are {', '.join(COLUMNS)}")
    return pl.DataFrame(
        {name: pl.from_arrow(array) if isinstance(array, pa.Array) else array for name, array in made.items()}
    )


def _find_files(found: np.ndarray, paths: dict[int, int], strings: StringTable) -> np.ndarray:
    """The file of each event as the number of a string (int64 [events]), negative where it names none.

    found: values of arguments (int64 [len(_SOURCES), events]).
    """
    hashed, named, other = (found[_PLACE[name]] for name in ("fhash", "file", "fname"))
    path = np.where(hashed >= 0, resolve_paths(np.maximum(hashed, 0), paths, strings), named)
    return np.where(path < 0, other, path)


def _make_numbers(values: np.ndarray, missing: np.ndarray | None = None) -> pa.Array:
    """A column of these numbers, null where they are missing. Not by pa.array, which imports pandas first:
    that takes longer than reading a small run.
    """
    valid = None if missing is None else pa.py_buffer(np.packbits(~missing, bitorder="little"))
    data = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [valid, data])


def _make_texts(numbers: np.ndarray, strings: StringTable) -> pl.Series:
    """Numbers of strings -> a categorical column that holds only the strings in use."""
    used = np.zeros(len(strings) + 1, np.bool_)
    known = numbers >= 0
    used[numbers[known]] = True
    new = np.cumsum(used) - 1
    texts = [strings.text(int(number)) for number in np.flatnonzero(used)]
    codes = np.where(known, new[np.maximum(numbers, 0)], 0).astype(np.uint32)
    dictionary = pl.Series(texts, dtype=pl.String).to_arrow()
    series = pl.from_arrow(pa.DictionaryArray.from_arrays(_make_numbers(codes, ~known), dictionary))
    assert isinstance(series, pl.Series)
    return series.cast(pl.Categorical)


def _make_json(block: EventBlock, rest: np.ndarray, keep: np.ndarray) -> pl.Series:
    """Arguments without a column, as JSON text (null where an event has none).

    rest: which arguments those are (bool [arguments]). keep: which events get a row (bool [events]).
    """
    ends = np.zeros(len(block) + 1, np.int64)
    _find_json_ends(block.arg_begin, block.arg_text, rest, keep, ends)
    out = np.empty(max(1, int(ends[-1])), np.uint8)
    _fill_json(block.text, block.arg_begin, block.arg_text, rest, keep, ends, out)
    lengths = np.diff(ends)[keep]
    places = np.concatenate([[0], np.cumsum(lengths)])
    try:
        out.tobytes().decode()
    except UnicodeDecodeError:  # Arrow takes it for UTF-8 as it is
        out[out >= 128] = ord("?")
    array = pa.LargeStringArray.from_buffers(len(lengths), pa.py_buffer(places), pa.py_buffer(out))
    series = pl.from_arrow(array)
    assert isinstance(series, pl.Series)
    return series.set(series == "", None)


@compiled
def _spread_arguments(arg_begin, arg_key, arg_kind, arg_val, place, value_row, found, rest):
    """Arguments to columns; `rest` marks those that have none."""
    real = arg_val.view(np.float64)
    found_real = found.view(np.float64)
    for i in range(len(arg_begin) - 1):
        for j in range(arg_begin[i], arg_begin[i + 1]):
            row, kind = place[arg_key[j]], arg_kind[j]
            whole = row < value_row - 2  # the whole numbers come first, then two texts, then value
            if row < 0 or kind > STRING or (kind == STRING) != (not whole and row != value_row):
                rest[j] = True
            elif row == value_row:
                found_real[row, i] = real[j] if kind == FLOAT else arg_val[j]
            else:
                found[row, i] = np.int64(real[j]) if kind == FLOAT else arg_val[j]  # within MAX_WHOLE


@compiled
def _find_json_ends(arg_begin, arg_text, rest, keep, ends):
    """Where the JSON text of each event ends in the buffer (int64 [events + 1], the first is 0)."""
    for i in range(len(arg_begin) - 1):
        size = 0
        for j in range(arg_begin[i], arg_begin[i + 1]):
            if rest[j]:
                size += (arg_text[j] & 0xFFFFFFFF) - (arg_text[j] >> 32) + 1
        ends[i + 1] = ends[i] + (size + 1 if size and keep[i] else 0)


@compiled
def _fill_json(text, arg_begin, arg_text, rest, keep, ends, out):
    """Writes the JSON text of each event to its place in `out` (uint8)."""
    for i in range(len(arg_begin) - 1):
        if ends[i + 1] == ends[i]:
            continue
        p = ends[i]
        for j in range(arg_begin[i], arg_begin[i + 1]):
            if rest[j]:
                out[p] = 123 if p == ends[i] else 44
                p += 1
                for a in range(arg_text[j] >> 32, arg_text[j] & 0xFFFFFFFF):
                    out[p] = text[a]
                    p += 1
        out[p] = 125
