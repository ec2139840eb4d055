"""A folder of .npy day files: which there are, what their headers promise, and whether that agrees.

Every file is checked before the first row is read, and all bad ones are named at once. Headers are read
with the same calls as the data, so that a trace shows these bytes too.
"""

import ast
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dlrm.criteo import META, NUM_SPARSE, PARTS, Meta, part_name, split_last_day
from dlrm.errors import UserError

DTYPES = {"dense": ("float32",), "sparse": ("int32", "int64"), "labels": ("int32", "int64")}
MAGIC = b"\x93NUMPY"
KAGGLE = "train_{}.npy"  # Kaggle's set is one file, without days
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
class Layout:
    """The files of a dataset, per part and day, all checked."""

    folder: str
    parts: dict[str, list[NpyFile]]
    table_sizes: list[int] | None = None
    bytes_read: dict[str, int] = field(default_factory=dict)

    def days(self, stage: str) -> list[tuple[int, range]]:
        """(day, rows of it) of a stage: all days but the last train, the last one's halves val and test."""
        rows = [file.rows for file in self.parts["dense"]]
        last = len(rows) - 1
        held_out = rows[0] // ONE_DAY_HELD_OUT if last == 0 else rows[last]
        first = rows[last] - held_out
        if stage == "train":
            whole = [(day, range(n)) for day, n in enumerate(rows[:last])]
            return whole or [(0, range(first))]
        half = split_last_day(held_out)[stage == "test"]
        return [(last, range(first + half.start, first + half.stop))]


def read_exactly(file: "os.PathLike[str] | str", handle: object, size: int) -> bytes:
    buffer = bytearray(size)
    view, done = memoryview(buffer), 0
    while done < size:
        got = handle.readinto(view[done:])  # type: ignore[attr-defined]
        if not got:
            raise ValueError("ends inside its header")
        done += got
    return bytes(buffer)


def read_header(handle: object, path: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """(shape, fortran order, dtype, header's length), from the handle's position on."""
    head = read_exactly(path, handle, 10)
    if head[:6] != MAGIC:
        raise ValueError("is not an .npy file")
    size = int.from_bytes(head[8:10], "little")
    length = 10 + size
    if head[6] > 1:  # versions 2 and 3 have a length of 4 bytes
        size |= int.from_bytes(read_exactly(path, handle, 2), "little") << 16
        length = 12 + size
    if size > 1 << 16:
        raise ValueError("has a damaged header")
    try:
        text = ast.literal_eval(read_exactly(path, handle, size).decode("latin-1"))
        shape, fortran, dtype = text["shape"], text["fortran_order"], np.dtype(text["descr"])
    except (SyntaxError, KeyError, TypeError) as error:
        raise ValueError(f"has a damaged header ({error})") from None
    return tuple(int(n) for n in shape), bool(fortran), dtype, length


def open_npy(path: str, part: str, columns: int, bytes_read: dict[str, int]) -> NpyFile:
    """Check one file against its own header; ValueError says what is wrong."""
    with open(path, "rb", buffering=0) as handle:
        shape, fortran, dtype, offset = read_header(handle, path)
        size = os.fstat(handle.fileno()).st_size
    bytes_read[path] = bytes_read.get(path, 0) + offset
    if len(shape) == 1 and columns == 1:
        shape = (shape[0], 1)
    if len(shape) != 2 or shape[1] != columns:
        raise ValueError(f"has shape {list(shape)}, expected [rows, {columns}]")
    if dtype.name not in DTYPES[part] or not dtype.isnative:
        raise ValueError(f"holds {dtype}, expected {' or '.join(DTYPES[part])}")
    if fortran and min(shape) > 1:
        raise ValueError("is in Fortran order, expected C order")
    wanted = offset + shape[0] * columns * dtype.itemsize
    if size != wanted:
        raise ValueError(f"has {size} bytes, but its header promises {wanted} ({shape[0]} rows)")
    return NpyFile(path, shape[0], columns, dtype, offset)


Names = Callable[[int, str], str]
Opener = Callable[[str, str, dict[str, int]], dict[str, NpyFile]]


def open_part(path: str, part: str, bytes_read: dict[str, int]) -> dict[str, NpyFile]:
    return {part: open_npy(path, part, PARTS[part], bytes_read)}


def scan(
    folder: str | os.PathLike[str],
    name: Names = part_name,
    opener: Opener = open_part,
) -> Layout:
    """Find the days of a folder and check every file; UserError names all that are bad."""
    root = Path(folder).absolute()
    meta = Meta.load(root) if (root / META).exists() else None
    days, name = find_days(root, name, meta)
    layout = Layout(str(root), {}, meta.table_sizes if meta else None)
    bad: list[str] = []
    for day in range(days):
        found: dict[str, NpyFile] = {}
        for part in PARTS:
            path = str(root / name(day, part))
            try:
                found.update(opener(path, part, layout.bytes_read))
            except FileNotFoundError:
                bad.append(f"{path} is missing")
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                bad.append(f"{path} {reason}")
        bad += disagreements(found, meta.rows[day] if meta else None)
        for part, file in found.items():
            layout.parts.setdefault(part, []).append(file)
    if bad:
        raise UserError("; ".join(bad) + ": restore these files or make the dataset again")
    return layout


def find_days(root: Path, name: Names, meta: Meta | None) -> tuple[int, Names]:
    """How many days, and how their files are called: days by number, or Kaggle's one train file."""
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: give the folder with the preprocessed day files")
    if meta is not None:
        return meta.days, name
    names = os.listdir(root)
    pattern = [re.escape(name(0, part)).replace("day_0", r"day_(\d+)") for part in PARTS]
    numbers = [int(m.group(1)) for one in pattern for file in names if (m := re.fullmatch(one, file))]
    if not numbers and KAGGLE.format("dense") in names:
        return 1, lambda _day, part: KAGGLE.format(part)
    if not numbers:
        raise UserError(
            f"{root} has no files like {name(0, 'dense')}: make them with python -m dlrm.prep run"
        )
    return max(numbers) + 1, name


def disagreements(found: dict[str, NpyFile], rows: int | None) -> list[str]:
    """The parts of one day must have the same number of rows, the one that meta.json gives."""
    if rows is not None:
        return [
            f"{file.path} has {file.rows} rows, {META} says {rows}"
            for file in found.values()
            if file.rows != rows
        ]
    if len({file.rows for file in found.values()}) <= 1:
        return []
    seen = {file.path: file.rows for file in found.values()}
    return [" but ".join(f"{path} has {n} rows" for path, n in seen.items())]


def check_multi_hot(parts: dict[str, list[NpyFile]]) -> None:
    """A feature has the same number of ids per row on every day."""
    for feature in range(NUM_SPARSE):
        files = parts[str(feature)]
        other = next((file for file in files if file.columns != files[0].columns), None)
        if other:
            raise UserError(
                f"{other.path} has {other.columns} ids per row of feature {feature}, {files[0].path} has "
                f"{files[0].columns}: make all days with the same --multi_hot_sizes"
            )
