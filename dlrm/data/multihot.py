"""Several ids per row and feature: read from `day_N_sparse_multi_hot.npz`, or made from one id by tables.

The .npz members 0.npy, 1.npy ... (int32 [rows, k]), one for each feature, are not compressed, so they are
read like .npy files at an offset. The tables are MLCommons': row i of a feature's table is i followed by
k - 1 random ids, all drawn one after the other from numpy's legacy generator with seed 0, so that every rank
and every tool has the same.
"""

import os
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from common.errors import UserError, printable
from common.memory import refuse_too_large
from dlrm.data.criteo import MOST_COLUMNS, name_array_file, name_multi_hot_file
from dlrm.data.npy import CountingFile, NpyFile, NpyLayout, describe_array, open_array, scan_npy
from dlrm.data.rows import SourceKind
from dlrm.data.stream import open_stream

DRAWS = 1 << 22  # ids drawn by one call: limits memory, the ids are the same


def scan_multi_hot_files(folder: str | os.PathLike[str]) -> NpyLayout:
    """A folder with dense and labels as .npy, sparse as .npz."""
    absent = [part for part in ("dense", "labels") if not (Path(folder) / name_array_file(0, part)).exists()]
    if absent and (Path(folder) / name_multi_hot_file(0)).exists():
        raise UserError(
            f"{printable(folder)} has multi-hot ids but no {name_array_file(0, absent[0])}: make it with "
            "python -m dlrm.prep multihot --copy_labels_and_dense, or copy the labels and counts there"
        )
    layout = scan_npy(
        folder,
        lambda d, part: name_multi_hot_file(d) if part == "sparse" else name_array_file(d, part),
        open_npz_or_npy,
    )
    for feature in range(layout.columns.categorical):
        files = layout.parts[str(feature)]
        other = next((file for file in files if file.columns != files[0].columns), None)
        if other:
            raise UserError(
                f"{printable(other.path)} has {other.columns} ids per row of feature {feature}, "
                f"{printable(files[0].path)} has "
                f"{files[0].columns}: make all days with the same --multi_hot_sizes"
            )
    return layout


def open_npz_or_npy(
    path: str, part: str, columns: int | None, bytes_read: dict[str, int]
) -> dict[str, NpyFile]:
    """The opener of `scan_npy` for folders whose ids are in .npz files; arguments as in `open_array`."""
    if part == "sparse":
        return open_npz(path, columns, bytes_read)
    return open_array(path, part, columns, bytes_read)


def open_npz(path: str, features: int | None, bytes_read: dict[str, int]) -> dict[str, NpyFile]:
    """Feature -> where its member's rows are in the file. `features`: None: as many as it has members."""
    found = {}
    with CountingFile(path, bytes_read) as file:
        size = os.fstat(file.fileno()).st_size
        members = list_members(file)
        for feature in range(features or max(1, min(len(members), MOST_COLUMNS))):
            name = f"{feature}.npy"
            if name not in members:
                raise ValueError(f"has no member {name}")
            if members[name].compress_type != zipfile.ZIP_STORED:
                raise ValueError("is compressed: save it with np.savez")
            if not 0 <= members[name].header_offset < size:
                raise ValueError(f"member {name} is beyond the end of the file")
            file.seek(members[name].header_offset)
            head = file.read_up_to(30)  # the lengths in it may differ from those in the directory
            extra = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
            at = members[name].header_offset + 30 + extra
            try:
                found[str(feature)] = describe_array(file, at, members[name].file_size, ("int32",), None)
            except ValueError as error:
                raise ValueError(f"member {name} {error}") from None
    return found


class _DirectoryFile:
    """What `zipfile` reads the list of members from: never more bytes at once than a real list may have."""

    LONGEST = 1 << 20

    def __init__(self, file: CountingFile) -> None:
        self.seek, self.tell, self._file = file.seek, file.tell, file

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > self.LONGEST:
            size = self.LONGEST + 1
        data = self._file.read_up_to(size)
        if len(data) > self.LONGEST:
            raise ValueError("its list of members is too long")
        return data

    def seekable(self) -> bool:
        return True


def list_members(file: CountingFile) -> dict[str, zipfile.ZipInfo]:
    """The list at the end of a zip file. Whatever its bytes are, ValueError is all that comes of them."""
    try:
        return {info.filename: info for info in zipfile.ZipFile(_DirectoryFile(file)).infolist()}  # type: ignore[arg-type]
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"is not an .npz file ({printable(error)[:100]})") from None
    except (OverflowError, struct.error, IndexError, OSError):
        raise ValueError("is not an .npz file (its list of members is damaged)") from None


class MultiHotMaker:
    """One id per feature -> k ids, by table. Call it with int32 [features, n]; returns an int32 array [n, k]
    of each.
    """

    def __init__(self, table_sizes: Sequence[int], ids_per_row: Sequence[int], distribution: str = "uniform"):
        """`ids_per_row`: k of each table. `distribution`: of the added ids, a key of DISTRIBUTIONS."""
        if distribution not in DISTRIBUTIONS:
            raise UserError(
                f"--multi_hot_distribution_type {distribution}: choose from {', '.join(DISTRIBUTIONS)}"
            )
        if len(ids_per_row) != len(table_sizes) or min(ids_per_row) < 1:
            raise UserError(f"--multi_hot_sizes: {len(table_sizes)} numbers of at least 1 are needed")
        if min(table_sizes) < 1:
            raise UserError("--num_embeddings_per_feature: sizes of at least 1 are needed")
        size = sum(4 * rows * count for rows, count in zip(table_sizes, ids_per_row, strict=True))
        refuse_too_large(size, "--multi_hot_sizes with tables of this length", "give smaller sizes or tables")
        state = np.random.RandomState(0)
        self.tables = [
            make_offset_table(state, size, count, DISTRIBUTIONS[distribution])
            for size, count in zip(table_sizes, ids_per_row, strict=True)
        ]

    def __call__(self, ids: np.ndarray) -> list[np.ndarray]:
        return [table.take(column, axis=0) for table, column in zip(self.tables, ids, strict=True)]


Draw = Callable[[np.random.RandomState, int, int], np.ndarray]  # (generator, table size, number of ids)


def draw_uniform(state: np.random.RandomState, size: int, count: int) -> np.ndarray:
    """int [count], ids below `size`."""
    return state.randint(0, size, count)


def draw_pareto(state: np.random.RandomState, size: int, count: int) -> np.ndarray:
    """int32 [count], ids below `size`, the low ones most often."""
    with np.errstate(invalid="ignore"):  # values beyond int32 wrap, as in the reference
        return state.pareto(0.25, count).astype(np.int32) % size


DISTRIBUTIONS: dict[str, Draw] = {"uniform": draw_uniform, "pareto": draw_pareto}


def make_offset_table(state: np.random.RandomState, size: int, count: int, draw: Draw) -> np.ndarray:
    """int32 [size, count]: row i is id i, then count - 1 random ids."""
    ids = np.empty((size, count), np.int32)
    ids[:, 0] = np.arange(size)
    if count > 1:
        step = max(1, DRAWS // (count - 1))
        for row in range(0, size, step):
            rows = min(step, size - row)
            ids[row : row + rows, 1:] = draw(state, size, rows * (count - 1)).reshape(rows, count - 1)
    return ids


MULTI_HOT = SourceKind(scan_multi_hot_files, open_stream)
