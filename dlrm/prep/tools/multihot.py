"""MLPerf DLRM v2's synthetic multi-hot data: each id becomes itself and m - 1 fixed random ids of its table.

It writes the same bytes as MLCommons' materialize_synthetic_multihot_dataset.py, but streams: the tables are
in files, and neither a large table nor a day is ever in memory as a whole.
"""

import json
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError, printable
from common.memory import format_size
from common.owned import finish_file
from dlrm.data.criteo import META, DatasetMeta, name_array_file, name_multi_hot_file
from dlrm.prep.io.files import OffsetFile, os_errors_as_user_errors, view_bytes
from dlrm.prep.io.folders import DATASET, Folders, Output, publish_results
from dlrm.prep.io.inputs import FileStamps
from dlrm.prep.io.publish import compute_md5, write_meta
from dlrm.prep.job.overlap import same_folder
from dlrm.prep.job.workers import Workers
from dlrm.prep.tools.check import read_layout
from dlrm.prep.tools.torchrec_shuffle import copy_day
from dlrm.runtime import trace

DISTRIBUTIONS = ("uniform", "pareto")
ROWS = 1 << 16  # rows of a table or of a day handled at a time
IN_MEMORY = 256 << 20  # bytes: larger tables are memory-mapped
LARGEST = {"multi_hot_sizes": 1 << 16, "num_embeddings_per_feature": (1 << 31) - 1}  # ids have 32 bits
LAYOUT = 1  # of the intermediate files


@dataclass(frozen=True)
class MultiHotOptions:
    """The options of `python -m dlrm.prep multihot`; `check_values` must be called before they are used."""

    input_dir: Path
    output_dir: Path
    sizes: tuple[int, ...]  # ids per row, per column
    tables: tuple[int, ...]  # rows of each table; ids are taken modulo these
    distribution: str = "uniform"
    copy_labels_and_dense: bool = False

    def check_values(self) -> "MultiHotOptions":
        columns = read_shape(self.input_dir, 0, "sparse")[1]
        for name, values in (("multi_hot_sizes", self.sizes), ("num_embeddings_per_feature", self.tables)):
            if len(values) != columns or min(values) < 1:
                raise UserError(f"--{name}: {columns} numbers of at least 1 are needed, got {len(values)}")
            if max(values) > LARGEST[name]:
                raise UserError(f"--{name} {max(values)}: at most {LARGEST[name]} is possible; lower it")
        if same_folder(self.input_dir, self.output_dir):
            raise UserError(
                f"--output_dir {printable(self.output_dir)}: the same as --input_dir; choose another"
            )
        return self

    def list_parameters(self) -> tuple[tuple[Any, ...], ...]:
        """Everything but the input that the output's bytes depend on."""
        return self.sizes, self.tables, (self.distribution, self.copy_labels_and_dense)


def write_multi_hot(options: MultiHotOptions, workers: Workers) -> None:
    """Make the .npz files of all days, shared among the workers, and publish them together."""
    days = list_days(options.input_dir)
    names = [name_multi_hot_file(day) for day in range(days)]
    parts = ["sparse"]
    if options.copy_labels_and_dense:
        parts = ["sparse", "dense", "labels"]
        names += [name_array_file(day, part) for day in range(days) for part in parts[1:]]
    paths = [options.input_dir / name_array_file(day, part) for day in range(days) for part in parts]
    stamps = workers.compute_on_first(lambda: FileStamps(paths))
    key = json.loads(json.dumps([LAYOUT, *map(list, options.list_parameters()), stamps.stamps]))
    with Output("multihot", options.output_dir, run_on_first=workers.run_on_first) as output:
        folders = workers.compute_on_first(lambda: output.open(key, [*names, META]))
        workers.run_on_first(lambda: check_free_space(options, folders.work))
        workers.run_on_first(lambda: make_tables(options, folders.work))
        workers.run_each(range(days), lambda day: write_day(options, folders, day))
        workers.run_on_first(lambda: publish_days(options, days, names, folders, stamps))
        workers.run_on_first(output.clear)
    if workers.first and not options.copy_labels_and_dense:
        print(
            f"{printable(options.output_dir)}: ids only; to train on this folder it also needs labels and "
            "counts: --copy_labels_and_dense"
        )


def publish_days(
    options: MultiHotOptions, days: int, names: list[str], folders: Folders, stamps: FileStamps
) -> None:
    """Give the results their names. `names`: all of them, the .npz files first."""
    last, others = names[0], r"day_\d+_sparse_multi_hot\.npz|meta\.json"
    if options.copy_labels_and_dense:  # a folder that can be read on its own
        write_meta(folders, make_meta(options, days, names, folders))
        last, others = META, DATASET
    publish_results(folders, names, last, others, stamps.refuse_changed)


def list_days(folder: Path) -> int:
    days = 0
    while (folder / name_array_file(days, "sparse")).exists():
        days += 1
    if not days:
        raise UserError(f"--input_dir {printable(folder)}: no {name_array_file(0, 'sparse')} in it")
    return days


def read_shape(folder: Path, day: int, part: str) -> tuple[int, int]:
    """Rows and columns of an array of the input; UserError if it has not two dimensions."""
    path = folder / name_array_file(day, part)
    shape = read_layout(path)[0]
    if len(shape) != 2:
        raise UserError(f"{printable(path)}: {shape}, rows and columns expected: make the dataset again")
    return shape[0], shape[1]


def check_free_space(options: MultiHotOptions, scratch: Path) -> None:
    """UserError where the files of the tables do not fit on the disk."""
    need = sum(4 * rows * hots for rows, hots in zip(options.tables, options.sizes, strict=True))
    with os_errors_as_user_errors(scratch):
        free = shutil.disk_usage(scratch).free
    if need > free:
        raise UserError(
            f"--output_dir {printable(options.output_dir)}: the tables need {format_size(need)}, "
            f"{format_size(free)} are free: free some space, or give smaller --multi_hot_sizes or tables"
        )


def make_tables(options: MultiHotOptions, scratch: Path) -> None:
    """Write a file per table: int32 [rows, ids per row], the ids that each id becomes, itself first.

    One generator draws for all tables in order, as in the reference; drawing in parts gives the same numbers.
    """
    rng = np.random.RandomState(0)
    for column, (rows, hots) in enumerate(zip(options.tables, options.sizes, strict=True)):
        with OffsetFile(scratch / f"table_{column}.i4", "w") as file:
            file.resize(0)
            at = 0
            step = max(1, ROWS // hots)
            for begin in range(0, rows, step):
                own = np.arange(begin, min(rows, begin + step))[:, None]
                others = DRAWS[options.distribution](rng, rows, (len(own), hots - 1))
                at = file.write(np.concatenate((own, others), axis=1).astype(np.int32), at)


def draw_uniform(rng: np.random.RandomState, rows: int, shape: tuple[int, int]) -> np.ndarray:
    """int [shape], ids below `rows`."""
    return rng.randint(0, rows, size=shape)


def draw_pareto(rng: np.random.RandomState, rows: int, shape: tuple[int, int]) -> np.ndarray:
    """Heavy-tailed: most numbers are small; others above int32's range become the same one, as in numpy."""
    with np.errstate(invalid="ignore"):
        return rng.pareto(a=0.25, size=shape).astype(np.int32) % rows


DRAWS = {"uniform": draw_uniform, "pareto": draw_pareto}


class IdTable:
    """A file of `make_tables`: in memory, or mapped if it is large."""

    def __init__(self, path: Path, rows: int, hots: int) -> None:
        """The file has int32 [rows, hots]: for each id of a column the ids that it becomes."""
        self.path = path
        if 4 * rows * hots > IN_MEMORY:
            self._ids: np.ndarray = np.memmap(path, np.int32, "r", shape=(rows, hots))
            return
        self._ids = np.empty((rows, hots), np.int32)
        with OffsetFile(path) as file:
            if file.read_into(view_bytes(self._ids), 0) != self._ids.nbytes:
                raise UserError(f"{printable(path)}: shorter than it should be; start again")

    def take(self, rows: np.ndarray) -> np.ndarray:
        """int32 [rows, ids per row]"""
        if not isinstance(self._ids, np.memmap):
            return self._ids.take(rows, axis=0)
        size = 4 * len(rows) * self._ids.shape[1]
        with trace.span("data", "read", file=str(self.path), bytes=size, mapped=1):  # by page faults
            return np.ascontiguousarray(self._ids[rows])


def write_day(options: MultiHotOptions, folders: Folders, day: int) -> None:
    """Write a day's .npz as np.savez would, column by column, and before it the copies of labels and counts:
    a day whose .npz exists is done.
    """
    source, target = (
        options.input_dir / name_array_file(day, "sparse"),
        folders.unfinished / name_multi_hot_file(day),
    )
    if target.exists():
        return
    if options.copy_labels_and_dense:
        for part in ("labels", "dense"):
            copy_day(
                options.input_dir / name_array_file(day, part),
                folders.unfinished / name_array_file(day, part),
            )
    shape, dtype, first = read_layout(source)
    columns = len(options.tables)
    if len(shape) != 2 or shape[1] != columns or dtype.kind != "i":
        raise UserError(f"{printable(source)}: {shape} {dtype}, integer ids in {columns} columns expected")
    partial = target.with_name(target.name + ".partial")
    with (
        os_errors_as_user_errors(partial),
        OffsetFile(source) as ids,
        zipfile.ZipFile(partial, "w", allowZip64=True) as archive,
    ):
        for column in range(columns):
            rows, hots = options.tables[column], options.sizes[column]
            table = IdTable(folders.work / f"table_{column}.i4", rows, hots)
            with archive.open(f"{column}.npy", "w", force_zip64=True) as out:
                description = {"descr": "<i4", "fortran_order": False, "shape": (shape[0], hots)}
                np.lib.format.write_array_header_1_0(out, description)
                for row in range(0, shape[0], ROWS):
                    count = min(ROWS, shape[0] - row)
                    at = first + row * columns * dtype.itemsize
                    block = ids.read_array(count * columns, at, dtype).reshape(count, columns)
                    out.write(table.take(block[:, column] % rows).data)
    finish_file(partial, target)


def make_meta(options: MultiHotOptions, days: int, names: list[str], folders: Folders) -> DatasetMeta:
    """The contents of meta.json for a folder that can be read on its own. `names`: the files to digest."""
    rows = [read_shape(options.input_dir, day, "sparse")[0] for day in range(days)]
    parameters = {"multi_hot_sizes": list(options.sizes), "distribution": options.distribution}
    if (options.input_dir / META).exists():
        parameters["made_from"] = DatasetMeta.load(options.input_dir).parameters
    return DatasetMeta(
        rows=rows,
        table_sizes=list(options.tables),
        format="multi_hot",
        parameters=parameters,
        made_by="dlrm.prep multihot",
        md5=compute_md5(folders, names),
        num_numerical=read_shape(options.input_dir, 0, "dense")[1],
        num_categorical=len(options.tables),
    )
