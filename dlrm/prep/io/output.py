"""Writes rows that are in their final order to the .npy files. All engines use it, so that all write the
same.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dlrm.prep.io import publish
from dlrm.prep.io.files import OffsetFile
from dlrm.prep.io.inputs import OutputDay
from dlrm.prep.job.options import MISSING, PrepOptions
from dlrm.prep.kernels.intrinsics import compiled

LOG_COUNTS = 1 << 13  # counts converted at a time: they stay in the first-level cache


def store_rows(
    folder: Path,
    options: PrepOptions,
    outputs: list[OutputDay],
    shuffled: int,
    begin: int,
    dense: np.ndarray,
    sparse: np.ndarray,
    labels: np.ndarray,
) -> None:
    """Write rows `begin`, `begin` + 1 ... of the whole output to the files in `folder`.

    `dense`: int32 [rows, numerical], arguments of the logarithm; changed in place. `sparse`: int32 [rows,
    categorical], raw ids as their 32 bits. `labels`: int32 [rows, 1]. `shuffled`: how many rows of the whole
    output are shuffled; with --compat these are rounded as in torchrec's float32 array.
    """
    kinds = publish.list_arrays(outputs, options)
    among = max(0, min(len(labels), shuffled - begin))
    if options.compat and among:
        round_in_place(sparse[:among], labels[:among], raw=not options.contiguous)
    floats = take_logarithm(dense, options)
    for output, start, stop, at in find_overlaps(outputs, begin, len(labels)):
        for part, array in (("dense", floats), ("sparse", sparse), ("labels", labels)):
            name = f"{output.name}_{part}.npy"
            rows = array[start:stop]
            if kinds[name][1] == "<i8":
                rows = (rows if options.contiguous else rows.view(np.uint32)).astype(np.int64)
            with OffsetFile(folder / name, "w") as file:
                file.write(rows, publish.HEADER_BYTES + at * rows.itemsize * rows.shape[1])


@compiled
def round_values(values, out):
    """`publish.round_through_float` into `out`. Above int32's range a value becomes -2^31, as on x86."""
    for at in range(len(values)):
        number = np.float32(values[at])
        out[at] = np.int32(number) if number < np.float32(2147483648.0) else np.int32(-2147483648)


def round_in_place(sparse: np.ndarray, labels: np.ndarray, raw: bool) -> None:
    """Round integers to what torchrec's float32 array leaves of them. `raw`: ids are unsigned, of all 32
    bits.
    """
    for array in (sparse, labels):
        flat = array.reshape(-1)
        round_values(flat.view(np.uint32) if raw and array is sparse else flat, flat)


def find_overlaps(
    outputs: list[OutputDay], begin: int, rows: int
) -> Iterator[tuple[OutputDay, int, int, int]]:
    """The outputs that rows `begin` .. `begin` + `rows` of the whole output belong to.

    Yields (output, start, stop, at): rows[start:stop] of these rows go to row `at` of the output.
    """
    start = 0
    for output in outputs:
        low, high = max(begin, start), min(begin + rows, start + output.rows)
        if low < high:
            yield output, low - begin, high - begin, low - start
        start += output.rows


@compiled
def convert_to_floats(counts, shift, gaps):
    """Replace int32 counts by float32(count - shift) in the same memory. With `gaps`, MISSING becomes 1,
    whose logarithm is 0.
    """
    floats = counts.view(np.float32)  # made here, so that the compiler knows that it is the same memory
    if gaps:
        for at in range(len(counts)):
            count = counts[at]
            floats[at] = np.float32(1) if count == MISSING else np.float32(np.int32(count - shift))
    else:
        for at in range(len(counts)):
            floats[at] = np.float32(np.int32(counts[at] - shift))


def take_logarithm_in_place(counts: np.ndarray, shift: np.int32, gaps: bool = False) -> np.ndarray:
    """float32 log(count - shift) in the memory of int32 `counts`; returns the float32 view.

    The logarithm must be numpy's float32 one: every other differs in the last bit of some values.
    """
    flat = counts.reshape(-1)
    with np.errstate(all="ignore"):
        for at in range(0, len(flat), LOG_COUNTS):
            part = flat[at : at + LOG_COUNTS]
            convert_to_floats(part, shift, gaps)
            np.log(part.view(np.float32), out=part.view(np.float32))
    return counts.view(np.float32)


def take_logarithm(dense: np.ndarray, options: PrepOptions) -> np.ndarray:
    return take_logarithm_in_place(dense, np.int32(0), bool(options.frequency_limit))
