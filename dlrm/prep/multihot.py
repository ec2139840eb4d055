"""MLPerf DLRM v2's synthetic multi-hot data: each id becomes itself and m - 1 fixed random ids of its table.

Byte for byte what MLCommons' materialisation writes, but streamed: tables lie in files when they are large,
and no day is ever whole in memory.
"""

import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlrm.criteo import META, NUM_SPARSE, Meta, multi_hot_name, part_name
from dlrm.errors import UserError
from dlrm.prep.check import layout
from dlrm.prep.files import File, explained
from dlrm.prep.publish import md5_of, unpublish
from dlrm.prep.team import Team

DISTRIBUTIONS = ("uniform", "pareto")
ROWS = 1 << 16  # at a time, of a table and of a day
IN_MEMORY = 256 << 20  # bytes of one table


@dataclass(frozen=True)
class MultiHot:
    input_dir: Path
    output_dir: Path
    sizes: tuple[int, ...]  # ids per row, per column
    tables: tuple[int, ...]  # rows of each table; ids are taken modulo these
    distribution: str = "uniform"
    copy_labels_and_dense: bool = False

    def checked(self) -> "MultiHot":
        for name, values in (("multi_hot_sizes", self.sizes), ("num_embeddings_per_feature", self.tables)):
            if len(values) != NUM_SPARSE or min(values) < 1:
                raise UserError(f"--{name}: {NUM_SPARSE} numbers of at least 1 are needed, got {len(values)}")
        if self.input_dir.resolve() == self.output_dir.resolve():
            raise UserError(f"--output_dir {self.output_dir}: the same as --input_dir; choose another")
        return self


def run(options: MultiHot, team: Team) -> None:
    days = days_in(options.input_dir)
    scratch = options.output_dir / "multihot.tmp"

    def prepare() -> None:
        with explained(options.output_dir):
            scratch.mkdir(parents=True, exist_ok=True)
        unpublish(options.output_dir)
        make_tables(options, scratch)

    team.first_does(prepare)
    team.each(range(days), lambda day: write_day(options, scratch, day))
    team.first_does(lambda: describe(options, days))
    team.first_does(lambda: shutil.rmtree(scratch))


def days_in(folder: Path) -> int:
    days = 0
    while (folder / part_name(days, "sparse")).exists():
        days += 1
    if not days:
        raise UserError(f"--input_dir {folder}: no {part_name(0, 'sparse')} in it")
    return days


def make_tables(options: MultiHot, scratch: Path) -> None:
    """One generator for all tables in their order; drawing in stretches gives the same numbers."""
    rng = np.random.RandomState(0)
    for column, (rows, hots) in enumerate(zip(options.tables, options.sizes, strict=True)):
        with File(scratch / f"table_{column}.i4", "w") as file:
            file.resize(0)
            at = 0
            step = max(1, ROWS // hots)
            for begin in range(0, rows, step):
                own = np.arange(begin, min(rows, begin + step))[:, None]
                others = DRAWS[options.distribution](rng, rows, (len(own), hots - 1))
                at = file.write(np.concatenate((own, others), axis=1).astype(np.int32), at)


def uniform(rng: np.random.RandomState, rows: int, shape: tuple[int, int]) -> np.ndarray:
    return rng.randint(0, rows, size=shape)


def pareto(rng: np.random.RandomState, rows: int, shape: tuple[int, int]) -> np.ndarray:
    """Heavy-tailed: most draws are small, and those beyond int32 all become the same."""
    with np.errstate(invalid="ignore"):
        return rng.pareto(a=0.25, size=shape).astype(np.int32) % rows


DRAWS = {"uniform": uniform, "pareto": pareto}


def write_day(options: MultiHot, scratch: Path, day: int) -> None:
    """The .npz that np.savez would write, one column after the other."""
    source, target = options.input_dir / part_name(day, "sparse"), options.output_dir / multi_hot_name(day)
    shape, dtype, first = layout(source)
    if len(shape) != 2 or shape[1] != NUM_SPARSE or dtype.kind != "i":
        raise UserError(f"{source}: {shape} {dtype}, integer ids in {NUM_SPARSE} columns expected")
    if target.exists():
        return
    partial = target.with_name(target.name + ".partial")
    with explained(partial), File(source) as ids, zipfile.ZipFile(partial, "w", allowZip64=True) as archive:
        for column in range(NUM_SPARSE):
            rows, hots = options.tables[column], options.sizes[column]
            path = scratch / f"table_{column}.i4"
            table = np.memmap(path, np.int32, "r", shape=(rows, hots))
            if table.nbytes <= IN_MEMORY:
                table = np.array(table)
            with archive.open(f"{column}.npy", "w", force_zip64=True) as out:
                description = {"descr": "<i4", "fortran_order": False, "shape": (shape[0], hots)}
                np.lib.format.write_array_header_1_0(out, description)
                for row in range(0, shape[0], ROWS):
                    count = min(ROWS, shape[0] - row)
                    at = first + row * NUM_SPARSE * dtype.itemsize
                    block = ids.read_array(count * NUM_SPARSE, at, dtype).reshape(count, NUM_SPARSE)
                    out.write(np.ascontiguousarray(table[block[:, column] % rows]).data)
    if options.copy_labels_and_dense:
        for part in ("labels", "dense"):
            with explained(options.input_dir / part_name(day, part)):
                shutil.copyfile(
                    options.input_dir / part_name(day, part), options.output_dir / part_name(day, part)
                )
    partial.rename(target)


def describe(options: MultiHot, days: int) -> None:
    """meta.json, where the folder can be read on its own."""
    if not options.copy_labels_and_dense:
        return
    rows = [layout(options.input_dir / part_name(day, "sparse"))[0][0] for day in range(days)]
    names = [multi_hot_name(day) for day in range(days)]
    names += [part_name(day, part) for day in range(days) for part in ("dense", "labels")]
    parameters = {"multi_hot_sizes": list(options.sizes), "distribution": options.distribution}
    if (options.input_dir / META).exists():
        parameters["made_from"] = Meta.load(options.input_dir).parameters
    meta = Meta(
        rows=rows,
        table_sizes=list(options.tables),
        format="multi_hot",
        parameters=parameters,
        made_by="dlrm.prep multihot",
        md5=md5_of(options.output_dir, names),
    )
    meta.save(options.output_dir)
