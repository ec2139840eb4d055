"""A dataset for the emulator, made on the spot: .npy files like those of the run, without their contents.

In: the run's dataset.json. Out: the files that are missing in a folder: sparse (holes, which read as zeros
and come from no device), or of random ids and numbers. A file that is there is never changed.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, os_errors_as_user_errors, printable
from common.inputs import read_json_object
from common.memory import format_size
from common.owned import write_file
from common.progress import ProgressBar
from dlrm.data.criteo import META
from dlrm.emulate.apart import print_value, run_apart

BLOCK_ROWS = 1 << 16  # that are made at once
MOST_BYTES = 1 << 50  # of all files together


def make_dataset(run: Path, folder: Path, contents: str, scale: float) -> None:
    """By a process of its own: see `make_files`."""
    run_apart("dlrm.emulate.dataset", str(run), str(folder), contents, repr(scale))


def make_files(run: Path, folder: Path, contents: str, scale: float) -> None:
    """Make the files that the run's dataset.json lists and this folder lacks.

    contents: sparse or real. scale: how many times the run's rows.
    """
    description = _scale_rows(read_description(run), scale)
    missing = {name: array for name, array in description["files"].items() if not (folder / name).exists()}
    sizes = {name: _count_bytes(*array) for name, array in missing.items()}
    with os_errors_as_user_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        free = os.statvfs(folder)
    if contents == "real" and sum(sizes.values()) > free.f_bavail * free.f_frsize:
        raise UserError(
            f"{printable(folder)}: the dataset takes {format_size(sum(sizes.values()))}, which are not free "
            "there: name another folder, or --make_data sparse"
        )
    progress = ProgressBar("data", "B", sum(sizes.values()))
    for name, (rows, columns, dtype) in missing.items():
        # all or nothing: half a file would be read as a whole one of zeros
        with (
            write_file(folder / name, lambda path: False) as partial,
            os_errors_as_user_errors(folder / name),
            open(partial, "wb") as file,
        ):
            np.lib.format.write_array_header_1_0(
                file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (rows, columns)}
            )
            if contents == "sparse":
                file.truncate(file.tell() + sizes[name])
                progress.add(sizes[name])
            else:
                for block in _make_blocks(rows, columns, dtype, description["table_sizes"]):
                    file.write(block.data)
                    progress.add(block.nbytes)
    progress.close()
    if not (folder / META).exists():
        _write_meta(folder / META, description)


def read_description(run: Path) -> dict[str, Any]:
    """dataset.json: files, name -> [rows, columns, dtype]; rows per day; table_sizes; meta_bytes."""
    path = run / "dataset.json"
    if not path.exists():
        raise UserError(
            f"{printable(path)} is missing: the run read no .npy files, or is of an earlier release, so its "
            "files cannot be made: leave out --make_data, and name a folder that has them (or python -m "
            "analysis replay, which needs the trace alone)"
        )
    values = read_json_object(path)
    try:
        total = sum(
            _count_bytes(_check_count(rows), _check_count(columns), dtype)
            for rows, columns, dtype in values["files"].values()
        )
        names = [name for name in values["files"] if Path(name).name != name or not name.endswith(".npy")]
        _check_count(values["meta_bytes"])
        counts = [*values["rows"], *values["table_sizes"]]
        widths = {columns for _, columns, dtype in values["files"].values() if dtype != "float32"}
        fits = widths <= {1, len(values["table_sizes"])}
        if names or total > MOST_BYTES or not fits or not all(_check_count(each) for each in counts):
            raise ValueError
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise UserError(f"{printable(path)}: does not describe a dataset; make it again by a run") from None
    return values


def _scale_rows(description: dict[str, Any], scale: float) -> dict[str, Any]:
    """The description of a dataset with `scale` times as many rows a day, at least one."""
    rows = [max(1, round(count * scale)) for count in description["rows"]]
    files = {
        name: [max(1, round(count * scale)), columns, dtype]
        for name, (count, columns, dtype) in description["files"].items()
    }
    if sum(_count_bytes(*array) for array in files.values()) > MOST_BYTES:
        raise UserError(f"--data_scale {scale:g}: the files would have more than {format_size(MOST_BYTES)}")
    return {**description, "rows": rows, "files": files}


def _check_count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise ValueError
    return value


def _count_bytes(rows: int, columns: int, dtype: str) -> int:
    if dtype not in ("float32", "int32", "int64"):
        raise ValueError(dtype)
    return rows * columns * np.dtype(dtype).itemsize


def _make_blocks(rows: int, columns: int, dtype: str, table_sizes: list[int]) -> Iterator[np.ndarray]:
    """Random rows: numbers of a dense file, ids of a sparse one, labels of one column."""
    draw = np.random.default_rng(0)
    for start in range(0, rows, BLOCK_ROWS):
        shape = min(BLOCK_ROWS, rows - start), columns
        if dtype == "float32":
            yield draw.random(shape, np.float32)
        else:
            highest = np.array([2] if columns == 1 != len(table_sizes) else table_sizes)
            yield draw.integers(0, highest, shape).astype(dtype)


def _write_meta(path: Path, description: dict[str, Any]) -> None:
    """As long as the run's own was: it is read whole, too."""
    values = {"version": 1, "rows": description["rows"], "table_sizes": description["table_sizes"]}
    with write_file(path, lambda path: False) as partial:
        partial.write_text(json.dumps(values).ljust(description["meta_bytes"] - 1) + "\n")


if __name__ == "__main__":
    print_value(
        lambda run, folder, contents, scale: make_files(Path(run), Path(folder), contents, float(scale))
    )
