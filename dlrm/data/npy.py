"""A folder of .npy day files: which there are, what their headers promise, and whether that agrees.

Every file is checked before the first row is read, and all bad ones are named at once. Headers are read
with the same calls as the data, so that a trace shows these bytes too.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from common.descriptors import opening
from common.errors import UserError, os_errors_as_user_errors, printable
from common.inputs import open_regular_file
from dlrm.data.criteo import (
    DAY_NUMBER,
    META,
    PARTS,
    Columns,
    DatasetMeta,
    count_days,
    join_flaws,
    name_array_file,
    refuse_without_dataset,
    split_last_day,
)
from dlrm.data.npy_header import read_npy_header

DTYPES = {"dense": ("float32",), "sparse": ("int32", "int64"), "labels": ("int32", "int64")}
ONE_DAY_HELD_OUT = 7  # a set of one file: its last seventh plays the last day, as Kaggle's seventh day does


@dataclass(frozen=True)
class NpyFile:
    path: str
    rows: int
    columns: int
    dtype: np.dtype
    offset: int  # of the first row, in bytes

    @property
    def row_bytes(self) -> int:
        return self.columns * self.dtype.itemsize


@dataclass
class NpyLayout:
    """The files of a dataset, per part and day, all checked."""

    folder: str
    parts: dict[str, list[NpyFile]]
    table_sizes: list[int] | None = None
    bytes_read: dict[str, int] = field(default_factory=dict)

    @property
    def columns(self) -> Columns:
        features = 0 if "sparse" in self.parts else sum(part.isdigit() for part in self.parts)
        return Columns(self.parts["dense"][0].columns, features or self.parts["sparse"][0].columns)

    def split_days(self, stage: str) -> list[tuple[int, range]]:
        return list_stage_rows([file.rows for file in self.parts["dense"]], stage)


def list_stage_rows(rows: list[int], stage: str) -> list[tuple[int, range]]:
    """(day, rows of it) of a stage: all days but the last train, the last one's halves val and test."""
    last = len(rows) - 1
    held_out = rows[0] // ONE_DAY_HELD_OUT if last == 0 else rows[last]
    first = rows[last] - held_out
    if stage == "train":
        return [(day, range(n)) for day, n in enumerate(rows[:last])] or [(0, range(first))]
    half = split_last_day(held_out)[stage == "test"]
    return [(last, range(first + half.start, first + half.stop))]


class CountingFile(FileIO):
    """An unbuffered regular file that counts what is read from it."""

    LARGE = 1 << 20

    def __init__(self, path: str, bytes_read: dict[str, int]) -> None:
        super().__init__(path, opener=open_regular_file)
        self.path, self.bytes_read = path, bytes_read

    def close(self) -> None:
        with opening:
            super().close()

    def readinto(self, buffer: Any) -> int:
        got = super().readinto(buffer) or 0
        self.bytes_read[self.path] = self.bytes_read.get(self.path, 0) + got
        return got

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > self.LARGE:  # read(n) takes n bytes of memory before it reads
            size = min(size, max(0, os.fstat(self.fileno()).st_size - self.tell()))
        found = super().read(-1 if size is None else size) or b""
        self.bytes_read[self.path] = self.bytes_read.get(self.path, 0) + len(found)
        return found

    def read_up_to(self, size: int) -> bytes:
        """The next bytes; fewer only at the end of the file."""
        found = b""
        while len(found) < size and (more := self.read(size - len(found))):
            found += more
        return found


def describe_array(
    file: CountingFile, at: int, size: int, dtypes: tuple[str, ...], columns: int | None, least: int = 1
) -> NpyFile:
    """The array that begins at byte `at` and has `size` bytes; ValueError says what is wrong with it.

    `columns`: how many it must have, None: at least `least`.
    """
    if not 0 <= at <= at + size <= os.fstat(file.fileno()).st_size:
        raise ValueError("is beyond the end of the file")
    file.seek(at)
    shape, dtype, length = header = read_npy_header(file.read_up_to)
    if len(shape) == 1 and columns == 1:
        shape = (shape[0], 1)
    if len(shape) != 2 or (shape[1] < least if columns is None else shape[1] != columns):
        wanted = "columns" if columns is None else columns
        raise ValueError(f"has shape {list(shape)}, expected [rows, {wanted}]")
    if dtype.name not in dtypes or not dtype.isnative:
        raise ValueError(f"holds {dtype}, expected {' or '.join(dtypes)}")
    if size != header.size:
        raise ValueError(f"has {size} bytes, but its header promises {header.size} ({shape[0]} rows)")
    return NpyFile(file.path, shape[0], shape[1], dtype, at + length)


Names = Callable[[int, str], str]
Opener = Callable[[str, str, int | None, dict[str, int]], dict[str, NpyFile]]


def open_array(path: str, part: str, columns: int | None, bytes_read: dict[str, int]) -> dict[str, NpyFile]:
    """{part: where its rows are in the file `path`}; ValueError where its header does not fit.

    part        "dense", "sparse" or "labels"
    columns     that the array must have; None: any number
    bytes_read  by path; what is read of the file is added
    """
    with CountingFile(path, bytes_read) as file:
        size = os.fstat(file.fileno()).st_size
        return {part: describe_array(file, 0, size, DTYPES[part], columns, part != "dense")}


def scan_npy(
    folder: str | os.PathLike[str],
    name: Names = name_array_file,
    opener: Opener = open_array,
) -> NpyLayout:
    """Find the days of a folder and check every file; UserError names all that are bad.

    The files have the columns that meta.json gives; without one, those of the first day.
    """
    root = Path(folder).absolute()
    meta = DatasetMeta.load(root) if os.path.lexists(root / META) else None
    days, name = find_days(root, name, meta)
    layout = NpyLayout(str(root), {}, meta.table_sizes if meta else None)
    bad: list[str] = []
    columns: dict[str, int] = meta.columns.parts if meta else {"labels": 1}
    for day in range(days):
        found: dict[str, NpyFile] = {}
        for part in PARTS:
            path = str(root / name(day, part))
            try:
                opened = opener(path, part, columns.get(part), layout.bytes_read)
                columns.setdefault(part, opened[part].columns if part in opened else len(opened))
                found.update(opened)
            except FileNotFoundError:
                dangling = " (it is a link to a file that is not there)" if os.path.islink(path) else ""
                bad.append(f"{printable(path)} is missing{dangling}")
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                bad.append(f"{printable(path)} {reason}")
        bad += find_disagreements(found, meta.rows[day] if meta else None)
        for part, file in found.items():
            layout.parts.setdefault(part, []).append(file)
    if bad:
        raise UserError(join_flaws(root, bad) + ": restore these files or make the dataset again")
    return layout


def find_days(root: Path, name: Names, meta: DatasetMeta | None) -> tuple[int, Names]:
    """How many days, and how their files are called: days by number, or Kaggle's one train file."""
    if not root.is_dir():
        raise UserError(f"{printable(root)} is not a folder: give the folder with the preprocessed day files")
    with os_errors_as_user_errors(root):
        names = set(os.listdir(root))
    patterns = [re.escape(name(0, part)).replace("day_0", f"day_{DAY_NUMBER}") for part in PARTS]
    numbers = {int(m[1]) for one in patterns for file in names if (m := re.fullmatch(one, file))}
    days = count_days(numbers, root, meta)
    if days:
        return days, name
    if find_kaggle_files(name, "dense") in names:
        return 1, lambda _day, part: find_kaggle_files(name, part)
    refuse_without_dataset(root)
    raise UserError(
        f"{printable(root)} has no files like {name(0, 'dense')}: make them with python -m dlrm.prep run"
    )


def find_kaggle_files(name: Names, part: str) -> str:
    """Kaggle's set is one file, without days."""
    return name(0, part).replace("day_0", "train", 1)


def find_disagreements(found: dict[str, NpyFile], rows: int | None) -> list[str]:
    """The parts of one day must have the same number of rows, the one that meta.json gives."""
    if rows is not None:
        return [
            f"{printable(file.path)} has {file.rows} rows, {META} says {rows}"
            for file in found.values()
            if file.rows != rows
        ]
    if len({file.rows for file in found.values()}) <= 1:
        return []
    seen = {file.path: file.rows for file in found.values()}
    return [" but ".join(f"{printable(path)} has {n} rows" for path, n in seen.items())]
