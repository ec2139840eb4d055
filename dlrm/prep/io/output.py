"""Rows in their final order into the output files, whoever put them in order."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dlrm.prep.io import publish
from dlrm.prep.io.files import OffsetFile
from dlrm.prep.io.inputs import OutputDay
from dlrm.prep.job.options import MISSING, PrepOptions
from dlrm.prep.kernels.intrinsics import compiled

LOG_COUNTS = 1 << 13  # stay in the first-level cache


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
    """Rows begin .. of the whole output, into files of `folder`; the first `moved` are the shuffled ones."""
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
    """`publish.round_through_float` in place: beyond int32 a value becomes the smallest int32, as on x86."""
    for at in range(len(values)):
        number = np.float32(values[at])
        out[at] = np.int32(number) if number < np.float32(2147483648.0) else np.int32(-2147483648)


def round_in_place(sparse: np.ndarray, labels: np.ndarray, raw: bool) -> None:
    """Integers as torchrec's float32 array leaves them; raw ids have all 32 bits."""
    for array in (sparse, labels):
        flat = array.reshape(-1)
        round_values(flat.view(np.uint32) if raw and array is sparse else flat, flat)


def find_overlaps(
    outputs: list[OutputDay], begin: int, rows: int
) -> Iterator[tuple[OutputDay, int, int, int]]:
    """(output, from, to in these rows, first row in the output)."""
    start = 0
    for output in outputs:
        low, high = max(begin, start), min(begin + rows, start + output.rows)
        if low < high:
            yield output, low - begin, high - begin, low - start
        start += output.rows


@compiled
def convert_to_floats(counts, shift, gaps):
    """Counts less the shift as float32, in the same memory; of a gap what has the logarithm 0."""
    floats = counts.view(np.float32)  # here, so that the compiler knows them to be the same
    if gaps:
        for at in range(len(counts)):
            count = counts[at]
            floats[at] = np.float32(1) if count == MISSING else np.float32(np.int32(count - shift))
    else:
        for at in range(len(counts)):
            floats[at] = np.float32(np.int32(counts[at] - shift))


def take_logarithm_in_place(counts: np.ndarray, shift: np.int32, gaps: bool = False) -> np.ndarray:
    """numpy's own float32 logarithm, in place: every other one differs in the last bit of some values."""
    flat = counts.reshape(-1)
    with np.errstate(all="ignore"):
        for at in range(0, len(flat), LOG_COUNTS):
            part = flat[at : at + LOG_COUNTS]
            convert_to_floats(part, shift, gaps)
            np.log(part.view(np.float32), out=part.view(np.float32))
    return counts.view(np.float32)


def take_logarithm(dense: np.ndarray, options: PrepOptions) -> np.ndarray:
    return take_logarithm_in_place(dense, np.int32(0), bool(options.frequency_limit))
