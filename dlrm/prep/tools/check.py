"""Checks that a dataset folder is what its meta.json says: shapes, dtypes, ranges, ids, md5. One line per
problem.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.errors import UserError, printable
from dlrm.data.criteo import DatasetMeta, name_array_file
from dlrm.data.npy_header import read_npy_header
from dlrm.prep.io.digests import compute_digests
from dlrm.prep.io.files import OffsetFile

PARTIAL = ".partial"
BLOCK_ROWS = 1 << 14


def check_dataset(folder: Path) -> list[str]:
    """One line for each problem; empty if the folder is complete and consistent."""
    meta = DatasetMeta.load(folder)
    flaws = [f"{path}: left by an unfinished run" for path in sorted(folder.glob(f"*{PARTIAL}"))]
    if meta.format == "npy":
        flaws += check_arrays(folder, meta)
    found = compute_digests([folder / name for name in meta.md5 if (folder / name).exists()])
    for name, wanted in meta.md5.items():
        path = folder / name
        if path not in found:
            if not any(line.startswith(f"{path}:") for line in flaws):
                flaws.append(f"{path}: missing")
        elif found[path] != wanted:
            flaws.append(f"{path}: md5 is not the one in meta.json: changed or damaged")
    return flaws


def check_arrays(folder: Path, meta: DatasetMeta) -> Iterator[str]:
    """What is wrong with shapes, types and values of the .npy files, a line each."""
    sizes = np.array(meta.table_sizes, np.int64)
    kept = meta.parameters.get("compat", "") == "" and "contiguous" in meta.parameters.get("steps", [])
    tested = "test_sparse.npy" in meta.md5  # Kaggle's test set has ids of its own
    found = list(check_layouts(folder, meta))
    whole = not any(flaw for _, _, flaw in found)
    seen: list[np.ndarray] = []
    if whole and kept and not tested:
        # The sizes in meta.json may be wrong, but there are at most as many ids as the files have rows.
        most = sum(meta.rows) + 2
        seen = [np.zeros(min(size, most), bool) for size in meta.table_sizes]
    for path, part, flaw in found:
        flaws = [flaw] if flaw else check_values(path, part, sizes, seen)
        yield from (f"{path}: {each}" for each in flaws)
    for column, ids in enumerate(seen):
        holes = np.flatnonzero(~ids[2:]) + 2
        missing = len(holes) + int(sizes[column]) - len(ids)
        if missing:
            first = holes[0] if len(holes) else len(ids)
            yield f"{folder}: column {column}: {missing} ids never occur, the first is {first}"


def check_layouts(folder: Path, meta: DatasetMeta) -> Iterator[tuple[Path, str, str]]:
    """(file, part, problem of its header or "") for each array."""
    for day, rows in enumerate(meta.rows):
        for part, columns in meta.columns.parts.items():
            path = folder / name_array_file(day, part)
            last = day == len(meta.rows) - 1
            yield path, part, check_layout(path, (rows, columns), meta, part, last)


def read_layout(path: Path, whole: bool = True) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape, dtype and header length in bytes of an .npy file. `whole`: UserError if the file is not as long
    as the header says.
    """
    with OffsetFile(path) as file:
        at = 0

        def read(count: int) -> bytes:
            nonlocal at
            at += count
            return file.read(count, at - count)

        try:
            header = read_npy_header(read)
        except ValueError as error:
            raise UserError(f"{printable(path)} {error}") from None
        if whole and file.size != header.size:
            raise UserError(
                f"{printable(path)}: {file.size} bytes, {header.size} expected: cut short or grown"
            )
    return header


def check_layout(path: Path, shape: tuple[int, int], meta: DatasetMeta, part: str, last: bool) -> str:
    """What is wrong with an array's header or size, "" if nothing.

    shape  (rows, columns) that meta.json promises
    part   "dense", "sparse" or "labels"
    last   whether it is of the last day, which is not shuffled
    """
    if not path.exists():
        return "missing"
    try:
        found, dtype, header = read_layout(path, whole=False)
    except UserError as error:
        return f"no readable header: {error}"
    wanted = np.dtype(meta.dtypes[part])
    only_copied = last or "shuffle" not in meta.parameters.get("steps", [])
    if part == "sparse" and meta.parameters.get("compat") == "torchrec" and only_copied:
        wanted = np.dtype(np.int64)
    if tuple(found) != shape:
        return f"shape {tuple(found)}, {shape} expected"
    if dtype != wanted:
        return f"{dtype} instead of {wanted}"
    size = header + shape[0] * shape[1] * dtype.itemsize
    if path.stat().st_size != size:
        return f"{path.stat().st_size} bytes, {size} expected: cut short or grown"
    return ""


def check_values(path: Path, part: str, sizes: np.ndarray, seen: list[np.ndarray]) -> Iterator[str]:
    """Problems with the values of an array. `sizes`: int64, of each table. `seen`: for each column bool
    [ids], in which the ids that occur are marked; empty if that is not checked.
    """
    shape, dtype, header = read_layout(path)
    rows, columns = shape
    low, high = np.full(columns, np.inf), np.full(columns, -np.inf)
    not_finite = 0
    with OffsetFile(path) as file:
        for row in range(0, rows, BLOCK_ROWS):
            count = min(BLOCK_ROWS, rows - row)
            block = file.read_array(count * columns, header + row * columns * dtype.itemsize, dtype)
            block = block.reshape(count, columns)
            low, high = np.minimum(low, block.min(axis=0)), np.maximum(high, block.max(axis=0))
            if part == "dense":
                not_finite += int(np.count_nonzero(~np.isfinite(block)))
            elif part == "sparse":
                for column, ids in enumerate(seen):
                    if low[column] >= 0 and high[column] < len(ids):
                        ids[block[:, column]] = True
    if not_finite:
        yield f"{not_finite} values are not finite"
    if part == "sparse":
        for column in np.flatnonzero((low < 0) | (high >= sizes)):
            span = f"ids from {low[column]:.0f} to {high[column]:.0f}"
            yield f"column {column}: {span}, its table has {sizes[column]}"
    elif part == "labels" and (low[0] < 0 or high[0] > 1):
        yield f"labels from {low[0]:.0f} to {high[0]:.0f}, 0 and 1 expected"
